"""For verl's custom reward function (read in verl 0.9.1); it needs no verl to be imported.

    reward.custom_reward_function.path=pkg://rayward.client.adapters.verl
    reward.custom_reward_function.name=compute_score
    +reward.custom_reward_function.reward_kwargs.base_url=http://127.0.0.1:8000

verl gives such a function the response without its prompt, so that the data set must hold the prompt in `extra_info` too. Where it does
not, `rayward.client.adapters.verl_manager` reads it from the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from rayward.client.samples import Judge, Sample, penalty_from_environment
from rayward.errors import ConfigError


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    base_url: str | None = None,
    prompt_key: str = "prompt",
    penalty: float | None = None,
    model: str | None = None,
    version: str | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
) -> dict[str, Any]:
    """The reward of one response, as `score`, and the version that judged.

    Args:
        data_source, ground_truth, reward_router_address, reward_model_tokenizer: verl's; no part of a conversation.
        solution_str: the response.
        extra_info: of the row.
        base_url: of the server; None: RAYWARD_URL.
        prompt_key: name of the prompt in extra_info: a text or messages.
        penalty: what a response that cannot be scored gets (empty, too long); None: RAYWARD_PENALTY; else an error.
        model, version: who judges.

    Raises:
        ConfigError: extra_info holds no prompt.
        PartialError: the response cannot be scored, and there is no penalty.
        ScoringError: the service did not answer.
    """
    prompt = (extra_info or {}).get(prompt_key)
    if prompt is None:
        raise ConfigError(
            f"extra_info has no {prompt_key!r}, and a response without its prompt cannot be scored",
            remedy="keep the prompt in extra_info when the data set is made, name it with prompt_key, or use the reward manager of "
            "rayward.client.adapters.verl_manager",
        )
    # Lists of a data frame come as arrays.
    prompt = prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    judged = await _judge(base_url, model, version).judge([Sample(prompt, solution_str)])
    (score,) = judged.floats(penalty_from_environment() if penalty is None else penalty)
    return {"score": score, "rayward_version": judged.versions[0]}


@lru_cache(maxsize=8)
def _judge(base_url: str | None, model: str | None, version: str | None) -> Judge:
    given: dict[str, Any] = {"model": model, "version": version}
    return Judge(base_url, **{name: value for name, value in given.items() if value is not None})
