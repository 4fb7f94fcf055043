"""A label that does not exist yet is added to a copy of the package, from the column of a raw row to the loss: four files change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.tokenizer import make_tokenizer

import rayward

EDITS = {
    "data/record.py": [
        (
            "    critiques: tuple[str, ...] | None = None\n",
            "    critiques: tuple[str, ...] | None = None\n    difficulty: float | None = _column(None)\n",
        )
    ],
    "data/prepared.py": [
        (
            '    Label(pa.field("margin", pa.float32()), float),\n',
            '    Label(pa.field("margin", pa.float32()), float),\n    Label(pa.field("difficulty", pa.float32()), float),\n',
        )
    ],
    "batch/comparison.py": [
        ("    margin: float = math.nan\n", "    margin: float = math.nan\n    difficulty: float = math.nan\n"),
    ],
    "objectives/pairs.py": [
        (
            '    margin: Literal["none", "column",',
            '    margin: Literal["none", "difficulty", "column",',
        ),
        (
            "        super().check(data)\n",
            "        super().check(data)\n"
            '        if self.margin == "difficulty" and data.missing.get("difficulty"):\n'
            '            raise ConfigError(f"{data.missing[\'difficulty\']} rows have no difficulty", remedy="use another margin")\n',
        ),
        (
            '        if config.margin in ("none", "column"):\n',
            '        if config.margin == "difficulty":\n            return label.difficulty\n'
            '        if config.margin in ("none", "column"):\n',
        ),
    ],
}

SCRIPT = """
import dataclasses
import json
import sys

import pyarrow as pa
import torch

import rayward
from rayward.config.data import DataConfig
from rayward.contract.contract import Contract
from rayward.contract.tokenizer import load_tokenizer
from rayward.data.formats.table import choose_format
from rayward.data.prepare.encode import Encoders, encode
from rayward.data.prepare.judge import Policy, judge
from rayward.data.prepare.rows import READ_SCHEMA, Adaptation
from rayward.data.prepare.stats import SplitStats
from rayward.data.prepared import PREPARED_SCHEMA
from rayward.data.stream.shares import plan_block, read_share
from rayward.errors import ConfigError
from rayward.objectives.base import LabelFacts
from rayward.objectives.pairs import BradleyTerryObjective, bradley_terry

assert rayward.__file__.startswith(sys.argv[1]), rayward.__file__
rows = [{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(4)]
for row, difficulty in zip(rows, (2.0, 0.5, float("inf"))):
    row["difficulty"] = difficulty
raw = [{"kind": "row", "role": "train", "file": "f", "number": i, "raw": json.dumps(row)} for i, row in enumerate(rows)]
formats = {"f": choose_format(rows, DataConfig(train=("f",)), where="f", source="f")}
policy = Policy(0, 0.0, "truncate")
contract = Contract.from_tokenizer(load_tokenizer(sys.argv[2]), max_tokens=64)
encoders = Encoders.of(contract, load_tokenizer(sys.argv[2]))
encoded = encode(pa.Table.from_pylist(raw, READ_SCHEMA), Adaptation(formats, "quarantine"), encoders, policy)
assert encoded["reason"].to_pylist() == [None, None, "wrong_type", None]
encoded = judge(encoded, policy)
encoded = encoded.filter(pa.compute.is_valid(encoded["split"]))
stats = SplitStats.of(encoded)
assert stats.missing["difficulty"] == 1
objective = BradleyTerryObjective(margin="difficulty")
try:
    objective.check(LabelFacts(missing=stats.missing))
except ConfigError as exc:
    assert "1 rows have no difficulty" in str(exc)
else:
    raise AssertionError("not refused")
prepared = encoded.append_column("row", pa.array(range(3), pa.int64())).select(PREPARED_SCHEMA.names).cast(PREPARED_SCHEMA)
block = prepared.slice(0, 2)
share = read_share(plan_block(block, world_size=1, comparisons_per_step=4, tokens_per_microbatch=999, layout="packed"),
                   layout="packed", pad_token_id=0)
labels = share.microbatches[0].labels
assert [label.difficulty for label in labels] == [2.0, 0.5]
loss = bradley_terry(torch.zeros(4, 1), labels, objective, ()).loss_sum
torch.testing.assert_close(loss, torch.nn.functional.softplus(torch.tensor([2.0, 0.5])).sum())
"""


def test_a_new_label_changes_four_files(tmp_path: Path) -> None:
    copy = tmp_path / "platform" / "rayward"
    shutil.copytree(Path(rayward.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert len(EDITS) == 4
    for name, edits in EDITS.items():
        text = (copy / name).read_text()
        for old, new in edits:
            assert old in text, f"{name} has no {old!r}; correct this test and docs/extending.md"
            text = text.replace(old, new, 1)
        (copy / name).write_text(text)
    make_tokenizer(tmp_path / "tokenizer")
    command = [sys.executable, "-c", SCRIPT, str(copy), str(tmp_path / "tokenizer")]
    environment = {**os.environ, "PYTHONPATH": str(copy.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
