"""NeMo-Aligner's reward server: KServe's protocol v2 over HTTP, as PyTriton's client speaks it to the model `reward_model`.

    inputs   sentences, BYTES [batch, 1]: whole texts
    outputs  rewards, FP32 [batch, 1]

Tensors stand in the JSON or, with `binary_data_size`, behind it in one body; so does the reply's when it is asked for in binary. PyTriton's
client first asks whether server and model are ready and what the model takes: those paths are answered too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from math import prod
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field

from rayward.errors import RaywardError, RuleError
from rayward.wire.dialect import JSON, Answered, Body, Call, Route
from rayward.wire.dialects.reading import Form, Peer, check_characters, request_id_of, text_items
from rayward.wire.dialects.replies import OPENAI_STATUSES, body, flat_rewards, float32_bytes, message_of
from rayward.wire.rules import Limits, body_too_large, decode, has_escapes

MODEL = "reward_model"
"""The name in all of NeMo-Aligner's configurations."""
LENGTH_HEADER = "Inference-Header-Content-Length"


class Tensor(Peer):
    """An input: its data, or the number of its bytes behind the JSON."""

    name: str
    datatype: str
    shape: list[Annotated[int, Field(ge=0, le=2**31)]]
    data: list[Any] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Wanted(Peer):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequest(Peer):
    """The JSON of a request."""

    inputs: list[Tensor]
    id: str | None = None
    outputs: list[Wanted] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    def in_binary(self) -> bool:
        """Whether the rewards are asked for behind the JSON; refuses outputs that there are not."""
        for wanted in self.outputs or ():
            if wanted.name != "rewards":
                raise RuleError("wrong_type", f"outputs: {wanted.name[:40]!r} is not given; the rule is rewards", remedy="ask for rewards")
        default = bool(self.parameters.get("binary_data_output", False))
        return any(bool(wanted.parameters.get("binary_data", default)) for wanted in self.outputs) if self.outputs else default


FORM = Form(InferRequest)


def parse_infer(request: bytes, limits: Limits) -> Call:
    """Sentences as whole texts."""
    if len(request) > limits.max_body_bytes:
        body_too_large(len(request), limits)
    header, binary = _split(request)
    raw = decode(header)
    if not isinstance(raw, dict):
        raise RuleError("wrong_type", "the body is no JSON object", remedy="send one JSON object, and binary tensors behind it")
    if has_escapes(header):
        check_characters(raw)
    asked = FORM.read_value(raw)
    in_binary = asked.in_binary()
    sentences = _sentences(asked.inputs, binary, limits)
    items = text_items(sentences, limits, "sentences")
    return Call(items, lambda answered: _rewards(answered, asked.id, in_binary), request_id=request_id_of(asked.id or None, "id"))


def _split(request: bytes) -> tuple[bytes, bytes]:
    # The JSON ends where its object does, whatever the header with its length says. One character is one byte here.
    try:
        _, end = json.JSONDecoder().raw_decode(request.decode("latin-1"))
    except (ValueError, RecursionError):
        return request, b""  # `decode` says what is wrong
    return request[:end], request[end:]


def _sentences(inputs: Sequence[Tensor], binary: bytes, limits: Limits) -> list[str]:
    start, found = 0, None
    for tensor in inputs:
        size = tensor.parameters.get("binary_data_size")
        if size is not None and (type(size) is not int or not 0 <= size <= len(binary) - start):
            _refuse(f"input {tensor.name[:40]!r} says {str(size)[:20]} bytes; {len(binary) - start} stand behind the JSON", "send them all")
        part = None if size is None else binary[start : start + size]
        start += size or 0
        if tensor.name in ("tokens", "sequence_lengths"):
            _refuse(f"input {tensor.name!r}: token ids are not scored here; the contract tokenizes", "send sentences", "unsupported_option")
        if tensor.name != "sentences" or tensor.datatype != "BYTES":
            _refuse(f"input {tensor.name[:40]!r} of type {tensor.datatype[:20]!r}; the rule is sentences of type BYTES", "send sentences")
        found = _texts(tensor, part, limits)
    if start != len(binary.strip(b" \t\r\n")) and start != len(binary):
        _refuse(f"{len(binary) - start} bytes behind the JSON belong to no input", "give binary_data_size for each input in binary")
    if found is None:
        _refuse("inputs holds no sentences", "send sentences", "missing_field")
    return found


