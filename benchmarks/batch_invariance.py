#!/usr/bin/env python3
"""What bitwise the same rewards in any company cost: `batch_invariant` against the ordinary scorer, one process, one thread.

    python benchmarks/batch_invariance.py --data DATA

Real dialogues (hh-rlhf harmless) with n completions of each prompt. Both scorers hold the same weights; each scores all items in one call,
then again in random company, and the rewards of both calls are compared bit by bit. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from score_scale import write_items
from serve_throughput import make_items
from smollm2 import smollm2

SIZES = (1, 4, 16)


def price(model: str, items: list[dict[str, Any]], *, tokens_per_batch: int, batch_invariant: bool) -> dict[str, Any]:
    """Completions a second, tokens that went through the model, and how many rewards change by how much in other company.

    Args:
        items: bodies of `/v1/score` items.
    """
    import torch

    from rayward.config.placement import Placement
    from rayward.scoring.load import load_scored_model
    from rayward.wire.lines import parse_line
    from rayward.wire.rules import Limits

    torch.set_num_threads(1)
    scorer = load_scored_model(model, Placement(device="cpu", tokens_per_batch=tokens_per_batch, batch_invariant=batch_invariant))
    parsed: list[Any] = [parse_line(json.dumps(item).encode(), Limits()).item for item in items]
    scorer.score(parsed[:4])
    start = time.process_time()
    results = scorer.score(parsed)
    seconds = time.process_time() - start
    generator, differences = random.Random(0), []
    order = list(range(len(parsed)))
    generator.shuffle(order)
    while order:
        taken, order = order[: (size := generator.randint(1, 8))], order[size:]
        for index, again in zip(taken, scorer.score([parsed[index] for index in taken]), strict=True):
            differences += [abs(a - b) for a, b in zip(results[index].rewards or (), again.rewards or (), strict=True)]
    return {
        "completions_per_s": len(differences) / seconds,
        "tokens": sum(result.tokens for result in results),
        "tokens_computed": sum(result.tokens_computed for result in results),
        "rewards": len(differences),
        "changed": sum(difference > 0 for difference in differences),
        "largest_change": max(differences),
    }


def main() -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_data_argument(parser)
    parser.add_argument("--model", help="directory [default: SmolLM2-135M, --layers of it, random head]")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--completions", type=int, default=192, help="of each size (default: %(default)s)")
    parser.add_argument("--tokens-per-batch", type=int, default=512)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    machine, model = common.describe_machine(), args.model or str(smollm2(args.layers, reward_head=True))
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "items.jsonl")
        write_items(common.data_file(args.data), file, 256)
        for size in SIZES:
            items = make_items(file, size, max(8, args.completions // size))
            found[str(size)] = {
                name: price(model, items, tokens_per_batch=args.tokens_per_batch, batch_invariant=name == "batch_invariant")
                for name in ("ordinary", "batch_invariant")
            }
    rows = []
    for name, both in found.items():
        ordinary, invariant = both["ordinary"], both["batch_invariant"]
        rows.append(
            [
                f"n = {name}",
                f"{ordinary['completions_per_s']:.1f}",
                f"{invariant['completions_per_s']:.1f}",
                f"{invariant['completions_per_s'] / ordinary['completions_per_s']:.2f}",
                f"{ordinary['changed']} of {ordinary['rewards']} by up to {ordinary['largest_change']:.0e}",
                f"{invariant['changed']} of {invariant['rewards']}",
            ]
        )
    header = ["", "ordinary, completions/s", "batch_invariant", "share", "changed in other company, ordinary", "batch_invariant"]
    text = f"{Path(model).name}, fp32, one thread, {args.tokens_per_batch} tokens a forward.\n\n{common.table(header, rows)}"
    common.write_results("batch_invariance", machine=machine, text=text, values=found, directory=args.results)


if __name__ == "__main__":
    main()
