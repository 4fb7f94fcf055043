"""What an actor of the pool does with blocks, without the actors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.helpers.models import make_export

from rayward.config.placement import Placement
from rayward.errors import ContractMismatchError, DataError, ModelLoadError
from rayward.scoring.batch import FAILURE, _error_in, _features, _score, _Worker
from rayward.scoring.combining import EnsembleRule
from rayward.wire.items import Asked

CPU = Placement(device="cpu")


def block(*rows: tuple[str, list[str]]) -> pa.Table:
    prompts = [json.dumps([{"role": "user", "content": prompt}]) for prompt, _ in rows]
    return pa.table({"row": range(len(rows)), "prompt_json": prompts, "completions_json": [json.dumps(texts) for _, texts in rows]})


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export")


def scoring(**options: Any) -> partial[pa.Table]:
    return partial(_score, asked=Asked(**options))


def test_rewards_and_errors_stand_beside_the_rows(export: Path) -> None:
    found = _Worker(scoring(), str(export), CPU)(block(("Hi", ["a", "b"]), ("Hi", ["word " * 100]))).to_pylist()
    assert [row["row"] for row in found] == [0, 1]
    assert len(found[0]["rewards"]) == 2
    assert found[0]["error"] is None
    assert found[1]["rewards"] is None
    assert found[1]["error"]["code"] == "too_long"


def test_what_is_asked_reaches_the_model(export: Path) -> None:
    (row,) = _Worker(scoring(weights="none such"), str(export), CPU)(block(("Hi", ["a"]))).to_pylist()
    assert row["error"]["code"] == "unknown_weights"


def test_features_come_for_every_completion(export: Path) -> None:
    first, second = _Worker(_features, str(export), CPU)(block(("Hi", ["a", "b"]), ("Hi", ["word " * 100]))).to_pylist()
    assert len(first["end_hidden"]) == len(first["gate_hidden"]) == 2 * 32
    assert (second["end_hidden"], second["error"]["code"]) == (None, "too_long")


def test_a_model_that_cannot_be_loaded_is_a_typed_error_of_the_first_block(tmp_path: Path) -> None:
    falsified = make_export(tmp_path / "falsified", golden_shift=1.0)
    for model, kind in ((falsified, ContractMismatchError), (tmp_path / "absent", ModelLoadError)):
        worker = _Worker(scoring(), str(model), CPU)
        found = worker(block(("Hi", ["a"])))
        assert found.column_names == [FAILURE]
        assert type(_error_in(found)) is kind


def test_a_failure_is_found_beside_good_blocks(export: Path, tmp_path: Path) -> None:
    good = _Worker(scoring(), str(export), CPU)(block(("Hi", ["a"])))
    bad = _Worker(scoring(), str(tmp_path / "absent"), CPU)(block(("Hi", ["a"])))
    assert isinstance(_error_in(pa.concat_tables([good, bad], promote_options="default")), ModelLoadError)


def test_columns_that_hold_no_json_are_a_typed_error(export: Path) -> None:
    broken = pa.table({"prompt_json": ["[]"], "completions_json": ['{"a": 1}']})
    error = _error_in(_Worker(scoring(), str(export), CPU)(broken))
    assert isinstance(error, DataError)
    assert "completions_json" in error.problem


def test_a_rule_over_models_has_no_features(export: Path, tmp_path: Path) -> None:
    EnsembleRule(rule="mean", members=(str(export), str(export))).save(tmp_path)
    error = _error_in(_Worker(_features, str(tmp_path), CPU)(block(("Hi", ["a"]))))
    assert isinstance(error, ModelLoadError)
