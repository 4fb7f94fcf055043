"""A burst on a cluster that grows: replicas, nodes and backlog over time, scaled by the backlog of tokens and by the number of requests.

    python benchmarks/autoscale.py

Real here: Serve and its controller, the autoscaler and its (fake) nodes on this machine, the dispatcher, the engine of a replica, its
reports, the policy. Not real is the device: a forward waits for as long as its tokens take at a fixed speed, as for an accelerator, because
two cores cannot be six replicas. All sides meet the same requests at the same times: first many short ones, then few long ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
from growing_cluster import cluster
from load import quantile

TOKENS_PER_S = 2000.0
"""Speed of one replica's device."""

CHARS_PER_TOKEN = 4

START_S = 5.0
"""How long a replica loads its model, besides starting its process."""

MAX_REPLICAS = 6
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 3.0, 20.0
SECONDS = 130.0

SIDES: dict[str, float | None] = {"backlog of tokens": None, "32 requests a replica": 32.0, "2 requests a replica": 2.0}
"""Side -> target_ongoing_requests of Serve's own policy; None: ours."""


@dataclass(frozen=True)
class Phase:
    """Requests of one length, Poisson, between two times."""

    name: str
    begin_s: float
    end_s: float
    requests_per_s: float
    tokens: int


PHASES = (Phase("short", 5.0, 30.0, 60.0, 100), Phase("long", 60.0, 85.0, 2.0, 4000))


def arrivals() -> list[tuple[float, int, str]]:
    """(time, tokens, phase) of every request, the same for all sides."""
    noise = random.Random(0)
    found = []
    for phase in PHASES:
        at = phase.begin_s
        while (at := at + noise.expovariate(phase.requests_per_s)) < phase.end_s:
            found.append((at, phase.tokens, phase.name))
    return found


# ---- the scorer ---------------------------------------------------------------------------------------------------


