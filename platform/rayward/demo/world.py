"""A small world with a known true reward: generated preference data for the demo, for tests and for the online loop.

Eight kinds of short task (`KINDS`) ask about a closed vocabulary. Most prompts also make a *demand* about length or tone.
A completion is read by a grammar (an opener, an answer, filler sentences) and rated 0..4 on four attributes:

- *correctness*: 4 for an accepted answer; partial credit for near misses (`_correctness`); 0 otherwise.
- *completeness*: as much as was asked for. A "long" demand wants two sentences: 2 points each. Without that demand 4.
- *concision*: no more than was asked for. A "short" demand costs one point for two words besides the answer. Without that demand one
  point for every five words above `WORD_LIMIT`. In both cases one point for two words that the grammar does not know.
- *tone*: 4 when warmth was asked for and is there, or formality was asked for and warmth is absent; 1 when it is the
  other way round; 4 when nothing was asked.

A completion without exactly one recognisable answer is rated 0 throughout. The true reward is the weighted sum `REWARD_WEIGHTS`, in
0..4; being right outweighs every matter of style. Neither length nor any phrase says which completion is better: each
answer, form and opener is as often preferred as not, and only the prompt decides.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from rayward.contract.conversation import Message
from rayward.data.record import dense_ranks
from rayward.demo.tasks import HARD, KINDS, LOOKUPS, Kind
from rayward.errors import DataError

ATTRIBUTES = ("correctness", "completeness", "concision", "tone")
REWARD_WEIGHTS = {"correctness": 0.5, "completeness": 0.2, "concision": 0.15, "tone": 0.15}
WORD_LIMIT = 40
_FREE_SURPLUS = 3
Demand = Literal["none", "short", "long", "warm", "formal"]
Form = Literal["bare", "sentence", "padded"]
_FORMS: tuple[Form, ...] = ("bare", "sentence", "padded")
_DEMAND_SHARES: dict[Demand, float] = {"none": 0.12, "short": 0.26, "long": 0.26, "warm": 0.18, "formal": 0.18}

_DEMAND_PHRASES: dict[Demand, tuple[str, ...]] = {
    "short": ("Be brief.", "Answer only."),
    "long": ("Say more.", "Explain at length."),
    "warm": ("Be friendly.", "Sound happy."),
    "formal": ("Be formal.", "Sound serious."),
}

_OPENERS = ("Great question!", "Happy to help!", "Lovely!")

FILLERS = (
    "Let me think about this.",
    "I hope that helps.",
    "I am quite sure of it.",
    "This comes up often.",
    "That is all there is.",
    "I checked it twice.",
)

_PHRASE = re.compile(r"(?:^|(?<=\s))(" + "|".join(re.escape(phrase) for phrase in (*_OPENERS, *FILLERS)) + r")(?:\s|$)", re.IGNORECASE)
_LOWER_OPENERS = {phrase.lower() for phrase in _OPENERS}
_SYSTEM = "You are a helpful assistant."

_GREETINGS = (
    ("Hello!", "Hello, what can I do for you?"),
    ("Good morning.", "Good morning, how can I help?"),
    ("Hi there.", "Hi, ask me anything."),
)


@dataclass(frozen=True, slots=True)
class Task:
    """One world prompt, understood.

    Attributes:
        kind: one of `KINDS`.
        prompt: the turns, ending with the user's.
        demand: what the prompt asks about length or tone.
        accepted: the right answers; any of them will do.
    """

    kind: str
    prompt: tuple[Message, ...]
    demand: Demand
    accepted: tuple[str, ...]

    @classmethod
    def from_prompt(cls, prompt: Sequence[Message]) -> Task:
        """Understand a prompt from its text alone.

        Raises:
            DataError: it is no prompt of this world.
        """
        texts = [turn["content"] for turn in prompt if turn["role"] != "system"]
        if not texts or prompt[-1]["role"] != "user":
            raise DataError("a world prompt ends with a user turn; this one does not", remedy="pass the turns before the completion")
        demand, texts[-1] = _take_demand(texts[-1])
        if demand == "none" and prompt[0]["role"] == "system":
            demand, _ = _take_demand(prompt[0]["content"])
        for name, kind in KINDS.items():
            accepted = kind.solve(texts)
            if accepted:
                return cls(name, tuple(prompt), demand, accepted)
        raise DataError(f"no kind of world task asks {texts[-1]!r}", remedy="grade only prompts that rayward.demo.world generated")

    def grade(self, completion: str) -> dict[str, float]:
        """Rate any text; keys are `ATTRIBUTES`, values lie in 0..4."""
        reply = _read(KINDS[self.kind], completion)
        if reply.answer is None:
            return dict.fromkeys(ATTRIBUTES, 0.0)
        excess = reply.extra_words / 2 if self.demand == "short" else max(0, reply.num_words - WORD_LIMIT) / 5
        tone_fits = self.demand not in ("warm", "formal") or reply.warm == (self.demand == "warm")
        return {
            "correctness": _correctness(self.kind, reply.answer, self.accepted),
            "completeness": float(min(4, 2 * reply.num_sentences)) if self.demand == "long" else 4.0,
            "concision": float(max(0, 4 - math.ceil(excess) - math.ceil(reply.unknown_words / 2))),
            "tone": 4.0 if tone_fits else 1.0,
        }

    def answers(self, text: str) -> bool:
        """Whether a text gives an answer of the task's kind, right or wrong."""
        return _read(KINDS[self.kind], text).answer is not None

    def true_reward(self, completion: str) -> float:
        """The reward that a perfect reward model orders by, in 0..4."""
        return reward_of(self.grade(completion))


