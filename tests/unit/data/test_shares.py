from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from tests.helpers.comparisons import make_comparison, random_comparisons

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import Layout
from rayward.data.prepared import PREPARED_SCHEMA, comparisons_from_table
from rayward.data.stream.shares import SHARE_SCHEMA, STREAM_COLUMNS, StepShare, plan_block, read_share
from rayward.errors import StreamOrderError


def prepared_table(comparisons: list[EncodedComparison], first_row: int = 0) -> pa.Table:
    """The stream's columns of prepared rows."""
    schema = pa.schema([PREPARED_SCHEMA.field(name) for name in STREAM_COLUMNS])
    rows = [
        {
            "row": first_row + index,
            "id": c.id,
            "prefix_ids": c.prefix_ids.tolist(),
            "branch_ids": [branch.tolist() for branch in c.branch_ids],
            "ranks": None if c.labels.ranks is None else c.labels.ranks.tolist(),
            "margin": None if np.isnan(c.labels.margin) else c.labels.margin,
            "strength": None if np.isnan(c.labels.strength) else c.labels.strength,
            "weight": c.labels.weight,
            "attributes": None if c.labels.attributes is None else c.labels.attributes.tolist(),
            "text_starts": c.text_starts,
            "step_ends": None if c.labels.step_labels is None else c.step_ends,
            "step_labels": None if c.labels.step_labels is None else [labels.tolist() for labels in c.labels.step_labels],
        }
        for index, c in enumerate(comparisons)
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def split(comparisons: list[EncodedComparison], world_size: int, *, layout: Layout = "packed", first_row: int = 0) -> list[StepShare]:
    table = plan_block(
        prepared_table(comparisons, first_row),
        world_size=world_size,
        comparisons_per_step=16,
        tokens_per_microbatch=300,
        layout=layout,
    )
    assert table.schema == SHARE_SCHEMA
    assert table.num_rows == world_size
    return [read_share(table.slice(rank, 1), layout=layout, pad_token_id=0) for rank in range(world_size)]


def assert_same(found: EncodedComparison, expected: EncodedComparison) -> None:
    np.testing.assert_array_equal(found.prefix_ids, expected.prefix_ids)
    assert found.num_completions == expected.num_completions
    for mine, theirs in zip(found.branch_ids, expected.branch_ids, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(found.labels.margin, expected.labels.margin)
    np.testing.assert_array_equal(found.labels.strength, expected.labels.strength)
    assert found.labels.weight == expected.labels.weight
    assert found.text_starts == expected.text_starts
    assert (found.labels.step_labels is None) == (expected.labels.step_labels is None)
    if expected.labels.step_labels is not None:
        assert found.step_ends == expected.step_ends
        for ours, given in zip(found.labels.step_labels or (), expected.labels.step_labels, strict=True):
            np.testing.assert_array_equal(ours, given)
    for name in ("ranks", "attributes"):
        mine, theirs = getattr(found.labels, name), getattr(expected.labels, name)
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_ranks_together_hold_exactly_the_step(world_size: int, layout: Layout) -> None:
    comparisons = random_comparisons(16, seed=1)
    shares = split(comparisons, world_size, layout=layout, first_row=48)
    assert [(s.step, s.rank, s.world_size) for s in shares] == [(3, rank, world_size) for rank in range(world_size)]
    assert len({len(s.microbatches) for s in shares}) == 1
    found = {c.id: c for s in shares for batch in s.microbatches for c in batch.comparisons}
    assert sorted(name for s in shares for name in s.comparison_ids) == sorted(c.id for c in comparisons)
    for comparison in comparisons:
        assert_same(found[comparison.id], comparison)


def test_the_last_step_may_be_short_and_ranks_may_have_nothing() -> None:
    shares = split(random_comparisons(2, seed=0), 5, first_row=160)
    assert {s.step for s in shares} == {10}
    assert sorted(len(s.comparison_ids) for s in shares) == [0, 0, 0, 1, 1]
    assert all(len(s.microbatches) == 1 for s in shares)


def test_labels_survive() -> None:
    ranks = np.array([1.0, 0.0], dtype=np.float32)
    ratings = np.array([[1.5, np.nan, 3.0], [0.0, -2.0, 1.0]], dtype=np.float32)
    comparisons = [
        make_comparison("all", 3, [2, 4], labels=Labels(ranks=ranks, margin=0.75, strength=2.0, weight=2.5, attributes=ratings)),
        make_comparison("no margin", 0, [2, 4], labels=Labels(ranks=ranks, attributes=ratings + 1)),
        make_comparison("ratings only", 1, [5, 1], labels=Labels(attributes=ratings - 1)),
    ]
    (share,) = split(comparisons, 1)
    found = {c.id: c for batch in share.microbatches for c in batch.comparisons}
    for comparison in comparisons:
        assert_same(found[comparison.id], comparison)


def test_labels_of_steps_survive_among_rows_without() -> None:
    generator = np.random.default_rng(3)
    comparisons = []
    for index, comparison in enumerate(random_comparisons(9, seed=4)):
        assert comparison.step_ends is not None
        steps = tuple(np.where(generator.random(len(e)) < 0.3, np.nan, 1.0).astype(np.float32) for e in comparison.step_ends)
        comparisons.append(comparison if index % 3 == 1 else replace(comparison, labels=replace(comparison.labels, step_labels=steps)))
    for world_size in (1, 3):
        found = {c.id: c for s in split(comparisons, world_size) for batch in s.microbatches for c in batch.comparisons}
        for comparison in comparisons:
            assert_same(found[comparison.id], comparison)


def test_a_table_with_several_chunks_and_an_offset_is_read_right() -> None:
    comparisons = random_comparisons(8, seed=2)
    table = pa.concat_tables([prepared_table(comparisons[:3]), prepared_table(comparisons[3:], 3)])
    planned = plan_block(table, world_size=2, comparisons_per_step=8, tokens_per_microbatch=300, layout="packed")
    second = read_share(pa.concat_tables([planned.slice(1, 1)]), layout="packed", pad_token_id=0)
    first = read_share(planned, layout="packed", pad_token_id=0)
    assert (first.rank, second.rank) == (0, 1)
    assert sorted([*first.comparison_ids, *second.comparison_ids]) == sorted(c.id for c in comparisons)
    for found, expected in zip(comparisons_from_table(table), comparisons, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize(
    "rows",
    [
        [1, 2, 3, 4],  # begins in the middle of a step
        [0, 1, 3],  # a hole
        [1, 0, 2, 3],  # another order
        [0, 1, 2, 3, 4],  # more than a step
        [4, 5, 6, 7, 8],
        [0, 0, 1],  # a row twice
    ],
)
def test_any_other_rows_than_those_of_one_step_stop_the_run(rows: list[int]) -> None:
    table = prepared_table(random_comparisons(len(rows), seed=0)).set_column(0, "row", pa.array(rows, pa.int64()))
    with pytest.raises(StreamOrderError, match=f"a block holds rows {rows[0]}"):
        plan_block(table, world_size=1, comparisons_per_step=4, tokens_per_microbatch=300, layout="packed")
