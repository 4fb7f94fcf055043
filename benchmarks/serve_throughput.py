#!/usr/bin/env python3
"""Completions per second of `rayward serve` against the bare forward of the same model, and against the servers that people use.

    python benchmarks/serve_throughput.py --data DATA --peers openrlhf pipeline

Real dialogues (hh-rlhf harmless), n completions of each prompt (those beyond the second taken from other dialogues), one replica, one
card or `--threads` threads for everybody. One run, in this order, each side in a process of its own:

    ceiling       the scorer's micro-batches of token ids, all prompts known beforehand: prompts shared, sorted, nothing tokenized or sent
    scorer        `Scorer.score` of all items: rendering and tokenizing too
    handle        `DeploymentHandle` of the running service, one item a call, 8 in flight
    http          POST /v1/score: one item a request, 8 and 64 in flight; eight items a request, 8 in flight
    flat          POST /get_reward with the n texts of one prompt, 8 in flight
    peers         their own server, /get_reward with the n texts of one prompt, 8 in flight, the same texts

A closed loop: so many requests are always in flight, until all items are answered; the first answers warm up and do not count. Every
reward is compared with the scorer's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

import common
from load import closed_loop, one_after_another, open_loop, over_http, quantile
from score_scale import write_items
from smollm2 import smollm2

SIZES = (1, 4, 16)
HANDLE, FLAT = "handle, 8 in flight", "flat, 8 in flight"
HTTP = {"http, 8 in flight": (8, 1), "http, 64 in flight": (64, 1), "http, 8 items, 8 in flight": (8, 8)}
"""Requests in flight, items of a request."""

PARTS = {
    ":scorer": "scorer", "encoder_process": "its encoders", ":ingress": "ingress", ":manager": "manager", "ProxyActor": "proxy",
    "haproxy": "HAProxy", "HAProxyManager": "HAProxy", "ServeController": "controller", "raylet": "Ray's own", "gcs_server": "Ray's own",
    "ray/": "Ray's own", "ray::": "Ray's own",
}  # fmt: skip
"""What a process is, by the first of these that is part of its command line."""

TIMES = ("alone, median", "at 70 %, median", "alone, p99", "at 70 %, p99", "p99 over alone", "in theory, one after another")

PEERS = Path(__file__).parent / "peers"


def make_items(file: Path, size: int, count: int) -> list[dict[str, Any]]:
    """Items of `size` completions each, all different."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    answers = [text for row in rows for text in row["completions"]]
    made = []
    for index in range(count):
        row = rows[index % len(rows)]
        others = [answers[(2 * index + 7 * k) % len(answers)] for k in range(1, 4 * size)]
        texts = list(dict.fromkeys([*row["completions"], *others]))[:size]
        made.append({"prompt": row["prompt"], "completions": texts})
    return made


def texts_of(model: str, items: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What flat servers are sent: every conversation as the chat template writes it."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return [
        [
            str(tokenizer.apply_chat_template([*item["prompt"], {"role": "assistant", "content": text}], tokenize=False)).rstrip("\n")
            for text in item["completions"]
        ]
        for item in items
    ]


# ---- without a server -------------------------------------------------------------------------------------------


