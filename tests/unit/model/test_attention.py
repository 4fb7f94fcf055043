from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.helpers.architectures import make_architecture
from tests.helpers.comparisons import make_comparison, random_comparisons
from torch import nn

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import PackedBatch, pack
from rayward.errors import ModelLoadError
from rayward.model.attention import ONE_CALL_TOKENS, segment_attention, why_not_shareable
from rayward.model.block_mask import BLOCK_SIZE, block_table, flex_mask


def visible(batch: PackedBatch) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """The rule, token by token and in words: same comparison, not later, and of the prefix or of the same branch."""
    place: list[tuple[int, int | None]] = []
    for index, comparison in enumerate(batch.comparisons):
        place += [(index, None)] * len(comparison.prefix_ids)
        for branch, ids in enumerate(comparison.branch_ids):
            place += [(index, branch)] * len(ids)
    allowed = np.zeros((len(place), len(place)), dtype=np.bool_)
    for token in sorted(set(place), key=str):
        rows = np.array([token == other for other in place])
        allowed |= rows[:, None] & np.array([other in (token, (token[0], None)) for other in place])[None, :]
    return np.tril(allowed)


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
    mask = flex_mask(torch.from_numpy(batch.segments), size, torch.device("cpu"))
    q, k = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    zero = torch.zeros((), dtype=torch.int64)
    found = mask.mask_mod(zero, zero, q.reshape(-1), k.reshape(-1)).reshape(size, size)
    np.testing.assert_array_equal(found.numpy(), visible(batch))


def long_comparisons(seed: int) -> list[EncodedComparison]:
    # Prefixes and branches around the size of a block, on it, and without any prefix.
    rng = np.random.default_rng(seed)

    def ids() -> npt.NDArray[np.int32]:
        return rng.integers(1, 9, int(rng.choice([1, 30, 127, 128, 129, 256, 300])), dtype=np.int32)

    made = []
    for number in range(int(rng.integers(1, 5))):
        prefix = ids() if rng.random() < 0.8 else np.zeros(0, dtype=np.int32)
        made.append(EncodedComparison(str(number), prefix, tuple(ids() for _ in range(int(rng.integers(1, 4)))), Labels()))
    return made


def test_a_long_prompt_is_seen_by_whole_blocks() -> None:
    batch = pack([make_comparison("a", 4 * BLOCK_SIZE, [BLOCK_SIZE, 2 * BLOCK_SIZE])])
    assert batch.segments is not None
    table = block_table(batch.segments, batch.input_ids.shape[1])
    full = ["", "x", "xx", "xxx", "xxxx", "xxxx", "xxxx x"]
    assert ["".join(" x"[int(cell)] for cell in row).rstrip() for row in table.full] == full
    assert (table.partial == np.eye(7, dtype=bool)).all()


@pytest.mark.parametrize("seed", range(1, 12))
def test_blocks_hold_every_visible_pair_and_full_ones_nothing_else(seed: int) -> None:
    batch = pack(long_comparisons(seed))
    size = batch.input_ids.shape[1]
    assert batch.segments is not None
    table = block_table(batch.segments, size)
    dense = visible(batch)
    blocks = -(-size // BLOCK_SIZE)
    for q in range(blocks):
        for k in range(blocks):
            part = dense[q * BLOCK_SIZE : (q + 1) * BLOCK_SIZE, k * BLOCK_SIZE : (k + 1) * BLOCK_SIZE]
            assert not (table.full[q, k] and table.partial[q, k])
            assert part.any() <= (table.full[q, k] or table.partial[q, k])
            if table.full[q, k]:
                assert part.all()
                assert part.shape == (BLOCK_SIZE, BLOCK_SIZE)
            if table.partial[q, k]:
                assert part.any()


def test_an_empty_micro_batch_attends_to_itself() -> None:
    batch = pack([])
    x = torch.randn(1, 2, 1, 4)
    assert batch.segments is not None
    found, _ = segment_attention(nn.Identity(), x, x, x, torch.from_numpy(batch.segments)[None, None])
    torch.testing.assert_close(found, x.transpose(1, 2))
    assert block_table(batch.segments, 1).partial.tolist() == [[True]]


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
