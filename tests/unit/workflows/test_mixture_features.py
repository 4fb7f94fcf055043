"""Features on disk: in order, whole, and read a slice at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rayward.errors import DataError, ScoringError
from rayward.model.gate import Gating
from rayward.scoring.batch import ERROR_TYPE
from rayward.workflows import mixture_features, mixture_fit
from rayward.workflows.mixture_features import Spill, collect, projected
from rayward.workflows.mixture_fit import as_tensor, fit_gate, ridge

HIDDEN = 3


def block(*rows: dict[str, Any]) -> pa.Table:
    texts = pa.array([json.dumps(["x"] * row["size"]) for row in rows])
    hidden = [None if row.get("error") else [float(row["row"] * 100 + i) for i in range(row["size"] * HIDDEN)] for row in rows]
    return pa.table(
        {
            "row": [row["row"] for row in rows],
            "prompt_key": [row.get("key", "00000000") for row in rows],
            "ranks": pa.array([row.get("ranks") for row in rows], pa.list_(pa.float32())),
            "attributes": pa.array([row.get("attributes") for row in rows], pa.list_(pa.list_(pa.float32()))),
            "completions_json": texts,
            "end_hidden": pa.array(hidden, pa.large_list(pa.float32())),
            "gate_hidden": pa.array(hidden, pa.large_list(pa.float32())),
            "error": pa.array([row.get("error") for row in rows], ERROR_TYPE),
        }
    )


BLOCKS = (
    block({"row": 0, "size": 2, "ranks": [0, 1]}, {"row": 1, "size": 1, "attributes": [[1.0, None]], "key": "00000001"}),
    block({"row": 2, "size": 3, "ranks": [1, 0, 1], "attributes": [[1.0, 2.0]] * 3}),
)


def test_completions_lie_in_the_order_of_the_rows(tmp_path: Path) -> None:
    found = collect(iter(BLOCKS), tmp_path, num_rows=3, num_attributes=2)
    assert found.ends.tolist() == [[0, 1, 2], [3, 4, 5], [100, 101, 102], [200, 201, 202], [203, 204, 205], [206, 207, 208]]
    assert found.gates.tolist() == found.ends.tolist()
    assert [str(each.dtype) for each in (found.ends, found.ratings, found.pairs)] == ["float32", "float64", "int64"]
    assert found.pairs.tolist() == [[0, 1], [4, 3], [4, 5]]
    assert found.held_out.tolist() == [True, True, False, True, True, True]
    np.testing.assert_array_equal(found.ratings, [[np.nan] * 2, [np.nan] * 2, [1, np.nan], *[[1, 2]] * 3])
    assert all(isinstance(array, np.memmap) for array in (found.ends, found.gates, found.ratings))


@pytest.mark.parametrize(
    ("blocks", "error", "says"),
    [
        (BLOCKS[::-1], ScoringError, "row 2 came where 0 was due"),
        (BLOCKS[:1], ScoringError, "2 of 3 prepared rows"),
        ((BLOCKS[0], BLOCKS[0]), ScoringError, "row 0 came where 2"),
        ((BLOCKS[0], block({"row": 2, "size": 1, "error": {"code": "too_long", "message": "5000 tokens"}})), DataError, "5000 tokens"),
    ],
)
def test_rows_that_are_lost_or_have_no_features_are_said(tmp_path: Path, blocks: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        collect(iter(blocks), tmp_path, num_rows=3, num_attributes=2)


def test_nothing_is_an_array_too(tmp_path: Path) -> None:
    found = collect(iter([block({"row": 0, "size": 1})]), tmp_path, num_rows=1, num_attributes=0)
    assert (found.pairs.shape, found.ratings.shape) == ((0, 2), (1, 0))
    assert Spill(tmp_path / "other", np.float32).done((7,)).shape == (0, 7)


def test_slices_change_no_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, HIDDEN)).astype(np.float32)
    y = x @ generator.normal(size=(HIDDEN, 2)) + generator.normal(size=(200, 2))
    y[generator.random((200, 2)) < 0.3] = np.nan
    out = generator.random(200) < 0.2
    pairs = generator.integers(0, 200, size=(150, 2))
    spilled = Spill(tmp_path / "x", np.float32)
    for part in np.array_split(x, 7):
        spilled.add(part)
    mapped = spilled.done()
    whole = ridge(x, y, out)
    better = as_tensor(x[pairs[:, 0]] @ whole.weights.astype(np.float32).T)
    worse = as_tensor(x[pairs[:, 1]] @ whole.weights.astype(np.float32).T)
    monkeypatch.setattr(mixture_fit, "SLICE", 16)
    monkeypatch.setattr(mixture_features, "SLICE", 16)
    sliced = ridge(mapped, y, out)
    np.testing.assert_allclose(sliced.weights, whole.weights, rtol=1e-9)
    assert (sliced.alphas, sliced.num_ratings) == (whole.alphas, whole.num_ratings)
    assert sliced.validation_mse == pytest.approx(whole.validation_mse, rel=1e-12)
    weights = whole.weights.astype(np.float32)
    np.testing.assert_allclose(projected(mapped, whole.weights, tmp_path / "p"), x @ whole.weights.T, rtol=1e-6)
    np.testing.assert_allclose(projected(mapped, weights, tmp_path / "b", pairs[:, 0]), better, rtol=1e-5, atol=1e-5)

    def losses(prompts: torch.Tensor, **options: Any) -> list[float]:
        torch.manual_seed(0)
        gate = Gating(HIDDEN, 2, width=8, depth=1, dropout=0.1)
        return fit_gate(gate, prompts, better, worse, steps=5, batch_size=64, **options)

    assert losses(as_tensor(mapped), rows=as_tensor(pairs)[:, 0]) == losses(as_tensor(x[pairs[:, 0]]))
