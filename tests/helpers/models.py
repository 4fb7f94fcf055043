"""A tiny reward model with its contract, exported the way `rayward export` lays it out, without any code of the exporter.

The golden rewards come from plain Transformers, one unpadded conversation at a time, so that the scorer is compared with
something else than itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tests.helpers.tokenizer import make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rayward.contract.contract import Contract, GoldenScore
from rayward.contract.conversation import Message
from rayward.contract.encoder import Encoder
from rayward.model.weights import head_sha256
from rayward.schema import file_sha256
from rayward.scoring.scorer import Scorer

MAX_TOKENS = 192

CONVERSATIONS: tuple[tuple[tuple[Message, ...], str], ...] = (
    (({"role": "user", "content": "What is two plus two?"},), "Four."),
    (({"role": "user", "content": "What is two plus two?"},), "It is five, I am sure."),
    (
        (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi!"},
            {"role": "user", "content": "Wie geht es? 你好"},
        ),
        "Gut, danke. 🙂",
    ),
)


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, num_labels: int = 1, seed: int = 0, max_tokens: int = 512, hidden_size: int = 32
) -> LlamaForSequenceClassification:
    """Random weights, but large enough that rewards differ between texts by far more than rounding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max(512, max_tokens),
        num_labels=num_labels,
        problem_type="regression",
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    return LlamaForSequenceClassification(config).eval()


def make_export(
    directory: Path,
    *,
    seed: int = 0,
    golden_shift: float = 0.0,
    outputs: tuple[str, ...] = ("reward",),
    reward_weights: tuple[float, ...] = (1.0,),
    max_shard_size: str = "1GB",
    make: Callable[[Path], PreTrainedTokenizerFast] = make_tokenizer,
    max_tokens: int = MAX_TOKENS,
    hidden_size: int = 32,
) -> Path:
    """Write model, tokenizer (by `make`) and contract to `directory`; `golden_shift` falsifies the golden rewards."""
    directory.mkdir(parents=True)
    tokenizer = make(directory)
    model = make_model(tokenizer, seed=seed, num_labels=len(outputs), max_tokens=max_tokens, hidden_size=hidden_size)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    contract = Contract.from_tokenizer(tokenizer, max_tokens=max_tokens).for_head(outputs, reward_weights)
    golden = []
    for prompt, completion in CONVERSATIONS:
        ids = Encoder(contract, tokenizer).encode(prompt, completion)
        values = tuple(value + golden_shift for value in plain_outputs(model, ids))
        golden.append(GoldenScore(prompt=prompt, completion=completion, token_ids=tuple(ids), reward=values))
    contract.model_copy(
        update={
            "golden": tuple(golden),
            "files": {path.name: file_sha256(path) for path in sorted(directory.iterdir())},
            "head_sha256": head_sha256(model.state_dict()),
        }
    ).save(directory)
    return directory


def change_contract(directory: Path, **changes: object) -> None:
    """Another contract beside the same files, with the golden scores that it gives."""
    changed = Contract.load(directory).model_copy(update={**changes, "golden": ()})
    changed.save(directory)
    golden = Scorer.load(directory, device="cpu", verify=False).golden_scores()
    changed.model_copy(update={"golden": golden}).save(directory)


def plain_reward(model: LlamaForSequenceClassification, ids: list[int]) -> float:
    """What plain Transformers gives for one unpadded conversation."""
    return plain_outputs(model, ids)[0]


def plain_outputs(model: LlamaForSequenceClassification, ids: list[int]) -> tuple[float, ...]:
    """All outputs of the head for one unpadded conversation."""
    with torch.inference_mode():
        return tuple(model(input_ids=torch.tensor([ids])).logits[0].tolist())
