"""How a format is declared, which one a file is in, and which columns of a row it leaves unread. No Ray and no tokenizer here.

Detection is a trial: every adapter whose predicate fits reads the sample, and what it can read counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rayward.data.formats.columns import COMMON_COLUMNS, Columns, is_media, names, type_of
from rayward.data.formats.fields import Row, SourceOptions
from rayward.data.record import BadRow, Comparison, RowRejected, validate
from rayward.errors import DataFormatError


@dataclass(frozen=True, slots=True)
class Format:
    """One row of `FORMATS`.

    Attributes:
        columns: the columns, in words, for error messages.
        fits: whether a row looks like this format.
        adapt: row to comparison; raises `RowRejected`.
        consumed: top-level columns that `adapt` reads, besides `COMMON_COLUMNS`.
        metadata: columns of the published data sets that are known to be harmless; they are not mentioned.
        named_by: fields of `SourceOptions` that name further columns which `adapt` reads.
        settings: columns that are read only where a setting is given, and that setting.
    """

    columns: str
    fits: Callable[[Row, SourceOptions], bool]
    adapt: Callable[[Row, SourceOptions], Comparison]
    consumed: frozenset[str]
    metadata: frozenset[str] = frozenset()
    named_by: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    def reads(self, options: SourceOptions) -> Columns:
        """What becomes of the columns of a row that is read with these options."""
        named: set[str] = set()
        for attribute in self.named_by:
            value = getattr(options, attribute)
            named.update((value,) if isinstance(value, str) else value or ())
        return Columns(COMMON_COLUMNS | self.consumed | named, self.metadata, options.ignore, self.settings)


@dataclass(frozen=True, slots=True)
class _Trial:
    """What one adapter makes of a sample.

    Attributes:
        fits: rows that look like the format; read: those that it can read, with what they became.
        reason: why the first row that it cannot read is refused; None: it reads all.
    """

    fits: int
    read: dict[int, Comparison]
    reason: str | None


def try_format(entry: Format, rows: Sequence[Row], options: SourceOptions, *, structural: bool = True) -> _Trial:
    """Read a sample with one adapter.

    Args:
        structural: rows that do not look like the format are not tried.
    """
    fits, reason, read = 0, None, dict[int, Comparison]()
    for index, row in enumerate(rows):
        looks = entry.fits(row, options)
        fits += looks
        if structural and not looks:
            continue
        try:
            comparison = entry.adapt(row, options)
            validate(comparison, ties="keep")
        except RowRejected as exc:
            reason = reason or f"{exc.reason}: {exc.detail}"
        else:
            read[index] = comparison
    return _Trial(fits, read, reason)


def detect(formats: Mapping[str, Format], rows: Sequence[Row], options: Mapping[str, SourceOptions], *, where: str) -> str:
    """The format of a file by trial on its first rows.

    Args:
        formats: by name.
        rows: at least one.
        options: for every format.
        where: the file, for messages.

    Raises:
        DataFormatError: no format fits, or several read the rows differently.
    """
    trials = {name: try_format(entry, rows, options[name]) for name, entry in formats.items()}
    succeeded = any(trial.read for trial in trials.values())
    # Where nothing can be read, the look decides, so that every row is quarantined with the reason of its own format.
    votes = {name: len(trial.read) if succeeded else trial.fits for name, trial in trials.items()}
    most = max(votes.values())
    # A few odd rows do not decide: a second format that reads half as many rows still makes the file ambiguous.
    candidates = [name for name, count in votes.items() if 2 * count >= most] if most else []
    if len(candidates) > 1 and len({_reading(trials[name]) for name in candidates if trials[name].read}) == 1:
        # They read the same: the one that leaves the least unread knows more about the rows, then the one that stands later in the table.
        unread = {name: sum(len(formats[name].reads(options[name]).unused(row)) for row in rows) for name in candidates}
        candidates = [min(reversed(candidates), key=lambda name: (-votes[name], unread[name]))]
    if len(candidates) != 1:
        raise undecided(formats, rows, options, candidates, where)
    return candidates[0]


def _reading(trial: _Trial) -> str:
    return repr([(index, c.prompt, c.completions, c.ranks) for index, c in trial.read.items()])


def undecided(
    formats: Mapping[str, Format], rows: Sequence[Row], options: Mapping[str, SourceOptions], candidates: Sequence[str], where: str
) -> DataFormatError:
    """The error that names the columns, and for each format the first reason why it does not fit."""
    columns = names({str(key) for row in rows for key in row})
    lines = []
    for name in candidates or formats:
        reason = None if candidates else try_format(formats[name], rows[:1], options[name], structural=False).reason
        texts = [] if reason else sorted({each for row in rows for each in formats[name].reads(options[name]).other_texts(row)})
        why = f"; not, because {reason}" if reason else ""
        if not candidates and texts and not reason:
            why = f"; not, because the prompt would be implied while there is another text column: {names(texts)}"
        lines.append(f"{name}: {formats[name].columns}{why}".encode("utf-8", "backslashreplace").decode())
    problem = f"fits {len(candidates)} formats" if candidates else "fits no known format"
    listed = "\n    ".join(lines)
    return DataFormatError(
        f"{where} {problem}; its columns are: {columns}\n  candidates:\n    {listed}",
        remedy="choose one with data.format=<name>; map other column names with data.sources[].columns (`rayward data describe "
        f"{where}` prints a block to paste), or with data.prompt_key, data.chosen_key and data.rejected_key",
    )


def require_read(columns: Columns, rows: Sequence[Row], adapt: Callable[[Row], Comparison], *, name: str, where: str) -> None:
    """Refuse a file whose rows would mean something else by a column that nothing reads.

    Only rows that the adapter reads count: the others are quarantined for a reason of their own.

    Raises:
        DataFormatError: naming these columns, their types and shares.
    """
    counts: dict[str, int] = {}
    types: dict[str, str] = {}
    for row in rows:
        missed = columns.missed(row)
        if not missed:
            continue
        try:
            validate(adapt(row), ties="keep")
        except RowRejected:
            continue
        for each in missed:
            counts[each] = counts.get(each, 0) + 1
            types.setdefault(each, type_of(row[each]))
    if counts:
        told = ", ".join(f"{each} ({types[each]}, {count / len(rows):.0%} of the first rows)" for each, count in counts.items())
        told = told.encode("utf-8", "backslashreplace").decode()
        media = [each for each in counts if is_media(each)]
        if media:
            raise DataFormatError(
                f"{where}: format {name} does not read {told}: images, sounds and videos are not supported",
                remedy="use rows of text alone; data.ignore with the names of these columns trains on the rest of such rows",
            )
        raise DataFormatError(
            f"{where}: format {name} does not read {told}, and by that the rows would mean something else",
            remedy=f"map it with data.sources[].columns (`rayward data describe {where}` prints a block to paste), choose another "
            "data.format, or list it in data.ignore",
        )


def adapt_row(adapt: Callable[[Row], Comparison], columns: Columns, row: Row) -> Comparison:
    """The comparison of a row, all of whose columns that matter are read.

    Raises:
        RowRejected: the row does not fit, or holds a column that nothing reads and that would change its meaning.
    """
    comparison = adapt(row)
    missed = columns.missed(row)
    if missed:
        raise RowRejected(
            BadRow.UNUSED_COLUMN, f"nothing reads {names(missed)}; no row of the sample had it; map it, or list it in data.ignore"
        )
    return comparison
