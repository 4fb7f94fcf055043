"""What the dialects have in common when they reply: rewards in order, usage, encodings, and the header that says how texts were taken."""

from __future__ import annotations

import base64
import math
import struct
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from rayward.errors import RaywardError
from rayward.wire.dialect import JSON, Answered, Body, ItemFailedError, rewards_of
from rayward.wire.items import ItemError

TEXT_HEADER = "x-rayward-text"
"""What became of the texts of a request: `templated`, `rendered` or `as_given`; with their numbers where they differ."""

Endianness: TypeAlias = Literal["native", "big", "little"]

OPENAI_STATUSES: Mapping[int, int] = {422: 400}
"""Of servers that answer 400 to whatever is wrong with a request."""
ENGINE_STATUSES: Mapping[int, int] = {**OPENAI_STATUSES, 429: 503}
"""Of inference engines: verl, which calls them, gives up at any 4xx, and tries again after a 503."""
_OPENAI_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "BadRequestError",
    415: "BadRequestError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


def flat_rewards(answered: Answered) -> list[float]:
    """Every reward of every item, in order.

    Raises:
        ItemFailedError: an item has none.
    """
    return [reward for rewards in rewards_of(answered.results) for reward in rewards]


def body(content: JSON | bytes, answered: Answered, *, headers: Mapping[str, str] | None = None, media_type: str | None = None) -> Body:
    """A reply with the header that says how the texts were taken."""
    own = {TEXT_HEADER: taken_as(answered), **(headers or {})}
    return Body(content, own) if media_type is None else Body(content, own, media_type)


def taken_as(answered: Answered) -> str:
    """How the texts were taken, with numbers where they differ."""
    counts = Counter(result.taken_as for result in answered.results)
    if len(counts) <= 1:
        return next(iter(counts), "templated")
    return ", ".join(f"{name}={counts[name]}" for name in sorted(counts))


def num_tokens(answered: Answered) -> list[int]:
    """Tokens of every completion's conversation, in the order of the rewards."""
    found: list[int] = []
    for result in answered.results:
        found += result.num_tokens or [result.tokens // max(1, len(result.rewards or ())) for _ in result.rewards or ()]
    return found


def usage(answered: Answered) -> dict[str, Any]:
    """OpenAI's usage; tokens that a prompt shared with others stand as cached ones."""
    computed = sum(result.tokens_computed for result in answered.results)
    return {
        "prompt_tokens": answered.tokens,
        "total_tokens": answered.tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": max(0, answered.tokens - computed)},
    }


def sigmoid(value: float) -> float:
    """1 / (1 + e^-value), for any finite value."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    grown = math.exp(value)
    return grown / (1.0 + grown)


def label(answered: Answered) -> str:
    """What a reward is called where schemas want a label: the name of the only output, or `reward`."""
    return answered.outputs[0] if len(answered.outputs) == 1 else "reward"


def output_names(answered: Answered, number: int) -> Sequence[str]:
    """Names of the values of a model with several outputs."""
    return answered.outputs if len(answered.outputs) == number else tuple(f"output_{index}" for index in range(number))


def float32_bytes(values: Sequence[float], endianness: Endianness = "native") -> bytes:
    """The values as float32.

    Raises:
        ItemFailedError: one is beyond float32.
    """
    order = sys.byteorder if endianness == "native" else endianness
    try:
        return struct.pack(f"{'<' if order == 'little' else '>'}{len(values)}f", *values)
    except OverflowError as exc:
        raise ItemFailedError(ItemError.of("non_finite", "a reward is beyond float32"), item=0) from exc


def float32_base64(values: Sequence[float], endianness: Endianness = "native") -> str:
    """The values as float32 in base64, as OpenAI's clients decode them."""
    return base64.b64encode(float32_bytes(values, endianness)).decode("ascii")


def ranked(rewards: Sequence[float], top_n: int = 0) -> list[int]:
    """Indices from the highest reward down, equal ones in their order; the first `top_n`, or all for 0."""
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    return order[:top_n] if top_n else order


def message_of(error: RaywardError) -> str:
    """Problem and remedy on one line."""
    return f"{error.problem}; {error.remedy}".replace("\n", " ")


def openai_error(status: int, error: RaywardError, code: str, *, statuses: Mapping[int, int] = OPENAI_STATUSES) -> JSON:
    """The shape of OpenAI's, vLLM's and infinity's errors, which repeat the status; our own code ends the message."""
    status = statuses.get(status, status)
    kind = _OPENAI_TYPES.get(status, "InternalServerError")
    return {"error": {"message": f"{message_of(error)} [{code}]", "type": kind, "param": None, "code": status}}


def detail_error(status: int, error: RaywardError, code: str) -> JSON:
    """The shape of servers that are FastAPI as it comes."""
    return {"detail": f"{message_of(error)} [{code}]"}
