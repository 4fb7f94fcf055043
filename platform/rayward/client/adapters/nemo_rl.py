"""For NeMo-RL (read at 7ea279a): an environment whose reward is the server's.

    from rayward.client.adapters.nemo_rl import register

    register()          # in the script that starts the run; then `env_name: rayward` in the data's configuration, and
                        # env: {rayward: {base_url: "http://127.0.0.1:8000"}}

NeMo-RL's data processors put the policy's template into the content of a message. The reward model has its own: let the processor keep the
turns as they were in `extra_env_info["prompt"]`, and they are scored under it. Without that, the log goes as one whole text, which is right
where both models have the same template, and only there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from nemo_rl.environments.interfaces import EnvironmentInterface, EnvironmentReturn

from rayward.client.client import RewardClient
from rayward.client.exchange import TextRefusedError
from rayward.client.samples import Judge, Sample, environment, penalty_from_environment, url_from_environment
from rayward.errors import ConfigError

NAME = "rayward"
ACTOR = "rayward.client.adapters.nemo_rl.RewardEnvironment"
SETTINGS = ("base_url", "model", "version", "deadline_s")


def register(name: str = NAME) -> None:
    """Make the environment known to NeMo-RL in this process, to run in the Python of the driver."""
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import register_env

    ACTOR_ENVIRONMENT_REGISTRY[ACTOR] = PY_EXECUTABLES.SYSTEM
    register_env(name, ACTOR)


class Environment(EnvironmentInterface):  # type: ignore[misc]
    """One turn of the policy, one reward of the server.

    Args:
        config: `base_url` (else RAYWARD_URL), `model`, `version`, `deadline_s`, and `penalty`: what a sample that cannot be scored gets,
            since NeMo-RL has no way to say that there is no reward; without it such a sample stops the step. Other keys are NeMo-RL's.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        given = {name: config[name] for name in SETTINGS if config.get(name) is not None}
        url = given.pop("base_url", None) or url_from_environment()
        self._judge = Judge(url, **given)
        self._client = RewardClient(url, **{**environment(), **given})
        penalty = config.get("penalty")
        self._penalty = penalty_from_environment() if penalty is None else float(penalty)

    def step(self, message_log_batch: Sequence[Sequence[Mapping[str, Any]]], metadata: Sequence[Mapping[str, Any] | None]) -> Any:
        """Rewards of the last turns; every episode ends here.

        Raises:
            PartialError, TextRefusedError: a sample cannot be scored, and there is no penalty.
            ScoringError: the service did not answer.
        """
        num = len(message_log_batch)
        rewards = [0.0] * num
        raw = [index for index, row in enumerate(metadata) if row and row.get("prompt") is not None]
        if raw:
            samples = [Sample((metadata[i] or {})["prompt"], _last_turn(message_log_batch[i], i)) for i in raw]
            for index, reward in zip(raw, self._judge.judge_blocking(samples).floats(self._penalty), strict=True):
                rewards[index] = reward
        whole = [index for index in range(num) if index not in set(raw)]
        for index, reward in zip(whole, self._of_texts([message_log_batch[index] for index in whole]), strict=True):
            rewards[index] = reward
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""} for _ in range(num)],
            metadata=[None] * num,
            next_stop_strings=[None] * num,
            rewards=torch.tensor(rewards, dtype=torch.float32),
            terminateds=torch.ones(num, dtype=torch.bool),
            answers=[log[-1]["content"] for log in message_log_batch],
        )

    def global_post_process_and_metrics(self, batch: Any) -> tuple[Any, dict[str, float]]:
        """The batch as it is, and the spread of its rewards."""
        if "total_reward" not in batch:
            return batch, {}
        rewards = torch.as_tensor(batch["total_reward"], dtype=torch.float32)
        spread = {"mean": rewards.mean(), "min": rewards.min(), "max": rewards.max(), "std": rewards.std(correction=0)}
        return batch, {f"{NAME}/{name}_reward": float(value) for name, value in spread.items()}

    def _of_texts(self, logs: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        if not logs:
            return []
        texts = ["".join(str(turn["content"]) for turn in log) for log in logs]
        try:
            return self._client.score_texts(
                texts, [text[: -len(log[-1]["content"]) or None] for text, log in zip(texts, logs, strict=True)]
            )
        except TextRefusedError:
            if self._penalty is None:
                raise
            if len(logs) == 1:
                return [self._penalty]
        # One refusal refuses all; alone, the others have the rewards that they would have had.
        return [reward for log in logs for reward in self._of_texts([log])]


def _last_turn(log: Sequence[Mapping[str, Any]], index: int) -> str:
    if [turn["role"] for turn in log].count("assistant") != 1 or log[-1]["role"] != "assistant":
        raise ConfigError(
            f"sample {index} has the turns {', '.join(str(turn['role']) for turn in log)}; the rule is one of the assistant, at the end",
            remedy="score trajectories with rayward.client.RewardClient, whose completions may be several turns",
        )
    return str(log[-1]["content"])


RewardEnvironment = ray.remote(Environment)
