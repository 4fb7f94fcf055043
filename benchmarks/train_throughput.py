"""Training pairs per second against TRL's RewardTrainer: same model, weights, pairs, order, steps and optimizer; fp32, one worker.

    python benchmarks/train_throughput.py --data DATA

Every side runs in a process of its own, one after the other, `--rounds` times in turn. Each optimizer step holds the same pairs on
every side, so times are compared step by step and the losses must agree: that is how one sees that the same work was done.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import common
from smollm2 import smollm2

if TYPE_CHECKING:
    from rayward.batch.comparison import EncodedComparison
    from rayward.data.stream.shares import StepShare

LEARNING_RATE = 1e-5
BETAS = (0.9, 0.95)
EPSILON = 1e-8
CLIP_NORM = 1.0
TRL_DEFAULT_BATCH = 8

# side -> (engine, layout, how micro-batches are made); the last one is what `rayward train` does.
OURS: dict[str, tuple[str, Literal["packed", "padded"], str]] = {
    "rows as TRL pads them": ("torch", "padded", "given"),
    "rows sorted by length": ("torch", "padded", "planned"),
    "packed, nothing shared": ("torch", "packed", "unshared"),
    "packed, prefix shared": ("torch", "packed", "planned"),
    "the same, DeepSpeed ZeRO-3": ("deepspeed", "packed", "planned"),
}
PRODUCT = "the same, DeepSpeed ZeRO-3"
PLAIN = "packed, prefix shared"


class StepClock:
    """Wall and processor seconds from the end of one optimizer step to the end of the next, loading included."""

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self._marks: list[tuple[float, float]] = []

    def start(self) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def step(self) -> None:
        """An optimizer step is done."""
        self._marks.append((time.perf_counter(), time.process_time()))
        if len(self._marks) == self._warmup + 1:
            common.reset_peak_memory()

    def read(self) -> dict[str, list[float]]:
        """`step_s` and `step_cpu_s`, one number per step."""
        steps = list(zip(self._marks, self._marks[1:], strict=False))
        return {"step_s": [b[0] - a[0] for a, b in steps], "step_cpu_s": [b[1] - a[1] for a, b in steps]}


# ---- the sides --------------------------------------------------------------------------------------------------


def run_trl(spec: dict[str, Any], pairs: list[EncodedComparison]) -> dict[str, Any]:
    """TRL's trainer on token ids that are the concatenation of prefix and branch, `pairs_per_step` of them a step, in order."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback, TrainerControl, TrainerState
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(spec["threads"])
    rows: dict[str, list[list[int]]] = {"chosen_ids": [], "rejected_ids": []}
    for pair in pairs:
        chosen, rejected = order_of(pair)
        rows["chosen_ids"].append([*pair.prefix_ids.tolist(), *pair.branch_ids[chosen].tolist()])
        rows["rejected_ids"].append([*pair.prefix_ids.tolist(), *pair.branch_ids[rejected].tolist()])
    clock = StepClock(spec["warmup"])
    losses: list[float] = []

    class Clock(TrainerCallback):
        """Reads the clock after every optimizer step."""

        def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            clock.step()

        def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    batch = spec["trl_batch"]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = RewardConfig(
            output_dir=scratch,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=spec["pairs_per_step"] // batch,
            max_steps=spec["steps"],
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPSILON,
            max_grad_norm=CLIP_NORM,
            gradient_checkpointing=spec["gradient_checkpointing"],
            max_length=None,
            train_sampling_strategy="sequential",
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(spec["model"], dtype=torch.float32),
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            processing_class=AutoTokenizer.from_pretrained(spec["model"]),
            callbacks=[Clock()],
        )
        trainer.train()
    return {**clock.read(), "loss": losses, "computed_tokens": _padded_tokens(rows, spec["pairs_per_step"], batch)}


