"""`rayward evaluate`: a model on raw files or prepared data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayward import storage
from rayward.cluster import connect
from rayward.config.data import DataConfig
from rayward.config.placement import Placement
from rayward.errors import ConfigError
from rayward.wire.items import Asked
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
    asked: Asked = Asked(),
    placement: Placement = Placement(),
    benchmark: Suite | None = None,
) -> Evaluation:
    """Evaluate a model on raw files or on one prepared directory and print the table."""
    connect()
    from rayward.data.prepared import MANIFEST_FILE
    from rayward.evaluation.report import print_table
    from rayward.evaluation.run import evaluate

    prepared = data[0] if len(data) == 1 and storage.exists(*storage.resolve(storage.join(data[0], MANIFEST_FILE))) else None
    if prepared is not None and data_config.sources:
        raise ConfigError(f"{prepared} is prepared data, whose columns are known; --data maps raw files", remedy="leave --data out")
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
