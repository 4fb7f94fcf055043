"""What an actor of the pool does with blocks, without the actors."""

from __future__ import annotations

import json
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.helpers.models import make_export

from rayward.config.placement import Placement
from rayward.errors import ContractMismatchError, DataError, ModelLoadError, find_in
from rayward.scoring.batch import _features, _score, _Worker
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
        with pytest.raises(kind) as caught:
            worker(block(("Hi", ["a"])))
        # What is left of it where Ray keeps only the text of its traceback.
        assert type(find_in("".join(traceback.format_exception(caught.value)))) is kind


def test_columns_that_hold_no_json_are_a_typed_error(export: Path) -> None:
    broken = pa.table({"prompt_json": ["[]"], "completions_json": ['{"a": 1}']})
    with pytest.raises(DataError, match="completions_json"):
        _Worker(scoring(), str(export), CPU)(broken)


def test_a_rule_over_models_has_no_features(export: Path, tmp_path: Path) -> None:
    EnsembleRule(rule="mean", members=(str(export), str(export))).save(tmp_path)
    with pytest.raises(ModelLoadError, match="rule over other models"):
        _Worker(_features, str(tmp_path), CPU)(block(("Hi", ["a"])))
