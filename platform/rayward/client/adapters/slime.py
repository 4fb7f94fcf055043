"""For slime (read at 624b824): `--custom-rm-path rayward.client.adapters.slime.custom_rm`, with RAYWARD_URL in the environment.

With `--group-rm` besides, the samples of a prompt are asked for together, and the prompt is computed once. slime has no way to say that a
sample has no reward, so that one which cannot be scored stops the rollout, unless RAYWARD_PENALTY says what such samples get.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache
from typing import Any

from rayward.client.client import AsyncRewardClient
from rayward.client.exchange import TextRefusedError
from rayward.client.samples import Judge, Sample, environment, penalty_from_environment, url_from_environment


async def custom_rm(args: Any, samples: Any, **kwargs: Any) -> Any:
    """The reward of one of slime's samples, or a list of those of several.

    A prompt of messages is scored by the reward model's own template. A prompt of text is one that slime has templated
    (`--apply-chat-template`), and goes as a whole text with its response.

    Args:
        args, kwargs: slime's; not part of a conversation.

    Raises:
        PartialError, TextRefusedError: a sample cannot be scored, and RAYWARD_PENALTY is not set.
        ScoringError: the service did not answer.
    """
    group = samples if isinstance(samples, list) else [samples]
    texts = [sample for sample in group if isinstance(sample.prompt, str)]
    turns = [sample for sample in group if not isinstance(sample.prompt, str)]
    penalty = penalty_from_environment()
    of_texts, of_turns = await asyncio.gather(_of_texts(texts, penalty), _of_turns(turns, penalty))
    rewards = {id(sample): reward for sample, reward in zip([*texts, *turns], [*of_texts, *of_turns], strict=True)}
    return [rewards[id(sample)] for sample in group] if isinstance(samples, list) else rewards[id(samples)]


async def _of_turns(samples: Sequence[Any], penalty: float | None) -> list[float]:
    if not samples:
        return []
    judged = await _judge().judge([Sample(sample.prompt, sample.response) for sample in samples])
    for sample, version in zip(samples, judged.versions, strict=True):
        sample.metadata["rayward_version"] = version
    return judged.floats(penalty)


async def _of_texts(samples: Sequence[Any], penalty: float | None) -> list[float]:
    if not samples:
        return []
    texts, prompts = [sample.prompt + sample.response for sample in samples], [sample.prompt for sample in samples]
    try:
        return await _client().score_texts(texts, prompts)
    except TextRefusedError:
        if penalty is None:
            raise
        if len(samples) == 1:
            return [penalty]
    # One refusal refuses all; alone, the others have the rewards that they would have had.
    return [reward for alone in await asyncio.gather(*(_of_texts([sample], penalty) for sample in samples)) for reward in alone]


@cache
def _judge() -> Judge:
    return Judge()


@cache
def _client() -> AsyncRewardClient:
    return AsyncRewardClient(url_from_environment(), **environment())
