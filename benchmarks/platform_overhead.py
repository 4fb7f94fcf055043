"""What the platform costs: step time of the bare torch engine, of DeepSpeed ZeRO-3 without Ray, and of the full job on Ray.

    python benchmarks/platform_overhead.py

One worker, fp32, the same prepared pairs and therefore the same packed micro-batches on every side; two model sizes with random
weights. Needs no data: the pairs are those of the generated world. Each side runs in a process of its own, in turn, `--rounds` times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from rayward.config.run import Config
    from rayward.data.prepared import PreparedData
    from rayward.data.stream.shares import StepShare

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4},
    "large": {"hidden_size": 512, "intermediate_size": 1664, "num_hidden_layers": 8, "num_attention_heads": 8},
}
SIDES = {"a": "torch engine", "b": "DeepSpeed ZeRO-3, no Ray", "c": "full job on Ray"}
MAX_TOKENS = 256
NUM_PROMPTS = 4000


# ---- data -------------------------------------------------------------------------------------------------------


def world_data() -> tuple[Path, Path]:
    """(pairs, tokenizer directory) of the generated world, written once."""
    from rayward.demo.files import write_demo

    directory = common.cache_directory() / f"world-{NUM_PROMPTS}"
    if not (directory / "done").exists():
        write_demo(directory, num_train_prompts=NUM_PROMPTS, num_validation_prompts=10, seed=0)
        (directory / "done").touch()
    return directory / "train.jsonl", directory / "tokenizer"


def make_config(size: str, spec: dict[str, Any]) -> Config:
    """The configuration of the full job; the other sides take model and training settings from it."""
    from rayward.config.load import parse_config
    from rayward.config.run import Config

    pairs, tokenizer = world_data()
    shape = SIZES[size]
    architecture = {
        "model_type": "llama",
        "vocab_size": 1000,
        **shape,
        "num_key_value_heads": shape["num_attention_heads"],
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return parse_config(
        {
            "run": {"name": spec["run"], "storage_path": spec["storage"]},
            "data": {"train": [str(pairs)], "format": "trl", "validation_fraction": 0.0},
            "model": {"architecture": architecture, "tokenizer": str(tokenizer), "max_tokens": MAX_TOKENS},
            "training": {
                "engine": "torch" if spec["side"] == "a" else "deepspeed",
                "num_workers": 1,
                "threads_per_worker": spec["threads"],
                "comparisons_per_step": spec["pairs_per_step"],
                "tokens_per_microbatch": spec["tokens_per_microbatch"],
                "max_steps": spec["steps"],
                "learning_rate": 1e-4,
                "gradient_checkpointing": False,
            },
            "checkpoint": {"every_steps": spec["steps"]},
            "tracking": {"tensorboard": False},
        },
        Config,
    )


# ---- the sides --------------------------------------------------------------------------------------------------


def run_bare(spec: dict[str, Any]) -> dict[str, Any]:
    """The loop in one process: engine by the side, shares read from the prepared shards."""
    import torch

    from rayward.contract.contract import Contract
    from rayward.data.prepared import PreparedData
    from rayward.model.build import build_reward_model, resolve_hf_config
    from rayward.model.pretrained import weight_source
    from rayward.objectives.table import Objective
    from rayward.training.engines.build import build_engine, initialize, pretrained
    from rayward.training.engines.deepspeed import init_process_group
    from rayward.training.loop import Schedule, run_steps

    torch.set_num_threads(spec["threads"])
    config = make_config(spec["size"], spec)
    prepared = PreparedData.load(spec["prepared"])
    contract = Contract.load(Path(prepared.directory))
    hf_config = resolve_hf_config(config.model, contract, vocab_size=1000)
    if config.training.engine == "deepspeed":
        init_process_group(rank=0, world_size=1, master_port=spec["port"])
    engine = build_engine(lambda dtype: build_reward_model(hf_config, max_tokens=contract.max_tokens, dtype=dtype), config.training)
    initialize(engine, weight_source(pretrained(engine), config.model, seed=0))
    lines: list[dict[str, float]] = []
    run_steps(
        engine,
        _shares(prepared, spec, contract.pad_token_id),
        objective=Objective(config.objective),
        schedule=Schedule(1e-4, spec["steps"], config.training.warmup_fraction, config.training.min_lr_fraction),
        first_step=0,
        stop_step=spec["steps"],
        on_step=lambda step, metrics: lines.append(metrics),
    )
    return {
        **_columns(lines),
        "parameters": sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in engine.reward_model.parameters()),
        "profile": _profile(engine, config, spec, prepared, contract.pad_token_id) if spec["profile"] else [],
    }


def _shares(prepared: PreparedData, spec: dict[str, Any], pad_token_id: int) -> Iterator[StepShare]:
    # Planned before the first step: these sides have no data work at all to wait for.
    import pyarrow as pa

    from rayward.data.stream.shares import STREAM_COLUMNS, plan_block, read_share

    rows = pa.concat_tables(prepared.tables("train", STREAM_COLUMNS))
    size = spec["pairs_per_step"]
    shares = []
    for step in range(spec["steps"]):
        block = rows.slice(step * size, size)
        planned = plan_block(
            block,
            world_size=1,
            comparisons_per_step=size,
            tokens_per_microbatch=spec["tokens_per_microbatch"],
            layout="packed",
        )
        shares.append(read_share(planned, layout="packed", pad_token_id=pad_token_id))
    return iter(shares)


def _profile(engine: Any, config: Config, spec: dict[str, Any], prepared: PreparedData, pad_token_id: int) -> list[tuple[str, float]]:
    # Where one more step spends its time: (function, milliseconds of its own), for the explanation of b over a.
    import cProfile
    import pstats

    from rayward.objectives.table import Objective
    from rayward.training.loop import train_step

    share = next(_shares(prepared, {**spec, "steps": 1}, pad_token_id))
    profiler = cProfile.Profile()
    profiler.enable()
    train_step(engine, share, Objective(config.objective), 1e-4)
    profiler.disable()
    rows = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    times = [(f"{Path(file).name}:{name}", 1000 * own) for (file, _, name), (_, _, own, _, _) in rows]
    return sorted(times, key=lambda item: -item[1])[:12]


def run_full(spec: dict[str, Any]) -> dict[str, Any]:
    """`rayward.training.trainer.train` on a Ray of its own; the times are those that the job logs."""
    import ray

    from rayward.cluster import connect
    from rayward.data.prepared import PreparedData
    from rayward.training.trainer import train

    connect()
    try:
        started = time.perf_counter()
        result = train(make_config(spec["size"], spec), PreparedData.load(spec["prepared"]))
        elapsed_s = time.perf_counter() - started
    finally:
        ray.shutdown()
    lines = [json.loads(line) for line in Path(result.location, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {**_columns([line for line in lines if line["kind"] == "train"]), "job_s": elapsed_s}


def _columns(lines: list[dict[str, float]]) -> dict[str, Any]:
    return {name: [line[name] for line in lines] for name in ("step_s", "data_wait_s", "loss", "tokens")}


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """One side in this process."""
    return run_full(spec) if spec["side"] == "c" else run_bare(spec)


# ---- the comparison ---------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--pairs-per-step", type=int, default=32)
    parser.add_argument("--tokens-per-microbatch", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1, help="of the training process, on every side")
    parser.add_argument("--rounds", type=int, default=3, help="times every side runs")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run all sides of all sizes in turn and write the table."""
    import shutil
    import tempfile

    import ray

    from rayward.cluster import connect
    from rayward.data.prepare.job import prepare

    args = parse()
    scratch = Path(tempfile.mkdtemp(prefix="rayward-bench-"))
    base = {
        "steps": args.steps,
        "pairs_per_step": args.pairs_per_step,
        "tokens_per_microbatch": args.tokens_per_microbatch,
        "threads": args.threads,
        "storage": str(scratch),
        "run": "prepare",
        "side": "c",
        "port": 29613,
        "profile": False,
    }
    try:
        connect()
        prepared = prepare(make_config(args.sizes[0], base))
        ray.shutdown()
        machine = common.describe_machine()
        runs: dict[str, dict[str, list[dict[str, Any]]]] = {size: {side: [] for side in SIDES} for size in args.sizes}
        for number in range(args.rounds):
            for size in args.sizes:
                for side in SIDES:
                    spec = {
                        **base,
                        "size": size,
                        "side": side,
                        "run": f"{size}-{side}-{number}",
                        "prepared": prepared.directory,
                        "profile": number == args.rounds - 1,
                    }
                    result = common.run_side(__file__, spec, num_threads=args.threads)
                    runs[size][side].append(result)
                    median = statistics.median(result["step_s"][args.warmup :])
                    print(f"round {number + 1}: {size}: {SIDES[side]}: {1000 * median:.0f} ms a step", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    text, values = summarize(runs, args)
    common.write_results("platform_overhead", machine=machine, text=text, values=values, directory=args.results)


def summarize(runs: dict[str, dict[str, list[dict[str, Any]]]], args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The table, and everything measured."""
    rows, values, notes = [], {}, []
    for size, sides in runs.items():
        # Per step the median over rounds, so that a disturbed round does not decide; ratios are taken step by step.
        counted = range(args.warmup, args.steps)
        step_s = {side: [statistics.median(r["step_s"][i] for r in results) for i in counted] for side, results in sides.items()}
        waits = [wait for r in sides["c"] for wait in r["data_wait_s"][args.warmup :]]
        ratio = {pair: _median_ratio(step_s[pair[0]], step_s[pair[1]]) for pair in ("ba", "cb")}
        losses = [results[0]["loss"] for results in sides.values()]
        difference = max(abs(a - b) for a, *others in zip(*losses, strict=True) for b in others)
        tokens = statistics.median(sides["a"][0]["tokens"][args.warmup :])
        rows.append(
            [
                f"{sides['a'][0]['parameters'] / 1e6:.1f}M",
                *(f"{1000 * statistics.median(step_s[side]):.0f}" for side in SIDES),
                f"{ratio['ba']:.2f}x",
                f"{ratio['cb']:.2f}x",
                f"{1000 * statistics.median(waits):.1f} / {1000 * max(waits):.0f}",
                f"{tokens:.0f}",
                f"{difference:.0e}",
            ]
        )
        values[size] = {"runs": sides, "step_s": step_s, "b_over_a": ratio["ba"], "c_over_b": ratio["cb"], "data_wait_s": waits}
        for side in ("a", "b"):
            top = ", ".join(f"`{name}` {milliseconds:.0f} ms" for name, milliseconds in sides[side][-1]["profile"][:6])
            notes.append(f"- {size}, {SIDES[side]}: {top}")
    times = [f"({key}) {name}, ms" for key, name in SIDES.items()]
    header = ["model", *times, "b/a", "c/b", "(c) waits for data, ms: median / most", "tokens", "loss differs by"]
    lines = [
        f"One worker with {args.threads} thread(s), fp32, no gradient checkpointing; {args.pairs_per_step} pairs a step in micro-batches "
        f"of {args.tokens_per_microbatch} tokens, the same on every side; {args.steps - args.warmup} measured steps after {args.warmup} "
        f"for warm-up, {args.rounds} round(s). Times are medians; ratios are the median over steps.",
        "",
        common.table(header, rows),
        "",
        "One step under cProfile, time inside each function itself:",
        "",
        *notes,
    ]
    return "\n".join(lines), values


def _median_ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


if __name__ == "__main__":
    given = common.worker_arguments()
    if given is None:
        main()
    else:
        given[1].write_text(json.dumps(work(given[0])), encoding="utf-8")
