"""For verl's reward loop (read in verl 0.9.1): a reward manager that scores the conversation of the batch.

    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://rayward.client.adapters.verl_manager
    reward.reward_manager.name=RewardManager

The server is RAYWARD_URL in the environment of the reward workers. The prompt is the row's messages (`raw_prompt`), so the reward model's
own template is applied to them, whatever the policy's is.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from rayward.client.samples import Judge, Sample, penalty_from_environment
from rayward.errors import ConfigError


class RewardManager(RewardManagerBase):  # type: ignore[misc]
    """Scores each sample as soon as its rollout is done; samples of other rollouts travel beside it."""

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        self._judge = Judge()
        self._penalty = penalty_from_environment()

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of one rollout, by its last sequence.

        Raises:
            ConfigError: the batch holds no messages.
            PartialError: the response cannot be scored, and RAYWARD_PENALTY is not set.
            ScoringError: the service did not answer.
        """
        row = data[-1:][0]
        turns = row.non_tensor_batch.get("raw_prompt")
        if turns is None:
            raise ConfigError("the batch has no raw_prompt", remedy="set data.return_raw_chat=True")
        ids = row.batch["responses"]
        num_valid = int(row.batch["attention_mask"][-ids.shape[-1] :].sum())
        response = await self.loop.run_in_executor(None, lambda: self.tokenizer.decode(ids[:num_valid], skip_special_tokens=True))
        judged = await self._judge.judge([Sample([dict(turn) for turn in turns], response)])
        (reward,) = judged.floats(self._penalty)
        return {"reward_score": reward, "reward_extra_info": {"score": reward, "rayward_version": judged.versions[0]}}
