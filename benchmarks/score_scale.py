"""Rows per second of `rayward score` on a file against the bare forward of the same scorer on the same rows, encoded beforehand.

    python benchmarks/score_scale.py --data DATA

Three sides, each in a process of its own with one thread, one after the other, `--rounds` times in turn:

    bare forward     the scorer's own micro-batches of token ids; nothing is read, parsed, tokenized or written
    one process      `rayward score MODEL FILE`: reads, parses, tokenizes, scores, writes JSON lines
    job on Ray       `rayward score MODEL FILE --output DIR --scorers 1`: the same in parts, by an actor, from its first part to its last

Loading the model and starting Ray do not count: they do not grow with the rows. All sides must give the same rewards.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from smollm2 import smollm2

BARE, HERE, JOB = "bare forward", "one process", "job on Ray"


def write_items(source: Path, target: Path, count: int) -> None:
    """The first pairs of the file as items: the shared turns, and both last turns."""
    with gzip.open(source, "rt", encoding="utf-8") as stream, target.open("w", encoding="utf-8") as out:
        written = 0
        for number, line in enumerate(stream):
            row = json.loads(line)
            turns = [re.split(r"\n\n(Human|Assistant): ?", row[name])[1:] for name in ("chosen", "rejected")]
            shared = turns[0][:-2]
            if turns[1][:-2] != shared or not shared or not all(part[-1].strip() for part in turns):
                continue
            roles = {"Human": "user", "Assistant": "assistant"}
            prompt = [{"role": roles[role], "content": text.strip()} for role, text in zip(shared[::2], shared[1::2], strict=True)]
            if prompt[-1]["role"] != "user" or not all(turn["content"] for turn in prompt):
                continue
            out.write(json.dumps({"id": number, "prompt": prompt, "completions": [part[-1].strip() for part in turns]}) + "\n")
            written += 1
            if written == count:
                return
    raise SystemExit(f"{source} holds {written} pairs that can be used, {count} are needed; lower --rows")


# ---- the sides --------------------------------------------------------------------------------------------------


def run_bare(spec: dict[str, Any]) -> dict[str, Any]:
    """The forward alone, in the chunks that `rayward score` makes."""
    import torch

    from rayward.config.placement import Placement
    from rayward.config.scoring import ScoringConfig
    from rayward.scoring.lines import chunks, numbered
    from rayward.scoring.load import load_scored_model, reward_model_of
    from rayward.scoring.units import Unit, UnitValues
    from rayward.wire.items import ScoreItem
    from rayward.wire.lines import parse_line

    torch.set_num_threads(1)
    scorer = reward_model_of(load_scored_model(spec["model"], Placement(device="cpu", tokens_per_batch=spec["budget"])))
    encoded: list[list[Unit]] = []
    for chunk in chunks(numbered(Path(spec["file"]).read_bytes().splitlines())):
        items = [parse_line(line, ScoringConfig().limits).item for _, line in chunk]
        assert all(isinstance(item, ScoreItem) for item in items)
        encoded.append([unit for item in items if isinstance(item, ScoreItem) for unit in scorer.encode_item(item).units])
    scorer.forward(encoded[0][:8])
    start, cpu = time.perf_counter(), time.process_time()
    outputs = [scorer.forward(units) for units in encoded]
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    values = [value for chunk in outputs for value in chunk if isinstance(value, UnitValues)]
    rewards = [float(reward) for value in values for reward in value.outputs.flatten()]
    return {"seconds": wall, "cpu_seconds": cpu, "rewards": rewards, "tokens": sum(value.num_tokens_computed for value in values)}


def run_here(spec: dict[str, Any]) -> dict[str, Any]:
    """What the command does without an output, after the model is loaded."""
    import torch

    from rayward.config.placement import Placement
    from rayward.scoring.load import load_scored_model
    from rayward.scoring.rows import line_of
    from rayward.scoring.scorer import Scorer
    from rayward.workflows.score import ScoreOptions, find_inputs, scored_files

    torch.set_num_threads(1)
    scorer = load_scored_model(spec["model"], Placement(device="cpu", tokens_per_batch=spec["budget"]))
    assert isinstance(scorer, Scorer)
    target = Path(spec["scratch"], "here.jsonl")
    start, cpu = time.perf_counter(), time.process_time()
    with target.open("wb") as out:
        inputs = find_inputs(ScoreOptions(items=(spec["file"],)), download_to=spec["scratch"])
        for file, (rows, results) in scored_files(scorer, inputs):
            out.write(b"".join(line_of(row, result, file.uri, scorer) for row, result in zip(rows, results, strict=True)))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "rewards": _rewards(target)}


def run_on_ray(spec: dict[str, Any]) -> dict[str, Any]:
    """What the command does with an output; the clock runs from the first part's start to the last one's end."""
    import ray

    from rayward.config.placement import Placement
    from rayward.workflows.score import ScoreOptions, find_inputs, run_scores

    os.environ["RAY_ADDRESS"] = "local"
    output = str(Path(spec["scratch"], "out.jsonl"))
    options = ScoreOptions(items=(spec["file"],), output=output, rows_per_part=spec["rows_per_part"])
    start = time.perf_counter()
    inputs = find_inputs(options, download_to=spec["scratch"])
    done = run_scores(spec["model"], inputs, output, options, placement=Placement(device="cpu", tokens_per_batch=spec["budget"]))
    whole = time.perf_counter() - start
    ray.shutdown()
    return {
        "seconds": done.seconds, "cpu_seconds": done.cpu_seconds, "whole_seconds": whole, "rewards": _rewards(Path(output)),
        "driver_peak_gib": common.peak_memory_gib(),
    }  # fmt: skip


def _rewards(path: Path) -> list[float]:
    return [reward for line in path.read_text(encoding="utf-8").splitlines() for reward in json.loads(line)["rewards"]]


SIDES = {BARE: run_bare, HERE: run_here, JOB: run_on_ray}


# ---- the comparison ---------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_data_argument(parser)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens-per-batch", type=int, default=512, help="on a CPU, short rows are fastest")
    parser.add_argument("--rows-per-part", type=int, default=128)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run the sides in turn, compare rewards, write the table."""
    args = parse()
    machine = common.describe_machine()
    model = str(smollm2(args.layers, reward_head=True))
    source = common.data_file(args.data)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "items.jsonl")
        write_items(source, file, args.rows)
        for number in range(args.rounds):
            for side in SIDES:
                place = Path(scratch, f"{number}-{side.replace(' ', '-')}")
                place.mkdir()
                spec = {
                    "side": side, "model": model, "file": str(file), "scratch": str(place), "budget": args.tokens_per_batch,
                    "rows_per_part": args.rows_per_part,
                }  # fmt: skip
                found[side].append(common.run_side(__file__, spec, num_threads=1))
                print(f"round {number + 1}, {side}: {args.rows / found[side][-1]['seconds']:.2f} rows/s", flush=True)
    expected = found[BARE][0].pop("rewards")
    rows, values = [], {}
    for side, runs in found.items():
        gaps = [abs(a - b) for run in runs for a, b in zip(run.pop("rewards", expected), expected, strict=True)]
        # Of each round: what was measured next to each other in time.
        ratios = [bare["seconds"] / run["seconds"] for bare, run in zip(found[BARE], runs, strict=True)]
        cpu = [bare["cpu_seconds"] / run["cpu_seconds"] for bare, run in zip(found[BARE], runs, strict=True)]
        values[side] = {"runs": runs, "ratio": statistics.median(ratios), "largest_gap": max(gaps)}
        rows.append(
            [
                side,
                f"{args.rows / statistics.median(run['seconds'] for run in runs):.2f}",
                f"**{statistics.median(ratios):.3f}**",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
                f"{statistics.median(cpu):.3f}",
                f"{max(gaps):.1e}",
            ]
        )
    tokens = found[BARE][0]["tokens"]
    text = "\n".join(
        [
            f"{args.rows} dialogues of hh-rlhf harmless with two completions each, {tokens / args.rows:.0f} computed tokens a row; "
            f"SmolLM2-135M cut to {args.layers} layers with a reward head, fp32, one thread, {args.tokens_per_batch} tokens a forward. "
            f"Ratio: rows per second over those of the bare forward of the same round, median of {args.rounds}. The last column is the "
            "largest difference of a reward.",
            "",
            common.table(["side", "rows/s", "ratio", "of the rounds", "ratio of CPU time", "rewards differ by"], rows),
        ]
    )
    common.write_results("score_scale", machine=machine, text=text, values={"sides": values}, directory=args.results)


if __name__ == "__main__":
    given = common.worker_arguments()
    if given is None:
        main()
    else:
        spec, out = given
        out.write_text(json.dumps(SIDES[spec["side"]](spec)), encoding="utf-8")
