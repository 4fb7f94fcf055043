from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.helpers.architectures import make_architecture
from tests.helpers.comparisons import make_comparison, random_comparisons
from torch import nn

from rayward.batch.layout import PackedBatch, pack
from rayward.errors import ModelLoadError
from rayward.model.attention import ONE_CALL_TOKENS, flex_mask, segment_attention, why_not_shareable


def visible(batch: PackedBatch) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """The rule, token by token and in words: same comparison, not later, and of the prefix or of the same branch."""
    place: list[tuple[int, int | None]] = []
    for index, comparison in enumerate(batch.comparisons):
        place += [(index, None)] * len(comparison.prefix_ids)
        for branch, ids in enumerate(comparison.branch_ids):
            place += [(index, branch)] * len(ids)
    size = len(place)
    allowed = np.zeros((size, size), dtype=np.bool_)
    for q in range(size):
        for k in range(q + 1):
            allowed[q, k] = place[q][0] == place[k][0] and place[k][1] in (None, place[q][1])
    return allowed


BATCHES = {
    "several": random_comparisons(6, seed=0, longest=9),
    "one completion": [make_comparison("a", 4, [3]), make_comparison("b", 0, [5])],
    "no prefix": [make_comparison("a", 0, [3, 4]), make_comparison("b", 0, [1, 2, 3])],
    "long": [make_comparison("a", ONE_CALL_TOKENS, [5, 9]), make_comparison("b", 3, [2, 2]), make_comparison("c", 0, [ONE_CALL_TOKENS, 7])],
    "at the border": [make_comparison("a", ONE_CALL_TOKENS - 4, [2, 2]), make_comparison("b", ONE_CALL_TOKENS - 3, [2, 2])],
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_segment_attention_equals_attention_under_the_dense_mask(name: str, groups: int) -> None:
    batch = pack(BATCHES[name])
    size = batch.input_ids.shape[1]
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, size, 8, generator=generator, requires_grad=True)
    key = torch.randn(1, 4 // groups, size, 8, generator=generator, requires_grad=True)
    value = torch.randn(1, 4 // groups, size, 8, generator=generator, requires_grad=True)
    assert batch.segments is not None
    found, weights = segment_attention(nn.Identity(), query, key, value, torch.from_numpy(batch.segments)[None, None], scaling=0.3)
    assert weights is None
    mask = torch.from_numpy(visible(batch))
    scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn(expected.shape, generator=generator)
    ours = torch.autograd.grad((found * direction).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * direction).sum(), (query, key, value))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["several", "one completion", "no prefix"])
def test_the_flex_mask_is_the_same_rule(name: str) -> None:
    batch = pack(BATCHES[name])
    size = batch.input_ids.shape[1]
    assert batch.segments is not None
    mask = flex_mask(torch.from_numpy(batch.segments), size)
    q, k = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    zero = torch.zeros((), dtype=torch.int64)
    found = mask.mask_mod(zero, zero, q.reshape(-1), k.reshape(-1)).reshape(size, size)
    np.testing.assert_array_equal(found.numpy(), visible(batch))


def test_an_empty_micro_batch_attends_to_itself() -> None:
    batch = pack([])
    x = torch.randn(1, 2, 1, 4)
    assert batch.segments is not None
    found, _ = segment_attention(nn.Identity(), x, x, x, torch.from_numpy(batch.segments)[None, None])
    torch.testing.assert_close(found, x.transpose(1, 2))


def test_a_feature_that_is_not_computed_is_refused() -> None:
    x = torch.randn(1, 2, 1, 4)
    table = torch.tensor([[[[0, 0, 0, 1]]]])
    with pytest.raises(ModelLoadError, match="soft-capping"):
        segment_attention(nn.Identity(), x, x, x, table, softcap=50.0)
    with pytest.raises(ModelLoadError, match="sinks"):
        segment_attention(nn.Identity(), x, x, x, table, s_aux=torch.zeros(2))


@pytest.mark.parametrize("name", ["llama", "nemotron", "qwen2", "gpt2"])
def test_decoders_can_share(name: str) -> None:
    assert why_not_shareable(make_architecture(name), max_tokens=2048) is None


@pytest.mark.parametrize(("name", "reason"), [("bert", "bidirectional"), ("gemma2", "soft-capping"), ("mistral", "sliding window of 16")])
def test_what_cannot_share_says_why(name: str, reason: str) -> None:
    why = why_not_shareable(make_architecture(name), max_tokens=64)
    assert why is not None
    assert reason in why


def test_a_window_that_no_conversation_reaches_is_no_obstacle() -> None:
    assert why_not_shareable(make_architecture("mistral"), max_tokens=16) is None
