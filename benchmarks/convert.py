"""Public preference files whose columns are not a preference format -> JSON lines that `rayward prepare` reads.

    python benchmarks/convert.py DATA OUT

ethics_util_train, ethics_util_test (more_pleasant, less_pleasant) become TRL pairs under a neutral, numbered question; rmb_bon (one
best answer, several losers) becomes rankings. Files that DATA lacks are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FIRST_TEST_DAY = 100_000


def ethics_train(row: Row, number: int) -> Row:
    """A day somebody tells about; the more pleasant one is chosen.

    The pairs have no prompt. With one and the same for all, none could be trained on while another is held out (a prompt is in one
    split only), and the bootstrap over prompts would see a single one; so the days are numbered.
    """
    return {"prompt": f"How was day {number}?", "chosen": row["more_pleasant"], "rejected": row["less_pleasant"]}


def ethics_test(row: Row, number: int) -> Row:
    """The same with other numbers."""
    return ethics_train(row, FIRST_TEST_DAY + number)


def best_of_n(row: Row, number: int) -> Row:
    """Best answer at rank 0, all losers tied at rank 1."""
    answers = [row["bon_best"]["answer"], *(loser["answer"] for loser in row["loser_list"])]
    prompt = [{"role": turn["role"], "content": turn["content"]} for turn in row["conversation_input"]]
    return {"prompt": prompt, "completions": answers, "ranks": [0, *([1] * (len(answers) - 1))]}


CONVERTERS: dict[str, Callable[[Row, int], Row]] = {
    "ethics_util_train": ethics_train,
    "ethics_util_test": ethics_test,
    "rmb_bon": best_of_n,
}


def convert(source: Path, target: Path, *, test_rows: int | None = None) -> list[Path]:
    """Convert what is there; returns the written files.

    Args:
        test_rows: keep so many evenly spaced rows of test files; None keeps all.
    """
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, function in CONVERTERS.items():
        path = source / f"{name}.jsonl.gz"
        if not path.is_file():
            continue
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [function(json.loads(line), number) for number, line in enumerate(lines, 1) if line.strip()]
        if test_rows is not None and name.endswith("_test"):
            rows = [rows[i * len(rows) // test_rows] for i in range(min(test_rows, len(rows)))]
        out = target / f"{name}.jsonl"
        out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        written.append(out)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory with the original .jsonl.gz files")
    parser.add_argument("out", type=Path, help="directory for the converted .jsonl files")
    parser.add_argument("--test-rows", type=int, help="keep so many evenly spaced rows of test files (default: all)")
    given = parser.parse_args()
    for file in convert(given.data, given.out, test_rows=given.test_rows):
        print(file)
