"""Requests as tritonclient writes them for PyTriton's client in NeMo-Aligner, and the reading of its replies."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from tests.helpers.dialects import LIMITS, Scored, answered, as_reply, parsed, refusal, route_of

from rayward.errors import UnavailableError
from rayward.wire.dialect import Body

PATH = "/v2/models/reward_model/infer"
TEXTS = ["<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHällo\n", "b"]


def in_json(texts: list[str], **more: Any) -> dict[str, Any]:
    """A request whose tensor stands in the JSON."""
    return {"inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [len(texts), 1], "data": texts}], **more}


def in_binary(texts: list[str], *, outputs: Any = None, size: int | None = None) -> bytes:
    """A request whose tensor stands behind the JSON, as tritonclient sends arrays."""
    data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
    header: dict[str, Any] = {
        "inputs": [
            {
                "name": "sentences",
                "shape": [len(texts), 1],
                "datatype": "BYTES",
                "parameters": {"binary_data_size": len(data) if size is None else size},
            }
        ]
    }
    if outputs is None:
        header["parameters"] = {"binary_data_output": True}
    else:
        header["outputs"] = outputs
    return json.dumps(header).encode() + data


def read_by_client(body: Body) -> list[float]:
    """The array that `InferResult.as_numpy("rewards")` gives."""
    if isinstance(body.content, bytes):
        length = int(body.headers["Inference-Header-Content-Length"])
        header, data = json.loads(body.content[:length]), body.content[length:]
    else:
        header, data = body.content, b""
    (output,) = header["outputs"]
    assert (output["name"], output["datatype"]) == ("rewards", "FP32")
    size = output.get("parameters", {}).get("binary_data_size")
    values = list(output["data"]) if size is None else list(struct.unpack(f"<{size // 4}f", data[:size]))
    assert output["shape"] == [len(values), 1]
    return values


def test_pytritons_client_sends_and_asks_for_binary() -> None:
    request = in_binary(TEXTS)
    assert [item.completions for item in parsed(PATH, request).items] == [(text,) for text in TEXTS]
    assert read_by_client(answered(PATH, request, Scored([1.25, -0.5]))) == [1.25, -0.5]


def test_outputs_may_be_named_one_by_one() -> None:
    wanted = [{"name": "rewards", "parameters": {"binary_data": True}}]
    assert read_by_client(answered(PATH, in_binary(TEXTS, outputs=wanted), Scored([1.25, -0.5]))) == [1.25, -0.5]
    plain = answered(PATH, in_binary(TEXTS, outputs=[{"name": "rewards"}]), Scored([1.25, -0.5]))
    assert not isinstance(plain.content, bytes)
    assert read_by_client(plain) == [1.25, -0.5]


def test_tensors_in_json() -> None:
    body = answered(PATH, in_json(TEXTS, id="mine"), Scored([1.25, -0.5]))
    assert read_by_client(body) == [1.25, -0.5]
    assert not isinstance(body.content, bytes)
    assert (body.content["id"], body.content["model_name"], body.content["model_version"]) == ("mine", "reward_model", "1")
    nested = {"inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [2, 1], "data": [["a"], ["b"]]}]}
    assert [item.completions for item in parsed(PATH, nested).items] == [("a",), ("b",)]
    assert "application/octet-stream" in route_of(PATH).media_types


def tokens(rows: list[list[int]], lengths: list[Any], shape: list[int] | None = None) -> dict[str, Any]:
    """What NeMo-Aligner's PPO actor sends: padded ids and how many of each row count."""
    given = {"name": "tokens", "datatype": "INT64", "shape": shape or [len(rows), len(rows[0])], "data": rows}
    return {"inputs": [given, {"name": "sequence_lengths", "datatype": "INT64", "shape": [len(lengths), 1], "data": lengths}]}


def test_ppo_actor_sends_padded_token_ids() -> None:
    request = tokens([[5, 6, 7], [8, 0, 0]], [3, 1])
    assert [item.token_ids for item in parsed(PATH, request).items] == [(5, 6, 7), (8,)]
    parts = [struct.pack("<6q", 5, 6, 7, 8, 0, 0), struct.pack("<2q", 3, 1)]
    for given, part in zip(request["inputs"], parts, strict=True):
        given["parameters"] = {"binary_data_size": len(part)}
        del given["data"]
    assert [item.token_ids for item in parsed(PATH, json.dumps(request).encode() + b"".join(parts)).items] == [(5, 6, 7), (8,)]


