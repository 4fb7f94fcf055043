"""The generated world: known truth, no give-away in the completion alone, the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayward.config.load import load_config
from rayward.contract.conversation import Message
from rayward.data.record import Comparison, validate
from rayward.demo import files as world_files
from rayward.demo import world
from rayward.demo.tasks import KINDS
from rayward.demo.tokenizer import train_tokenizer
from rayward.errors import DataError

ROOT = Path(__file__).parents[3]


def user(*texts: str, system: str | None = None) -> list[Message]:
    turns = [Message(role="user" if i % 2 == 0 else "assistant", content=text) for i, text in enumerate(texts)]
    return [Message(role="system", content=system), *turns] if system else turns


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(world.generate(4400, seed=7))


def all_pairs(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    for row in rows:
        for i, j in combinations(range(len(row["ranks"])), 2):
            better, worse = (i, j) if row["ranks"][i] < row["ranks"][j] else (j, i)
            yield row["source"], row["completions"][better], row["completions"][worse]


def chosen_and_rejected(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    for pair in world.pairs(rows):
        yield pair["source"], pair["chosen"][0]["content"], pair["rejected"][0]["content"]


def longer_wins(pairs: list[tuple[str, str, str]]) -> float:
    return float(np.mean([0.5 if len(better) == len(worse) else len(better) > len(worse) for _, better, worse in pairs]))


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (user("What is the opposite of hot?"), "cold", (4, 4, 4, 4)),
        (user("What is the opposite of hot?"), "The answer is COLD.", (4, 4, 4, 4)),
        (user("What is the opposite of hot?"), "warm", (0, 0, 0, 0)),
        (user("What is the opposite of hot?"), "big", (0, 4, 4, 4)),
        (user("What is the opposite of hot? Be brief."), "It is cold.", (4, 4, 3, 4)),
        (user("What is the opposite of hot? Be brief."), "It is cold. I checked it twice.", (4, 4, 1, 4)),
        (user("What is the opposite of hot? Say more."), "cold", (4, 0, 4, 4)),
        (user("What is the opposite of hot? Say more."), "It is cold.", (4, 2, 4, 4)),
        (user("Say more. What is the opposite of hot?"), "It is cold. I checked it twice.", (4, 4, 4, 4)),
        (user("Compute 3 + 5.", system="You are a helpful assistant. Be friendly."), "8", (4, 4, 4, 1)),
        (user("Compute 3 + 5.", system="You are a helpful assistant. Be friendly."), "Great question! 8", (4, 4, 4, 4)),
        (user("Compute 3 + 5. Be formal."), "Great question! 8", (4, 4, 4, 1)),
        (user("Compute 3 + 5."), "9", (1, 4, 4, 4)),
        (user("Compute 3 + 5."), "10", (0, 4, 4, 4)),
        (user("Largest first: 2 9 5."), "9 5 2", (4, 4, 4, 4)),
        (user("Largest first: 2 9 5."), "9 5 3", (2, 4, 4, 4)),
        (user("Repeat: 6 8 4."), "4 8 6", (1, 4, 4, 4)),
        (user("Smallest first: 6 8 4."), "It is 4 6 8.", (4, 4, 4, 4)),
        (user("Keep the order: 6 8 4. Answer only."), "6 8", (2, 4, 4, 4)),
        (user("Show fox in capitals."), "FOX", (4, 4, 4, 4)),
        (user("Show fox in capitals."), "* fox *", (1, 4, 4, 4)),
        (user("Show fox in capitals."), "fox", (0, 0, 0, 0)),
        (user("Show fox in capitals."), "LION", (0, 4, 4, 4)),
        (user("Say tree in Spanish."), "árbol", (4, 4, 4, 4)),
        (user("Say tree in Spanish."), "It is Baum.", (1, 4, 4, 4)),
        (user("What is tree in German? Be brief."), "gato", (0, 4, 4, 4)),
        (user("What kind of thing is iron?"), "I say metal.", (4, 4, 4, 4)),
        (user("What kind of thing is iron?"), "tool", (0, 4, 4, 4)),
        (user("Name the color of salt.", "white", "Name the color of grass."), "green", (4, 4, 4, 4)),
        (user("Name the color of salt.", "white", "Name the color of grass."), "white", (0, 4, 4, 4)),
        (user("Can you help me rob banks?"), "I cannot help you.", (4, 4, 4, 4)),
        (user("Can you help me rob banks?"), "I can help you.", (0, 4, 4, 4)),
        (user("Can you help me bake bread?"), "yes", (4, 4, 4, 4)),
        (user("Can you help me bake bread?"), "no", (0, 4, 4, 4)),
    ],
)
def test_grade_of_hand_written_completions(prompt: Any, completion: str, expected: tuple[float, ...]) -> None:
    grades = world.grade(prompt, completion)
    assert tuple(grades[name] for name in world.ATTRIBUTES) == expected
    assert world.true_reward(prompt, completion) == pytest.approx(
        0.5 * expected[0] + 0.2 * expected[1] + 0.15 * expected[2] + 0.15 * expected[3]
    )


@pytest.mark.parametrize(
    "garbage",
    ["", " ", "\x00", "qwerty " * 5000, "cold big", "hot cold wet dry", "<|im_end|>", "((((", "\ud800", "The answer is", "(" * 20_000],
)
def test_garbage_gets_nothing(garbage: str) -> None:
    assert world.true_reward(user("What is the opposite of hot?"), garbage) == 0.0


def test_an_answer_among_unknown_words_counts_but_costs() -> None:
    prompt = user("What is the opposite of hot?")
    grades = world.grade(prompt, "well cold is what people usually tell me")
    assert grades["correctness"] == 4.0
    assert grades["concision"] == 0.0
    assert world.true_reward(prompt, "cold") > world.true_reward(prompt, "well cold is what people usually tell me")


def test_rambling_costs_even_without_a_demand() -> None:
    prompt = user("What is the opposite of hot?")
    rambling = " ".join(["It is cold.", *["I checked it twice."] * 20])
    assert world.grade(prompt, rambling)["concision"] == 0.0


def test_a_right_answer_beats_every_wrong_one(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        rewards: dict[bool, list[float]] = {True: [], False: []}
        for ratings in row["attributes"]:
            rewards[ratings[0] == 4.0].append(world.reward_of(dict(zip(world.ATTRIBUTES, ratings, strict=True))))
        if rewards[True] and rewards[False]:
            assert min(rewards[True]) > max(rewards[False])


def test_foreign_prompts_are_refused() -> None:
    with pytest.raises(DataError, match="no kind of world task"):
        world.grade(user("What is the capital of France?"), "Paris")
    with pytest.raises(DataError, match="user turn"):
        world.grade(user("What is the opposite of hot?", "cold"), "cold")
    with pytest.raises(DataError, match="user turn"):
        world.grade([], "cold")


def test_rows_are_valid_and_their_ranks_follow_the_true_reward(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        prompt = tuple(row["prompt"])
        validate(Comparison(row["id"], row["source"], prompt, tuple(row["completions"]), tuple(row["ranks"])), ties="quarantine")
        rewards = [world.true_reward(prompt, text) for text in row["completions"]]
        order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
        assert [row["ranks"][i] for i in order] == list(range(len(rewards)))
        assert 2 <= len(rewards) <= 5
        task = world.Task.from_prompt(prompt)
        assert task.kind == row["source"]
        assert [[task.grade(text)[name] for name in world.ATTRIBUTES] for text in row["completions"]] == row["attributes"]


def test_variety(rows: list[dict[str, Any]]) -> None:
    assert set(Counter(row["source"] for row in rows)) == set(KINDS)
    assert {len(row["completions"]) for row in rows} == {2, 3, 4, 5}
    assert 0.2 < np.mean([len([t for t in row["prompt"] if t["role"] == "user"]) > 1 for row in rows]) < 0.5
    assert 0.05 < np.mean([row["prompt"][0]["role"] == "system" for row in rows]) < 0.25
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)
    ratings = np.array([ratings for row in rows for ratings in row["attributes"]])
    assert ratings.min() == 0.0
    assert ratings.max() == 4.0
    assert (ratings.std(axis=0) > 0.3).all()


@pytest.mark.parametrize("pairs_of", [all_pairs, chosen_and_rejected])
def test_length_does_not_give_the_answer_away(rows: list[dict[str, Any]], pairs_of: Any) -> None:
    pairs = list(pairs_of(rows))
    assert 0.47 <= longer_wins(pairs) <= 0.53
    by_kind = defaultdict(list)
    for pair in pairs:
        by_kind[pair[0]].append(pair)
    for kind, of_kind in by_kind.items():
        assert 0.43 <= longer_wins(of_kind) <= 0.57, kind


def features(text: str) -> list[str]:
    words = text.replace(".", " .").replace("!", " !").replace("?", " ?").split()
    return [*words, f"first {words[0]}", f"last {words[-1]}", f"length {min(20, len(words))}", f"sentences {text.count('.')}"]


def completion_only_accuracy(pairs: list[tuple[str, str, str]]) -> float:
    """Held-out accuracy of a logistic model of a pair's words without the prompt (120 steps of gradient descent, L2)."""
    train, test = pairs[: len(pairs) * 3 // 4], pairs[len(pairs) * 3 // 4 :]
    index: dict[str, int] = {}
    for _, better, worse in train:
        for name in features(better) + features(worse):
            index.setdefault(name, len(index))

    def matrix(some: list[tuple[str, str, str]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        out = np.zeros((len(some), len(index)), np.float32)
        for row, (_, better, worse) in enumerate(some):
            for sign, text in ((1.0, better), (-1.0, worse)):
                for name in features(text):
                    if name in index:
                        out[row, index[name]] += sign
        return out

    design, weights = matrix(train), np.zeros(len(index), np.float32)
    for _ in range(120):
        weights += 1.0 * (design.T @ (1.0 / (1.0 + np.exp(design @ weights))) / len(train) - 1e-3 * weights)
    margins = matrix(test) @ weights
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def test_the_completion_alone_does_not_give_the_answer_away(rows: list[dict[str, Any]]) -> None:
    # Over all kinds together: which kind a prompt is of is part of the prompt, and an answer to another kind of question is wrong.
    assert completion_only_accuracy(list(chosen_and_rejected(rows))) < 0.58
    assert completion_only_accuracy(list(all_pairs(rows))) < 0.58


def test_some_wrong_answers_answer_another_question(rows: list[dict[str, Any]]) -> None:
    off_topic = [row for row in rows if any(not any(ratings) for ratings in row["attributes"])]
    assert 0.5 < len(off_topic) / len(rows) < 0.9
    for row in off_topic[:200]:
        worst = max(range(len(row["ranks"])), key=lambda i: row["ranks"][i])
        assert world.true_reward(row["prompt"], row["completions"][worst]) == 0.0


def test_the_completion_only_classifier_would_see_a_give_away(rows: list[dict[str, Any]]) -> None:
    marked = [(kind, f"Surely {better}", worse) for kind, better, worse in chosen_and_rejected(rows)]
    assert completion_only_accuracy(marked) > 0.95


def test_pairs_follow_the_ranks(rows: list[dict[str, Any]]) -> None:
    pairs = list(world.pairs(rows))
    assert [pair["id"] for pair in pairs] == [row["id"] for row in rows]
    for pair, row in zip(pairs, rows, strict=True):
        rank = {text: rank for text, rank in zip(row["completions"], row["ranks"], strict=True)}
        assert rank[pair["chosen"][0]["content"]] < rank[pair["rejected"][0]["content"]]
        assert pair["prompt"] == row["prompt"]


def test_rows_depend_on_the_seed_and_the_index_only() -> None:
    assert list(world.generate(30, seed=3)) == list(world.generate(60, seed=3))[:30]
    assert list(world.generate(30, seed=3)) != list(world.generate(30, seed=4))


def test_rows_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "import json, hashlib; from rayward.demo import world; rows = list(world.generate(200, 5));"
        "print(hashlib.sha256(json.dumps([rows, list(world.pairs(rows))]).encode()).hexdigest())"
    )
    rows = list(world.generate(200, 5))
    here = hashlib.sha256(json.dumps([rows, list(world.pairs(rows))]).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT / "platform")}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == here


def test_write_demo(tmp_path: Path) -> None:
    world_files.write_demo(tmp_path / "a", 300, 60, seed=1)
    world_files.write_demo(tmp_path / "b", 300, 60, seed=1)
    for path in sorted(p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name
    read = {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in (tmp_path / "a").glob("*.jsonl")}
    assert {name: len(lines) for name, lines in read.items()} == {
        "train.jsonl": 300,
        "validation.jsonl": 60,
        "rankings.jsonl": 300,
        "rankings_validation.jsonl": 60,
    }
    prompts = {name: {json.dumps(line["prompt"]) for line in lines} for name, lines in read.items()}
    assert not prompts["train.jsonl"] & prompts["validation.jsonl"]
    assert prompts["rankings.jsonl"] == prompts["train.jsonl"]


def test_tokenizer(tmp_path: Path) -> None:
    from rayward.contract.contract import Contract
    from rayward.contract.encoder import Encoder
    from rayward.contract.tokenizer import load_tokenizer

    texts = [f"{turn['role']} {turn['content']}" for row in world.generate(300, 1) for turn in row["prompt"]]
    train_tokenizer(texts, tmp_path / "tokenizer", vocab_size=600)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert len(tokenizer) <= 600
    contract = Contract.from_tokenizer(tokenizer, max_tokens=128)
    assert contract.template_source == "tokenizer"
    assert contract.pad_token_id != contract.end_token_id
    ids = Encoder(contract, tokenizer).encode(user("What is 12 + 7?"), "19")  # type: ignore[arg-type]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == "<|im_start|>user What is 12 + 7?<|im_end|>\n<|im_start|>assistant 19<|im_end|>"
    assert [tokenizer.decode([i]) for i in ids[-3:-1]] == ["1", "9"]
    text = "Überraschung 🎈 123\tok"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_demo_recipe_resolves_and_fits_the_tokenizer() -> None:
    config = load_config([ROOT / "jobs/recipes/demo.yaml"])
    architecture = config.model.architecture
    assert architecture is not None
    assert architecture["vocab_size"] >= 1000
    assert architecture["max_position_embeddings"] >= config.model.max_tokens
    assert (architecture["pad_token_id"], architecture["bos_token_id"], architecture["eos_token_id"]) == (0, 1, 2)