class WaitingModel:
    """A `UnitModel` whose device needs a fixed time a token; four characters are one."""

    model_id = version = "waiting"
    layout: Any = "packed"

    def __init__(self) -> None:
        from rayward.scoring.scored_model import ModelFacts

        self.facts = ModelFacts(outputs=("reward",), max_tokens=1 << 20, weight_sets=(), normaliser=None)

    def encoder_spec(self) -> None:
        """None: the compute thread encodes, there is nothing to do."""

    def encode(self, items: Sequence[Any]) -> list[Any]:
        return [self.encode_item(item) for item in items]

    def encode_item(self, item: Any) -> Any:
        import numpy as np

        from rayward.batch.comparison import EncodedComparison, Labels
        from rayward.scoring.units import EncodedItem, Unit

        ids = np.zeros(len(item.prompt[0]["content"]) // CHARS_PER_TOKEN, dtype=np.int32)
        comparison = EncodedComparison("x", np.zeros(0, dtype=np.int32), (ids,), Labels())
        return EncodedItem(item, (Unit(comparison),))

    def forward(self, units: Sequence[Any]) -> list[Any]:
        import torch

        from rayward.scoring.units import UnitValues

        time.sleep(sum(unit.num_tokens for unit in units) / TOKENS_PER_S)
        return [UnitValues(torch.ones(1, 1), unit.num_tokens) for unit in units]

    def finish(self, encoded: Any, values: Sequence[Any]) -> Any:
        from rayward.scoring.units import usage
        from rayward.wire.items import ItemResult

        return ItemResult(rewards=(float(encoded.units[0].num_tokens),), **usage(encoded, values))

    def score(self, items: Sequence[Any]) -> list[Any]:
        from rayward.scoring.units import computed

        return computed(self, self.encode(items))


class WaitingScorer:
    """`ScorerDeployment` around a `WaitingModel`."""

    def __init__(self) -> None:
        # Before the first forward, which would be measured as slow as this import is.
        import torch

        from rayward.config.scoring import ReplicaConfig
        from rayward.serving.engine.engine import Engine

        torch.set_num_threads(1)
        time.sleep(START_S)
        self._engine = Engine(WaitingModel(), ReplicaConfig(max_queue_s=600.0))

    async def score(self, call: Any) -> Any:
        return await self._engine.score(call)

    async def info(self) -> Any:
        from rayward.wire.native import ModelInfo

        return ModelInfo(id="m", version="waiting", max_tokens=1 << 20, outputs=["reward"])

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._engine.load()


def scaling(target_ongoing_requests: float | None) -> dict[str, Any]:
    """Options of a side's deployment: bounds, delays and reports are the same."""
    from rayward.config.scoring import ReplicaConfig
    from rayward.serving.autoscaling import scaling_options

    config = ReplicaConfig(max_replicas=MAX_REPLICAS, upscale_delay_s=UPSCALE_DELAY_S, downscale_delay_s=DOWNSCALE_DELAY_S)
    options = scaling_options(config)
    if target_ongoing_requests is None:
        return options
    kept = {key: options["autoscaling_config"][key] for key in ("min_replicas", "max_replicas", "initial_replicas", "look_back_period_s")}
    return {
        "autoscaling_config": {
            **kept,
            "target_ongoing_requests": target_ongoing_requests,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
        }
    }


# ---- one side -----------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """How things stood."""

    at_s: float
    replicas: int
    nodes: int
    backlog_tokens: int


@dataclass
class Answered:
    """One request."""

    phase: str
    sent_s: float
    took_s: float
    outcome: str


async def drive() -> tuple[list[Sample], list[Answered]]:
    """Send the requests at their times, look twice a second."""
    import ray
    from ray import serve

    from rayward.config.scoring import ReplicaConfig
    from rayward.errors import RaywardError
    from rayward.serving.dispatch import Dispatcher
    from rayward.serving.handles import ServeHandles
    from rayward.serving.routes import ModelRoutes, Release, RouteTable
    from rayward.wire.items import ScoreItem

    release = Release(version="waiting", source="none", config=ReplicaConfig(max_replicas=MAX_REPLICAS), state="ready")
    table = RouteTable(generation=1, default_model="m", models={"m": ModelRoutes(releases={"waiting": release}, current="waiting")})
    application = "bench.m.waiting"
    dispatcher = Dispatcher(lambda: table, ServeHandles("bench", lambda _model, _version: application))
    start, outstanding, samples, answered = time.monotonic(), [0], [], []

    async def one(at: float, tokens: int, phase: str) -> None:
        await asyncio.sleep(max(0.0, at - (time.monotonic() - start)))
        sent = time.monotonic()
        outstanding[0] += tokens
        item = ScoreItem(({"role": "user", "content": "a" * (tokens * CHARS_PER_TOKEN)},), ("x",))
        try:
            _, scored = await dispatcher.score([item], request_id=f"{at}", caller="bench", budget_s=300.0, model=None, version=None)
            error = scored.results[0].error
            outcome = "scored" if error is None else error.code
        except RaywardError as exc:
            outcome = type(exc).__name__
        outstanding[0] -= tokens
        answered.append(Answered(phase, sent - start, time.monotonic() - sent, outcome))

    def look() -> tuple[int, int]:
        found = serve.status().applications[application].deployments["scorer"].replica_states
        return int(found.get("RUNNING", 0)), sum(node["Alive"] for node in ray.nodes())

    reading = asyncio.create_task(dispatcher.run())
    tasks = [asyncio.create_task(one(*each)) for each in arrivals()]
    while time.monotonic() - start < SECONDS or not all(task.done() for task in tasks):
        replicas, nodes = await asyncio.to_thread(look)
        samples.append(Sample(time.monotonic() - start, replicas, nodes, outstanding[0]))
        await asyncio.sleep(0.5)
    await asyncio.gather(*tasks)
    reading.cancel()
    await dispatcher.close()
    return samples, answered


def run_one(target_ongoing_requests: float | None) -> dict[str, Any]:
    """Start a cluster, meet the burst, end it."""
    import ray
    from ray import serve

    from rayward.serving.autoscaling import REPORT_ENVIRONMENT

    # Handles report from here too.
    environment = {**REPORT_ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(common.HERE.parent / "platform"), str(common.HERE)])}
    with cluster() as address:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": environment})
        deployment = serve.deployment(
            WaitingScorer,
            name="scorer",
            max_ongoing_requests=1024,
            graceful_shutdown_timeout_s=60.0,
            ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": REPORT_ENVIRONMENT}},
            **scaling(target_ongoing_requests),
        )
        serve.run(deployment.bind(), name="bench.m.waiting", route_prefix=None)
        samples, answered = asyncio.run(drive())
        serve.shutdown()
        ray.shutdown()
    return {"samples": [asdict(each) for each in samples], "answered": [asdict(each) for each in answered]}


# ---- results ------------------------------------------------------------------------------------------------------


