"""What a published benchmark is: rules for its rows, and figures from the scored ones. Each stands in a file of its own.

A row's `source` is its subset; what else the data must look like: docs/benchmarks.md. No numpy here or in a suite: the command line
checks a benchmark's name before anything heavy loads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rayward.errors import DataError
from rayward.evaluation.records import BenchmarkPart, BenchmarkScores, BenchmarkSection, Record

Judged = tuple[str, str, Sequence[float] | None]
"""Id, source and ranks of a row: what can be checked before anything is scored."""
BySource = Mapping[str, list[Record]]
"""Scored records by their source."""


@dataclass(frozen=True)
class Suite(ABC):
    """A benchmark, with its subset weights chosen where it has several.

    Attributes:
        name: what the user types.
        weightings: names of the subset weights to choose from, the default first.
        unique_in: sections in which an id stands once.
        counts: the chosen one of `weightings`; None where there is nothing to choose.
    """

    name: ClassVar[str]
    weightings: ClassVar[tuple[str, ...]] = ()
    unique_in: ClassVar[frozenset[str]] = frozenset()

    counts: str | None = None

    @abstractmethod
    def subsets(self) -> list[str]:
        """The sources that a row may have, as an error message lists them."""

    @abstractmethod
    def section_of(self, source: str) -> str | None:
        """The section of a source; None: no subset of this benchmark."""

    @abstractmethod
    def broken_rule(self, section: str, row_id: str, ranks: Sequence[float] | None) -> str | None:
        """The rule that a row of the section breaks; None: it fits."""

    @abstractmethod
    def sections(self, by_source: BySource) -> list[BenchmarkSection]:
        """The sections that have scored rows, with their figures."""

    @abstractmethod
    def overall(self, sections: Sequence[BenchmarkSection]) -> float:
        """The benchmark's total over `counted` sections, at least one."""

    @abstractmethod
    def missing(self, scored: Mapping[str, int], sections: Sequence[BenchmarkSection]) -> list[str]:
        """What of the published benchmark the figures lack, from the scored rows by source."""

    def counted(self, sections: Sequence[BenchmarkSection]) -> list[BenchmarkSection]:
        """The sections behind `overall`."""
        return list(sections)

    def overall_with_prior(self, sections: Sequence[BenchmarkSection]) -> float | None:
        """A second total, where the benchmark has one."""
        return None

    def check(self, rows: Iterable[Judged]) -> None:
        """Refuse rows that the benchmark has no rule for.

        Raises:
            DataError: a source is no subset, a row is judged in another way than its subset is, or an id stands twice that must not.
        """
        seen: set[str] = set()
        for row_id, source, ranks in rows:
            section = self.section_of(source)
            if section is None:
                raise DataError(
                    f"row {row_id!r} has the source {source!r}, which is no subset of {self.name}; it has {', '.join(self.subsets())}",
                    remedy="put the subset's name into the column source, and leave other rows out",
                )
            rule = self.broken_rule(section, row_id, ranks)
            if rule is None and section in self.unique_in and row_id in seen:
                rule = "an id stands once"
            if rule is not None:
                raise DataError(
                    f"row {row_id!r} of {source!r} has the ranks {None if ranks is None else [*ranks]}; the rule of {self.name} is: {rule}",
                    remedy="see docs/benchmarks.md for the rows that the benchmark needs",
                )
            seen.add(row_id)

    def aggregate(self, records: Sequence[Record]) -> BenchmarkScores:
        """The benchmark's figures; rows without a score are in none of them and are named in `deviations`.

        Raises:
            DataError: as `check`, or no row has a score.
        """
        scored = [record for record in records if record.rewards is not None]
        self.check((record.id, record.source, record.ranks) for record in scored)
        by_source: dict[str, list[Record]] = {}
        for record in scored:
            by_source.setdefault(record.source, []).append(record)
        sections = self.sections(by_source)
        counted = self.counted(sections)
        if not counted:
            raise DataError(
                f"no section of {self.name} has a scored row ({len(records)} rows, {len(scored)} scored)",
                remedy="check the errors in scores.jsonl and the rows that the benchmark needs (docs/benchmarks.md)",
            )
        counts = Counter(record.source for record in scored)
        return BenchmarkScores(
            name=self.name,
            counts=self.counts,
            overall=self.overall(counted),
            overall_with_prior=self.overall_with_prior(sections),
            sections=tuple(sections),
            num_rows=len(records),
            num_scored=len(scored),
            num_ties=sum(section.num_ties for section in sections),
            deviations=(*_without_score(records), *self.missing(counts, sections)),
        )


def _without_score(records: Sequence[Record]) -> list[str]:
    failed = Counter(record.error_code or "unknown" for record in records if record.rewards is None)
    codes = ", ".join(f"{code}: {count:,}" for code, count in sorted(failed.items()))
    return [f"{failed.total():,} rows have no score ({codes})"] if failed else []


# ---- what suites are made of ----------------------------------------------------------------------------------------


def mean_of_sections(sections: Sequence[float]) -> float:
    """The leaderboards' total: each section (or domain) weighs the same."""
    return sum(sections) / len(sections)


def best_and_others(ranks: Sequence[float] | None) -> tuple[int, int]:
    """How many completions share the best rank, and how many have another."""
    num_best = 0 if not ranks else [*ranks].count(min(ranks))
    return num_best, len(ranks or ()) - num_best


def pair_rule(ranks: Sequence[float] | None) -> str | None:
    """The rule of a benchmark of pairs, where it is broken."""
    return None if best_and_others(ranks) == (1, 1) else "two completions, one of them better"


def short_subsets(scored: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    """Subsets with other than their published number of scored rows."""
    return [f"{name}: {scored.get(name, 0):,} of {rows:,} rows scored" for name, rows in expected.items() if scored.get(name, 0) != rows]


def judgement(record: Record) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rewards and ranks of a scored record that passed `check`."""
    assert record.rewards is not None
    assert record.ranks is not None
    return record.rewards, record.ranks


def parts_of(by_source: BySource, names: Iterable[str], credit: Callable[[Record], float]) -> list[BenchmarkPart]:
    """A part for each of the sources that has rows: the mean credit of its rows."""
    found = []
    for name in names:
        if rows := by_source.get(name):
            credits_of = [credit(row) for row in rows]
            ties = sum(_highest_is_shared(row) for row in rows)
            found.append(BenchmarkPart(name=name, value=sum(credits_of) / len(rows), num_rows=len(rows), num_ties=ties))
    return found


def section_of_parts(name: str, value: float, parts: Sequence[BenchmarkPart]) -> BenchmarkSection:
    """A section with the rows and ties of its parts."""
    num_rows, num_ties = sum(part.num_rows for part in parts), sum(part.num_ties for part in parts)
    return BenchmarkSection(name=name, value=value, num_rows=num_rows, num_ties=num_ties, parts=tuple(parts))


def _highest_is_shared(record: Record) -> bool:
    rewards, _ = judgement(record)
    return rewards.count(max(rewards)) > 1