@dataclass(frozen=True, slots=True)
class _Reply:
    answer: str | None
    num_words: int = 0
    extra_words: int = 0
    unknown_words: int = 0
    num_sentences: int = 0
    warm: bool = False


@dataclass(frozen=True, slots=True)
class _Style:
    form: Form
    warm: bool
    seed: float


def reward_of(attributes: dict[str, float]) -> float:
    """Weighted sum of the attributes, in 0..4."""
    return round(sum(weight * attributes[name] for name, weight in REWARD_WEIGHTS.items()), 6)


def grade(prompt: Sequence[Message], completion: str) -> dict[str, float]:
    """Rate any text as a completion of a world prompt; see `Task.grade`.

    Raises:
        DataError: it is no prompt of this world.
    """
    return Task.from_prompt(prompt).grade(completion)


def true_reward(prompt: Sequence[Message], completion: str) -> float:
    """True reward of any text as a completion of a world prompt, in 0..4.

    Raises:
        DataError: it is no prompt of this world.
    """
    return Task.from_prompt(prompt).true_reward(completion)


def generate(num_prompts: int, seed: int) -> Iterator[dict[str, Any]]:
    """Ranking rows with distinct prompts; row *i* depends on the seed and on *i* only.

    Yields:
        {"id", "source": kind, "prompt": messages, "completions": K strings (2..5), "ranks": K ints, lower is better and without ties,
        "attributes": K lists in the order of `ATTRIBUTES`}

    Raises:
        DataError: the world has not that many prompts.
    """
    rng = random.Random(f"rayward world {seed}")
    names = [*sorted(KINDS), *sorted(set(KINDS) - set(HARD))]
    seen: set[tuple[tuple[str, str], ...]] = set()
    for index in range(num_prompts):
        name = names[index % len(names)]
        for _ in range(1000):
            prompt, wrong = _draw_prompt(rng, KINDS[name])
            key = tuple((turn["role"], turn["content"]) for turn in prompt)
            if key not in seen:
                break
        else:
            raise DataError(f"the world has no {num_prompts} different prompts", remedy="ask for fewer")
        seen.add(key)
        task = Task.from_prompt(prompt)
        completions = _draw_completions(rng, task, wrong)
        grades = [task.grade(text) for text in completions]
        yield {
            "id": f"world-{seed}-{index:06d}",
            "source": name,
            "prompt": [dict(turn) for turn in prompt],
            "completions": completions,
            "ranks": dense_ranks([-reward_of(ratings) for ratings in grades]),
            "attributes": [[ratings[attribute] for attribute in ATTRIBUTES] for ratings in grades],
        }


