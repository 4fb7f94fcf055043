"""The prepare job on a real local Ray, from files on disk to shards on disk."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.helpers.tokenizer import CHATML, make_tokenizer

from rayward.config.load import load_config
from rayward.config.run import Config
from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer
from rayward.data.prepare.job import prepare
from rayward.data.prepared import MANIFEST_FILE, PREPARED_SCHEMA, PreparedData
from rayward.data.record import BadRow
from rayward.data.sources import read
from rayward.errors import DataError, TooManyBadRowsError

# Ray Data 2.60 warns about its own deprecated settings whenever it copies its context.
pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    # A socket of Ray's own that is collected late would fail whichever test runs then.
    pytest.mark.filterwarnings("default::ResourceWarning"),
]
MAX_TOKENS = 160


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The byte tokenizer, with a template that refuses tool turns."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = make_tokenizer(path)
    refuse = "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    tokenizer.chat_template = refuse + CHATML
    tokenizer.save_pretrained(str(path))
    return path


def _config(tokenizer_path: Path, storage: Path | str, train: object, *overrides: str) -> Config:
    paths = json.dumps([str(path) for path in train] if isinstance(train, list) else [str(train)])
    base = [f"run.storage_path={storage}", f"model.tokenizer={tokenizer_path}", f"model.max_tokens={MAX_TOKENS}", f"data.train={paths}"]
    return load_config([], [*base, *overrides])


def _good(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {i}", "chosen": f"right {i}", "rejected": f"wrong answer {i}", "source": f"set{i % 2}"}
        for i in range(start, start + count)
    ]


def _write(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _table(prepared: PreparedData, split: Any) -> pa.Table:
    return pa.concat_tables([PREPARED_SCHEMA.empty_table(), *prepared.tables(split, PREPARED_SCHEMA.names)])


def _planted() -> list[tuple[BadRow | None, Any]]:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    long = [{"role": "user", "content": "old " * 40}, turns[1], {"role": "user", "content": "new"}]
    pair = {"prompt": "p", "chosen": "c", "rejected": "d"}
    twice = {"prompt": "twice", "chosen": "c", "rejected": "d"}
    return [
        *((None, row) for row in _good(20)),
        (None, {"prompt": long, "chosen": "fits", "rejected": "after turns were dropped"}),
        (BadRow.UNPARSABLE, "{broken"),
        (BadRow.UNPARSABLE, '{"prompt": "cut'),
        (BadRow.WRONG_TYPE, "[1, 2]"),
        (BadRow.WRONG_TYPE, pair | {"chosen": [1, 2]}),
        (BadRow.MISSING_FIELD, {"prompt": "p", "chosen": "c"}),
        (BadRow.EMPTY_PROMPT, pair | {"prompt": ""}),
        (BadRow.EMPTY_COMPLETION, pair | {"rejected": "  "}),
        (BadRow.IDENTICAL_COMPLETIONS, pair | {"rejected": "c"}),
        (BadRow.NO_SHARED_PROMPT, {"prompt": [turns[0]], "chosen": [{**turns[0], "content": "x"}, turns[1]], "rejected": [turns[1]]}),
        (BadRow.NON_FINITE_MARGIN, '{"prompt": "p", "chosen": "c", "rejected": "d", "margin": NaN}'),
        (BadRow.UNKNOWN_ROLE, pair | {"prompt": [{"role": "wizard", "content": "a"}]}),
        (BadRow.BAD_TEXT, pair | {"chosen": "nul \x00"}),
        (BadRow.BAD_TEXT, pair | {"chosen": "lone \ud800"}),
        (BadRow.TOO_LONG, pair | {"chosen": "c" * MAX_TOKENS}),
        (BadRow.TEMPLATE_REJECTED, pair | {"prompt": [turns[0], {"role": "tool", "content": "x"}]}),
        (BadRow.ALREADY_TEMPLATED, pair | {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}),
        (BadRow.UNSUPPORTED_MESSAGE, pair | {"prompt": [turns[0], {**turns[1], "reasoning_content": "hm"}, turns[0]]}),
        (BadRow.DUPLICATE, _good(1)[0]),
        (BadRow.CONTRADICTION, twice),
        (BadRow.CONTRADICTION, twice | {"chosen": "d", "rejected": "c"}),
        (BadRow.IN_VALIDATION, {"prompt": "held out", "chosen": "x", "rejected": "y"}),
        (BadRow.CONTAMINATED, {"prompt": "A  benchmark's question!", "chosen": "x", "rejected": "y"}),
    ]


def test_every_kind_of_bad_row_is_counted_by_its_reason_and_nothing_is_lost(tmp_path: Path, tokenizer_path: Path) -> None:
    planted = _planted()
    train = _write(tmp_path / "train.jsonl", [row for _, row in planted])
    ranking = {"prompt": "three", "completions": ["a", "b", "c"]}
    rated = [{"prompt": "rated", "completions": ["a", "b"], "attributes": ratings} for ratings in ([[9], [1]], [[None], [None]])]
    stepped = {"prompt": "steps", "completions": ["a|b", "c"], "ranks": [0, 1], "step_labels": [[1], [0]]}
    rows = [ranking | {"ranks": [2, 0, 1]}, ranking | {"ranks": [1, 1, 1]}, ranking | {"ranks": [1]}, *rated, stepped]
    ranked = _write(tmp_path / "ranked.jsonl", rows)
    held_out = [{"prompt": "held out", "chosen": "1", "rejected": "2"}, {"prompt": "more", "chosen": "1", "rejected": "2"}]
    validation = _write(tmp_path / "validation.jsonl.gz", held_out)
    options: tuple[str, ...] = (f"data.validation=[{validation}]", "data.max_bad_fraction=1.0", "data.rows_per_shard=8")
    benchmark = _write(tmp_path / "benchmark.jsonl", [{"prompt": "a benchmark's question", "chosen": "1", "rejected": "2"}])
    options += (f"data.contamination=[{benchmark}]",)
    options += ("data.attributes=[quality]", "data.attribute_range=[0,4]", "data.step_separator='|'")
    prepared = prepare(_config(tokenizer_path, tmp_path, [train, ranked], *options))
    manifest = prepared.manifest
    expected = Counter(reason.value for reason, _ in planted if reason) + Counter(
        tie=1, bad_ranking=1, bad_rating=1, no_rating=1, bad_steps=1
    )
    assert manifest.num_quarantined == dict(expected)
    elsewhere = {BadRow.NO_CRITIQUE, BadRow.OUTLIER, BadRow.CHANGED_BY_TEMPLATE}
    elsewhere |= {BadRow.UNUSED_COLUMN, BadRow.ADAPTER_REJECTED, BadRow.ADAPTER_FAILED}
    assert set(manifest.num_quarantined) == {reason.value for reason in BadRow} - elsewhere
    assert (manifest.num_input_rows, manifest.num_train, manifest.num_validation) == (len(planted) + 8, 22, 2)
    assert manifest.num_input_rows == manifest.num_train + manifest.num_validation + sum(manifest.num_quarantined.values())

    records = [json.loads(line) for path in Path(prepared.directory, "quarantine").iterdir() for line in path.read_text().splitlines()]
    from_train = {(record["row"], record["reason"]) for record in records if record["file"] == str(train)}
    copies = {(1, "duplicate"), (next(i for i, (reason, _) in enumerate(planted, 1) if reason is BadRow.DUPLICATE), "duplicate")}
    assert from_train - copies == {(i, reason.value) for i, (reason, _) in enumerate(planted, 1) if reason} - copies
    assert next(record["raw"] for record in records if record["row"] == 22 and record["file"] == str(train)) == "{broken"
    assert Counter(record["reason"] for record in records) == expected

    assert [shard.num_rows for shard in manifest.train_shards] == [8, 8, 6]
    report = json.loads(Path(prepared.directory, "report.json").read_text())
    assert (report["rows_truncated"], report["train_validation_prompt_overlap"]) == (1, 0)
    assert Path(prepared.directory, "report.html").stat().st_size > 10_000
    _check_shards(prepared)


def test_a_place_that_is_a_uri_gets_the_same_data_as_a_path(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [*_good(12), "{broken"]
    _write(tmp_path / "train.jsonl", rows)
    options = ("data.max_bad_fraction=1.0", "data.rows_per_shard=8", "data.validation_fraction=0.3")
    local = prepare(_config(tokenizer_path, tmp_path / "a", tmp_path / "train.jsonl", *options))
    remote = prepare(_config(tokenizer_path, f"file://{tmp_path}/b", f"file://{tmp_path}/train.jsonl", *options))
    assert remote.directory == f"file://{tmp_path}/b/prepared/{local.manifest.fingerprint}"
    assert remote.manifest == local.manifest
    for split in ("train", "validation"):
        assert _table(remote, split) == _table(local, split)
    found = {str(path.relative_to(tmp_path / "b")) for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert found == {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file()}


def test_critiques_and_steps_are_prepared_where_they_stand_in_the_ids(tmp_path: Path, tokenizer_path: Path) -> None:
    pair = {"chosen": "one|two", "rejected": "three", "chosen_feedback": "Right.", "rejected_feedback": "Wrong."}
    rows = [{"prompt": f"p{i}", **pair} for i in range(6)]
    rows += [{"prompt": "none", "chosen": "a", "rejected": "b"}, {"prompt": "blank", **pair, "chosen_feedback": " "}]
    options = ("data.critique_lead_in='Judge:'", "data.validation_fraction=0.0", "data.max_bad_fraction=1.0")
    prepared = prepare(_config(tokenizer_path, tmp_path, _write(tmp_path / "pairs.jsonl", rows), *options))
    assert prepared.manifest.num_quarantined == {"no_critique": 2}
    encoder = Encoder(Contract.load(Path(prepared.directory)), load_tokenizer(f"{prepared.directory}/tokenizer"))
    assert encoder.contract.critique_lead_in == "Judge:"
    for row in _table(prepared, "train").to_pylist():
        texts, critiques, prompt = (json.loads(row[f"{name}_json"]) for name in ("completions", "critiques", "prompt"))
        parts = [encoder.encode_parts(prompt, *both) for both in zip(texts, critiques, strict=True)]
        assert [row["prefix_ids"] + branch for branch in row["branch_ids"]] == [part.ids for part in parts]
        assert row["text_starts"] == [part.text_start for part in parts]
        assert (row["step_ends"], row["step_labels"]) == (None, None)

    steps = [{"prompt": f"p{i}", "completions": ["one", "two"], "labels": [True, None]} for i in range(4)]
    stepwise = ("data.step_separator='|'", "data.validation_fraction=0.0")
    prepared = prepare(_config(tokenizer_path, tmp_path, _write(tmp_path / "steps.jsonl", steps), *stepwise))
    assert prepared.manifest.labels.num_without_steps == 0
    encoder = Encoder(Contract.load(Path(prepared.directory)), load_tokenizer(f"{prepared.directory}/tokenizer"))
    for row in _table(prepared, "train").to_pylist():
        (text,) = json.loads(row["completions_json"])
        assert text == "one|two"
        assert row["step_ends"] == [list(encoder.encode_parts(json.loads(row["prompt_json"]), text, separator="|").step_ends or ())]
        ((right, missing),) = row["step_labels"]
        assert right == 1.0
        assert math.isnan(missing)


def test_a_large_file_is_read_by_many_tasks_and_its_rows_keep_their_lines(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [*_good(30), "", "{broken", *_good(30, start=30), "[]"]
    (tmp_path / "set").mkdir()
    whole = _write(tmp_path / "set/pairs.jsonl", rows)
    _write(tmp_path / "set/test-00000-of-00001.jsonl", _good(3, start=90))
    options = ("data.max_bad_fraction=1.0", "data.validation_fraction=0.2")
    expected = prepare(_config(tokenizer_path, tmp_path / "a", whole, *options))
    monkeypatch.setattr(read, "UNIT_BYTES", 150)
    prepared = prepare(_config(tokenizer_path, tmp_path / "b", tmp_path / "set", *options))
    assert prepared.manifest == expected.manifest
    assert [_table(prepared, split) for split in ("train", "validation")] == [_table(expected, split) for split in ("train", "validation")]
    records = [json.loads(line) for path in Path(prepared.directory, "quarantine").iterdir() for line in path.read_text().splitlines()]
    assert sorted((record["row"], record["reason"]) for record in records) == [(32, "unparsable"), (63, "wrong_type")]
    (passed_over,) = json.loads(Path(prepared.directory, "report.json").read_text())["ignored_files"]
    assert "test-00000-of-00001.jsonl: its name says test" in passed_over


def _check_shards(prepared: PreparedData) -> None:
    """Rows are numbered, and their ids are those of the contract's encoder on the text beside them."""
    encoder = Encoder(Contract.load(Path(prepared.directory)), load_tokenizer(f"{prepared.directory}/tokenizer"))
    prompts = {}
    for split in ("train", "validation"):
        table = _table(prepared, split)
        assert table.schema == PREPARED_SCHEMA
        assert table["row"].to_pylist() == list(range(table.num_rows))
        prompts[split] = set(table["prompt_key"].to_pylist())
        for row in table.to_pylist():
            texts = json.loads(row["completions_json"])
            encoded = [encoder.encode(json.loads(row["prompt_json"]), text) for text in texts]
            assert [row["prefix_ids"] + branch for branch in row["branch_ids"]] == encoded
            assert len(row["ranks"]) == len(texts)
    assert not prompts["train"] & prompts["validation"]
    train = _table(prepared, "train")
    sizes = [len(row["prefix_ids"]) + sum(map(len, row["branch_ids"])) for row in train.to_pylist()]
    assert sum(sizes) == prepared.manifest.total_train_tokens
    assert max(sizes) <= prepared.manifest.longest_comparison_tokens
    assert sum(prepared.manifest.length_histogram.values()) == prepared.manifest.num_train


