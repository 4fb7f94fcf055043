"""For a training loop of your own: a function of prompts and completions.

from rayward.client.adapters.plain import Rewards

rewards_of = Rewards("http://127.0.0.1:8000")
rewards = rewards_of(prompts, completions)            # one each; None: mask this sample
rewards = await rewards_of.concurrently(prompts, completions)
"""

from __future__ import annotations

from collections.abc import Sequence

from rayward.client.exchange import Text
from rayward.client.samples import Judge, Judged, Sample


class Rewards(Judge):
    """A reward for each pair of prompt and completion; equal prompts are computed once, wherever they stand. Arguments as in `Judge`."""

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """Finite rewards; None for a sample that cannot be scored, because it is empty or too long for example.

        Raises:
            ScoringError: the service did not answer for all of them (PartialError: for some); stop, or try again.
        """
        return list(self.judge_blocking(samples_of(prompts, completions)).rewards)

    async def concurrently(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """The same for asyncio."""
        return list((await self.judge(samples_of(prompts, completions))).rewards)

    def judged(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Judged:
        """The same with the reasons of those that have none, and with versions."""
        return self.judge_blocking(samples_of(prompts, completions))


def samples_of(prompts: Sequence[Text], completions: Sequence[Text]) -> list[Sample]:
    """Pairs; raises ValueError where there are not as many of each."""
    return [Sample(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
