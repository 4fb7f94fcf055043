#!/usr/bin/env python3
"""What callers notice while a version is published beside the running one, compared, made canary, promoted, rolled back and retired.

    python benchmarks/swap_under_load.py --layers 4

Callers in a closed loop score groups of `--completions` completions of one prompt by `rayward serve`, one replica a version, and keep a
ledger: every reply must be 200, of one version, with the rewards that this version gives offline. Needs no data.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

import common
from load import quantile
from smollm2 import smollm2

KEY = "of-the-benchmark-and-nobody-else"
TOLERANCE = 1e-5
PROMPTS = 32
PHASES = ("steady", "load beside", "shadow", "canary 0.2", "promoted", "rolled back", "retired")


@dataclass
class Ledger:
    """Every request: when it ended, how long it took, which version answered; and whatever was not as it should be."""

    expected: dict[str, list[list[float]]]
    ends: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def note(self, prompt: int, start: float, response: httpx.Response) -> None:
        """One reply."""
        now = time.perf_counter()
        if response.status_code != 200:
            self.dropped.append(f"{response.status_code}: {response.text[:200]}")
            return
        reply = response.json()
        rewards = reply["results"][0].get("rewards")
        reference = self.expected[reply["version"]][prompt]
        if rewards is None or max(abs(a - b) for a, b in zip(rewards, reference, strict=True)) > TOLERANCE:
            self.wrong.append(json.dumps(reply)[:200])
        self.ends.append(now)
        self.seconds.append(now - start)
        self.versions.append(reply["version"])


def make_items(completions: int) -> list[dict[str, Any]]:
    """Groups of completions of different lengths."""
    texts = ["Certainly. " + "It depends on what you want to do with it. " * (1 + k % 5) + f"Answer {k}." for k in range(completions)]
    return [{"prompt": f"Question {i}: " + "what should I know about this? " * 8, "completions": texts} for i in range(PROMPTS)]


def make_versions(layers: int, scratch: Path) -> list[Path]:
    """One model, and the same one with another head."""
    from safetensors.torch import load_file, save_file

    first = smollm2(layers, reward_head=True)
    second = Path(shutil.copytree(first, scratch / "second"))
    (file,) = second.glob("*.safetensors")
    tensors = load_file(file)
    tensors["score.weight"] = tensors["score.weight"].flip(-1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return [first, second]


def run_offline(spec: dict[str, Any]) -> dict[str, Any]:
    """Version -> rewards of every item, by the scorer alone."""
    from rayward.scoring.scorer import ScoreItem, Scorer

    found = {}
    for model in spec["models"]:
        scorer = Scorer.load(model, device="cpu", tokens_per_batch=spec["budget"])
        items = [ScoreItem(({"role": "user", "content": item["prompt"]},), tuple(item["completions"])) for item in spec["items"]]
        found[scorer.version] = [result.rewards for result in scorer.score(items)]
    return found


def run_service(spec: dict[str, Any]) -> dict[str, Any]:
    """The phases one after the other, under load all the time."""
    os.environ.update(RAY_ADDRESS="local", RAY_AUTH_MODE="disabled", RAYWARD_API_KEYS=f"bench:{KEY}:score+admin", RAYWARD_API_KEY=KEY)
    from rayward.config.scoring import ScoringConfig
    from rayward.serving.app import serve_model, take_down

    config = ScoringConfig(
        model=spec["models"][0], model_name="rm", device="cpu", tokens_per_batch=spec["budget"], cpus_per_replica=0.5, state=spec["state"]
    )
    url = serve_model(config, port=0, name="swap")
    ledger = Ledger(spec["expected"])
    starts = asyncio.run(_load(url, ledger, spec))
    take_down(config, "swap")
    return {
        "starts": starts, "ends": ledger.ends, "seconds": ledger.seconds, "versions": ledger.versions,
        "dropped": ledger.dropped, "wrong": ledger.wrong,
    }  # fmt: skip


async def _load(url: str, ledger: Ledger, spec: dict[str, Any]) -> list[float]:
    stopped = asyncio.Event()
    headers = {"authorization": f"Bearer {KEY}"}

    async def call(http: httpx.AsyncClient, number: int) -> None:
        while not stopped.is_set():
            prompt = number % len(spec["items"])
            start = time.perf_counter()
            try:
                ledger.note(prompt, start, await http.post("/v1/score", json={"items": [spec["items"][prompt]]}))
            except httpx.TransportError as exc:
                ledger.dropped.append(type(exc).__name__)
            number += spec["callers"]

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300.0) as http, asyncio.TaskGroup() as group:
        for number in range(spec["callers"]):
            group.create_task(call(http, number))
        try:
            return await asyncio.to_thread(_administer, url, ledger, spec)
        finally:
            stopped.set()


def _administer(url: str, ledger: Ledger, spec: dict[str, Any]) -> list[float]:
    from rayward.workflows.publish import Service, publish_model

    service = Service(url)
    _, second = spec["expected"]
    steps: list[Callable[[], object]] = [
        lambda: None,
        lambda: publish_model(service, "rm", spec["models"][1]),
        lambda: service.ask("shadow", {"model": "rm", "version": second}),
        lambda: service.ask("canary", {"model": "rm", "version": second, "share": 0.2}),
        lambda: service.ask("promote", {"model": "rm", "version": second}),
        lambda: service.ask("rollback", {"model": "rm"}),
        lambda: service.ask("retire", {"model": "rm", "version": second}),
    ]
    starts = []
    for phase, step in zip(PHASES, steps, strict=True):
        starts.append(time.perf_counter())
        step()
        time.sleep(spec["phase_s"])
        print(f"{phase}: {len(ledger.ends)} replies, {len(ledger.dropped)} dropped, {len(ledger.wrong)} wrong", flush=True)
    return starts


def main() -> None:
    """Offline rewards, the service under load, the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of SmolLM2-135M")
    parser.add_argument("--completions", type=int, default=8, help="of a group")
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--phase-s", type=float, default=20.0, help="seconds under load after each step")
    parser.add_argument("--tokens-per-batch", type=int, default=512, help="on a CPU, short rows are fastest")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    machine = common.describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = [str(path) for path in make_versions(args.layers, scratch)]
        spec = {
            "models": models, "items": make_items(args.completions), "budget": args.tokens_per_batch, "callers": args.callers,
            "phase_s": args.phase_s, "state": str(scratch / "state"),
        }  # fmt: skip
        expected = common.run_side(__file__, {**spec, "side": "offline"}, num_threads=1)
        found = common.run_side(__file__, {**spec, "side": "service", "expected": expected}, num_threads=1)
    stem = common.write_results("swap_under_load", machine=machine, text=_text(found, args), values=found, directory=args.results)
    _plot(found, stem.with_suffix(".png"))