def test_order_split_and_ids_do_not_depend_on_files_or_blocks(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = _good(60) + _good(5)
    one = _write(tmp_path / "one.jsonl", rows)
    shuffled = random.Random(1).sample(rows, len(rows))
    many = tmp_path / "many"
    many.mkdir()
    pq.write_table(pa.Table.from_pylist(shuffled[:30]), many / "z.parquet", row_group_size=7)
    _write(many / "b.jsonl.gz", shuffled[30:50])
    (many / "a.json").write_text(json.dumps(shuffled[50:]))
    options = ("data.validation_fraction=0.3", "run.seed=4")
    first = prepare(_config(tokenizer_path, tmp_path / "s", one, "data.rows_per_shard=7", *options))
    second = prepare(_config(tokenizer_path, tmp_path / "s", many, "data.rows_per_shard=1000", *options))
    other = prepare(_config(tokenizer_path, tmp_path / "s", one, "data.validation_fraction=0.3", "run.seed=5"))
    assert first.directory != second.directory
    assert 0 < first.manifest.num_validation < 60
    for split in ("train", "validation"):
        assert _table(first, split).equals(_table(second, split))
    assert _table(first, "train")["id"].to_pylist() != _table(other, "train")["id"].to_pylist()
    assert first.manifest.num_quarantined == second.manifest.num_quarantined == {"duplicate": 5}


def test_large_data_is_shuffled_by_its_keys_to_the_same_result(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*_good(80), *_good(9), {"prompt": "Question 3?", "chosen": "right 3!", "rejected": "wrong answer 3"}, "{broken"]
    rows += [{"prompt": "one", "chosen": f"a{i}", "rejected": "b"} for i in range(30)]
    data = _write(tmp_path / "x.jsonl", rows)
    options = ("data.validation_fraction=0.3", "data.rows_per_shard=7", "data.group_pairs=true")
    tables = []
    for name, small in (("one", 1000), ("many", 10)):
        monkeypatch.setattr("rayward.data.prepare.stages.SMALL_ROWS", small)
        for grouped in options[2:], ():
            prepared = prepare(_config(tokenizer_path, tmp_path / name, data, *options[:2], *grouped))
            report = json.loads(Path(prepared.directory, "report.json").read_text())
            assert prepared.manifest.num_quarantined == {"duplicate": 9, "unparsable": 1}
            assert (report["near_duplicates"], report["train_validation_prompt_overlap"]) == (1, 0)
            assert prepared.manifest.near_duplicate_examples[0].row in (4, 90)
            tables.append([_table(prepared, split).to_pylist() for split in ("train", "validation")])
    assert tables[:2] == tables[2:]
    assert all(tables[0])


def test_a_second_call_reuses_the_directory_and_checks_the_share_again(tmp_path: Path, tokenizer_path: Path) -> None:
    data = _write(tmp_path / "x.jsonl", [*_good(20), "{broken"])
    prepared = prepare(_config(tokenizer_path, tmp_path, data))
    stamp = Path(prepared.directory, MANIFEST_FILE).stat().st_mtime_ns
    moved = data.rename(tmp_path / "elsewhere.jsonl").rename(data)
    again = prepare(_config(tokenizer_path, tmp_path, moved))
    assert again == prepared
    assert Path(again.directory, MANIFEST_FILE).stat().st_mtime_ns == stamp
    assert sorted(p.name for p in (tmp_path / "prepared").iterdir()) == [prepared.manifest.fingerprint]
    with pytest.raises(TooManyBadRowsError, match="1 of 21 rows"):
        prepare(_config(tokenizer_path, tmp_path, data, "data.max_bad_fraction=0.01"))
    _write(data, _good(3))
    assert prepare(_config(tokenizer_path, tmp_path, data)).manifest.num_input_rows == 3


def test_too_many_bad_rows_stop_the_run_and_leave_the_quarantine(tmp_path: Path, tokenizer_path: Path) -> None:
    tied = {"prompt": "t", "chosen": "same", "rejected": "other"}
    data = _write(tmp_path / "x.jsonl", [*_good(8), "{broken", "{broken", tied, tied, tied])
    with pytest.raises(TooManyBadRowsError, match=r"2 of 13 rows are bad .*duplicate: 2, unparsable: 2"):
        prepare(_config(tokenizer_path, tmp_path, data))
    (directory,) = (tmp_path / "prepared").iterdir()
    assert not (directory / MANIFEST_FILE).exists()
    assert len((directory / "quarantine" / "unparsable.jsonl").read_text().splitlines()) == 2
    assert (directory / "report.html").exists()
    # Duplicates alone (2 of 13 as well) are no reason to stop.
    data = _write(tmp_path / "y.jsonl", [*_good(10), tied, tied, tied])
    assert prepare(_config(tokenizer_path, tmp_path, data)).manifest.num_train > 0


def test_numbers_far_from_all_others_are_quarantined_and_their_distribution_is_reported(tmp_path: Path, tokenizer_path: Path) -> None:
    rows = [{**row, "margin": 1.0} for row in _good(20)]
    rows[3] |= {"margin": 1e30}
    rows[7] |= {"weight": 1e6}
    data = _write(tmp_path / "x.jsonl", rows)
    prepared = prepare(_config(tokenizer_path, tmp_path, data, "data.max_bad_fraction=0.1"))
    assert prepared.manifest.num_quarantined == {"outlier": 2}
    assert prepared.manifest.num_train + prepared.manifest.num_validation == 18
    out = [json.loads(line) for line in Path(prepared.directory, "quarantine", "outlier.jsonl").read_text().splitlines()]
    assert sorted(record["row"] for record in out) == [4, 8]
    report = json.loads(Path(prepared.directory, "report.json").read_text())
    assert (report["numbers"]["weight"]["largest"], report["numbers"]["weight"]["largest_allowed"]) == (1e6, 1000.0)
    assert "<h2>Numbers</h2>" in Path(prepared.directory, "report.html").read_text()
    # From the report as well, when the data is there already.
    with pytest.raises(TooManyBadRowsError, match=r"(?s)2 of 20 rows.*outlier \(2\).*row \d of .*x.jsonl: (weight|margin)"):
        prepare(_config(tokenizer_path, tmp_path, data, "data.max_bad_fraction=0.05"))


def test_votes_become_one_row_of_the_prepared_data(tmp_path: Path, tokenizer_path: Path) -> None:
    votes = [{"prompt": "q", "chosen": a, "rejected": b, "id": str(n)} for n, (a, b) in enumerate([("x", "y"), ("x", "y"), ("y", "x")])]
    data = _write(tmp_path / "x.jsonl", [*_good(10), *votes])
    prepared = prepare(_config(tokenizer_path, tmp_path, data, "data.votes=soft", "data.validation_fraction=0.0"))
    assert (prepared.manifest.num_train, prepared.manifest.num_merged, prepared.manifest.num_quarantined) == (11, 2, {})
    assert prepared.manifest.labels.num_with_shares == 1
    shares = [row for row in _table(prepared, "train")["vote_shares"].to_pylist() if row is not None]
    assert shares == [[pytest.approx(2 / 3)]]
    plain = prepare(_config(tokenizer_path, tmp_path, data, "data.max_bad_fraction=0.5", "data.validation_fraction=0.0"))
    assert plain.manifest.num_quarantined == {"contradiction": 3}


def test_over_long_rows_follow_the_policy(tmp_path: Path, tokenizer_path: Path) -> None:
    turns = [{"role": "user", "content": "old " * 40}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "new"}]
    data = _write(tmp_path / "x.jsonl", [{"prompt": turns, "chosen": [turns[1]], "rejected": [{**turns[1], "content": "c"}]}])
    cut = prepare(_config(tokenizer_path, tmp_path, data, "data.validation_fraction=0.0"))
    assert cut.manifest.num_train == 1
    assert cut.manifest.longest_conversation_tokens <= MAX_TOKENS
    with pytest.raises(DataError, match=r"no usable train row among 1 \(too_long: 1\)"):
        prepare(_config(tokenizer_path, tmp_path, data, "data.too_long=quarantine"))