def _padded_tokens(rows: dict[str, list[list[int]]], pairs_per_step: int, batch: int) -> list[int]:
    lengths = [max(len(c), len(r)) for c, r in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
    per_batch = [2 * len(lengths[i : i + batch]) * max(lengths[i : i + batch]) for i in range(0, len(lengths), batch)]
    count = pairs_per_step // batch
    return [sum(per_batch[i : i + count]) for i in range(0, len(per_batch), count)]


def run_ours(spec: dict[str, Any], comparisons: list[EncodedComparison], objective: dict[str, Any] | None = None) -> dict[str, Any]:
    """Rayward's loop in one process without Ray, in one of the layouts of `OURS`, `comparisons_per_step` of them a step, in order."""
    import torch

    from rayward.config.load import parse_config
    from rayward.config.run import Config
    from rayward.contract.contract import Contract
    from rayward.model.build import build_reward_model, resolve_hf_config
    from rayward.model.pretrained import weight_source
    from rayward.objectives.table import Objective
    from rayward.training.engines.build import build_engine, initialize, pretrained
    from rayward.training.engines.deepspeed import init_process_group
    from rayward.training.loop import Schedule, run_steps

    torch.set_num_threads(spec["threads"])
    engine_name, layout, microbatches = OURS[spec["side"]]
    config = parse_config(
        {
            "model": {"path": spec["model"], "max_tokens": spec["max_tokens"]},
            "objective": objective or {},
            "training": {
                "engine": engine_name,
                "comparisons_per_step": spec["comparisons_per_step"],
                "tokens_per_microbatch": spec["tokens_per_microbatch"],
                "learning_rate": LEARNING_RATE,
                "weight_decay": 0.0,
                "beta1": BETAS[0],
                "beta2": BETAS[1],
                "epsilon": EPSILON,
                "clip_norm": CLIP_NORM,
                "gradient_checkpointing": spec["gradient_checkpointing"],
            },
        },
        Config,
    )
    contract = Contract.load(Path(spec["prepared"]))
    hf_config = resolve_hf_config(config.model, contract, vocab_size=1)
    if engine_name == "deepspeed":
        init_process_group(rank=0, world_size=1, master_port=spec["port"])
    engine = build_engine(
        lambda dtype: build_reward_model(hf_config, max_tokens=contract.max_tokens, dtype=dtype, layout=layout), config.training
    )
    initialize(engine, weight_source(pretrained(engine), config.model, seed=0))
    measured: list[dict[str, float]] = []
    clock = StepClock(spec["warmup"])

    def on_step(step: int, metrics: dict[str, float]) -> None:
        clock.step()
        measured.append(metrics)

    clock.start()
    run_steps(
        engine,
        _shares(comparisons, spec, layout, microbatches, contract.pad_token_id),
        objective=Objective(config.objective),
        schedule=Schedule(LEARNING_RATE, spec["steps"], warmup_fraction=0.0, min_lr_fraction=1.0),
        first_step=0,
        stop_step=spec["steps"],
        on_step=on_step,
    )
    return {
        **clock.read(),
        "loss": [m["loss"] for m in measured],
        "computed_tokens": [round(m["tokens"] / (1.0 - m["padding_fraction"])) for m in measured],
    }


def _shares(
    comparisons: list[EncodedComparison], spec: dict[str, Any], layout: Any, microbatches: str, pad_token_id: int
) -> Iterator[StepShare]:
    # Planned and packed when the loop asks for it, so that its cost is inside the step.
    from rayward.batch.layout import pack
    from rayward.batch.planner import plan_step
    from rayward.data.stream.shares import StepShare

    size = spec["comparisons_per_step"]
    for step in range(spec["steps"]):
        members = comparisons[step * size : (step + 1) * size]
        if microbatches == "unshared":
            members = [unshared(comparison) for comparison in members]
        if microbatches == "given":
            batch = spec["trl_batch"]
            groups = [list(range(start, start + batch)) for start in range(0, size, batch)]
        else:
            groups = plan_step(members, world_size=1, tokens_per_microbatch=spec["tokens_per_microbatch"], layout=layout)[0]
        batches = tuple(pack([members[i] for i in group], layout=layout, pad_token_id=pad_token_id) for group in groups)
        yield StepShare(step=step, rank=0, world_size=1, microbatches=batches)


def order_of(pair: EncodedComparison) -> tuple[int, int]:
    """(better, worse) completion of a pair."""
    assert pair.labels.ranks is not None
    return (0, 1) if pair.labels.ranks[0] < pair.labels.ranks[1] else (1, 0)


def unshared(comparison: EncodedComparison) -> EncodedComparison:
    """The same conversations without a common prefix."""
    import numpy as np

    from rayward.batch.comparison import EncodedComparison as Encoded

    branches = tuple(np.concatenate([comparison.prefix_ids, branch]) for branch in comparison.branch_ids)
    return Encoded(comparison.id, comparison.prefix_ids[:0], branches, comparison.labels)


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """One side in this process."""
    pairs = common.read_pairs(spec["prepared"], spec["steps"] * spec["pairs_per_step"])
    result = run_trl(spec, pairs) if spec["side"].startswith("TRL") else run_ours(spec, pairs)
    return {**result, "training_peak_gib": common.peak_memory_gib()}


# ---- the comparison ---------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_data_argument(parser)
    parser.add_argument("--layers", type=int, default=10, help="SmolLM2-135M cut to its first N layers (30: all)")
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=1, help="first steps that do not count")
    parser.add_argument("--pairs-per-step", type=int, default=32)
    parser.add_argument("--trl-batches", type=int, nargs="+", default=[TRL_DEFAULT_BATCH, 2], help="pairs in TRL's micro-batch (default 8)")
    parser.add_argument("--tokens-per-microbatch", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="times every side runs; the median of a step counts")
    parser.add_argument("--no-gradient-checkpointing", action="store_true", help="off on both sides (both have it on by default)")
    parser.add_argument("--sides", nargs="+", help="run only sides whose name contains one of these texts")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run all sides and write the table."""
    args = parse()
    model = smollm2(args.layers, reward_head=True)
    source = str(common.data_file(args.data))
    prepared = common.prepare_pairs([source], tokenizer=str(model), max_tokens=args.max_tokens, data_format="hh_rlhf")
    machine = common.describe_machine()
    base = {
        "model": str(model),
        "prepared": prepared.directory,
        "steps": args.steps,
        "warmup": args.warmup,
        "pairs_per_step": args.pairs_per_step,
        "comparisons_per_step": args.pairs_per_step,
        "trl_batch": TRL_DEFAULT_BATCH,
        "tokens_per_microbatch": args.tokens_per_microbatch,
        "max_tokens": args.max_tokens,
        "threads": args.threads,
        "gradient_checkpointing": not args.no_gradient_checkpointing,
        "port": 29611,
    }
    sides = {f"TRL, {batch} pairs a micro-batch": {**base, "trl_batch": batch} for batch in args.trl_batches}
    sides |= dict.fromkeys(OURS, base)
    if args.sides:
        sides = {name: spec for name, spec in sides.items() if any(text in name for text in args.sides)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for round_number in range(args.rounds):
        for name, spec in sides.items():
            result = common.run_side(__file__, {**spec, "side": name}, num_threads=args.threads)
            runs[name].append(result)
            seconds = sum(result["step_s"][args.warmup :])
            print(f"round {round_number + 1}: {name}: {seconds:.1f} s measured, peak {result['training_peak_gib']:.2f} GiB", flush=True)
    text, values = summarize(runs, args)
    common.write_results("train_throughput", machine=machine, text=text, values=values, directory=args.results)


def summarize(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The table, and everything measured."""
    measured = args.steps - args.warmup
    pairs = measured * args.pairs_per_step
    sides: dict[str, dict[str, Any]] = {}
    for name, results in runs.items():
        step_s, step_cpu_s = (
            [statistics.median(r[kind][args.warmup + i] for r in results) for i in range(measured)] for kind in ("step_s", "step_cpu_s")
        )
        sides[name] = {
            "step_s": step_s,
            "step_cpu_s": step_cpu_s,
            "pairs_per_s": pairs / sum(step_s),
            "computed_tokens": sum(results[0]["computed_tokens"][args.warmup :]),
            "peak_gib": max(r["training_peak_gib"] for r in results),
            "loss": results[0]["loss"],
            "runs": results,
        }
    baseline = next(iter(sides))
    reference = sides[baseline]
    rows = []
    for name, side in sides.items():
        ratios = [a / b for a, b in zip(reference["step_s"], side["step_s"], strict=True)]
        side["ratio"] = statistics.median(ratios)
        side["loss_difference"] = max(abs(a - b) for a, b in zip(reference["loss"], side["loss"], strict=True))
        rows.append(
            [
                name,
                f"{side['pairs_per_s']:.2f}",
                f"{side['ratio']:.2f}x",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{sum(reference['step_cpu_s']) / sum(side['step_cpu_s']):.2f}x",
                f"{side['computed_tokens'] / pairs:.0f}",
                f"{side['computed_tokens'] / sum(side['step_s']):.0f}",
                f"{side['peak_gib']:.2f}",
                f"{side['loss_difference']:.1e}",
            ]
        )
    header = ["side", "pairs/s", "ratio", "over steps", "ratio of CPU time", "tokens per pair", "tokens/s", "peak GiB", "loss differs by"]
    checkpointing = "off" if args.no_gradient_checkpointing else "on"
    lines = [
        f"SmolLM2-135M, first {args.layers} layers, fp32, one process with {args.threads} threads; {measured} measured optimizer steps of "
        f"{args.pairs_per_step} real pairs (hh-rlhf harmless), {args.warmup} for warm-up, {args.rounds} round(s). AdamW, learning rate "
        f"{LEARNING_RATE:g} constant, no weight decay, clip {CLIP_NORM:g}; gradient checkpointing {checkpointing} on every side; our "
        f"micro-batches: {args.tokens_per_microbatch} tokens. The ratio is the median over steps of the same pairs, against the first "
        "line; tokens are those that pass through the model, padding included; the peak is the resident memory after the warm-up.",
        "",
        common.table(header, rows),
        *_breakdown(sides, baseline),
    ]
    return "\n".join(lines), {"settings": {k: str(v) for k, v in vars(args).items() if k not in ("data", "results")}, "sides": sides}


