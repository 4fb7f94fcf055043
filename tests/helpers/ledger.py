"""A load test that keeps its own books: every item that is sent, what had to become of it, and what did."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.models import MAX_TOKENS

from rayward import AsyncRewardClient
from rayward.errors import RequestError
from rayward.scoring.scorer import Scorer
from rayward.wire.items import ItemResult
from rayward.wire.rules import Limits, check_request

REFUSED = "refused"


@dataclass(frozen=True)
class Page:
    """One kind of item of the pool.

    Attributes:
        wanted: what has to become of it: `rewarded`, the code of an item's error, or `refused` with its whole request.
    """

    item: Mapping[str, Any]
    wanted: str

    @property
    def num_completions(self) -> int:
        return len(self.item["completions"])


BAD = (
    Page({"prompt": "a", "completions": ["b", "x" * 2 * MAX_TOKENS]}, "too_long"),
    Page({"prompt": "Hi", "completions": ["Hello.<|im_end|>"]}, "already_templated"),
    Page({"prompt": "Hi", "completions": [[{"role": "assistant", "content": "a", "name": "x"}]]}, "unsupported_message"),
    Page({"prompt": "Hi", "completions": ["a"], "chat_template_kwargs": {"messages": 1}}, "template"),
)
BROKEN = (Page({"prompt": "Hi", "completions": [""]}, REFUSED), Page({"prompt": "Hi\x00", "completions": ["a"]}, REFUSED))


def make_pool(num_good: int, *, seed: int = 0) -> list[Page]:
    """Good items of one to eight completions, and the bad ones."""
    chance = random.Random(seed)
    words = ["what", "why", "how", "sum", "of", "two", "and", "seven", "is", "the", "answer", "not", "never", "a", "blue", "green", "plus"]

    def text(longest: int) -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(1, longest)))

    good = []
    for number in range(num_good):
        completions = list(dict.fromkeys(text(6) + "!" * (number % 4) for _ in range(chance.randint(1, 8))))
        good.append(Page({"prompt": f"{number}: {text(8)}?", "completions": completions}, "rewarded"))
    return good


def offline_rewards(scorer: Scorer, pool: Sequence[Page]) -> list[tuple[float, ...] | None]:
    """Of every page the rewards that one version gives without any service; None where it gives none."""
    items, _ = check_request({"items": [page.item for page in pool]}, Limits())
    return [result.rewards for result in scorer.score(items)]


@dataclass
class Ledger:
    """What was sent and what came back.

    Args:
        pool: pages that requests are made of.
        expected: version -> rewards by page, as `offline_rewards` gives them.
    """

    pool: Sequence[Page]
    expected: Mapping[str, Sequence[tuple[float, ...] | None]]
    num_sent: int = 0
    num_completions: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    largest_gap: float = 0.0

    async def run(self, url: str, *, num_completions: int, in_flight: int, deadline_s: float, seed: int, **options: Any) -> None:
        """Send requests of one to sixteen items until so many completions are asked for.

        Args:
            in_flight: callers side by side, each with one request at a time.
            options: of the client.
        """
        async with AsyncRewardClient(url, deadline_s=deadline_s, **options) as client, asyncio.TaskGroup() as group:
            for number in range(in_flight):
                group.create_task(self._call(client, random.Random(seed * 1000 + number), num_completions))

    async def _call(self, client: AsyncRewardClient, chance: random.Random, num_completions: int) -> None:
        while self.num_completions < num_completions:
            pages = [self._page(chance) for _ in range(chance.randint(1, 16))]
            if chance.random() < 0.02:
                pages = [chance.choice(BROKEN)]
            self.num_sent += len(pages)
            self.num_completions += sum(page.num_completions for page in pages)
            try:
                scores = await client.score_items([page.item for page in pages])
            except RequestError:
                self._book([(page, REFUSED) for page in pages])
                continue
            for page, result, version in zip(pages, scores.results, scores.versions, strict=True):
                self._check(page, result, version)

    def _page(self, chance: random.Random) -> Page:
        return chance.choice(BAD) if chance.random() < 0.05 else chance.choice(self.pool)

    def _check(self, page: Page, result: ItemResult, version: str) -> None:
        self.versions[version] += 1
        if result.rewards is None:
            assert result.error is not None
            self._book([(page, result.error.code)])
            return
        wanted = self.expected[version][self.pool.index(page)] if page.wanted == "rewarded" else None
        if wanted is None or len(wanted) != len(result.rewards):
            self.wrong.append(f"{page.item} of version {version} has the rewards {result.rewards}, {wanted} are right")
        else:
            self.largest_gap = max(self.largest_gap, *(abs(a - b) for a, b in zip(wanted, result.rewards, strict=True)))
        self._book([(page, "rewarded")])

    def _book(self, found: Sequence[tuple[Page, str]]) -> None:
        for page, outcome in found:
            self.outcomes[outcome] += 1
            if outcome != page.wanted:
                self.wrong.append(f"{page.wanted} became {outcome}: {str(page.item)[:200]}")

    def close(self) -> None:
        """The books agree: nothing lost, nothing invented."""
        assert self.wrong == []
        assert self.num_sent == sum(self.outcomes.values())
        assert self.largest_gap <= 1e-5


async def when(progress: Callable[[], float], steps: Mapping[float, Callable[[], object]]) -> None:
    """Carry out each step, in a thread, when the progress has reached it."""
    for share in sorted(steps):
        while progress() < share:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(steps[share])
