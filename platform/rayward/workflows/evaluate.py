"""`rayward evaluate`: a model on raw files or prepared data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayward import storage
from rayward.cluster import connect
from rayward.config.data import DataConfig
from rayward.config.placement import Placement
from rayward.wire.items import Asked
from rayward.workflows.console import console

if TYPE_CHECKING:
    from rayward.evaluation.records import Evaluation
    from rayward.evaluation.suites.base import Suite


def prepared_of(data: Sequence[str]) -> str | None:
    """The one prepared directory that is named, if it is one."""
    from rayward.data.prepared import MANIFEST_FILE

    return data[0] if len(data) == 1 and storage.exists(*storage.resolve(storage.join(data[0], MANIFEST_FILE))) else None


def evaluate_pipeline(
    model: str,
    data: Sequence[str],
    output: str,
    *,
    data_config: DataConfig,
    asked: Asked = Asked(),
    placement: Placement = Placement(),
    benchmark: Suite | None = None,
) -> Evaluation:
    """Evaluate a model on raw files or on one prepared directory and print the table."""
    connect()
    from rayward.evaluation.report import print_table
    from rayward.evaluation.run import evaluate

    prepared = prepared_of(data)
    result = evaluate(
        model=model,
        output=output,
        data=None if prepared else data,
        prepared=prepared,
        data_config=data_config,
        asked=asked,
        placement=placement,
        benchmark=benchmark,
    )
    print_table(result)
    console.print(f"evaluation: {output}/report.html\nplots: {output}/plots")
    return result
