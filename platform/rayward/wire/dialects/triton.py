"""NeMo-Aligner's reward server: KServe's protocol v2 over HTTP, as PyTriton's client speaks it to the model `reward_model`.

    inputs   sentences, BYTES [batch, 1]: whole texts; or
             tokens, INT64 [batch, length], and sequence_lengths, INT64 [batch, 1]: as many ids of each row
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
from rayward.wire.dialects.reading import Form, Peer, check_characters, id_items, request_id_of, text_items
from rayward.wire.dialects.replies import OPENAI_STATUSES, body, flat_rewards, float32_bytes, message_of
from rayward.wire.items import ScoreItem
from rayward.wire.rules import Limits, body_too_large, decode, has_escapes

MODEL = "reward_model"
"""The name in all of NeMo-Aligner's configurations."""
LENGTH_HEADER = "Inference-Header-Content-Length"


class Tensor(Peer):
    """An input: its data, or the number of its bytes behind the JSON."""

    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=2, fail_fast=True)]
    data: list[Any] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Wanted(Peer):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferRequest(Peer):
    """The JSON of a request."""

    inputs: Annotated[list[Tensor], Field(fail_fast=True)]
    id: str | None = None
    outputs: Annotated[list[Wanted], Field(fail_fast=True)] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    def in_binary(self) -> bool:
        """Whether the rewards are asked for behind the JSON; refuses outputs that there are not."""
        for wanted in self.outputs or ():
            if wanted.name != "rewards":
                raise RuleError("wrong_type", f"outputs: {wanted.name[:40]!r} is not given; the rule is rewards", remedy="ask for rewards")
        default = bool(self.parameters.get("binary_data_output", False))
        return any(bool(wanted.parameters.get("binary_data", default)) for wanted in self.outputs) if self.outputs else default


FORM = Form(InferRequest)
INPUTS = (
    ("sentences", "BYTES", "TYPE_STRING", [-1]),
    ("tokens", "INT64", "TYPE_INT64", [-1]),
    ("sequence_lengths", "INT64", "TYPE_INT64", [-1]),
)
"""Name, type in requests, type in the model's configuration, shape without the batch."""


def parse_infer(request: bytes, limits: Limits) -> Call:
    """Sentences as whole texts, or rows of token ids."""
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
    items = _items(_tensors(asked.inputs, binary), limits)
    return Call(items, lambda answered: _rewards(answered, asked.id, in_binary), request_id=request_id_of(asked.id or None, "id"))


def _split(request: bytes) -> tuple[bytes, bytes]:
    # The JSON ends where its object does, whatever the header with its length says. One character is one byte here.
    try:
        _, end = json.JSONDecoder().raw_decode(request.decode("latin-1"))
    except (ValueError, RecursionError):
        return request, b""  # `decode` says what is wrong
    return request[:end], request[end:]


def _tensors(inputs: Sequence[Tensor], binary: bytes) -> dict[str, tuple[Tensor, bytes | None]]:
    # Each input with its part of what stands behind the JSON.
    start, found = 0, {}
    for tensor in inputs:
        kind = next((kind for name, kind, _, _ in INPUTS if name == tensor.name), None)
        if kind != tensor.datatype or tensor.name in found:
            rule = ", ".join(f"{name} of type {kind}" for name, kind, _, _ in INPUTS)
            _refuse(f"input {tensor.name[:40]!r} of type {tensor.datatype[:20]!r}; the rule is {rule}, each once", "send sentences")
        size = tensor.parameters.get("binary_data_size")
        if size is not None and (type(size) is not int or not 0 <= size <= len(binary) - start):
            _refuse(f"input {tensor.name!r} says {str(size)[:20]} bytes; {len(binary) - start} stand behind the JSON", "send them all")
        found[tensor.name] = (tensor, None if size is None else binary[start : start + size])
        start += size or 0
    if binary[start:].strip(b" \t\r\n"):
        _refuse(f"{len(binary) - start} bytes behind the JSON belong to no input", "give binary_data_size for each input in binary")
    return found


def _items(tensors: dict[str, tuple[Tensor, bytes | None]], limits: Limits) -> tuple[ScoreItem, ...]:
    if set(tensors) == {"sentences"}:
        return text_items(_texts(*tensors["sentences"], limits), limits, "sentences")
    if set(tensors) != {"tokens", "sequence_lengths"}:
        names = ", ".join(sorted(tensors)) or "none"
        _refuse(f"inputs are {names}; the rule is sentences, or tokens and sequence_lengths", "send sentences", "missing_field")
    tokens, lengths = tensors["tokens"], tensors["sequence_lengths"]
    shape, count = tokens[0].shape, lengths[0].shape
    if len(shape) != 2 or prod(count) != shape[0] or count[0] != shape[0]:
        _refuse(f"tokens has shape {shape} and sequence_lengths {count}; the rule is [batch, length] and [batch, 1]", "send both so")
    width, flat, used = shape[1], _integers(*tokens), _integers(*lengths)
    if any(not 0 < length <= width for length in used):
        _refuse(f"sequence_lengths has a length outside 1 to {width}", "send the number of ids in each row")
    return id_items([flat[row * width : row * width + length] for row, length in enumerate(used)], limits, "tokens")


def _integers(tensor: Tensor, part: bytes | None) -> list[int]:
    number = prod(tensor.shape)
    if part is not None:
        if len(part) != 8 * number:
            _refuse(f"{tensor.name} has {len(part)} bytes for shape {tensor.shape}; the rule is 8 for each", "send them all")
        return list(struct.unpack(f"<{number}q", part))
    flat = [value for row in tensor.data or () for value in (row if isinstance(row, list) else [row])]
    if len(flat) != number or not all(type(value) is int for value in flat):
        _refuse(f"{tensor.name} has {len(flat)} elements for shape {tensor.shape}; the rule is as many integers", "send them all")
    return flat


def _texts(tensor: Tensor, part: bytes | None, limits: Limits) -> list[str]:
    number = prod(tensor.shape)
    if number != tensor.shape[0]:
        _refuse(f"sentences has shape {tensor.shape}; the rule is [batch, 1]", "send one sentence a row")
    if number > limits.max_items:
        _refuse(f"sentences has {number} texts; the limit is {limits.max_items}", "split them over several requests", "too_many_items")
    if part is not None:
        texts = _strings(part)
        check_characters(texts)
    else:
        texts = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in tensor.data or ()]
    if len(texts) != number or not all(isinstance(text, str) for text in texts):
        _refuse(f"sentences has {len(texts)} elements for shape {tensor.shape}; the rule is as many texts", "send them all")
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


METADATA: JSON = {
    "name": MODEL,
    "versions": ["1"],
    "platform": "rayward",
    "inputs": [{"name": name, "datatype": kind, "shape": [-1, *shape]} for name, kind, _, shape in INPUTS],
    "outputs": [{"name": "rewards", "datatype": "FP32", "shape": [-1, 1]}],
}
CONFIG: JSON = {
    "name": MODEL,
    "platform": "",
    "backend": "rayward",
    # A number of rows that PyTriton's client takes for "batches"; the limit of a request is ours.
    "max_batch_size": 9_999_999,
    "input": [{"name": name, "data_type": kind, "dims": list(map(str, shape)), "optional": True} for name, _, kind, shape in INPUTS],
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
