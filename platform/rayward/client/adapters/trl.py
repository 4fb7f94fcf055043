"""For TRL's trainers with reward functions (GRPO, RLOO, …; read in TRL 1.16).

    from rayward.client.adapters.trl import RewardFunction

    trainer = GRPOTrainer(model=…, reward_funcs=RewardFunction("http://127.0.0.1:8000"), …)

A completion that cannot be scored gets None: TRL 1.16 leaves it out of the baseline and gives it no advantage. When the service does not
answer, the step raises: the trainer stops at its last checkpoint rather than to learn from a part of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rayward.client.exchange import Text
from rayward.client.samples import Judge, Judged, Sample

LogExtra: TypeAlias = Callable[[str, list[Any]], None]
LogMetric: TypeAlias = Callable[[str, float], None]


class _Function(Judge):
    def __init__(self, base_url: str | Sequence[str] | None = None, *, name: str = "rayward", **settings: Any) -> None:
        super().__init__(base_url, **settings)
        # Under which TRL logs the rewards.
        self.__name__ = name

    def _logged(self, judged: Judged, log_extra: LogExtra | None, log_metric: LogMetric | None) -> list[float | None]:
        if log_extra is not None:
            log_extra(f"{self.__name__}_version", list(judged.versions))
        if log_metric is not None:
            log_metric(f"{self.__name__}/masked", judged.num_masked / max(1, len(judged.rewards)))
        return list(judged.rewards)


class RewardFunction(_Function):
    """A reward function that blocks.

    Args:
        base_url, settings: as in `rayward.client.samples.Judge`.
        name: under which the trainer logs.
    """

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward per completion, or None to mask it. Token ids, other columns and the trainer's state are no part of it."""
        return self._logged(self.judge_blocking(samples_of(prompts, completions)), log_extra, log_metric)


class AsyncRewardFunction(_Function):
    """The same for TRL's asynchronous path: runs beside the trainer's other asynchronous functions."""

    async def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """As `RewardFunction`."""
        return self._logged(await self.judge(samples_of(prompts, completions)), log_extra, log_metric)


def samples_of(prompts: Sequence[Text], completions: Sequence[Text]) -> list[Sample]:
    """TRL's pairs: texts, or lists of messages. A prompt that ends with the assistant's turn is one that the completion goes on with."""
    return [Sample(_open_end(prompt), completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _open_end(prompt: Text) -> Text:
    if isinstance(prompt, str) or not prompt or prompt[-1].get("role") != "assistant":
        return prompt
    last: Mapping[str, Any] = {**prompt[-1], "prefix": True}
    return [*prompt[:-1], last]
