"""Rewards of a policy's samples, one prompt and one completion each: what every adapter of a trainer is made of.

Samples of one prompt travel as one item, so that the prompt is computed once and one version judges the group. What an item does to its
group is undone: where one completion cannot be scored, the others are asked for alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayward.client import loops
from rayward.client.client import AsyncRewardClient
from rayward.client.core import check_alone
from rayward.client.exchange import Scores, Text, item_error, json_item, partial_error
from rayward.errors import ConfigError, PartialError, RequestError
from rayward.wire.items import ItemError, ItemResult

MAX_GROUP = 64
"""Completions in one item; larger groups travel as several."""

DEADLINE_S = 300.0
"""Of one call; a step of a trainer would rather wait for a replica than stop."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, and what the policy wrote."""

    prompt: Text
    completion: Text


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of samples, in their order.

    Attributes:
        rewards: finite, or None where this sample cannot be scored; never because of the service.
        errors: why, where there is none.
        versions: who judged.
    """

    rewards: tuple[float | None, ...]
    errors: tuple[ItemError | None, ...]
    versions: tuple[str, ...]

    @property
    def num_masked(self) -> int:
        """Samples without a reward."""
        return self.rewards.count(None)

    def floats(self, penalty: float | None = None) -> list[float]:
        """A number for every sample, for trainers that cannot mask one.

        Args:
            penalty: what samples that cannot be scored get, because the caller says so.

        Raises:
            PartialError: a sample has no reward, and no penalty was given.
        """
        if penalty is None and self.num_masked:
            raise partial_error(
                [ItemResult(error=e) if e else ItemResult(rewards=(r or 0.0,)) for r, e in zip(self.rewards, self.errors, strict=True)]
            )
        return [reward if reward is not None else penalty for reward in self.rewards]  # type: ignore[misc]


class Judge:
    """Scores samples of a policy; may be copied to other processes, and used on any event loop.

    Args:
        base_url: of the server, or several with commas between them; None: RAYWARD_URL.
        tools, chat_template_kwargs: what the reward model's template is given besides turns, for all samples.
        settings: of `AsyncRewardClient`; where they are not given, RAYWARD_MODEL, RAYWARD_VERSION and RAYWARD_DEADLINE_S say them.

    Raises:
        ConfigError: no server is named.
    """

    def __init__(
        self,
        base_url: str | Sequence[str] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.client = AsyncRewardClient(base_url or url_from_environment(), **{**environment(), **settings})
        given = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        self._inputs = {name: value for name, value in given.items() if value is not None}

    async def judge(self, samples: Sequence[Sample]) -> Judged:
        """A reward for every sample, or the reason why it cannot have one.

        Raises:
            PartialError: the service did not answer for some of them; `failed` are their indices.
            ScoringError: it answered for none, or refused the call as a whole.
        """
        results: list[ItemResult | None] = [None] * len(samples)
        versions = [""] * len(samples)
        groups = self._groups(samples, results)
        if groups:
            scores = await self._scored(samples, groups, results, None)
            _spread(groups, scores, results, versions)
        broken = [group for group, version in ((g, versions[g[0]]) for g in groups) if len(group) > 1 and _is_final(results[group[0]])]
        if broken:
            judges = {versions[group[0]] for group in broken}
            singles = [[index] for group in broken for index in group]
            # Siblings are judged by the version that the group was given to.
            again = await self._scored(samples, singles, results, judges.pop() if len(judges) == 1 else None)
            _spread(singles, again, results, versions)
        return _judged(results, versions)

    def judge_blocking(self, samples: Sequence[Sample]) -> Judged:
        """As `judge`, from any thread."""
        return loops.run(self.judge(samples))

    def _groups(self, samples: Sequence[Sample], results: list[ItemResult | None]) -> list[list[int]]:
        open_groups: dict[str, list[int]] = {}
        groups: list[list[int]] = []
        for index, sample in enumerate(samples):
            try:
                check_alone(index, self._item([sample]))
                key = json.dumps(json_item({"prompt": sample.prompt}))
            except (RequestError, TypeError, ValueError) as exc:
                problem = item_error(exc) if isinstance(exc, RequestError) else ItemError("invalid_item", f"the sample is no JSON: {exc}")
                results[index] = ItemResult(error=problem)
                continue
            group = open_groups.get(key)
            if group is None or len(group) == MAX_GROUP:
                group = open_groups[key] = []
                groups.append(group)
            group.append(index)
        return groups

    def _item(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {"prompt": samples[0].prompt, "completions": [sample.completion for sample in samples], **self._inputs}

    async def _scored(
        self, samples: Sequence[Sample], groups: Sequence[list[int]], results: Sequence[ItemResult | None], version: str | None
    ) -> Scores:
        items = [self._item([samples[index] for index in group]) for group in groups]
        try:
            return await self.client.score_items(items, bad_items="report", version=version)
        except PartialError as exc:
            # The indices of items become those of samples.
            found = list(results)
            for group, rewards in zip(groups, exc.rewards, strict=True):
                for place, index in enumerate(group):
                    error = ItemError("interrupted", exc.problem, retryable=True)
                    found[index] = ItemResult(rewards=(rewards[place],)) if rewards is not None else ItemResult(error=error)
            raise partial_error([result for result in found if result is not None]) from exc


def environment() -> dict[str, Any]:
    """Settings of a client that the environment says."""
    settings: dict[str, Any] = {"deadline_s": DEADLINE_S}
    for name in ("model", "version"):
        if value := os.environ.get(f"RAYWARD_{name.upper()}"):
            settings[name] = value
    if text := os.environ.get("RAYWARD_DEADLINE_S"):
        settings["deadline_s"] = _number("RAYWARD_DEADLINE_S", text)
    return settings


def penalty_from_environment() -> float | None:
    """RAYWARD_PENALTY: what a sample that cannot be scored gets in trainers that cannot mask one; None: an error is raised."""
    text = os.environ.get("RAYWARD_PENALTY")
    return _number("RAYWARD_PENALTY", text) if text else None


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise ConfigError(f"{name} is {text!r}, which is no finite number", remedy=f"set {name} to a number, or unset it")
    return value


def url_from_environment() -> str:
    """RAYWARD_URL.

    Raises:
        ConfigError: it is not set.
    """
    value = os.environ.get("RAYWARD_URL")
    if not value:
        raise ConfigError(
            "no server is named: no base_url is given, and RAYWARD_URL is not set", remedy="export RAYWARD_URL=http://127.0.0.1:8000"
        )
    return value


def _is_final(result: ItemResult | None) -> bool:
    return result is not None and result.error is not None and not result.error.retryable


def _spread(groups: Sequence[list[int]], scores: Scores, results: list[ItemResult | None], versions: list[str]) -> None:
    for group, result, version in zip(groups, scores.results, scores.versions, strict=True):
        for place, index in enumerate(group):
            results[index] = result if result.rewards is None else ItemResult(rewards=(result.rewards[place],))
            versions[index] = version


def _judged(results: Sequence[ItemResult | None], versions: Sequence[str]) -> Judged:
    found = [result for result in results if result is not None]
    if any(result.error is not None and result.error.retryable for result in found):
        # The service failed, not the sample: a trainer that went on would learn from whoever happened to be answered.
        raise partial_error(found)
    rewards = tuple(None if result.rewards is None else result.rewards[0] for result in found)
    return Judged(rewards, tuple(result.error for result in found), tuple(versions))
