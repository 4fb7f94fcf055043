from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.helpers.prepared import make_manifest, prepared_row, write_prepared

from rayward.data.prepare.report import build_report, render_html
from rayward.data.prepare.rows import ENCODED_SCHEMA
from rayward.data.prepare.stats import SplitStats, bin_of
from rayward.data.prepared import COMPARISON_COLUMNS, MANIFEST_FILE, PREPARED_SCHEMA, PreparedData, ShardEntry, comparisons_from_table
from rayward.errors import DataError

MANIFEST = make_manifest({"train": [ShardEntry(file="train/part-00000.parquet", num_rows=2)]}, num_quarantined={"tie": 1})


def _rows() -> pa.Table:
    rows = [
        # 10 + 3 + 5 tokens; the longer, second completion wins.
        {"prefix_ids": [1] * 10, "branch_ids": [[1] * 3, [1] * 5], "ranks": [1, 0], "strength": 3.0, "source": "s", "truncated": False},
        # 0 + 40 + 40 + 2; 0 beats 2 (longer), 1 beats 2 (longer), 0 and 1 tie.
        {"prefix_ids": [], "branch_ids": [[1] * 40, [1] * 40, [1] * 2], "ranks": [0, 0, 1], "source": "t", "truncated": True},
        # The shorter wins.
        {"prefix_ids": [1], "branch_ids": [[1] * 2, [1] * 4], "ranks": [0, 1], "strength": 0.5, "source": "s", "truncated": False},
        # Attributes only: no pair.
        {"prefix_ids": [1], "branch_ids": [[1] * 2], "attributes": [[1.0, 2.0]], "source": "s", "truncated": False},
    ]
    return pa.Table.from_pylist(rows, schema=ENCODED_SCHEMA)


def test_split_stats_by_hand() -> None:
    stats = SplitStats.of(_rows())
    assert stats.num_rows == 4
    assert stats.tokens == 18 + 82 + 7 + 3
    assert stats.tokens_unshared == 28 + 82 + 8 + 3
    assert (stats.longest_comparison, stats.longest_conversation, stats.max_completions) == (82, 40, 3)
    assert (stats.num_unrated, stats.weakest, stats.strongest) == (3, 0.5, 3.0)
    assert stats.missing == {"ranks": 1, "margin": 4, "strength": 2, "weight": 4, "attributes": 3, "step_labels": 4}
    assert (stats.longer_wins, stats.shorter_wins, stats.equal_length, stats.tied_pairs) == (3, 1, 0, 1)
    assert stats.lengths == {32: 3, 96: 1}
    assert stats.prompt_lengths == {32: 3, 0: 1}
    assert stats.completion_lengths == {32: 6, 64: 2}
    assert (stats.truncated, stats.sources) == (1, {"s": 3, "t": 1})


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    table = _rows()
    parts = [SplitStats.of(table.slice(start, 1)) for start in range(4)]
    whole = SplitStats.merged([SplitStats.of(table)])
    assert SplitStats.merged(parts) == whole
    assert SplitStats.merged(reversed(parts)).model_dump_json() == whole.model_dump_json()


@pytest.mark.parametrize(("tokens", "upper"), [(0, 0), (1, 32), (32, 32), (33, 64)])
def test_bins_are_named_by_their_upper_bound(tokens: int, upper: int) -> None:
    assert bin_of(tokens) == upper


