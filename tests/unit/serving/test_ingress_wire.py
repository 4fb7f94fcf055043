"""The service behind a real HTTP server on a loopback socket: what bytes on the wire do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from tests.helpers.backends import FakeBackends

from rayward.config.scoring import ScoringConfig
from rayward.serving.auth import Keys
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.mounts import all_routes

BODY = json.dumps({"items": [{"prompt": "Hi", "completions": ["abc"]}]}).encode()
HEAD = b"POST /v1/score HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
Work = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def on_the_wire(work: Work, backends: FakeBackends | None = None, config: ScoringConfig | None = None) -> None:
    async def run() -> None:
        app = build_http(Front(backends or FakeBackends(), routes=all_routes()), config or ScoringConfig(), Keys())
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.wait_for(work(reader, writer), 60)
        finally:
            writer.close()
            server.should_exit = True
            await serving

    asyncio.run(run())


async def reply(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    return int(lines[0].split()[1]), headers, await reader.readexactly(int(headers.get("content-length", "0")))


def test_expect_100_continue_is_answered_before_the_body_comes() -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY))
        assert (await reply(reader))[0] == 100
        writer.write(BODY)
        assert (await reply(reader))[0] == 200

    on_the_wire(work)


def test_a_body_that_would_be_refused_is_not_asked_for() -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % 10**9)
        assert (await reply(reader))[0] == 413

    on_the_wire(work)


def test_a_body_in_chunks() -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for start in range(0, len(BODY), 7):
            part = BODY[start : start + 7]
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        assert (await reply(reader))[0] == 200

    on_the_wire(work)


def test_a_body_that_drips_is_given_up_and_others_are_served_meanwhile() -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"content-length: 1000000\r\n\r\n{")
        host, port = writer.get_extra_info("peername")[:2]
        other_reader, other = await asyncio.open_connection(host, port)
        other.write(HEAD + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY))
        assert (await reply(other_reader))[0] == 200
        other.close()
        status, _, body = await reply(reader)
        assert (status, json.loads(body)["error"]["code"]) == (408, "body_timeout")

    on_the_wire(work, config=ScoringConfig(body_timeout_s=0.2))


def test_head_has_no_body() -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for path in (b"/livez", b"/readyz", b"/health"):
            writer.write(b"HEAD " + path + b" HTTP/1.1\r\nhost: test\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
        writer.write(b"GET /livez HTTP/1.1\r\nhost: test\r\n\r\n")
        assert (await reply(reader))[2] == b'{"status":"ok"}'

    on_the_wire(work)


def test_a_client_that_hangs_up_ends_its_work() -> None:
    backends = FakeBackends()

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backends.release = asyncio.Event()
        writer.write(HEAD + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY))
        while not backends.calls:
            await asyncio.sleep(0)
        writer.close()
        while not backends.num_cancelled:
            await asyncio.sleep(0)

    on_the_wire(work, backends)
    assert backends.num_cancelled == 1


@pytest.mark.parametrize(
    "lines",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"content-length: -1\r\n\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["length and chunks", "negative length", "two lengths", "no chunk"],
)
def test_a_request_that_is_not_http_ends_in_400(lines: bytes) -> None:
    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + lines)
        writer.write_eof()
        head = await reader.readline()
        assert head.startswith(b"HTTP/1.1 4"), head

    on_the_wire(work)


def test_a_large_body_does_not_keep_health_waiting() -> None:
    completions = ["x" * 100] * 200
    large = json.dumps({"items": [{"prompt": "Hi", "completions": completions}] * 300}).encode()

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = writer.get_extra_info("peername")[:2]
        other_reader, other = await asyncio.open_connection(host, port)
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(large) + large)
        await writer.drain()
        num_answers = 0
        answered = asyncio.ensure_future(reply(reader))
        while not answered.done():
            other.write(b"GET /livez HTTP/1.1\r\nhost: test\r\n\r\n")
            assert (await reply(other_reader))[0] == 200
            num_answers += 1
        other.close()
        assert (await answered)[0] == 200
        assert num_answers > 3

    on_the_wire(work)