def phases_of(found: dict[str, Any]) -> list[list[int]]:
    """The indices of the requests that ended in each phase."""
    bounds = [*found["starts"], float("inf")]
    return [[i for i, end in enumerate(found["ends"]) if low <= end < high] for low, high in pairwise(bounds)]


def _text(found: dict[str, Any], args: argparse.Namespace) -> str:
    rows = []
    steady = 0.0
    for phase, indices in zip(PHASES, phases_of(found), strict=True):
        seconds = [found["seconds"][i] for i in indices]
        answered = [found["versions"][i] for i in indices]
        p50, p99 = (quantile(seconds, share) for share in (0.5, 0.99))
        steady = steady or p50
        shares = ", ".join(f"{answered.count(version) / len(answered):.0%}" for version in dict.fromkeys(found["versions"]))
        rows.append([phase, len(indices), shares, f"{p50 * 1e3:.0f}", f"{p99 * 1e3:.0f}", f"{(p50 - steady) * 1e3:+.0f}"])
    header = ["phase", "replies", "of first, second version", "p50 ms", "p99 ms", "p50 over steady, ms"]
    return "\n".join(
        [
            f"SmolLM2-135M cut to {args.layers} layers and the same with another head, one replica each, {args.callers} callers, groups of "
            f"{args.completions} completions; all of it on one machine, so what loads or scores beside takes its share of the cores.",
            "",
            f"**Dropped: {len(found['dropped'])} of {len(found['ends']) + len(found['dropped'])} requests. Groups whose rewards are not "
            f"all those of the one version that the reply names: {len(found['wrong'])}.**",
            "",
            common.table(header, rows),
        ]
    )


def _plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    zero = found["starts"][0]
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    for version, colour in zip(dict.fromkeys(found["versions"]), ("#3b6ea5", "#c8553d"), strict=False):
        own = [i for i, answered in enumerate(found["versions"]) if answered == version]
        ends, seconds = [found["ends"][i] - zero for i in own], [found["seconds"][i] for i in own]
        axes.scatter(ends, seconds, s=5, color=colour, label=f"version {version[-12:]}", linewidths=0)
    top = max(found["seconds"])
    for phase, start in zip(PHASES, found["starts"], strict=True):
        axes.axvline(start - zero, color="#999999", linewidth=0.8)
        axes.text(start - zero, top, f" {phase}", rotation=90, va="top", fontsize=8)
    axes.set(xlabel="seconds", ylabel="seconds a request", ylim=(0, None))
    axes.set_title(
        f"Every request while versions change; median of the steady phase {statistics.median(found['seconds'][:50]):.2f} s", fontsize=10
    )
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    given = common.worker_arguments()
    if given is None:
        main()
    else:
        given_spec, output = given
        side = run_offline if given_spec["side"] == "offline" else run_service
        output.write_text(json.dumps(side(given_spec)))
