"""Public preference files whose columns are not a preference format -> JSON lines that `rayward prepare` reads.

    python benchmarks/convert.py DATA OUT

ethics_util_train, ethics_util_test (more_pleasant, less_pleasant) become TRL pairs under a neutral, numbered question; rmb_bon (one
best answer, several losers) becomes rankings; ukp_convarg1_ranking (arguments of a topic in the order of a crowd) becomes short
rankings for training and whole ones of other topics for testing; of unieval_human_attributes the two sets of system utterances become
rated completions, every fifth prompt for testing; of shepherd_human_critique the short rows become completions with a critique, every tenth
for testing. Files that DATA lacks are left out.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FIRST_TEST_DAY = 100_000
GROUP_SIZE = 8
ROUNDS = 5
TEST_TOPIC_EVERY = 3
TEST_PROMPT_EVERY = 5
TEST_CRITIQUE_EVERY = 10
SHORT_LINE = 899
"""Characters of a row of critiques, as JSON."""
PLACES = {"data2text/sfres": "restaurant", "data2text/sfhot": "hotel"}
"""The subsets of UniEval in which people rated one utterance of a dialogue system from 1 to 6, and what the dialogue is about."""


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


def argument_rankings(rows: Sequence[Row]) -> list[Row]:
    """Short rankings for training: the arguments of a side are dealt into groups of eight, five times over in other orders."""
    rankings = []
    for row in rows:
        if _is_test_topic(row, rows):
            continue
        for number in range(ROUNDS):
            dealt = _arguments(row)
            random.Random(f"{row['topic']} {number}").shuffle(dealt)
            # What is left over at the end of a round is in another group of the next one.
            starts = range(0, len(dealt) - GROUP_SIZE + 1, GROUP_SIZE)
            rankings += [_argument_ranking(row["topic"], dealt[start : start + GROUP_SIZE]) for start in starts]
    return rankings


def argument_rankings_test(rows: Sequence[Row]) -> list[Row]:
    """One ranking of all arguments for each side of every third topic."""
    return [_argument_ranking(row["topic"], _arguments(row)) for row in rows if _is_test_topic(row, rows)]


def _is_test_topic(row: Row, rows: Sequence[Row]) -> bool:
    # Both sides of a topic are on the same side of the split: they share vocabulary and often answer each other.
    topics = sorted({_topic(other) for other in rows})
    return topics.index(_topic(row)) % TEST_TOPIC_EVERY == 0


def _topic(row: Row) -> str:
    return str(row["topic"]).split("_")[0]


def _arguments(row: Row) -> list[tuple[str, float]]:
    # An argument that was posted twice stands once, with the mean of its places.
    scores = defaultdict(list)
    for candidate in row["candidates"]:
        text = html.unescape(re.sub(r"\s*<br/>\s*", "\n", candidate["text"])).strip()
        scores[text].append(candidate["rank_score"])
    return [(text, sum(values) / len(values)) for text, values in scores.items()]


def _argument_ranking(topic: str, arguments: Sequence[tuple[str, float]]) -> Row:
    # topic is `some-question_one-side`; rank_score is lower for the more convincing argument, as `ranks` is.
    question, side = (re.sub("-+", " ", part).strip() for part in topic.split("_", 1))
    texts, scores = zip(*arguments, strict=True)
    return {"prompt": f"{question}: argue for {side}", "completions": texts, "ranks": scores, "source": topic}


def rated_utterances(rows: Sequence[Row]) -> list[Row]:
    """Prompts whose utterances are for training."""
    return [row for number, row in enumerate(_rated_prompts(rows)) if number % TEST_PROMPT_EVERY]


def rated_utterances_test(rows: Sequence[Row]) -> list[Row]:
    """Every fifth prompt, in the order of the file."""
    return _rated_prompts(rows)[::TEST_PROMPT_EVERY]


def _rated_prompts(rows: Sequence[Row]) -> list[Row]:
    # One row for each meaning to be said, with all utterances for it; an utterance that was rated twice has the mean. Where there is
    # but one, nothing can be ranked: it is left out.
    prompts: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["subset"] in PLACES:
            prompts[row["subset"], row["source"]][row["system_output"]].append(row["scores"])
    return [
        {
            "prompt": f"In a dialogue about a {PLACES[subset]}, say: {meaning}",
            "completions": list(utterances),
            "attributes": [
                {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]} for scores in utterances.values()
            ],
            "source": subset,
        }
        for (subset, meaning), utterances in prompts.items()
        if len(utterances) > 1
    ]


def written_critiques(rows: Sequence[Row]) -> list[Row]:
    """Short questions, answers and critiques for training."""
    return [_criticised(row) for number, row in enumerate(rows) if number % TEST_CRITIQUE_EVERY and _is_short(row)]


def written_critiques_test(rows: Sequence[Row]) -> list[Row]:
    """Every tenth, where it is short."""
    return [_criticised(row) for row in rows[::TEST_CRITIQUE_EVERY] if _is_short(row)]


def _criticised(row: Row) -> Row:
    texts = {"prompt": row["question"], "completion": row["answer"], "critique": row["feedback"]}
    return {**{name: text.strip() for name, text in texts.items()}, "source": row["dataset"]}


def _is_short(row: Row) -> bool:
    return len(json.dumps(_criticised(row))) < SHORT_LINE


def each(function: Callable[[Row, int], Row]) -> Callable[[Sequence[Row]], list[Row]]:
    """A converter of rows, with their number from 1, as one of files."""
    return lambda rows: [function(row, number) for number, row in enumerate(rows, 1)]


CONVERTERS: dict[str, tuple[str, Callable[[Sequence[Row]], list[Row]]]] = {
    "ethics_util_train": ("ethics_util_train", each(ethics_train)),
    "ethics_util_test": ("ethics_util_test", each(ethics_test)),
    "rmb_bon": ("rmb_bon", each(best_of_n)),
    "ukp_convarg1_ranking_train": ("ukp_convarg1_ranking", argument_rankings),
    "ukp_convarg1_ranking_test": ("ukp_convarg1_ranking", argument_rankings_test),
    "shepherd_critiques_train": ("shepherd_human_critique", written_critiques),
    "shepherd_critiques_test": ("shepherd_human_critique", written_critiques_test),
    "unieval_utterances_train": ("unieval_human_attributes", rated_utterances),
    "unieval_utterances_test": ("unieval_human_attributes", rated_utterances_test),
}
"""Name of the written file -> name of the file that it is made of, and how."""


def convert(source: Path, target: Path, *, test_rows: int | None = None) -> list[Path]:
    """Convert what is there; returns the written files.

    Args:
        test_rows: keep so many evenly spaced rows of test files; None keeps all.
    """
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (original, function) in CONVERTERS.items():
        path = source / f"{original}.jsonl.gz"
        if not path.is_file():
            continue
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = function([json.loads(line) for line in lines if line.strip()])
        if test_rows is not None and name.endswith("_test"):
            kept = min(test_rows, len(rows))
            rows = [rows[i * len(rows) // kept] for i in range(kept)]
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
