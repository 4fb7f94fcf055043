"""Published benchmarks: from scored comparisons to the figures of RewardBench, RewardBench 2 and JudgeBench.

A row's `source` is its subset; what else the data must look like: docs/benchmarks.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rayward.errors import ConfigError, DataError
from rayward.evaluation.records import BenchmarkPart, BenchmarkScores, BenchmarkSection, Record
from rayward.evaluation.suites.rules import (
    BEST_OF,
    COUNTS,
    JUDGEBENCH_GROUPS,
    PRIOR_SECTION,
    PRIOR_SETS,
    REWARDBENCH2_ROWS,
    REWARDBENCH_SECTIONS,
    TIES,
    TiesPrompt,
    best_of_credit,
    decides_rightly,
    mean_of_sections,
    section_score,
    subset_weights,
    ties_parts,
    ties_score,
    total_with_prior,
)

_TIES_ID = re.compile(r"(ref|tied):(0|[1-9]\d*)")
Judged = tuple[str, str, Sequence[float] | None]
"""Id, source and ranks of a row: what can be checked before anything is scored."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by its name, with the subset weights chosen where it has several; made by `choose`."""

    name: str
    counts: str | None

    def check(self, rows: Iterable[Judged]) -> None:
        """Refuse rows that the benchmark has no rule for.

        Raises:
            DataError: a source is no subset, a row is judged in another way than its subset is, or an id of Ties stands twice.
        """
        seen: set[str] = set()
        for name, source, ranks in rows:
            section = _section_of(self.name, source)
            if section is None:
                raise DataError(
                    f"row {name!r} has the source {source!r}, which is no subset of {self.name}; it has {', '.join(_subsets(self.name))}",
                    remedy="put the subset's name into the column source, and leave other rows out",
                )
            rule = _broken_rule(self.name, section, name, ranks)
            if rule is None and section == TIES and name in seen:
                rule = "an id stands once"
            if rule is not None:
                raise DataError(
                    f"row {name!r} of {source!r} has the ranks {None if ranks is None else [*ranks]}; the rule of {self.name} is: {rule}",
                    remedy="see docs/benchmarks.md for the rows that the benchmark needs",
                )
            seen.add(name)

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
        sections = _SECTIONS[self.name](self, by_source)
        counted = [section for section in sections if section.name != PRIOR_SECTION]
        if not counted:
            raise DataError(
                f"no section of {self.name} has a scored row ({len(records)} rows, {len(scored)} scored)",
                remedy="check the errors in scores.jsonl and the rows that the benchmark needs (docs/benchmarks.md)",
            )
        prior = [section.value for section in sections if section.name == PRIOR_SECTION]
        values = [section.value for section in counted]
        if self.name == "judgebench":  # over all pairs
            overall = sum(section.value * section.num_rows for section in counted) / sum(section.num_rows for section in counted)
        else:
            overall = mean_of_sections(values)
        return BenchmarkScores(
            name=self.name,
            counts=self.counts,
            overall=overall,
            overall_with_prior=total_with_prior(values, prior[0]) if prior else None,
            sections=tuple(sections),
            num_rows=len(records),
            num_scored=len(scored),
            num_ties=sum(section.num_ties for section in sections),
            deviations=tuple(_deviations(self.name, records, sections)),
        )