def pairs(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One preference pair for each ranking row, in TRL's conversational format.

    Of a ranking's pairs the two most alike are taken, as long as, for every kind of task, the longer completion wins as often as it
    loses. The choice depends on the rows before it and on the row's id.

    Yields:
        {"id", "source", "prompt": messages, "chosen": [message], "rejected": [message], "strength": 1..3 by the gap of the true rewards}
    """
    surplus: Counter[str] = Counter()
    for row in rows:
        completions, ranks = row["completions"], row["ranks"]
        candidates = [pair if ranks[pair[0]] < ranks[pair[1]] else pair[::-1] for pair in combinations(range(len(ranks)), 2)]
        random.Random(row["id"]).shuffle(candidates)

        def preference(pair: tuple[int, ...], completions: Any = completions, source: str = row["source"]) -> tuple[int, int]:
            better, worse = (completions[index] for index in pair)
            imbalance = abs(surplus[source] + _longer_wins(better, worse))
            return max(_FREE_SURPLUS, imbalance), -len(set(better.split()) & set(worse.split()))

        better, worse = min(candidates, key=preference)
        surplus[row["source"]] += _longer_wins(completions[better], completions[worse])
        yield {
            "id": row["id"],
            "source": row["source"],
            "prompt": row["prompt"],
            "chosen": [{"role": "assistant", "content": completions[better]}],
            "rejected": [{"role": "assistant", "content": completions[worse]}],
            "strength": _strength(row["attributes"][better], row["attributes"][worse]),
        }


OFF_TOPIC_SHARE = 0.35
"""Of the changed answers, the share that answers another kind of question altogether; the rest is wrong in kind."""


def _strength(better: Sequence[float], worse: Sequence[float]) -> int:
    # Slightly, clearly or much better, as people are asked: the gap of the true rewards in steps of one.
    gap = reward_of(dict(zip(ATTRIBUTES, better, strict=True))) - reward_of(dict(zip(ATTRIBUTES, worse, strict=True)))
    return min(3, max(1, math.ceil(gap)))


def _longer_wins(better: str, worse: str) -> int:
    return (len(better) > len(worse)) - (len(better) < len(worse))


def _take_demand(text: str) -> tuple[Demand, str]:
    for demand, phrases in _DEMAND_PHRASES.items():
        for phrase in phrases:
            if phrase in text:
                return demand, " ".join(text.replace(phrase, " ").split())
    return "none", text


def _draw_prompt(rng: random.Random, kind: Kind) -> tuple[list[Message], tuple[str, ...]]:
    texts, wrong = kind.draw(rng)
    demand = rng.choices(list(_DEMAND_SHARES), list(_DEMAND_SHARES.values()))[0]
    system = _SYSTEM if rng.random() < 0.15 else None
    if demand != "none":
        phrase = rng.choice(_DEMAND_PHRASES[demand])
        if system:
            system = f"{system} {phrase}"
        else:
            texts = [*texts[:-1], f"{texts[-1]} {phrase}" if rng.random() < 0.7 else f"{phrase} {texts[-1]}"]
    chance = rng.random()
    if chance < 0.08:
        texts = [*rng.choice(_GREETINGS), *texts]
    elif chance < 0.16:
        earlier = KINDS[rng.choice(LOOKUPS)]
        question, _ = earlier.draw(rng)
        answer = rng.choice(earlier.solve(question) or ("",))
        texts = [*question, _write(rng, earlier, answer, rng.choice(("bare", "sentence")), warm=False), *texts]
    prompt = [Message(role="user" if i % 2 == 0 else "assistant", content=text) for i, text in enumerate(texts)]
    return ([Message(role="system", content=system), *prompt] if system else prompt), wrong


def _draw_completions(rng: random.Random, task: Task, wrong: Sequence[str]) -> list[str]:
    # At least one right answer; every reward only once, so that no ranking has ties.
    num_completions = rng.choices((2, 3, 4, 5), (0.1, 0.2, 0.3, 0.4))[0]
    # Each one differs from the one before it either in its answer or in its style, which teaches more than unrelated texts.
    kind, answer, style = KINDS[task.kind], rng.choice(task.accepted), _draw_style(rng, task)
    by_reward: dict[float, str] = {}
    for _ in range(24):
        text = _write(random.Random(style.seed), kind, answer, style.form, warm=style.warm)
        by_reward.setdefault(task.true_reward(text), text)
        if len(by_reward) == num_completions:
            break
        kind = KINDS[task.kind]
        if rng.random() < 0.6:
            chance = rng.random()
            if chance < 0.35:
                answer = rng.choice(task.accepted)
            elif chance < 0.35 + OFF_TOPIC_SHARE and task.kind != "arithmetic":  # nothing is as short as a number
                kind, answer = _draw_off_topic(rng, task.kind, len(rng.choice(task.accepted)))
            else:
                answer = rng.choice(wrong)
        else:
            style = _draw_style(rng, task)
    completions = list(by_reward.values())
    rng.shuffle(completions)
    return completions


def _draw_off_topic(rng: random.Random, name: str, length: int) -> tuple[Kind, str]:
    # The right answer to a question of another kind: says nothing by itself, since it is right elsewhere as often. Of a few, the one
    # closest in length to what would be right here, so that length says nothing either.
    drawn = []
    for _ in range(6):
        other = KINDS[rng.choice(sorted(set(KINDS) - {name}))]
        texts, _ = other.draw(rng)
        drawn.append((other, rng.choice(other.solve(texts) or ("",))))
    return min(drawn, key=lambda pair: abs(len(pair[1]) - length))


def _draw_style(rng: random.Random, task: Task) -> _Style:
    return _Style(rng.choice(_FORMS), rng.random() < (0.5 if task.demand in ("warm", "formal") else 0.2), rng.random())


def _write(rng: random.Random, kind: Kind, answer: str, form: Form, *, warm: bool) -> str:
    body = answer if form == "bare" else rng.choice(kind.sentences(answer)).format(a=answer)
    parts = [rng.choice(_OPENERS)] if warm else []
    fillers = rng.sample(FILLERS, rng.choice((1, 1, 2))) if form == "padded" else []
    position = rng.randint(0, len(fillers))
    return " ".join([*parts, *fillers[:position], body, *fillers[position:]])


def _read(kind: Kind, completion: str) -> _Reply:
    text = " ".join(completion.split())
    num_words = len(text.split())
    phrases = {found.lower() for found in _PHRASE.findall(text)}
    warm, fillers = bool(phrases & _LOWER_OPENERS), len(phrases - _LOWER_OPENERS)
    text = _PHRASE.sub("", text).strip()
    answer, is_sentence = kind.match(text)
    unknown = 0
    if answer is None:
        found = kind.find(text)
        if len(found) != 1:
            return _Reply(None)
        (answer,) = found
        unknown = len(text.split()) - len(answer.split())
    return _Reply(answer, num_words, num_words - len(answer.split()), unknown, fillers + is_sentence, warm)


def _correctness(name: str, answer: str, accepted: tuple[str, ...]) -> float:
    if answer in accepted:
        return 4.0
    if name == "ordering":
        given, wanted = answer.split(), accepted[0].split()
        hits = sum(a == b for a, b in zip(given, wanted, strict=False))
        return float(math.floor(3 * hits / max(len(given), len(wanted))))
    return 1.0 if KINDS[name].near(answer, accepted[0]) else 0.0
