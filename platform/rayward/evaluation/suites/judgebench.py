"""JudgeBench: the share of pairs decided as labelled, in the order A, B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rayward.evaluation.records import BenchmarkSection, Record
from rayward.evaluation.suites.base import BySource, Suite, judgement, pair_rule, parts_of, section_of_parts

JUDGEBENCH_GROUPS = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")


def decides_rightly(rewards: Sequence[float], ranks: Sequence[float]) -> bool:
    """The decision is A if it has the higher reward and B otherwise, so that equal rewards mean B, the second one."""
    return (rewards[0] > rewards[1]) == (ranks[0] < ranks[1])


class JudgeBench(Suite):
    """Its two published sets differ in size, so no count of rows is expected."""

    name: ClassVar[str] = "judgebench"

    def subsets(self) -> list[str]:
        return [f"{group}…" for group in JUDGEBENCH_GROUPS]

    def section_of(self, source: str) -> str | None:
        return next((group for group in JUDGEBENCH_GROUPS if source.startswith(group)), None)

    def broken_rule(self, section: str, row_id: str, ranks: Sequence[float] | None) -> str | None:
        return pair_rule(ranks)

    def sections(self, by_source: BySource) -> list[BenchmarkSection]:
        found = []
        for group in JUDGEBENCH_GROUPS:
            parts = parts_of(by_source, sorted(source for source in by_source if source.startswith(group)), _is_right)
            if parts:
                num_rows = sum(part.num_rows for part in parts)
                found.append(section_of_parts(group, sum(part.value * part.num_rows for part in parts) / num_rows, parts))
        return found

    def overall(self, sections: Sequence[BenchmarkSection]) -> float:
        # Over all pairs, not over sections.
        return sum(section.value * section.num_rows for section in sections) / sum(section.num_rows for section in sections)

    def missing(self, scored: Mapping[str, int], sections: Sequence[BenchmarkSection]) -> list[str]:
        names = {section.name for section in sections}
        return [f"{group}: no scored row" for group in JUDGEBENCH_GROUPS if group not in names]


def _is_right(record: Record) -> float:
    return float(decides_rightly(*judgement(record)))
