"""Rewards along the tokens of a completion: what the head would say if the conversation ended there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.architectures import make_architecture
from tests.helpers.models import change_contract, make_export
from tests.helpers.tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from rayward.contract.contract import Contract, Normaliser
from rayward.contract.conversation import Message
from rayward.contract.encoder import Encoder
from rayward.contract.reading import Aggregate, RewardReadout
from rayward.contract.tokenizer import load_tokenizer
from rayward.model.gate import Gating
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.implicit import ImplicitScorer
from rayward.scoring.scorer import Scorer
from rayward.wire.items import Asked, ItemResult, ScoreItem

PROMPT: tuple[Message, ...] = ({"role": "user", "content": "Name a colour, and say where it is found."},)
COMPLETIONS = ("Red.", "Übrigens: 蓝色 🙂 of course", "R")
ITEM = ScoreItem(PROMPT, COMPLETIONS, trace=True)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export")


def plain_along(directory: Path, completion: str) -> tuple[str, torch.Tensor]:
    """From plain Transformers: the text of a completion with its end token, and the outputs when the conversation stops at each of them."""
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(directory).eval(), load_tokenizer(str(directory))
    encoding = Encoder(Contract.load(directory), tokenizer).encode_parts(PROMPT, completion)
    with torch.inference_mode():
        found = [
            model.score(model.model(input_ids=torch.tensor([encoding.ids[: stop + 1]])).last_hidden_state[0, -1])
            for stop in range(encoding.text_start, len(encoding.ids))
        ]
    return str(tokenizer.decode(encoding.ids[encoding.text_start :])), torch.stack(found)


def traces_of(result: ItemResult) -> list[tuple[str, tuple[float, ...]]]:
    assert result.error is None, result.error
    assert result.traces is not None
    assert result.rewards is not None
    assert [trace.rewards[-1] for trace in result.traces] == pytest.approx(list(result.rewards), abs=1e-6)
    assert all(len(trace.tokens) == len(trace.rewards) for trace in result.traces)
    return [("".join(trace.tokens), trace.rewards) for trace in result.traces]


def test_a_trace_is_what_the_head_says_where_the_conversation_stops(export: Path) -> None:
    scorer = Scorer.load(export, device="cpu")
    (result,) = scorer.score([ITEM])
    for completion, (text, rewards) in zip(COMPLETIONS, traces_of(result), strict=True):
        whole, expected = plain_along(export, completion)
        assert text == whole == completion + scorer.contract.end_token
        assert rewards == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    # Characters of several tokens stand at their last one.
    assert result.traces is not None
    assert {"蓝", "🙂", "Ü"} <= set(result.traces[1].tokens)


def test_a_trace_changes_no_reward_and_not_what_others_get(export: Path) -> None:
    scorer = Scorer.load(export, device="cpu")
    bare = replace(ITEM, trace=False)
    alone = scorer.score([bare])[0]
    traced, plain, again = scorer.score([ITEM, bare, replace(ITEM, completions=("Red.",))])
    assert plain.traces is None
    assert (traced.num_tokens, traced.tokens) == (plain.num_tokens, plain.tokens)
    for result in (traced, plain):
        assert result.rewards == pytest.approx(alone.rewards, abs=1e-6)
    assert again.traces is not None
    assert traced.traces is not None
    assert again.traces[0].rewards == pytest.approx(traced.traces[0].rewards, abs=1e-6)


def test_weights_and_scale_hold_along_the_trace(tmp_path: Path) -> None:
    outputs, weights = ("helpfulness", "correctness", "coherence", "verbosity"), (0.5, 1.0, -2.0, 0.25)
    directory = make_export(tmp_path / "model", outputs=outputs, reward_weights=weights)
    normaliser = Normaliser(mean=0.75, std=0.5, num_rewards=100, reference="test")
    Contract.load(directory).model_copy(update={"normaliser": normaliser}).save(directory)
    scorer = Scorer.load(directory, device="cpu")
    _, along = plain_along(directory, COMPLETIONS[0])
    (raw,), (scaled,) = scorer.score([ITEM]), scorer.score([replace(ITEM, asked=Asked(normalise="standardised"))])
    expected = (along @ torch.tensor(weights)).tolist()
    assert traces_of(raw)[0][1] == pytest.approx(expected, abs=1e-5)
    assert traces_of(scaled)[0][1] == pytest.approx([(value - 0.75) / 0.5 for value in expected], abs=1e-4)
    (chosen,) = scorer.score([replace(ITEM, asked=Asked(weights="helpsteer2_goodness"))])
    assert traces_of(chosen)[0][1] == pytest.approx((along @ torch.tensor([0.65, 0.80, 0.45, 0.0])).tolist(), abs=1e-5)


def test_a_gate_weighs_every_token_by_the_prompt(tmp_path: Path) -> None:
    directory = make_export(tmp_path / "model", outputs=("a", "b"), reward_weights=(1.0, 0.0))
    loaded = Scorer.load(directory, device="cpu")
    torch.manual_seed(0)
    loaded._model.gate = Gating(32, 2, width=8, depth=1, dropout=0.0).eval()
    contract = loaded.contract.model_copy(update={"outputs": ("a", "b", "score"), "reward_weights": (0.0, 0.0, 1.0), "gate": ()})
    contract = contract.model_copy(update={"weight_sets": {}})
    encoder = Encoder(contract, load_tokenizer(str(directory)))
    scorer = Scorer(loaded._model, encoder, model_id="m", version="v", tokens_per_batch=512)
    (result,) = scorer.score([ITEM])
    gate = loaded._model.gate
    for completion, (_, rewards) in zip(COMPLETIONS, traces_of(result), strict=True):
        _, along = plain_along(directory, completion)
        (features,) = scorer.features([ScoreItem(PROMPT, (completion,))])
        assert isinstance(features, torch.Tensor)
        with torch.inference_mode():
            expected = gate.score(along, features[:, 1].expand(len(along), -1))
        assert rewards == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("aggregate", ["last", "mean", "minimum", "product", "mean_logit"])
def test_an_outcome_model_says_what_it_would_have_said_by_then(tmp_path: Path, aggregate: Aggregate) -> None:
    directory = make_export(tmp_path / "model")
    change_contract(directory, reading=RewardReadout(at="tokens", aggregate=aggregate))
    (result,) = Scorer.load(directory, device="cpu").score([ITEM])
    for completion, (_, rewards) in zip(COMPLETIONS, traces_of(result), strict=True):
        logits = plain_along(directory, completion)[1][:, 0]
        combine: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "last": lambda x: x[-1].sigmoid(), "mean": lambda x: x.sigmoid().mean(), "minimum": lambda x: x.min().sigmoid(),
            "product": lambda x: x.sigmoid().prod(), "mean_logit": lambda x: x.mean().sigmoid(),
        }  # fmt: skip
        expected = [float(combine[aggregate](logits[: stop + 1])) for stop in range(len(logits))]
        assert rewards == pytest.approx(expected, abs=1e-5)


def test_a_process_model_answers_with_its_steps(tmp_path: Path) -> None:
    directory = make_export(tmp_path / "model")
    change_contract(directory, reading=RewardReadout(at="steps", separator="|", aggregate="minimum"))
    (result,) = Scorer.load(directory, device="cpu").score([replace(ITEM, completions=("a|b|c",))])
    assert result.traces is None
    assert result.steps is not None
    assert len(result.steps[0]) == 3


def test_an_ensemble_has_its_rule_at_every_token(export: Path, tmp_path: Path) -> None:
    other = make_export(tmp_path / "other", seed=1)
    for rule in ("mean", "minimum"):
        (tmp_path / rule).mkdir()
        (tmp_path / rule / "ensemble.json").write_text(json.dumps({"rule": rule, "members": [str(export), str(other)]}))
        (result,) = Ensemble.load(tmp_path / rule, device="cpu").score([ITEM])
        for completion, (text, rewards) in zip(COMPLETIONS, traces_of(result), strict=True):
            pair = torch.stack([plain_along(member, completion)[1][:, 0] for member in (export, other)])
            expected = pair.mean(0) if rule == "mean" else pair.min(0).values
            assert text == plain_along(export, completion)[0]
            assert rewards == pytest.approx(expected.tolist(), abs=1e-5)


def test_members_that_read_at_other_places_have_no_common_trace(export: Path, tmp_path: Path) -> None:
    steps = make_export(tmp_path / "steps", seed=1)
    change_contract(steps, reading=RewardReadout(at="steps", separator="|", aggregate="minimum"))
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "ensemble.json").write_text(json.dumps({"rule": "mean", "members": [str(export), str(steps)]}))
    ensemble = Ensemble.load(tmp_path / "mixed", device="cpu")
    (refused, scored) = ensemble.score([ITEM, replace(ITEM, trace=False)])
    assert refused.error is not None
    assert refused.error.code == "no_trace"
    assert scored.rewards is not None


@pytest.mark.parametrize("per_token", [False, True])
def test_an_implicit_reward_adds_up_along_the_completion(tmp_path: Path, per_token: bool) -> None:
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for seed, name in enumerate(("policy", "reference")):
        (tmp_path / name).mkdir()
        tokenizer = make_tokenizer(tmp_path / name)
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.2, **shape)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    (tmp_path / "rule").mkdir()
    rule = {"policy": "../policy", "reference": "../reference", "beta": 0.3, "max_tokens": 192, "per_token": per_token}
    (tmp_path / "rule" / "implicit.json").write_text(json.dumps(rule))
    scorer = ImplicitScorer.load(tmp_path / "rule", device="cpu")
    (result,) = scorer.score([ITEM])
    encoder = Encoder(Contract.from_tokenizer(tokenizer, max_tokens=192), tokenizer)
    for completion, (text, rewards) in zip(COMPLETIONS, traces_of(result), strict=True):
        encoding = encoder.encode_parts(PROMPT, completion)
        sums = []
        for name in ("policy", "reference"):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
            with torch.inference_mode():
                log_probs = model(input_ids=torch.tensor([encoding.ids])).logits[0].log_softmax(-1)
            taken = [float(log_probs[place - 1, encoding.ids[place]]) for place in range(encoding.text_start, len(encoding.ids))]
            sums.append(torch.tensor(taken).double().cumsum(0))
        expected = 0.3 * (sums[0] - sums[1]) / (torch.arange(1, len(sums[0]) + 1) if per_token else 1)
        assert text == completion + encoder.contract.end_token
        assert rewards == pytest.approx(expected.tolist(), abs=1e-4)
    # The first token of a text that begins with the completion has no probability.
    (flat,) = scorer.score([ScoreItem((), ("no turns",), form="text", trace=True)])
    assert traces_of(flat)[0][1][0] == 0.0


def test_where_a_critique_is_read_there_is_no_trace_and_none_is_written_for_it(export: Path) -> None:
    loaded = Scorer.load(export, device="cpu")
    contract = loaded.contract.model_copy(update={"critique_lead_in": "Judge:"})
    # The model has no language head: writing would fail with another error.
    scorer = Scorer(loaded._model, Encoder(contract, load_tokenizer(str(export))), model_id="m", version="v", tokens_per_batch=512)
    (result,) = scorer.score([ITEM])
    assert result.error is not None
    assert (result.error.code, "read after a critique" in result.error.message) == ("no_trace", True)


def test_models_that_say_nothing_before_the_end_refuse(tmp_path: Path) -> None:
    directory = make_export(tmp_path / "export")
    (directory / "contract.json").unlink()
    vocabulary = len(load_tokenizer(str(directory)))
    for name in ("bert", "gemma2"):
        for file in directory.glob("*.safetensors"):
            file.unlink()
        make_architecture(name, vocab_size=vocabulary).save_pretrained(directory)
        scorer = Scorer.load(directory, device="cpu")
        traced, plain = scorer.score([ITEM, replace(ITEM, trace=False)])
        assert plain.rewards is not None
        if name == "bert":
            assert traced.error is not None
            assert (traced.error.code, traced.error.retryable) == ("no_trace", False)
        else:
            # Padded rows, but causal ones: the last token alone decides.
            assert scorer._model.layout == "padded"
            assert traces_of(traced)[0][1][-1] == pytest.approx((plain.rewards or ())[0], abs=1e-6)