def _breakdown(sides: dict[str, dict[str, Any]], baseline: str) -> list[str]:
    chain = [baseline, *(name for name in OURS if name in sides)]
    if not baseline.startswith("TRL") or len(chain) < len(OURS) + 1:
        return []
    labels = ["the trainer around the model", "rows sorted by length", "padding removed", "prefix shared", "ZeRO-3 for the plain engine"]
    lines = ["", "Where the factor comes from (each line against the one before, the product is the whole):", ""]
    for label, before, after in zip(labels, chain, chain[1:], strict=False):
        lines.append(f"- {label}: {sides[after]['pairs_per_s'] / sides[before]['pairs_per_s']:.2f}x")
    best = max((name for name in sides if name.startswith("TRL")), key=lambda name: sides[name]["pairs_per_s"])
    for name in (PLAIN, PRODUCT):
        memory = "less or equal" if sides[name]["peak_gib"] <= sides[baseline]["peak_gib"] else "MORE"
        lines.append(
            f"- **{name}: {sides[name]['ratio']:.2f}x** TRL with its default micro-batch, "
            f"{sides[name]['pairs_per_s'] / sides[best]['pairs_per_s']:.2f}x its fastest here ({best}); peak memory: {memory}"
        )
    return lines


if __name__ == "__main__":
    given = common.worker_arguments()
    if given is None:
        main()
    else:
        import json

        given[1].write_text(json.dumps(work(given[0])), encoding="utf-8")
