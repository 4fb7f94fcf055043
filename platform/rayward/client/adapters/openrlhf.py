"""For OpenRLHF (read in 0.11.2): the file of `--reward.remote_url /path/to/this/file.py`, with RAYWARD_URL in the environment.

OpenRLHF can also ask the server itself, without this file: `--reward.remote_url http://127.0.0.1:8000/get_reward`. It then repeats five
times, a second apart; the file waits for a server that restarts, goes to another one of several, and sends a key.

OpenRLHF gives whole texts, which its tokenizer has templated. An exception is logged there and leaves the sample without a reward; a later
step of OpenRLHF then stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from rayward.client.client import RewardClient
from rayward.client.exchange import TextRefusedError
from rayward.client.samples import environment, penalty_from_environment, url_from_environment


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
    """Rewards of whole texts, for the advantage (`rewards`) and for the filter of groups (`scores`).

    Args:
        queries: prompts and responses, with their special tokens.
        prompts: what each query begins with.
        labels, kwargs: not part of a conversation.

    Raises:
        TextRefusedError: a query cannot be scored (too long for example), and RAYWARD_PENALTY is not set.
        ScoringError: the service did not answer.
    """
    import torch

    penalty = penalty_from_environment()
    if penalty is None:
        rewards = _client().score_texts(queries, prompts)
    else:
        rewards = [_one(query, prompt, penalty) for query, prompt in zip(queries, prompts, strict=True)]
    tensor = torch.tensor(rewards, dtype=torch.float32)
    return {"rewards": tensor, "scores": tensor, "extra_logs": {}}


def _one(query: str, prompt: str, penalty: float) -> float:
    try:
        return _client().score_texts([query], [prompt])[0]
    except TextRefusedError:
        return penalty


@cache
def _client() -> RewardClient:
    return RewardClient(url_from_environment(), **environment())
