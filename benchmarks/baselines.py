"""What a reward model must beat, from `scores.jsonl` of an evaluation: the longer completion, and for ratings what needs no model.

    python benchmarks/baselines.py runs/arguments/export-evaluation
    python benchmarks/baselines.py runs/utterances/again --train converted/unieval_utterances_train.jsonl --rating overall

The first table orders the completions of a prompt: Kendall's tau (more than two completions) and accuracy of pairs. With --train, the
second compares the rewards with the ratings that ranked the completions: squared error, and Pearson's and Spearman's correlation over all
completions. The evaluation is then of the rated file itself (`rayward evaluate … --attributes overall --rank-by overall`): prepared data
keep the order of the ratings only. The baselines are the mean rating of the training file, and a line in the number of characters fitted to
it. Brackets: 95 %, prompts drawn again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

import common
from rayward.evaluation.records import Estimate, Record
from rayward.evaluation.run import SCORES_FILE, read_scores
from rayward.evaluation.statistics import spearman
from rayward.evaluation.summary import summarise

SAMPLES = 2000
Floats = npt.NDArray[np.float64]


def order_table(records: Sequence[Record]) -> str:
    """Model and "the longer one wins" on the same prompts."""
    by_length = [record.model_copy(update={"rewards": tuple(float(n) for n in record.lengths)}) for record in records]
    rows = []
    for name, judged in (("model", records), ("longer one wins", by_length)):
        result = summarise(judged, model=name, model_version="", data=())
        row = result.rows[0]
        rows.append(
            (name, row.num_pairs, row.num_ties, row.accuracy, f"{row.accuracy_ties_half:.3f}", result.num_rankings, result.kendall_tau)
        )
    return common.table(("", "pairs", "ties", "accuracy [95 %]", "ties half", "rankings", "Kendall's tau [95 %]"), rows)


def rating_table(records: Sequence[Record], train: Sequence[tuple[int, float]]) -> str:
    """Rewards as predictions of the ratings, beside what the (length, rating) of the training completions alone predict."""
    lengths, ratings = np.asarray(train, dtype=np.float64).T
    slope, start = np.polyfit(lengths, ratings, 1)
    clusters: dict[str, list[int]] = defaultdict(list)
    truth: list[float] = []
    reward: list[float] = []
    length: list[float] = []
    for record in records:
        if record.rewards is not None and record.ranks is not None:
            if max(record.ranks) > 0:
                raise SystemExit("the ranks are no ratings: evaluate the rated file with --attributes and --rank-by")
            clusters[record.prompt_key] += range(len(truth), len(truth) + len(record.ranks))
            truth += [-rank for rank in record.ranks]  # `rank_by` ranks by the negated rating
            reward += record.rewards
            length += record.lengths
    target = np.asarray(truth)
    predictions = {
        "model": np.asarray(reward),
        "training mean": np.full(len(target), ratings.mean()),
        "line in the length": start + slope * np.asarray(length),
    }
    rng = np.random.default_rng(0)
    members = [np.asarray(rows) for rows in clusters.values()]
    drawn = [np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]) for _ in range(SAMPLES)]

    def over_mean(predicted: Floats, given: Floats) -> float:
        return squared_error(predicted, given) - squared_error(np.full(len(given), ratings.mean()), given)

    def estimate(statistic: Callable[[Floats, Floats], float], predicted: Floats) -> Estimate:
        if np.ptp(predicted) == 0 and statistic in (pearson, spearman):
            return Estimate(value=None)
        low, high = np.quantile([statistic(predicted[rows], target[rows]) for rows in drawn], [0.025, 0.975])
        return Estimate(value=statistic(predicted, target), low=float(low), high=float(high))

    rows = [
        (name, len(target), *(estimate(s, p) for s in (squared_error, over_mean, pearson, spearman))) for name, p in predictions.items()
    ]
    return common.table(("", "completions", "squared error [95 %]", "minus the mean's [95 %]", "Pearson [95 %]", "Spearman [95 %]"), rows)


def squared_error(predicted: Floats, target: Floats) -> float:
    """Mean squared error."""
    return float(np.mean((predicted - target) ** 2))


def pearson(predicted: Floats, target: Floats) -> float:
    """Correlation."""
    return float(np.corrcoef(predicted, target)[0, 1])


def rated(path: Path, rating: str) -> list[tuple[int, float]]:
    """(characters, rating) of every completion of a file of rated completions."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(len(text), given[rating]) for row in rows for text, given in zip(row["completions"], row["attributes"], strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="directory that `rayward evaluate` or `rayward train` wrote")
    parser.add_argument("--train", type=Path, help="file of rated completions that the model was trained on")
    parser.add_argument("--rating", default="overall", help="the rating that ranked the completions (default: overall)")
    given = parser.parse_args()
    scored = read_scores(given.evaluation / SCORES_FILE)
    print(order_table(scored))
    if given.train:
        print(f"\n{rating_table(scored, rated(given.train, given.rating))}")
