"""Records with known rewards, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayward.evaluation.records import Evaluation, Record
from rayward.evaluation.summary import summarise


def pair(
    name: str,
    *,
    rewards: tuple[float, ...],
    lengths: tuple[int, ...] = (5, 3),
    ranks: tuple[float, ...] = (0.0, 1.0),
    key: str | None = None,
) -> Record:
    """One scored pair from source `s`; the first completion is the better one unless `ranks` say otherwise."""
    return Record(id=name, source="s", prompt_key=key or name, ranks=ranks, lengths=lengths, rewards=rewards)


def make_records(count: int, seed: int = 0) -> list[Record]:
    """Three sources, one of them rankings of four; a fair model, some ties, and every 31st row without a score."""
    rng = np.random.default_rng(seed)
    records = []
    for index in range(count):
        source = ("summaries", "dialogue", "<b>arithmetic</b> | x")[index % 3]
        quality = rng.normal(size=4 if index % 3 == 2 else 2)
        rewards = np.full(len(quality), 0.5) if index % 29 == 5 else quality + rng.normal(0, 0.8, len(quality))
        failed = index % 31 == 7
        records.append(
            Record(
                id=f"row-{index}",
                source=source,
                prompt_key=f"prompt-{index // 2}",
                ranks=tuple(np.argsort(np.argsort(-quality)).astype(float).tolist()),
                lengths=tuple(np.maximum(5, 120 + 25 * quality + rng.normal(0, 60, len(quality))).astype(int).tolist()),
                rewards=None if failed else tuple(rewards.tolist()),
                error_code="too_long" if failed else None,
                error="the last user turn takes <3,000> tokens" if failed else None,
            )
        )
    return records


def evaluation_of(records: Sequence[Record], *, seed: int = 0) -> Evaluation:
    """The evaluation of records, with a name that HTML and rich would misread if it were not escaped."""
    name = "runs/<demo>[bold]"
    return summarise(records, model=name, model_version="0123456789ab", data=["held-out.jsonl"], bootstrap_samples=400, seed=seed)
