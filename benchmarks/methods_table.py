"""Every method on the generated world: accuracy and Kendall's tau against the true reward, one backbone, one budget of training tokens.

    python benchmarks/methods_table.py

Each method trains by its recipe over jobs/recipes/demo.yaml, as `rayward train` does, and scores the completions of new prompts. Needs no
data. The pairs are two of each ranking's completions, so methods on pairs see more prompts for their tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "jobs" / "recipes"
PAIRS = ["data.train=[runs/demo/data/train.jsonl]", "data.validation=[runs/demo/data/validation.jsonl]", "data.format=trl"]
# name -> (recipe over the demo, further settings, what it learns from)
METHODS: dict[str, tuple[str | None, list[str], str]] = {
    "untrained": (None, ["training.learning_rate=1e-12"], "nothing"),
    "Bradley-Terry, pairs": (None, PAIRS, "pairs"),
    "margin (large)": ("margin", [], "pairs with strength"),
    "scaled": ("scaled", [], "pairs with strength"),
    "all pairs, by prompt": (None, [], "rankings"),
    "all pairs, by pair": ("bradley_terry_pairs", [], "rankings"),
    "Plackett-Luce": ("plackett_luce", [], "rankings"),
    "regression": ("regression", [], "attribute ratings"),
    "outcome": ("outcome", [], "right or wrong"),
    "outcome, every token": ("outcome_tokens", [], "right or wrong"),
    "process": ("process", [], "labels of steps"),
    "all pairs, language loss": ("language_auxiliary", [], "rankings"),
}
NUM_TRAIN, NUM_TEST, SEED, TEST_SEED = 24_000, 1_000, 0, 7


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one method in this process and judge it."""
    import os

    os.environ["RAY_ADDRESS"] = "local"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.chdir(spec["directory"])
    from rayward.config.load import load_config
    from rayward.data.prepare.job import prepare
    from rayward.workflows.train import train_pipeline

    recipe, settings, _ = METHODS[spec["side"]]
    files = [RECIPES / "demo.yaml", *([RECIPES / "methods" / f"{recipe}.yaml"] if recipe else [])]
    name = "".join(char if char.isalnum() else "_" for char in spec["side"])
    overrides = [*settings, f"run.name={name}", "checkpoint.every_steps=100000", "training.evaluate_every_steps=null"]
    manifest = prepare(load_config(files, overrides)).manifest
    config = load_config(files, overrides)
    tokens_per_step = manifest.total_train_tokens / manifest.num_train * config.training.comparisons_per_step
    steps = 1 if spec["side"] == "untrained" else round(spec["tokens"] / tokens_per_step)
    config = load_config(files, [*overrides, f"training.max_steps={steps}"])
    train_pipeline(config, export_to=None, evaluation=False)
    lines = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    return {**judge(Path("runs", name, "export")), "steps": steps, "final_accuracy": trained[-1]["accuracy"]}


def judge(export: Path) -> dict[str, Any]:
    """Pairs and taus against the true reward on new prompts, by prompt."""
    from rayward.demo.world import generate, true_reward
    from rayward.evaluation.statistics import kendall_tau, pair_differences
    from rayward.scoring.scorer import ScoreItem, Scorer

    rows = list(generate(NUM_TEST, TEST_SEED))
    items = [ScoreItem(tuple(row["prompt"]), tuple(row["completions"])) for row in rows]
    correct, pairs, taus = [], [], []
    for row, result in zip(rows, Scorer.load(export, device="cpu").score(items), strict=True):
        assert result.rewards is not None
        ranks = [-true_reward(row["prompt"], text) for text in row["completions"]]
        differences = pair_differences(result.rewards, ranks)
        correct.append(int((differences > 0).sum()))
        pairs.append(len(differences))
        tau = kendall_tau(result.rewards, ranks)
        taus.append(0.0 if math.isnan(tau) else tau)  # all rewards equal: no order at all
    return {"correct": correct, "pairs": pairs, "tau": taus}


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="training tokens of every method, shared prompts counted once")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    return parser.parse_args()


def main() -> None:
    """Train all methods one after the other; write table and plot."""
    args = parse()
    from rayward.demo.files import write_demo

    machine = common.describe_machine()
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="rw") as directory:
        write_demo(Path(directory) / "runs" / "demo" / "data", NUM_TRAIN, 1_000, SEED)
        for name in args.methods:
            runs[name] = common.run_side(__file__, {"side": name, "directory": directory, "tokens": args.tokens}, num_threads=1)
            print(f"{name}: {sum(runs[name]['correct']) / sum(runs[name]['pairs']):.3f}", flush=True)
    estimates = {name: _estimates(run) for name, run in runs.items()}
    rows = [
        [name, METHODS[name][2], str(runs[name]["steps"]), _shown(*found["accuracy"]), _shown(*found["tau"])]
        for name, found in estimates.items()
    ]
    text = (
        f"Two-layer decoder of jobs/recipes/demo.yaml, two workers, {args.tokens:,} training tokens for every method; "
        f"{NUM_TEST:,} new prompts with two to five completions each, no ties. Accuracy: share of pairs in the order of the "
        "true reward. Tau: Kendall's, mean over prompts, 0 where all rewards are equal. 95 % intervals resample prompts.\n\n"
        + common.table(["method", "learns from", "steps", "accuracy [95 %]", "tau [95 %]"], rows)
        + f"\n\n![accuracy by method](methods_table-{machine['date'][:10]}.png)"
    )
    summary = {name: {"steps": runs[name]["steps"], **found} for name, found in estimates.items()}
    path = common.write_results("methods_table", machine=machine, text=text, values={"methods": summary}, directory=args.results)
    _plot({name: found["accuracy"] for name, found in estimates.items()}, path.with_suffix(".png"))


def _estimates(run: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    from rayward.evaluation.statistics import bootstrap_ratio

    accuracy = bootstrap_ratio(run["correct"], run["pairs"])
    tau = bootstrap_ratio(run["tau"], [1.0] * len(run["tau"]), bounds=(-1.0, 1.0))
    mean_tau = sum(run["tau"]) / len(run["tau"])
    return {"accuracy": (sum(run["correct"]) / sum(run["pairs"]), *accuracy), "tau": (mean_tau, *tau)}


def _shown(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _plot(values: dict[str, tuple[float, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(values)[::-1]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.5 * len(names) + 1.2), layout="constrained")
    means = [values[name][0] for name in names]
    errors = [[values[n][0] - values[n][1] for n in names], [values[n][2] - values[n][0] for n in names]]
    axes.errorbar(means, range(len(names)), xerr=errors, fmt="o", color="#1f5f8b", capsize=3)
    axes.axvline(0.5, color="#9aa5b1", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("accuracy against the true reward, 95 % interval (dashed: chance)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e4e8ec")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    given = common.worker_arguments()
    if given is None:
        main()
    else:
        given[1].write_text(json.dumps(work(given[0])), encoding="utf-8")
