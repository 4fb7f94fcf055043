"""How many of the computed tokens are real, and how many are not computed at all because prompts are shared.

    python benchmarks/packing_efficiency.py --data DATA

Counts tokens; no model runs, so the figures do not depend on the machine. The yardstick pads as TRL's collator does: micro-batches of
eight comparisons in training order, every completion a row, all rows as long as the longest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from convert import convert
from smollm2 import smollm2

if TYPE_CHECKING:
    from rayward.batch.comparison import EncodedComparison

PADDED_BATCH = 8
WORLD_SIZES = (1, 8)


def padded_tokens(comparisons: Sequence[EncodedComparison]) -> int:
    """Tokens of the yardstick."""
    from rayward.batch.planner import microbatch_tokens

    return sum(microbatch_tokens(comparisons[i : i + PADDED_BATCH], "padded") for i in range(0, len(comparisons), PADDED_BATCH))


def measure(comparisons: Sequence[EncodedComparison], *, pairs_per_step: int, budget: int) -> dict[str, Any]:
    """Token counts over whole optimizer steps, planned and packed as in training."""
    from rayward.batch.layout import pack
    from rayward.batch.planner import plan_step

    result: dict[str, Any] = {
        "comparisons": len(comparisons),
        "completions": sum(c.num_completions for c in comparisons),
        "unshared": sum(c.num_tokens_unshared for c in comparisons),
        "padded": padded_tokens(comparisons),
    }
    for world_size in WORLD_SIZES:
        computed = real = slots = microbatches = 0
        for start in range(0, len(comparisons), pairs_per_step):
            step = comparisons[start : start + pairs_per_step]
            plan = plan_step(step, world_size=world_size, tokens_per_microbatch=budget)
            batches = [[pack([step[i] for i in group]) for group in rank] for rank in plan]
            computed += sum(batch.num_computed_tokens for rank in batches for batch in rank)
            real += sum(batch.num_real_tokens for rank in batches for batch in rank)
            # Ranks walk through their micro-batches in lock step: the i-th costs what its largest costs.
            slots += world_size * sum(max(batch.num_computed_tokens for batch in lane) for lane in zip(*batches, strict=True))
            microbatches += len(plan[0])
        assert real == sum(c.num_tokens for c in comparisons)
        result[f"world_{world_size}"] = {
            "computed": computed, "real": real, "efficiency": real / computed, "balance": computed / slots, "microbatches": microbatches
        }  # fmt: skip
    return result


def parse() -> argparse.Namespace:
    """Command line."""
    from rayward.config.training import TrainingConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_data_argument(parser)
    parser.add_argument("--tokens-per-microbatch", type=int, default=TrainingConfig().tokens_per_microbatch)
    parser.add_argument("--comparisons-per-step", type=int, default=TrainingConfig().comparisons_per_step)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def main() -> None:
    """Prepare every file, count, write the table."""
    args = parse()
    machine = common.describe_machine()
    model = str(smollm2(1))
    files = {"hh-rlhf harmless, pairs": str(common.data_file(args.data))}
    names = {"ethics_util_test": "ETHICS utilitarianism, pairs", "rmb_bon": "RMB best-of-n, K = 3-8"}
    files |= {names[path.stem]: str(path) for path in convert(args.data, common.cache_directory() / "converted") if path.stem in names}
    rows, values = [], {}
    for name, path in files.items():
        prepared = common.prepare_pairs([path], tokenizer=model, max_tokens=args.max_tokens)
        comparisons = common.read_pairs(prepared.directory)
        fitting = [c for c in comparisons if c.num_tokens <= args.tokens_per_microbatch]
        value = measure(fitting, pairs_per_step=args.comparisons_per_step, budget=args.tokens_per_microbatch)
        value["left_out"] = len(comparisons) - len(fitting)
        values[name] = value
        one, many = (value[f"world_{size}"] for size in WORLD_SIZES)
        rows.append(
            [
                name,
                f"{value['comparisons']:,}",
                f"{one['computed'] / value['comparisons']:.0f}",
                f"{min(one['efficiency'], many['efficiency']):.4f}",
                f"{1 - one['real'] / value['unshared']:.0%}",
                f"{value['unshared'] / value['padded']:.2f}",
                f"**{value['padded'] / one['computed']:.2f}x**",
                f"{many['balance']:.3f}",
                value["left_out"],
            ]
        )
    header = [
        "data",
        "comparisons",
        "computed tokens each",
        "share that is real",
        "saved by sharing",
        "padded: share that is real",
        "padded / ours",
        f"balance over {WORLD_SIZES[-1]} ranks",
        "over budget",
    ]
    text = "\n".join(
        [
            f"Tokenizer of SmolLM2, at most {args.max_tokens} tokens a conversation; {args.comparisons_per_step} comparisons a step, "
            f"{args.tokens_per_microbatch} tokens a micro-batch (the defaults); padded: {PADDED_BATCH} comparisons a micro-batch, every "
            "completion a row. Balance: computed tokens over what ranks in lock step have time for. Comparisons over budget do not count.",
            "",
            common.table(header, rows),
        ]
    )
    common.write_results("packing_efficiency", machine=machine, text=text, values={"data": values}, directory=args.results)


if __name__ == "__main__":
    main()