def test_unusable_inputs_are_errors_that_name_the_path(tmp_path: Path, tokenizer_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        prepare(_config(tokenizer_path, tmp_path, tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match=r"(?s)empty\.jsonl.*no usable row"):
        prepare(_config(tokenizer_path, tmp_path, _write(tmp_path / "empty.jsonl", [])))
    with pytest.raises(DataError, match=r"(?s)junk\.jsonl.*unparsable: 2"):
        prepare(_config(tokenizer_path, tmp_path, _write(tmp_path / "junk.jsonl", ["a", "b"])))
    bad = [row | {"rejected": row["chosen"]} for row in _good(3)]
    with pytest.raises(DataError, match=r"(?s)same\.jsonl.*identical_completions: 3"):
        prepare(_config(tokenizer_path, tmp_path, _write(tmp_path / "same.jsonl", bad)))
    whole = _write(tmp_path / "whole.jsonl.gz", _good(4000))
    half = tmp_path / "half.jsonl.gz"
    half.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"half\.jsonl\.gz is damaged"):
        prepare(_config(tokenizer_path, tmp_path, half))
    assert not list((tmp_path / "prepared").glob("*.partial-*"))


def test_pairs_join_to_groups_wherever_their_rows_stand(tmp_path: Path, tokenizer_path: Path) -> None:
    generator = random.Random(5)
    rows: list[dict[str, Any]] = []
    for i in range(30):
        texts = [f"answer {i} {name}" for name in "abcd"]
        chosen = [(0, 1), (1, 2), (2, 3), (0, 3)] if i % 3 else [(0, 1), (0, 2)]
        rows += [{"prompt": f"question {i}", "chosen": texts[a], "rejected": texts[b]} for a, b in chosen]
    rows += [{"prompt": "circle", "chosen": a, "rejected": b} for a, b in ("ab", "bc", "ca")]
    options = ("data.group_pairs=true", "data.group_tokens=400", "data.validation_fraction=0.3", "data.rows_per_shard=7")
    tables = []
    for name, num_files in (("one", 1), ("five", 5)):
        generator.shuffle(rows)
        folder = tmp_path / name
        folder.mkdir()
        files = [_write(folder / f"pairs-{k:05d}-of-{num_files:05d}.jsonl", rows[k::num_files]) for k in range(num_files)]
        prepared = prepare(_config(tokenizer_path, folder, files, *options))
        manifest = prepared.manifest
        assert manifest.grouping.model_dump() == {
            "groups": 20, "joined": 80, "incomplete": 20, "contradictory": 3, "apart": 0, "unfit": 0,
        }  # fmt: skip
        assert (manifest.num_train + manifest.num_validation, manifest.num_merged) == (20 + 20 + 3, 60)
        assert (manifest.num_input_rows, manifest.num_quarantined, manifest.max_completions) == (103, {}, 4)
        report = json.loads(Path(prepared.directory, "report.json").read_text())
        assert report["grouping"] == manifest.grouping.model_dump()
        assert "incomplete 20, contradictory 3" in Path(prepared.directory, "report.html").read_text()
        _check_shards(prepared)
        tables.append([_table(prepared, split).to_pylist() for split in ("train", "validation")])
    assert tables[0] == tables[1]
    assert all(tables[0])