def choose(name: str, counts: str | None = None) -> Benchmark:
    """The benchmark of a name.

    Args:
        counts: weights of RewardBench's subsets, one of COUNTS; None: the corrected ones.

    Raises:
        ConfigError: the name or the counts are not known, or counts are given to a benchmark without weights.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"benchmark is {name!r}; the rule is one of {', '.join(BENCHMARKS)}", remedy="use one of these")
    if name != "rewardbench":
        if counts is not None:
            raise ConfigError(f"counts is {counts!r} and {name} has no subset weights", remedy="leave counts out")
        return Benchmark(name, None)
    if counts is not None and counts not in COUNTS:
        raise ConfigError(f"counts is {counts!r}; the rule is one of {', '.join(COUNTS)}", remedy="use one of these")
    return Benchmark(name, counts or "fixed")


def _subsets(benchmark: str) -> list[str]:
    if benchmark == "rewardbench":
        return [*subset_weights("raw"), *PRIOR_SETS]
    return list(REWARDBENCH2_ROWS) if benchmark == "rewardbench2" else [f"{group}…" for group in JUDGEBENCH_GROUPS]


def _section_of(benchmark: str, source: str) -> str | None:
    if benchmark == "rewardbench":
        named = REWARDBENCH_SECTIONS | {PRIOR_SECTION: PRIOR_SETS}
        return next((section for section, subsets in named.items() if source in subsets), None)
    if benchmark == "rewardbench2":
        return source if source in REWARDBENCH2_ROWS else None
    return next((group for group in JUDGEBENCH_GROUPS if source.startswith(group)), None)


def _broken_rule(benchmark: str, section: str, name: str, ranks: Sequence[float] | None) -> str | None:
    num_best = 0 if not ranks else [*ranks].count(min(ranks))
    num_others = len(ranks or ()) - num_best
    if benchmark != "rewardbench2":
        return None if (num_best, num_others) == (1, 1) else "two completions, one of them better"
    if section != TIES:
        return None if (num_best, num_others) == (1, BEST_OF - 1) else f"{BEST_OF} completions, one of them best"
    found = _TIES_ID.fullmatch(name)
    if found is None:
        return "the id is ref:<number> or tied:<number>"
    if len(set(ranks or ())) != 2:
        return "the correct completions share one rank and the incorrect ones another"
    fits = num_best == 1 if found[1] == "ref" else num_best > 1
    return None if fits else "one correct completion in a row ref:…, several in a row tied:…"


def _deviations(benchmark: str, records: Sequence[Record], sections: Sequence[BenchmarkSection]) -> list[str]:
    failed = Counter(record.error_code or "unknown" for record in records if record.rewards is None)
    codes = ", ".join(f"{code}: {count:,}" for code, count in sorted(failed.items()))
    found = [f"{failed.total():,} rows have no score ({codes})"] if failed else []
    names = {section.name for section in sections}
    if benchmark == "judgebench":  # its two sets differ in size
        return found + [f"{group}: no scored row" for group in JUDGEBENCH_GROUPS if group not in names]
    expected = REWARDBENCH2_ROWS if benchmark == "rewardbench2" else subset_weights("raw")
    if PRIOR_SECTION in names:
        expected = expected | PRIOR_SETS
    scored = Counter(record.source for record in records if record.rewards is not None)
    found += [f"{name}: {scored[name]:,} of {rows:,} rows scored" for name, rows in expected.items() if scored[name] != rows]
    if scored[TIES] and TIES not in names:
        found.append(f"{TIES}: no number has both a row ref:… and a row tied:…, so the domain has no score")
    return found


BySource = Mapping[str, list[Record]]


def _part(name: str, credits_of: Sequence[float], num_ties: int) -> BenchmarkPart:
    return BenchmarkPart(name=name, value=sum(credits_of) / len(credits_of), num_rows=len(credits_of), num_ties=num_ties)


def _section(name: str, value: float, parts: Sequence[BenchmarkPart]) -> BenchmarkSection:
    num_rows, num_ties = sum(part.num_rows for part in parts), sum(part.num_ties for part in parts)
    return BenchmarkSection(name=name, value=value, num_rows=num_rows, num_ties=num_ties, parts=tuple(parts))


def _known(record: Record) -> tuple[tuple[float, ...], tuple[float, ...]]:
    assert record.rewards is not None  # only scored rows come here
    assert record.ranks is not None
    return record.rewards, record.ranks


def _highest_is_shared(record: Record) -> bool:
    rewards, _ = _known(record)
    return rewards.count(max(rewards)) > 1


def _parts(by_source: BySource, names: Iterable[str], credit: Callable[[Record], float]) -> list[BenchmarkPart]:
    rows = {name: by_source[name] for name in names if name in by_source}
    return [_part(name, [credit(row) for row in these], sum(map(_highest_is_shared, these))) for name, these in rows.items()]


def _rewardbench(benchmark: Benchmark, by_source: BySource) -> list[BenchmarkSection]:
    def right(record: Record) -> float:
        rewards, ranks = _known(record)
        better = ranks.index(min(ranks))
        return float(rewards[better] > rewards[1 - better])

    weights = subset_weights(benchmark.counts or "fixed") | dict.fromkeys(PRIOR_SETS, 1)
    sections = []
    for name, subsets in (REWARDBENCH_SECTIONS | {PRIOR_SECTION: PRIOR_SETS}).items():
        parts = _parts(by_source, subsets, right)
        if parts:
            sections.append(_section(name, section_score({part.name: part.value for part in parts}, weights), parts))
    return sections


def _rewardbench2(benchmark: Benchmark, by_source: BySource) -> list[BenchmarkSection]:
    def credit(record: Record) -> float:
        rewards, ranks = _known(record)
        return best_of_credit(rewards, ranks.index(min(ranks)))

    domains = [name for name in REWARDBENCH2_ROWS if name != TIES]
    sections = [_section(part.name, part.value, [part]) for part in _parts(by_source, domains, credit)]
    sets: dict[str, dict[int, TiesPrompt]] = {"ref": {}, "tied": {}}
    for record in by_source.get(TIES, ()):
        rewards, ranks = _known(record)
        kind, _, number = record.id.partition(":")
        best = min(ranks)
        sets[kind][int(number)] = TiesPrompt(
            correct=tuple(reward for reward, rank in zip(rewards, ranks, strict=True) if rank == best),
            incorrect=tuple(reward for reward, rank in zip(rewards, ranks, strict=True) if rank != best),
        )
    if set(sets["ref"]) & set(sets["tied"]):
        values = ties_parts(sets["ref"], sets["tied"])
        parts = tuple(BenchmarkPart(name=name, value=value, num_rows=0, num_ties=0) for name, value in values.items())
        num_rows = len(sets["ref"]) + len(sets["tied"])
        sections.append(BenchmarkSection(name=TIES, value=ties_score(values), num_rows=num_rows, num_ties=0, parts=parts))
    return sections


def _judgebench(benchmark: Benchmark, by_source: BySource) -> list[BenchmarkSection]:
    def right(record: Record) -> float:
        return float(decides_rightly(*_known(record)))

    sections = []
    for group in JUDGEBENCH_GROUPS:
        parts = _parts(by_source, sorted(source for source in by_source if source.startswith(group)), right)
        if parts:
            num_rows = sum(part.num_rows for part in parts)
            sections.append(_section(group, sum(part.value * part.num_rows for part in parts) / num_rows, parts))
    return sections


_SECTIONS: dict[str, Callable[[Benchmark, BySource], list[BenchmarkSection]]] = {
    "rewardbench": _rewardbench,
    "rewardbench2": _rewardbench2,
    "judgebench": _judgebench,
}

BENCHMARKS = tuple(_SECTIONS)
