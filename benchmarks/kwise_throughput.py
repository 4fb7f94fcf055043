"""Completions per second on rankings of K, against TRL's RewardTrainer on their C(K, 2) pairs and against our own unshared path.

    python benchmarks/kwise_throughput.py --data DATA

Prompts and texts are real (hh-rlhf harmless): a ranking is a prompt, its two completions, and K - 2 completions of other rows; the
order is arbitrary, because only the work is measured. Every side minimises the same loss, the mean over all pairs of the step, so the
losses must agree. The last side is the Plackett-Luce objective: the same forward, another loss.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import train_throughput
from smollm2 import smollm2

if TYPE_CHECKING:
    from rayward.batch.comparison import EncodedComparison

ALL_PAIRS = {"type": "bradley_terry", "balance": "pair", "margin": "none"}
OURS = {
    "packed, nothing shared": ALL_PAIRS,
    "packed, prefix shared": ALL_PAIRS,
    "the same, DeepSpeed ZeRO-3": ALL_PAIRS,
    "Plackett-Luce": {"type": "plackett_luce"},
}
SAME_FORWARD = {"Plackett-Luce": "packed, prefix shared"}
TRL = "TRL on all pairs"
LARGEST_TRL_BATCH = 8


def rankings(prepared: str, num_rankings: int, size: int) -> list[EncodedComparison]:
    """K completions each; the shared prefix is that of the ids."""
    import numpy as np

    from rayward.batch.comparison import EncodedComparison as Encoded
    from rayward.batch.comparison import Labels, shared_prefix_length

    pairs = common.read_pairs(prepared, num_rankings * size)
    result = []
    for index in range(num_rankings):
        own = pairs[index]
        others = pairs[num_rankings + index * (size - 2) : num_rankings + (index + 1) * (size - 2)]
        branches = [*own.branch_ids, *(other.branch_ids[0] for other in others)]
        ids = [[*own.prefix_ids.tolist(), *branch.tolist()] for branch in branches]
        shared = shared_prefix_length(ids)
        labels = Labels(ranks=np.arange(size, dtype=np.float32))
        rows = tuple(np.array(row[shared:], dtype=np.int32) for row in ids)
        result.append(Encoded(own.id, np.array(ids[0][:shared], dtype=np.int32), rows, labels))
    return result


def pairs_of(ranking: EncodedComparison) -> list[EncodedComparison]:
    """All C(K, 2) pairs, the better completion first."""
    import numpy as np

    from rayward.batch.comparison import EncodedComparison as Encoded
    from rayward.batch.comparison import Labels

    label = Labels(ranks=np.array([0, 1], dtype=np.float32))
    both = combinations(ranking.branch_ids, 2)
    return [Encoded(f"{ranking.id}-{i}", ranking.prefix_ids, pair, label) for i, pair in enumerate(both)]


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """One side in this process."""
    ranked = rankings(spec["prepared"], spec["steps"] * spec["comparisons_per_step"], spec["size"])
    if spec["side"] == TRL:
        result = train_throughput.run_trl(spec, [pair for ranking in ranked for pair in pairs_of(ranking)])
    else:
        side = SAME_FORWARD.get(spec["side"], spec["side"])
        result = train_throughput.run_ours({**spec, "side": side}, ranked, OURS[spec["side"]])
    return {**result, "training_peak_gib": common.peak_memory_gib()}


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_data_argument(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 7, 9], help="completions K of a ranking")
    parser.add_argument("--rankings-per-step", type=int, default=2)
    parser.add_argument("--layers", type=int, default=10, help="SmolLM2-135M cut to its first N layers (30: all)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps, warm-up included")
    parser.add_argument("--warmup", type=int, default=1, help="first steps that do not count")
    parser.add_argument("--tokens-per-microbatch", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run all sides for every K and write the table."""
    args = parse()
    model = smollm2(args.layers, reward_head=True)
    source = str(common.data_file(args.data))
    prepared = common.prepare_pairs([source], tokenizer=str(model), max_tokens=args.max_tokens, data_format="hh_rlhf")
    machine = common.describe_machine()
    rows: list[list[str]] = []
    values: dict[str, Any] = {}
    for size in args.sizes:
        num_pairs = args.rankings_per_step * size * (size - 1) // 2
        spec = {
            "model": str(model),
            "prepared": prepared.directory,
            "size": size,
            "steps": args.steps,
            "warmup": args.warmup,
            "pairs_per_step": num_pairs,
            "comparisons_per_step": args.rankings_per_step,
            "trl_batch": max(batch for batch in range(1, LARGEST_TRL_BATCH + 1) if num_pairs % batch == 0),
            "tokens_per_microbatch": args.tokens_per_microbatch,
            "max_tokens": args.max_tokens,
            "threads": args.threads,
            "gradient_checkpointing": True,
            "port": 29613,
        }
        runs = {}
        for name in (TRL, *OURS):
            runs[name] = common.run_side(__file__, {**spec, "side": name}, num_threads=args.threads)
            print(f"K = {size}: {name}: {sum(runs[name]['step_s'][args.warmup :]):.1f} s measured", flush=True)
        rows += _rows(size, runs, args)
        values[str(size)] = runs
    header = [
        "K",
        "side",
        "completions/s",
        "ratio to TRL",
        "over steps",
        "ratio to unshared",
        "tokens per ranking",
        "peak GiB",
        "loss differs by",
    ]
    text = (
        f"SmolLM2-135M, first {args.layers} layers, fp32, one process with {args.threads} threads, gradient checkpointing on every "
        f"side; {args.steps - args.warmup} measured optimizer steps of {args.rankings_per_step} rankings, {args.warmup} for warm-up. Real "
        "prompts and texts (hh-rlhf harmless), completions beyond the second taken from other rows, arbitrary order. TRL trains the "
        f"C(K, 2) pairs in its largest micro-batch up to {LARGEST_TRL_BATCH} that divides them. Ratios are medians over the steps; "
        "tokens pass through the model, padding included.\n\n" + common.table(header, rows)
    )
    common.write_results("kwise_throughput", machine=machine, text=text, values={"runs": values}, directory=args.results)


def _rows(size: int, runs: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[list[str]]:
    measured = slice(args.warmup, None)
    times = {name: run["step_s"][measured] for name, run in runs.items()}
    num_rankings = args.rankings_per_step * len(times[TRL])
    rows = []
    for name, run in runs.items():
        to_trl = [a / b for a, b in zip(times[TRL], times[name], strict=True)]
        to_unshared = statistics.median(a / b for a, b in zip(times["packed, nothing shared"], times[name], strict=True))
        same_loss = name == TRL or OURS[name] is ALL_PAIRS
        difference = max(abs(a - b) for a, b in zip(runs[TRL]["loss"], run["loss"], strict=True)) if same_loss else None
        rows.append(
            [
                str(size),
                name,
                f"{num_rankings * size / sum(times[name]):.2f}",
                f"**{statistics.median(to_trl):.1f}x**",
                f"{min(to_trl):.1f}-{max(to_trl):.1f}",
                f"{to_unshared:.2f}x",
                f"{sum(run['computed_tokens'][measured]) / num_rankings:.0f}",
                f"{run['training_peak_gib']:.2f}",
                "another loss" if difference is None else f"{difference:.1e}",
            ]
        )
    return rows


if __name__ == "__main__":
    given = common.worker_arguments()
    if given is None:
        main()
    else:
        import json

        given[1].write_text(json.dumps(work(given[0])), encoding="utf-8")