def test_a_manifest_survives_the_disk(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text(MANIFEST.model_dump_json())
    prepared = PreparedData.load(str(tmp_path))
    assert prepared.manifest == MANIFEST


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "holds no"),
        ("{", "not a valid manifest"),
        ('{"version": 3}', "not a valid manifest"),
        ('{"version": 2}', "version 2, which is no longer read"),
        ("version", "newer Rayward: it has version 99"),
    ],
)
def test_a_directory_that_is_not_prepared_is_an_error_that_names_it(tmp_path: Path, text: str | None, says: str) -> None:
    if text == "version":
        text = json.dumps(MANIFEST.model_dump() | {"version": 99})
    if text is not None:
        (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        PreparedData.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_tables_are_the_rows_of_a_split_in_order(tmp_path: Path) -> None:
    shards = [[prepared_row(0), prepared_row(1), prepared_row(2)], [], [prepared_row(3)]]
    prepared = write_prepared(str(tmp_path), {"train": shards, "validation": [[prepared_row(0, id="held out")]]})
    assert [table["row"].to_pylist() for table in prepared.tables("train", ["row", "id"])] == [[0, 1, 2], [3]]
    assert [table["id"].to_pylist() for table in prepared.tables("train", ["id"], max_rows=2)] == [["r0", "r1"], ["r2"], ["r3"]]
    assert [table.to_pylist() for table in prepared.tables("validation", ["id"])] == [[{"id": "held out"}]]


def test_a_label_that_is_younger_than_the_shards_is_unknown_in_them(tmp_path: Path) -> None:
    prepared = write_prepared(str(tmp_path), {"train": [[prepared_row(0)]]})
    shard = tmp_path / "train/part-00000.parquet"
    pq.write_table(pq.read_table(shard).drop(["strength", "step_labels"]), shard)
    (table,) = prepared.tables("train", COMPARISON_COLUMNS)
    assert table.schema == pa.schema([PREPARED_SCHEMA.field(name) for name in COMPARISON_COLUMNS])
    (comparison,) = comparisons_from_table(table)
    assert math.isnan(comparison.labels.strength)
    assert comparison.labels.step_labels is None


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda shard: shard.unlink(), r"part-00001\.parquet is missing"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-9]), r"part-00001\.parquet cannot be read"),
        (lambda shard: shard.write_bytes((shard.parent / "part-00000.parquet").read_bytes()), "holds 2 rows; manifest.json says 1"),
        (lambda shard: pq.write_table(pa.table({"id": ["x"]}), shard), "there is no column row"),
        (lambda shard: pq.write_table(pa.table({"row": [2], "id": pa.array([None], pa.string())}), shard), "cannot be read"),
    ],
)
def test_a_shard_is_read_when_it_is_its_turn_and_a_bad_one_is_named(tmp_path: Path, spoil: Callable[[Path], None], says: str) -> None:
    prepared = write_prepared(str(tmp_path), {"train": [[prepared_row(0), prepared_row(1)], [prepared_row(2)]]})
    spoil(tmp_path / "train/part-00001.parquet")
    tables = prepared.tables("train", ["row", "id"])
    assert next(tables).num_rows == 2
    with pytest.raises(DataError, match=says) as caught:
        next(tables)
    assert "part-00001" in str(caught.value)


def test_the_report_escapes_what_the_data_says_and_needs_no_network() -> None:
    record = {"reason": "tie", "detail": "<b>x</b>", "source": "s", "file": "f.jsonl", "row": 3, "raw": "<script>alert(1)</script>"}
    report = build_report(
        fingerprint="abc",
        num_input_rows=5,
        quarantined={"tie": 1},
        quarantined_by_source={"s": 1},
        examples={"tie": [record]},
        train=SplitStats.merged([SplitStats.of(_rows())]),
        validation=SplitStats(),
        files=["f.jsonl"],
        ignored_files=[],
        formats={"trl": 1},
        overlap=0,
    )
    assert report["longer_wins"] == {"longer": 3, "shorter": 1, "equal_length": 0, "share": 0.75}
    assert report["tokens_saved_by_sharing"] == pytest.approx(1 - 110 / 121)
    page = render_html(report)
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 3


def test_no_name_of_the_data_becomes_html() -> None:
    evil = "<script>alert('x')</script>\"onload="
    record = {"reason": "tie", "detail": evil, "source": evil, "file": evil, "row": 3, "raw": evil}
    report = build_report(
        fingerprint=evil,
        num_input_rows=5,
        quarantined={"tie": 1},
        quarantined_by_source={evil: 1},
        examples={"tie": [record]},
        train=SplitStats(),
        validation=SplitStats(),
        files=[evil],
        ignored_files=[evil],
        formats={evil: 1},
        overlap=0,
    )
    page = render_html(report)
    assert "<script" not in page
    assert '"onload' not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") == 8