def tensor(**fields: Any) -> dict[str, Any]:
    """A request of one input."""
    return {"inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [1, 1], "data": ["a"], **fields}]}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (tensor(name="tokens", datatype="INT64", data=[1]), "inputs are tokens"),
        (tokens([[1, 2]], [3]), "outside 1 to 2"),
        (tokens([[1, 2]], [0]), "outside 1 to 2"),
        (tokens([[1, -2]], [2]), "no token id"),
        (tokens([[1, 2]], [2], shape=[1, 3]), "2 elements for shape [1, 3]"),
        (tokens([[1, 2]], [2], shape=[2, 1]), "tokens has shape [2, 1] and sequence_lengths [1, 1]"),
        (tokens([[1, 2]], [2.0]), "1 elements"),
        ({"inputs": tokens([[1]], [1])["inputs"] * 2}, "each once"),
        (tensor(name="texts"), "'texts'"),
        (tensor(datatype="FP32"), "FP32"),
        (tensor(shape=[2, 1]), "1 elements for shape [2, 1]"),
        (tensor(shape=[1, 2]), "shape [1, 2]"),
        (tensor(shape=[]), "at least 1 item"),
        (tensor(shape=[2**31] * 5_000), "at most 2 items"),
        (tensor(shape=[0, 1], data=[]), "sentences is empty"),
        (tensor(shape=[-1, 1]), "shape"),
        (tensor(data=[3]), "sentences has"),
        (tensor(parameters={"binary_data_size": 5}), "0 stand behind the JSON"),
        (tensor(parameters={"binary_data_size": -5}), "stand behind the JSON"),
        (tensor(parameters={"binary_data_size": "x"}), "stand behind the JSON"),
        ({"inputs": []}, "inputs are none"),
        (in_json(["a"], outputs=[{"name": "values"}]), "'values'"),
        (in_json(["a\x00"]), "NUL"),
        (in_binary(["ab"], size=3)[:-3], "in the middle"),
        (in_binary(["a"]) + b"more", "belong to no input"),
        (in_binary(["a\x00b"]), "NUL"),
        (in_binary(["a"]).replace(b"\x01\x00\x00\x00a", b"\x01\x00\x00\x00\xff"), "no UTF-8"),
        (b"[1]", "no JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 50_000, "not JSON"),
    ],
)
def test_bad_tensors_are_refused_with_tritons_error(body: Any, named: str) -> None:
    status, error = refusal(PATH, body)
    assert status == 400
    assert error.keys() == {"error"}
    assert named in error["error"]


def test_sizes_are_bounded() -> None:
    assert refusal(PATH, in_json(["a"] * 51))[0] == 413
    assert refusal(PATH, b" " * (LIMITS.max_body_bytes + 1))[0] == 413


@pytest.mark.parametrize(
    ("path", "asks"),
    [
        ("/v2", "alive"),
        ("/v2/health/live", "alive"),
        ("/v2/health/ready", "ready"),
        ("/v2/models/reward_model", "alive"),
        ("/v2/models/reward_model/ready", "ready"),
        ("/v2/models/reward_model/config", "alive"),
    ],
)
def test_client_asks_what_there_is_before_it_infers(path: str, asks: str) -> None:
    route = route_of(path, b"", "GET")
    call = route.parse(b"", LIMITS)
    assert (route.asks, call.items) == (asks, ())
    assert isinstance(call.render(Scored([]).of(call)).content, dict)


def test_config_is_what_pytritons_parser_needs() -> None:
    route = route_of("/v2/models/reward_model/config", b"", "GET")
    call = route.parse(b"", LIMITS)
    config = call.render(Scored([]).of(call)).content
    assert not isinstance(config, bytes)
    assert config["max_batch_size"] > 0, "else the client refuses infer_batch"
    assert [(each["name"], each["data_type"], each["optional"]) for each in config["input"]] == [
        ("sentences", "TYPE_STRING", True),
        ("tokens", "TYPE_INT64", True),
        ("sequence_lengths", "TYPE_INT64", True),
    ]
    assert [(each["name"], each["data_type"], each["dims"]) for each in config["output"]] == [("rewards", "TYPE_FP32", ["1"])]


def test_unavailable_is_said_in_tritons_shape() -> None:
    status, error = as_reply(route_of("/v2/health/ready", b"", "GET"), UnavailableError("none is up", remedy="retry"), 503, "unavailable")
    assert (status, list(error)) == (503, ["error"])
