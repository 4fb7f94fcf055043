"""`rayward evaluate`: a model on raw files or prepared data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from rayward import storage
from rayward.cluster import connect
from rayward.config.data import DataConfig
from rayward.workflows.console import console

if TYPE_CHECKING:
    from rayward.evaluation.records import Evaluation
    from rayward.evaluation.suites.base import Suite


def evaluate_pipeline(
    model: str,
    data: Sequence[str],
    output: str,
    *,
    data_config: DataConfig,
    device: str = "auto",
    scorers: int = 1,
    gpus_per_scorer: float = 0.0,
    tokens_per_batch: int = 8192,
    verify: bool = True,
    weights: str | None = None,
    benchmark: Suite | None = None,
    n_critiques: int = 1,
    temperature: float = 0.0,
) -> Evaluation:
    """Evaluate a model on raw files or on one prepared directory and print the table."""
    connect()
    from rayward.data.prepared import MANIFEST_FILE
    from rayward.evaluation.report import print_table
    from rayward.evaluation.run import evaluate

    prepared = data[0] if len(data) == 1 and storage.exists(*storage.resolve(storage.join(data[0], MANIFEST_FILE))) else None
    result = evaluate(
        model=model,
        output=output,
        data=None if prepared else data,
        prepared=prepared,
        data_config=data_config,
        device=cast(Any, device),
        concurrency=scorers,
        gpus_per_actor=gpus_per_scorer,
        tokens_per_batch=tokens_per_batch,
        verify=verify,
        weights=weights,
        benchmark=benchmark,
        n_critiques=n_critiques,
        temperature=temperature,
    )
    print_table(result)
    console.print(f"evaluation: {output}/report.html\nplots: {output}/plots")
    return result