def summary(side: dict[str, Any]) -> dict[str, float]:
    """What a side comes to."""
    samples, answered = side["samples"], side["answered"]
    found: dict[str, float] = {"answered": sum(each["outcome"] == "scored" for each in answered), "of": len(answered)}
    for phase in PHASES:
        took = [each["took_s"] for each in answered if each["phase"] == phase.name]
        ends = [each["sent_s"] + each["took_s"] for each in answered if each["phase"] == phase.name]
        found[f"{phase.name} p50"], found[f"{phase.name} p99"] = quantile(took, 0.5), quantile(took, 0.99)
        found[f"{phase.name} drained"] = max(ends) - phase.end_s
    steps = pairwise(samples)
    found["replica_seconds"] = sum(a["replicas"] * (b["at_s"] - a["at_s"]) for a, b in steps if b["at_s"] <= SECONDS)
    found["max_replicas"] = max(each["replicas"] for each in samples)
    found["max_nodes"] = max(each["nodes"] for each in samples)
    found["last_replicas"], found["last_nodes"] = samples[-1]["replicas"], samples[-1]["nodes"]
    return found


def plot(sides: dict[str, dict[str, Any]], path: Path) -> None:
    """Replicas, nodes and backlog over time, a column a side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(sides), 6.4), layout="constrained")
    axes = figure.subplots(2, len(sides), sharex=True, sharey="row", squeeze=False)
    for column, (name, side) in enumerate(sides.items()):
        at = [each["at_s"] for each in side["samples"]]
        upper, lower = axes[0][column], axes[1][column]
        upper.step(at, [each["replicas"] for each in side["samples"]], where="post", color="#2f6fb3", label="replicas")
        upper.step(at, [each["nodes"] for each in side["samples"]], where="post", color="#8a97a3", label="nodes", linestyle="--")
        lower.plot(at, [each["backlog_tokens"] / TOKENS_PER_S for each in side["samples"]], color="#e0803a")
        upper.set_title(name, loc="left", fontsize=11, fontweight="bold")
        lower.set_xlabel("seconds")
        for phase in PHASES:
            for each in (upper, lower):
                each.axvspan(phase.begin_s, phase.end_s, color="#eef1f4")
            upper.text(phase.begin_s + 1, MAX_REPLICAS + 0.25, f"{phase.requests_per_s:g}/s of {phase.tokens} tokens", fontsize=7.5)
        upper.set_ylim(0, MAX_REPLICAS + 0.8)
    axes[0][0].set_ylabel("running")
    axes[1][0].set_ylabel("backlog, in seconds of one replica")
    axes[0][0].legend(loc="center right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=160, facecolor="white")


def main() -> None:
    given = common.worker_arguments()
    if given is not None:
        warnings.simplefilter("ignore")
        spec, out = given
        out.write_text(json.dumps(run_one(spec["target_ongoing_requests"])), encoding="utf-8")
        return
    machine = common.describe_machine()
    sides = {name: common.run_side(__file__, {"target_ongoing_requests": target}, num_threads=1) for name, target in SIDES.items()}
    found = {name: summary(side) for name, side in sides.items()}
    rows = [
        [
            name,
            f"{each['answered']:.0f} of {each['of']:.0f}",
            *(f"{each[f'{p.name} {what}']:.1f}" for p in PHASES for what in ("p50", "p99", "drained")),
            f"{each['max_replicas']:.0f} ({each['max_nodes']:.0f})",
            f"{each['replica_seconds']:.0f}",
            f"{each['last_replicas']:.0f} ({each['last_nodes']:.0f})",
        ]
        for name, each in found.items()
    ]
    header = ["scaled by", "answered", *(f"{p.name}: {what}, s" for p in PHASES for what in ("p50", "p99", "drained after")),
              "most replicas (nodes)", "replica-seconds", "at the end"]  # fmt: skip
    loads = "; ".join(
        f"{p.requests_per_s:g} requests/s of {p.tokens} tokens for {p.end_s - p.begin_s:g} s "
        f"({p.requests_per_s * p.tokens / TOKENS_PER_S:g} replicas' work)"
        for p in PHASES
    )
    text = (
        f"{common.table(header, rows)}\n\nLoad: {loads}. One replica computes {TOKENS_PER_S:g} tokens/s (its forward waits so long) "
        f"and needs {START_S:g} s to load; 1 to {MAX_REPLICAS} replicas, up after {UPSCALE_DELAY_S:g} s, down after "
        f"{DOWNSCALE_DELAY_S:g} s, on a head of 1 CPU and up to 3 nodes of 2. `drained after`: from the end of a burst until its last "
        f"request was answered.\n\n![over time](autoscale-{machine['date'][:10]}.png)"
    )
    stem = common.write_results("autoscale", machine=machine, text=text, values={"summary": found, "sides": sides})
    plot(sides, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
