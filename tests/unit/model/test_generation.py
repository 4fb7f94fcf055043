"""Generated text: that of plain Transformers when greedy; alone or in company the same when sampled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.helpers.training import LLAMA
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rayward.batch.layout import Layout
from rayward.model.build import build_reward_model
from rayward.model.generation import REPETITION_PENALTY, Opening, _cache_argument, generate
from rayward.model.reward_model import RewardModel

OPENINGS = [[5, 9, 11], [7], [3, 3, 40, 41, 42, 43, 44], [80, 81], [12, 13, 14]]
END, BANNED = 2, 0


@pytest.fixture(scope="module", params=["packed", "padded"])
def models(request: pytest.FixtureRequest) -> tuple[RewardModel, LlamaForCausalLM]:
    torch.manual_seed(4)
    settings = {key: value for key, value in LLAMA.items() if key != "model_type"}
    # Not one configuration for both: the attention is chosen in it.
    plain, config = LlamaForCausalLM(LlamaConfig(**settings)).eval(), LlamaConfig(**settings)
    layout: Layout = request.param
    model = build_reward_model(config, max_tokens=256, layout=layout, with_language=True)
    found = dict(model.model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            found[name].copy_(parameter)
    return model.eval(), plain


def openings(max_new_tokens: int, *seeds: int) -> list[Opening]:
    return [Opening(ids, max_new_tokens, seed) for ids, seed in zip(OPENINGS, seeds or (0,) * len(OPENINGS), strict=True)]


@pytest.mark.parametrize("budget", [1, 10_000])
def test_greedy_text_is_that_of_transformers(models: tuple[RewardModel, LlamaForCausalLM], budget: int) -> None:
    model, plain = models
    found = generate(model, openings(24), end_id=END, banned_id=BANNED, temperature=0.0, tokens_per_batch=budget)
    settings = GenerationConfig(
        max_new_tokens=24, do_sample=False, repetition_penalty=REPETITION_PENALTY, eos_token_id=END, pad_token_id=BANNED,
        suppress_tokens=[BANNED], output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for ids, text in zip(OPENINGS, found, strict=True):
        given = torch.tensor([ids])
        whole: Any = cast(Any, plain).generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
        best = torch.cat(whole.scores).topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4, "the likeliest token must lead by more than rounding, or take another seed"
        expected = whole.sequences[0, len(ids) :].tolist()
        assert text == (expected[:-1] if expected[-1] == END else expected)
    assert {len(text) for text in found} != {0}


def test_a_sampled_text_depends_on_its_seed_alone(models: tuple[RewardModel, LlamaForCausalLM]) -> None:
    model, _ = models

    def sample(given: list[Opening]) -> list[list[int]]:
        return generate(model, given, end_id=END, banned_id=BANNED, temperature=0.8, tokens_per_batch=10_000)

    together = sample(openings(16, 1, 2, 3, 4, 5))
    for opening, text in zip(openings(16, 1, 2, 3, 4, 5), together, strict=True):
        assert sample([opening]) == [text]
    assert sample(openings(16, 6, 7, 8, 9, 10)) != together


def test_samples_follow_the_distribution(models: tuple[RewardModel, LlamaForCausalLM]) -> None:
    model, plain = models
    number = 600
    found = generate(
        model, [Opening([7], 1, seed) for seed in range(number)], end_id=END, banned_id=BANNED, temperature=1.0, tokens_per_batch=10_000
    )
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[7]])).logits[0, -1]
    logits[7] = logits[7] / REPETITION_PENALTY if logits[7] > 0 else logits[7] * REPETITION_PENALTY
    logits[BANNED] = -torch.inf
    likeliest = logits.softmax(-1).topk(5)
    for probability, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
        share = sum(text == ([token] if token != END else []) for text in found) / number
        assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / number) ** 0.5)


def test_nothing_is_added_where_there_is_no_room(models: tuple[RewardModel, LlamaForCausalLM]) -> None:
    model, _ = models
    given = [Opening([5, 6], 0), Opening([5, 6], 3)]
    none, some = generate(model, given, end_id=END, banned_id=BANNED, temperature=0.0, tokens_per_batch=100)
    assert none == []
    assert len(some) <= 3
    assert generate(model, [], end_id=END, banned_id=BANNED, temperature=0.0, tokens_per_batch=100) == []


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_passed_under_the_name_that_the_model_has(name: str) -> None:
    forwards = {"cache": lambda cache: cache, "past_key_values": lambda past_key_values: past_key_values}
    assert _cache_argument(cast(PreTrainedModel, SimpleNamespace(forward=forwards[name]))) == name