def run_scorer(spec: dict[str, Any]) -> dict[str, Any]:
    """Ceiling and scorer, by size."""
    import torch

    from rayward.config.placement import Placement
    from rayward.config.scoring import ScoringConfig
    from rayward.scoring.load import load_scored_model, reward_model_of
    from rayward.wire.lines import parse_line

    torch.set_num_threads(spec["threads"])
    scorer = reward_model_of(load_scored_model(spec["model"], Placement(device=spec["device"], tokens_per_batch=spec["budget"])))
    found: dict[str, Any] = {}
    for size, items in spec["items"].items():
        parsed: list[Any] = [parse_line(json.dumps(item).encode(), ScoringConfig().limits).item for item in items]
        units = [unit for item in parsed for unit in scorer.encode_item(item).units]
        scorer.forward(units[:8])
        start = time.perf_counter()
        scorer.forward(units)
        ceiling = time.perf_counter() - start
        start = time.perf_counter()
        results = scorer.score(parsed)
        direct = time.perf_counter() - start
        start = time.perf_counter()
        scorer.forward(units[: max(1, len(units) // len(items))])
        rewards = [list(result.rewards or ()) for result in results]
        found[size] = {"ceiling_s": ceiling, "scorer_s": direct, "single_s": time.perf_counter() - start, "rewards": rewards}
    return found


# ---- the service ------------------------------------------------------------------------------------------------


def rewards_of_reply(reply: Any) -> list[list[float]]:
    """Of the native schema; an error of an item is a KeyError here."""
    return [result["rewards"] for result in reply["results"]]


def run_service(spec: dict[str, Any]) -> dict[str, Any]:
    """Handle, HTTP and flat sides of one running service, by side and size."""
    os.environ["RAY_ADDRESS"] = "local"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from rayward.config.scoring import ScoringConfig
    from rayward.serving.app import serve_model

    config = ScoringConfig(
        model=spec["model"], model_name="rm", device=spec["device"], tokens_per_batch=spec["budget"], threads_per_replica=spec["threads"],
        gpus_per_replica=1.0 if spec["device"] == "cuda" else 0.0, state=spec["state"],
    )  # fmt: skip
    url = serve_model(config, port=0, name="throughput")
    found: dict[str, Any] = {}
    for size, items in spec["items"].items():
        found[size] = {HANDLE: asyncio.run(by_handle(items, spec["warm_up"], spec["state"]))}
        for side, (in_flight, per_request) in HTTP.items():
            before = cpu_seconds()
            bodies = [{"items": items[start : start + per_request]} for start in range(0, len(items), per_request)]
            loop = over_http(url, "/v1/score", bodies, in_flight, max(1, spec["warm_up"] // per_request), rewards_of_reply)
            found[size][side] = asyncio.run(loop)
            found[size][side]["cpu_s"] = {part: seconds - before.get(part, 0.0) for part, seconds in cpu_seconds().items()}
        texts = [{"query": each} for each in spec["texts"][size]]
        found[size][FLAT] = asyncio.run(over_http(url, "/get_reward", texts, 8, spec["warm_up"], lambda reply: [reply["rewards"]]))
        print(size, {side: round(run["seconds"], 1) for side, run in found[size].items()}, flush=True)
        # One at a time, and at seven tenths of the full rate: what p99 is compared with.
        bodies = [{"items": [item]} for item in items]
        alone = asyncio.run(over_http(url, "/v1/score", bodies, 1, 0, rewards_of_reply))
        rate = (len(bodies) - spec["warm_up"]) / found[size]["http, 8 in flight"]["seconds"]
        found[size]["alone"] = alone
        found[size]["at 70 %"] = asyncio.run(open_loop(url, bodies, 0.7 * rate))
    return found


def cpu_seconds() -> dict[str, float]:
    """Of this process, which is the client, and of everything that it has started, by part."""
    import psutil

    me = psutil.Process()
    found = {"client": sum(me.cpu_times()[:2])}
    for process in me.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            part = next((part for mark, part in PARTS.items() if mark in line), "others")
            found[part] = found.get(part, 0.0) + sum(process.cpu_times()[:2])
    return found


async def by_handle(items: Sequence[dict[str, Any]], warm_up: int, state: str) -> dict[str, Any]:
    """One item a call, past HTTP."""
    from rayward import AsyncRewardClient
    from rayward.serving.direct import direct

    async with AsyncRewardClient(direct("throughput", state=state), deadline_s=600.0) as client:

        async def send(item: dict[str, Any]) -> list[list[float]]:
            return [await client.score(item["prompt"], item["completions"])]

        return await closed_loop(items, send, 8, warm_up)


def run_peer(spec: dict[str, Any]) -> dict[str, Any]:
    """Another server with the same texts, by size."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "CUDA_VISIBLE_DEVICES": ""}
    script = str(PEERS / f"{spec['peer']}_server.py")
    command = [sys.executable, script, "--model", spec["model"], "--port", str(port), "--threads", str(spec["threads"])]
    server = subprocess.Popen(command, env=environment)
    url, found = f"http://127.0.0.1:{port}", {}
    try:
        until = time.monotonic() + 300
        while True:
            try:
                httpx.post(f"{url}/get_reward", json={"query": [spec["texts"]["1"][0][0]]}, timeout=60.0).raise_for_status()
                break
            except httpx.TransportError:
                if server.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"{spec['peer']} did not start; see its output above") from None
                time.sleep(0.5)
        for size, texts in spec["texts"].items():
            bodies = [{"query": each} for each in texts]
            found[size] = asyncio.run(over_http(url, "/get_reward", bodies, 8, spec["warm_up"], lambda reply: [reply["rewards"]]))
    finally:
        server.terminate()
        server.wait()
    return found


# ---- the comparison ---------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_data_argument(parser)
    parser.add_argument("--model", help="directory of a model without contract [default: SmolLM2-135M, --layers of it, random head]")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--completions", type=int, default=768, help="of each size, warm-up included (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens-per-batch", type=int, default=512, help="on a CPU, short rows are fastest")
    parser.add_argument("--peers", nargs="*", default=[], choices=["openrlhf", "pipeline"])
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run the sides, compare rewards, write the table."""
    args = parse()
    machine = common.describe_machine()
    model = args.model or str(smollm2(args.layers, reward_head=True))
    source = common.data_file(args.data)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "items.jsonl")
        # No prompt twice: the ceiling knows all of them beforehand, and would compute once what the service meets minutes apart.
        write_items(source, file, args.completions)
        items = {str(size): make_items(file, size, max(32, args.completions // size)) for size in SIZES}
        spec = {
            "model": model, "items": items, "texts": {size: texts_of(model, given) for size, given in items.items()}, "warm_up": 8,
            "threads": args.threads, "budget": args.tokens_per_batch, "device": args.device, "state": str(Path(scratch, "state")),
        }  # fmt: skip
        scorer = common.run_side(__file__, {**spec, "side": "scorer"}, num_threads=args.threads)
        service = common.run_side(__file__, {**spec, "side": "service"}, num_threads=args.threads)
        peers = {peer: common.run_side(__file__, {**spec, "side": "peer", "peer": peer}, num_threads=args.threads) for peer in args.peers}
    rows, latency, gaps = _table(scorer, service, peers, items, spec["warm_up"])
    sizes = [f"n = {size}" for size in SIZES]
    text = "\n".join(
        [
            f"{Path(model).name}, fp32, {args.threads} compute threads for every side, {args.tokens_per_batch} tokens a forward, hh-rlhf "
            "harmless; completions a second, and in brackets the share of the ceiling. "
            f"Every reward of the service is within {gaps:.1e} of the scorer's.",
            "",
            common.table(["side", *sizes], rows),
            "",
            "Seconds of a request over HTTP, one item each: alone on an idle service, and at 70 % of the rate of 8 in flight (exponential "
            "gaps). `over alone`: p99 over the median alone; `in theory`: the same if every request took what it takes alone and they were "
            "served one after another, in the order and at the times in which they came.",
            "",
            common.table(["", *sizes], latency),
            "",
            "Processor time of a request over HTTP, 8 in flight, in ms:",
            "",
            common.table(["", *sizes], _cpu_rows(service, items)),
        ]
    )
    values = {"scorer": scorer, "service": service, "peers": peers}
    common.write_results("serve_throughput", machine=machine, text=text, values=_without_answers(values), directory=args.results)


def _table(
    scorer: dict[str, Any], service: dict[str, Any], peers: dict[str, Any], items: dict[str, Any], warm_up: int
) -> tuple[list[list[str]], list[list[str]], float]:
    sides = [HANDLE, *HTTP, FLAT]
    names = ["ceiling: bare forward", "scorer", *sides, *peers]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    latency = {name: list[str]() for name in TIMES}
    gaps = 0.0
    for size, given in items.items():
        total, number = sum(len(item["completions"]) for item in given), int(size)
        speeds[names[0]].append(total / scorer[size]["ceiling_s"])
        speeds["scorer"].append(total / scorer[size]["scorer_s"])
        for side in sides:
            run = service[size][side]
            per_request = HTTP.get(side, (8, 1))[1]
            counted = total - number * per_request * max(1, warm_up // per_request)
            speeds[side].append(counted / run["seconds"])
            rewards = [rewards for answer in run["answers"] for rewards in answer]
            pairs = zip([r for each in rewards for r in each], [r for each in scorer[size]["rewards"] for r in each], strict=True)
            gaps = max(gaps, *(abs(a - b) for a, b in pairs))
        for peer, runs in peers.items():
            speeds[peer].append((total - number * warm_up) / runs[size]["seconds"])
        times, loaded = service[size]["alone"]["latencies"], service[size]["at 70 %"]
        alone, p99 = statistics.median(times), quantile(loaded["latencies"], 0.99)
        theory = quantile(one_after_another(loaded["arrivals"], times), 0.99) / alone
        for name, value in zip(
            latency, (alone, statistics.median(loaded["latencies"]), quantile(times, 0.99), p99, p99 / alone, theory), strict=True
        ):
            latency[name].append(f"{value:.3f}")
    ceiling = speeds[names[0]]
    rows = [[name, *(f"{v:.1f} ({v / c:.2f})" for v, c in zip(values, ceiling, strict=True))] for name, values in speeds.items()]
    return rows, [[name, *cells] for name, cells in latency.items()], gaps


def _cpu_rows(service: dict[str, Any], items: dict[str, Any]) -> list[list[str]]:
    used = {size: run["http, 8 in flight"]["cpu_s"] for size, run in service.items()}
    parts = sorted({part for each in used.values() for part in each}, key=lambda part: -used["1"].get(part, 0.0))
    return [[part, *(f"{1e3 * used[size].get(part, 0.0) / len(items[size]):.1f}" for size in items)] for part in parts]


def _without_answers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_answers(each) for key, each in value.items() if key not in ("answers", "rewards", "arrivals")}
    return value


if __name__ == "__main__":
    given = common.worker_arguments()
    if given is None:
        main()
    else:
        sides = {"scorer": run_scorer, "service": run_service, "peer": run_peer}
        given[1].write_text(json.dumps(sides[given[0]["side"]](given[0])), encoding="utf-8")
