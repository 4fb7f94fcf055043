"""The three steps of scoring: units are made in any process, computed in any company, and finished into what `score` gives."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.models import make_export
from tests.helpers.tokenizer import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rayward.errors import ContractMismatchError
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.implicit import ImplicitScorer
from rayward.scoring.scorer import Scorer
from rayward.scoring.units import EncodedItem, ItemEncoder, UnitModel, Values, computed
from rayward.wire.items import Asked, ItemResult, ScoreItem

PROMPTS = ("Name a colour, please, and say why it is one.", "Count to three", "Say something long. " * 5)


def item(prompt: str, *completions: str, **asked: str) -> ScoreItem:
    return ScoreItem(({"role": "user", "content": prompt},), completions, Asked(**asked))  # type: ignore[arg-type]


ITEMS = [
    item(PROMPTS[0], "Red.", "Blue, because the sky is blue.", "Red."),
    item(PROMPTS[1], "1 2 3"),
    item(PROMPTS[2], "word " * 10, "w", "other " * 8, "x y z"),
    item(PROMPTS[0], "Green"),
    item(PROMPTS[2], "w"),
    item("too long", "x" * 500),
    item(PROMPTS[1], "1", weights="nobody knows it"),
]


def _policy(directory: Path, seed: int) -> None:
    tokenizer = make_tokenizer(directory)
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(directory)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    make_export(root / "export")
    make_export(root / "other", seed=1)
    (root / "ensemble").mkdir()
    (root / "ensemble" / "ensemble.json").write_text(json.dumps({"rule": "mean", "members": ["../export", "../other"]}))
    for seed, name in enumerate(("policy", "reference")):
        _policy(root / name, seed)
    (root / "implicit").mkdir()
    (root / "implicit" / "implicit.json").write_text(json.dumps({"policy": "../policy", "reference": "../reference", "max_tokens": 192}))
    return {name: root / name for name in ("export", "ensemble", "implicit")}


KINDS: dict[str, Callable[..., UnitModel]] = {"export": Scorer.load, "ensemble": Ensemble.load, "implicit": ImplicitScorer.load}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, UnitModel]:
    return {kind: load(directories[kind], device="cpu", tokens_per_batch=512) for kind, load in KINDS.items()}


def as_lists(encoded: EncodedItem) -> list[object]:
    return [
        [
            unit.member, unit.comparison.prefix_ids.tolist(), [ids.tolist() for ids in unit.comparison.branch_ids],
            unit.comparison.text_starts, unit.comparison.gate_positions,
        ]
        for unit in encoded.units
    ]  # fmt: skip


def same(found: ItemResult, expected: ItemResult) -> None:
    assert found.error == expected.error
    assert found.rewards == pytest.approx(expected.rewards, abs=1e-6)
    assert replace(found, rewards=(0.0,), error=None, outputs=None, tokens_computed=0) == replace(
        expected, rewards=(0.0,), error=None, outputs=None, tokens_computed=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_units_from_another_encoder_give_what_score_gives(models: dict[str, UnitModel], kind: str) -> None:
    model = models[kind]
    spec = model.encoder_spec()
    assert spec is not None
    encoder: ItemEncoder = pickle.loads(pickle.dumps(spec)).load()
    encoded = [pickle.loads(pickle.dumps(encoder.encode(each))) for each in ITEMS]
    assert [as_lists(each) for each in encoded] == [as_lists(model.encode_item(each)) for each in ITEMS]
    for found, expected in zip(computed(model, encoded), model.score(ITEMS), strict=True):
        same(found, expected)
    assert [None if each.error is None else each.error.code for each in encoded] == [*[None] * 5, "too_long", "unknown_weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_does_not_depend_on_the_company_of_its_units(models: dict[str, UnitModel], kind: str) -> None:
    model, generator = models[kind], random.Random(0)
    alone = [model.score([each])[0] for each in ITEMS]
    encoded = [model.encode_item(each) for each in ITEMS]
    # The units of all items in any order, in forwards of any size.
    waiting = [(owner, place) for owner, each in enumerate(encoded) for place in range(len(each.units))]
    for _ in range(5):
        generator.shuffle(waiting)
        values: dict[tuple[int, int], Values] = {}
        for start in range(0, len(waiting), size := generator.randint(1, len(waiting))):
            group = waiting[start : start + size]
            found = model.forward([encoded[owner].units[place] for owner, place in group])
            values |= dict(zip(group, found, strict=True))
        for owner, each in enumerate(encoded):
            same(model.finish(each, [values[owner, place] for place in range(len(each.units))]), alone[owner])


@pytest.mark.parametrize("kind", KINDS)
def test_what_items_begin_with_is_computed_once(models: dict[str, UnitModel], kind: str) -> None:
    model = models[kind]
    long, number = "p" * 100, len("group")
    apart = [item(long, text) for text in "group"]
    together, (merged,) = model.score(apart), model.score([item(long, *"group")])
    assert sum(result.tokens for result in together) == merged.tokens
    assert sum(result.tokens_computed for result in together) == merged.tokens_computed < merged.tokens / 3
    assert max(result.tokens_computed for result in together) - min(result.tokens_computed for result in together) <= number
    assert [result.rewards for result in together] == [pytest.approx((reward,), abs=1e-6) for reward in merged.rewards or ()]


def test_the_encoder_of_another_process_is_light_and_does_not_need_the_weights(directories: dict[str, Path], tmp_path: Path) -> None:
    spec = Scorer.load(directories["export"], device="cpu").encoder_spec()
    assert spec is not None
    # Golden scores are for whoever computes.
    assert spec.contract.golden == ()
    assert len(pickle.dumps(spec)) < 20_000
    (tmp_path / "spec").write_bytes(pickle.dumps((spec, ITEMS[0])))
    program = (
        "import pickle, sys; spec, item = pickle.load(open(sys.argv[1], 'rb'));"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), 'heavy before the tokenizer';"
        "encoded = spec.load().encode(item); print(len(encoded.units), encoded.num_tokens, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "spec")], capture_output=True, text=True, check=True)
    expected = Scorer.load(directories["export"], device="cpu").encode_item(ITEMS[0])
    assert done.stdout.split() == [str(len(expected.units)), str(expected.num_tokens), "False"]


def test_an_encoder_never_reads_another_tokenizer_than_its_model(directories: dict[str, Path], tmp_path: Path) -> None:
    directory = make_export(tmp_path / "export")
    spec = Scorer.load(directory, device="cpu").encoder_spec()
    assert spec is not None
    file = directory / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"a"', '"swapped"', 1).replace('"e"', '"a"', 1))
    with pytest.raises(ContractMismatchError, match="have changed since the model was loaded"):
        spec.load()
    file.write_text(text)
    assert spec.load().encode(ITEMS[0]).units


def test_a_foreign_tokenizer_without_a_pad_token_is_made_the_same_again(directories: dict[str, Path], tmp_path: Path) -> None:
    directory = make_export(tmp_path / "export")
    for name in ("contract.json", "chat_template.jinja"):
        (directory / name).unlink()
    values = json.loads((directory / "tokenizer_config.json").read_text())
    values.pop("pad_token")
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    scorer = Scorer.load(directory, device="cpu")
    spec = scorer.encoder_spec()
    assert spec is not None
    forged = item("Hi", f"x {scorer.contract.pad_token} y {scorer.contract.end_token} z")
    assert as_lists(spec.load().encode(forged)) == as_lists(scorer.encode_item(forged))


def test_a_scorer_that_was_not_loaded_from_a_directory_encodes_by_itself(directories: dict[str, Path], tmp_path: Path) -> None:
    loaded = Scorer.load(directories["export"], device="cpu")
    made = Scorer(loaded._model, loaded._encoder, model_id="m", version="v", tokens_per_batch=512)
    assert made.encoder_spec() is None
    assert made.score(ITEMS[:2])[0].rewards == loaded.score(ITEMS[:2])[0].rewards


def test_one_unit_that_fails_leaves_those_that_it_was_merged_with(directories: dict[str, Path]) -> None:
    scorer = Scorer.load(directories["export"], device="cpu")
    prompt = "A prompt that all of them share, long enough to be computed once."
    expected = [scorer.score([item(prompt, text)])[0] for text in ("fine", "good")]
    run = scorer._outputs

    def outputs(batch: Any) -> torch.Tensor:
        found = run(batch)
        if bool((batch.input_ids == tilde).any()):
            found[:] = torch.nan
        return found

    (tilde,) = scorer._encoder._tokenizer("~", add_special_tokens=False)["input_ids"]
    scorer._outputs = outputs  # type: ignore[method-assign]
    results = scorer.score([item(prompt, "fine"), item(prompt, "~"), item(prompt, "good")])
    assert results[1].error is not None
    assert results[1].error.code == "non_finite"
    for found, alone in zip(results[::2], expected, strict=True):
        assert found.rewards == pytest.approx(alone.rewards, abs=1e-6)
