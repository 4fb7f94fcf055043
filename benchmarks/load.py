"""Load on a server: always so many requests in flight, or requests that come when they come; and what their times come to."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx


async def closed_loop(jobs: Sequence[Any], send: Callable[[Any], Awaitable[Any]], in_flight: int, warm_up: int) -> dict[str, Any]:
    """Send all jobs, always `in_flight` at a time.

    `seconds` is from the answer that ends the warm-up to the last one: as many answers come in that time as are counted, where from the
    sending of a request on those of the requests before it would come too.
    """
    answers: list[Any] = [None] * len(jobs)
    latencies: list[float] = []
    pending = iter(range(len(jobs)))
    num_answered, begun = 0, time.perf_counter()

    async def caller() -> None:
        nonlocal num_answered, begun
        for index in pending:
            start = time.perf_counter()
            answers[index] = await send(jobs[index])
            num_answered += 1
            if num_answered == warm_up:
                begun = time.perf_counter()
            elif num_answered > warm_up:
                latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(caller() for _ in range(in_flight)))
    return {"seconds": time.perf_counter() - begun, "latencies": latencies, "answers": answers}


async def over_http(
    url: str, path: str, bodies: Sequence[dict[str, Any]], in_flight: int, warm_up: int, read: Callable[[Any], Any]
) -> dict[str, Any]:
    """The closed loop over HTTP with kept connections."""
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=limits) as client:

        async def send(body: dict[str, Any]) -> Any:
            response = await client.post(path, json=body)
            response.raise_for_status()
            return read(response.json())

        return await closed_loop(bodies, send, in_flight, warm_up)


async def open_loop(url: str, bodies: Sequence[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Requests that come when they come, `rate` a second on average (exponential gaps): latencies."""
    gaps = random.Random(0)
    latencies: list[float] = [0.0] * len(bodies)
    arrivals: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=httpx.Limits(max_connections=256)) as client:

        async def send(index: int) -> None:
            (await client.post("/v1/score", json=bodies[index])).raise_for_status()
            latencies[index] = time.perf_counter() - arrivals[index]

        async with asyncio.TaskGroup() as group:
            for index in range(len(bodies)):
                arrivals.append(time.perf_counter())
                group.create_task(send(index))
                await asyncio.sleep(gaps.expovariate(rate))
    return {"latencies": latencies, "arrivals": arrivals, "rate": rate}


def one_after_another(arrivals: Sequence[float], alone: Sequence[float]) -> list[float]:
    """What the requests would have taken if each had its time alone, and they were served in the order in which they came."""
    free, took = 0.0, []
    for arrival, seconds in zip(arrivals, alone, strict=True):
        free = max(free, arrival) + seconds
        took.append(free - arrival)
    return took


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies, one of them itself; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