def _texts(tensor: Tensor, part: bytes | None, limits: Limits) -> list[str]:
    number = prod(tensor.shape)
    if not tensor.shape or len(tensor.shape) > 2 or number != tensor.shape[0]:
        _refuse(f"sentences has shape {tensor.shape[:8]}; the rule is [batch, 1]", "send one sentence a row")
    if number > limits.max_items:
        _refuse(f"sentences has {number} texts; the limit is {limits.max_items}", "split them over several requests", "too_many_items")
    if part is not None:
        texts = _strings(part)
    else:
        rows = tensor.data or []
        texts = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
    if len(texts) != number or not all(isinstance(text, str) for text in texts):
        _refuse(f"sentences has {len(texts)} elements for shape {tensor.shape}; the rule is as many texts", "send them all")
    if part is not None:
        check_characters(texts)
    return texts


def _strings(part: bytes) -> list[str]:
    # Each is its length as a little-endian uint32, and its UTF-8.
    texts, at = [], 0
    while at < len(part):
        (size,) = struct.unpack_from("<I", part, at) if at + 4 <= len(part) else (-1,)
        if size < 0 or at + 4 + size > len(part):
            _refuse("sentences in binary end in the middle of one", "send each as its length in 4 bytes and its UTF-8")
        try:
            texts.append(part[at + 4 : at + 4 + size].decode("utf-8"))
        except UnicodeDecodeError:
            _refuse("sentences hold bytes that are no UTF-8", "encode them as UTF-8", "invalid_json")
        at += 4 + size
    return texts


def _refuse(problem: str, remedy: str, code: str = "wrong_type") -> NoReturn:
    raise RuleError(code, problem, remedy=remedy)


def _rewards(answered: Answered, request_id: str | None, in_binary: bool) -> Body:
    rewards = flat_rewards(answered)
    output: dict[str, Any] = {"name": "rewards", "datatype": "FP32", "shape": [len(rewards), 1]}
    reply: dict[str, Any] = {"model_name": MODEL, "model_version": "1", "outputs": [output]}
    if request_id:
        reply["id"] = request_id
    if not in_binary:
        output["data"] = rewards
        return body(reply, answered)
    data = float32_bytes(rewards, "little")
    output["parameters"] = {"binary_data_size": len(data)}
    header = json.dumps(reply).encode()
    return body(header + data, answered, headers={LENGTH_HEADER: str(len(header))}, media_type="application/octet-stream")


def error_body(status: int, error: RaywardError, code: str) -> JSON:
    """Triton's error: a text."""
    return {"error": f"{message_of(error)} [{code}]"}


_INPUTS = (("sentences", "BYTES", "TYPE_STRING"),)
METADATA: JSON = {
    "name": MODEL,
    "versions": ["1"],
    "platform": "rayward",
    "inputs": [{"name": name, "datatype": kind, "shape": [-1, 1]} for name, kind, _ in _INPUTS],
    "outputs": [{"name": "rewards", "datatype": "FP32", "shape": [-1, 1]}],
}
CONFIG: JSON = {
    "name": MODEL,
    "platform": "",
    "backend": "rayward",
    # A number of rows that PyTriton's client takes for "batches"; the limit of a request is ours.
    "max_batch_size": 9_999_999,
    "input": [{"name": name, "data_type": kind, "dims": ["1"]} for name, _, kind in _INPUTS],
    "output": [{"name": "rewards", "data_type": "TYPE_FP32", "dims": ["1"]}],
}
_OBJECT: JSON = {"type": "object"}


def _constant(content: JSON) -> Callable[[bytes, Limits], Call]:
    return lambda request, limits: Call((), lambda answered: Body(content))


def _probe(path: str, summary: str, content: JSON, asks: Literal["ready", "alive"]) -> Route:
    return Route(
        path=path,
        dialect="triton",
        summary=summary,
        parse=_constant(content),
        error=error_body,
        request=_OBJECT,
        reply=_OBJECT,
        methods=("GET",),
        asks=asks,
    )


ROUTES = (
    Route(
        path=f"/v2/models/{MODEL}/infer",
        dialect="triton",
        summary="Rewards as NeMo-Aligner's reward server gives them",
        parse=parse_infer,
        error=error_body,
        request=FORM.schema(),
        reply={"type": "object", "required": ["model_name", "outputs"]},
        statuses=OPENAI_STATUSES,
        media_types=("application/json", "application/octet-stream"),
    ),
    _probe("/v2", "What this server is", {"name": "rayward", "version": "1", "extensions": ["binary_tensor_data"]}, "alive"),
    _probe("/v2/health/live", "Whether the server lives", {}, "alive"),
    _probe("/v2/health/ready", "Whether the server can score", {}, "ready"),
    _probe(f"/v2/models/{MODEL}", "What the model takes and gives", METADATA, "alive"),
    _probe(f"/v2/models/{MODEL}/ready", "Whether the model can score", {}, "ready"),
    _probe(f"/v2/models/{MODEL}/config", "What the model takes and gives, as PyTriton's client reads it", CONFIG, "alive"),
)
