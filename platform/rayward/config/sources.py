"""One source of data: where it lies, how its columns become a comparison, how much of it is used. No torch, Ray or files here."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rayward.config.formats import SourceFormat
from rayward.schema import Frozen

PROMPT_NAMES = ("prompt", "history", "system", "tools", "chat_template_kwargs")
ROW_NAMES = ("id", "source", "weight", "margin", "strength")
ANSWER_NAMES = ("chosen", "rejected", "first", "second", "completions", "completion", "best", "losers")
JUDGEMENT_NAMES = ("label", "scores", "ranks", "comparisons", "votes", "critiques", "first_name", "second_name")
STANDARD_NAMES = (*PROMPT_NAMES, *ROW_NAMES, *ANSWER_NAMES, *JUDGEMENT_NAMES)
"""What a column may be mapped to, where no format is named."""

JUDGEMENTS: dict[str, frozenset[str]] = {
    "chosen and rejected": frozenset({"chosen", "rejected"}),
    "first, second and label": frozenset({"first", "second", "label"}),
    "first, second and votes": frozenset({"first", "second", "votes"}),
    "first, second and scores": frozenset({"first", "second", "scores"}),
    "completions and scores": frozenset({"completions", "scores"}),
    "completions and ranks": frozenset({"completions", "ranks"}),
    "completions and votes": frozenset({"completions", "votes"}),
    "completions and label": frozenset({"completions", "label"}),
    "completions and comparisons": frozenset({"completions", "comparisons"}),
    "best and losers": frozenset({"best", "losers"}),
    "completion and label": frozenset({"completion", "label"}),
}
"""The judgements that columns may express, by the standard names that they need. `ratings` or `critiques` do for answers without one."""


def _listed(value: Any) -> Any:
    # One value may stand for a list of one.
    return (value,) if isinstance(value, str | bool | int | float) else value


Values = Annotated[tuple[bool | int | float | str, ...], BeforeValidator(_listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


# YAML reads the words on the left as true and false, whatever the data means by them.
_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def word_of(value: object) -> str:
    """A label as it is compared: a text without its outer spaces and its case; 1.0 is 1; yes and true are one word, no and false too."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = str(value).strip().casefold()
    return _BOOLEANS.get(word, word)


def _worded(value: Any) -> Any:
    # Keys that YAML reads as numbers or booleans are words here.
    return {key if isinstance(key, str) else word_of(key): number for key, number in value.items()} if isinstance(value, dict) else value


Numbers = Annotated[dict[str, float], BeforeValidator(_worded)]


class JudgementConfig(Frozen):
    first: Values = ()
    """Values of `label` (or of a vote) that find the first answer better; case does not count."""
    second: Values = ()
    """Values that find the second answer better."""
    tie: Values = ()
    """Values that find them equal. Any other value is quarantined as `bad_ranking`."""
    strengths: Numbers = Field(default_factory=dict)
    """Strength of the preference by value of `label`."""
    middle: float | None = None
    """A label that is a number: this one is a tie, the distance from it is the strength."""
    above: Literal["first", "second"] = "first"
    """Which answer a label above `middle` finds better."""
    lower_is_better: bool = False
    """Of `scores`: the lowest is the best. `ranks` are always so."""
    counted_from: Literal[0, 1] = 0
    """Of several `completions`, `label` is the place of the best one: the place of the first."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Which two completions, counted from 1, each of the `comparisons` compares; empty: 12 13 14 … 23 24 … in this order."""
    contradictions: Literal["quarantine", "wins"] = "quarantine"
    """Comparisons that no order of the completions agrees with: quarantine the row, or order by wins (a tie is half a win)."""
    values: Numbers = Field(default_factory=dict)
    """Numbers for words (`yes: 1`) in scores, ranks, ratings, labels that are numbers, margin, strength and weight."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        words = [word_of(value) for group in (self.first, self.second, self.tie) for value in group]
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise ValueError(f"judgement: the value {twice[0]!r} stands twice in first, second and tie; the rule is once; remove one")
        if self.middle is not None and words:
            raise ValueError("judgement.middle is set beside first, second or tie; the rule is numbers or values; remove one")
        if any(a == b or min(a, b) < 1 for a, b in self.pairs):
            raise ValueError(f"judgement.pairs is {list(self.pairs)}; the rule is two different completions, counted from 1; correct it")
        return self

    @cached_property
    def sides(self) -> dict[str, int]:
        """Word of a label to what it says: -1 the first is better, 1 the second, 0 a tie."""
        return {word_of(value): side for side, group in ((-1, self.first), (1, self.second), (0, self.tie)) for value in group}

    @cached_property
    def numbers(self) -> dict[str, float]:
        """`values` by word."""
        return {word_of(key): number for key, number in self.values.items()}

    @cached_property
    def strength_of(self) -> dict[str, float]:
        """`strengths` by word."""
        return {word_of(key): number for key, number in self.strengths.items()}

    @property
    def names_values(self) -> bool:
        """Whether values of a label are told."""
        return bool(self.first or self.second or self.tie)


class SourceConfig(Frozen):
    path: Names = Field(min_length=1)
    """Files, globs, directories, URIs or `hf:` names, as in `data.train`; one or a list."""
    role: Literal["train", "validation", "contamination"] = "train"
    """What the rows are for."""
    judged: bool = True
    """false: answers without a judgement, which can be scored and not trained on."""
    format: SourceFormat | None = None
    """Format of the rows after `columns` has renamed them. None: `data.format`, or what `columns` says by standard names."""
    columns: dict[str, str | tuple[str, ...] | None] = Field(default_factory=dict)
    """Standard name to the column that holds it: an exact name, or a path with dots (`a.b.0.c`; `*` is every element of a list). A list
    of paths gathers their values. null: the column of this name is not read."""
    ratings: str | dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Attribute (of `data.attributes`) to the column of its ratings, one for each completion; or one column with an object of them."""
    system: str | None = None
    """A system turn for rows that bring none."""
    prompt_template: str | None = None
    """The prompt as a text with columns in braces: `{instruction}\\n\\n{input}`; an empty one goes with the text before it, `{{` is a
    brace."""
    extract: dict[str, str] = Field(default_factory=dict)
    """Column to a regular expression that finds something in it; its named groups become columns. A row without a match is quarantined."""
    judgement: JudgementConfig = JudgementConfig()
    """What the labels of the source mean."""
    adapter: str | None = None
    """`module:function` of yours that turns a row into a row of a known format; see `data.adapter`."""
    ignore: tuple[str, ...] = ()
    """Like `data.ignore`, for this source."""
    source: str | None = Field(None, min_length=1)
    """Name in reports; None: the file's. A column is named by `columns.source`."""
    limit: int | None = Field(None, ge=1)
    """Use only so many rows, the first ones of its files in sorted order."""
    repeat: float = Field(1.0, ge=1.0)
    """Times that each training row is used; 1.5 repeats half of them, chosen by a hash of the row."""
    share: float | None = Field(None, gt=0.0, lt=1.0)
    """Share of the training rows that this source makes up in the end: the other way to say `repeat`. No row is left out for it. All
    training sources need it, or none."""

    @model_validator(mode="after")
    def _mapping(self) -> Self:
        where = f"data.sources, {self.path[0]}"
        for pattern in self.extract.values():
            try:
                groups = re.compile(pattern).groupindex
            except re.error as exc:
                raise ValueError(f"{where}: extract {pattern!r} is no regular expression: {exc}; correct it") from exc
            if not groups:
                raise ValueError(f"{where}: extract {pattern!r} names no group; the rule is (?P<name>…); name what it finds")
        if self.adapter is not None and not self.plain:
            raise ValueError(
                f"{where}: adapter is set beside columns, ratings, extract, system or prompt_template; the rule is one of the two"
            )
        if self.prompt_template is not None and "prompt" in self.columns:
            raise ValueError(f"{where}: columns.prompt and prompt_template are both set; the rule is one of them; remove one")
        if self.adapter is not None and re.fullmatch(r"[\w.]+:[\w.]+", self.adapter) is None:
            raise ValueError(f"{where}: adapter is {self.adapter!r}; the rule is module:function; correct it")
        if self.repeat != 1.0 and self.share is not None:
            raise ValueError(f"{where}: repeat and share are both set; the rule is one of them; remove one")
        if self.role == "validation" and (self.repeat != 1.0 or self.share is not None):
            raise ValueError(f"{where}: repeat or share of a validation source; the rule is training sources only; remove it")
        template_fields(self.prompt_template or "")
        if self.is_mapped:
            self._judged(where)
        elif self.judgement != JudgementConfig() or self.ratings:
            raise ValueError(
                f"{where}: judgement or ratings without columns that they speak about; map the answers with columns, or remove them"
            )
        return self

    def _judged(self, where: str) -> None:
        unknown = sorted(set(self.columns) - set(STANDARD_NAMES))
        if unknown:
            raise ValueError(
                f"{where}: columns.{unknown[0]} is no standard name; the rule without a format is one of {', '.join(STANDARD_NAMES)}; "
                "correct it, or name the format whose column it is"
            )
        judgement = self.kind
        if judgement is None and not self.judged:
            return
        if judgement is None:
            raise ValueError(
                f"{where}: columns maps {', '.join(self.mapped_names)}, which is no judgement; the rule is one of "
                f"{'; '.join(JUDGEMENTS)}; or completions, or completion, with ratings or critiques; add what is missing"
            )
        label, values = self.columns.get("label"), self.judgement
        told = values.names_values or values.middle is not None or not isinstance(label, str) or "first_name" in self.columns
        if judgement == "first, second and label" and not told:
            raise ValueError(
                f"{where}: it is not said which values of the label mean what; set judgement.first, judgement.second and judgement.tie"
            )

    @cached_property
    def paths(self) -> dict[str, str]:
        """Every path that the settings name, with the setting."""
        found: dict[str, str] = {}
        listed: list[tuple[str, str | tuple[str, ...] | None]] = [(f"columns.{name}", path) for name, path in self.columns.items()]
        if isinstance(self.ratings, str):
            listed.append(("ratings", self.ratings))
        else:
            listed += [(f"ratings.{name}", path) for name, path in self.ratings.items()]
        fields = [field for _, field in template_fields(self.prompt_template or "") if field is not None]
        listed += [("prompt_template", field) for field in fields if field not in self.columns]
        listed += [("extract", name) for name in self.extract]
        for setting, path in listed:
            for each in (path,) if isinstance(path, str) else path or ():
                found.setdefault(each, setting)
        return found

    @cached_property
    def heads(self) -> frozenset[str]:
        """The columns that the paths may stand in."""
        return frozenset(head for path in self.paths for head in heads_of(path))

    @cached_property
    def mapped_names(self) -> list[str]:
        """Standard names that a column is given for."""
        return [name for name, path in self.columns.items() if path is not None]

    @property
    def is_mapped(self) -> bool:
        """Whether `columns` says by standard names what the answers are, so that no format is needed."""
        return self.format in (None, "auto") and any(name in ANSWER_NAMES for name in self.mapped_names)

    @property
    def kind(self) -> str | None:
        """The judgement in `JUDGEMENTS` that the columns express, `ratings` or `critiques` alone, or None."""
        given = set(self.mapped_names)
        answers, judged = given & set(ANSWER_NAMES), given & {"label", "scores", "ranks", "comparisons", "votes"}
        for name, needed in JUDGEMENTS.items():
            if needed == answers | judged:
                return name
        if not judged and answers in ({"completion"}, {"completions"}):
            return "ratings" if self.ratings else "critiques" if "critiques" in given else None
        return None

    @property
    def plain(self) -> bool:
        """Whether rows are read as they are."""
        return not (self.columns or self.ratings or self.system or self.prompt_template or self.extract)


_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def heads_of(path: str) -> frozenset[str]:
    """The columns that a path may stand in: its first name, or more of it where names hold dots."""
    parts = path.split(".")
    return frozenset(".".join(parts[: end + 1]) for end in range(len(parts)))


@lru_cache(maxsize=256)
def template_fields(template: str) -> tuple[tuple[str, str | None], ...]:
    """A prompt template as pairs of a literal text and the column after it; the last column is None.

    Raises:
        ValueError: a brace stands alone, or holds no name.
    """
    parts: list[tuple[str, str | None]] = []
    literal, start = "", 0
    for match in _FIELD.finditer(template):
        literal += template[start : match.start()]
        start = match.end()
        if match[0] in ("{{", "}}"):
            literal += match[0][0]
        elif match[1] is not None and match[1].strip():
            parts.append((literal, match[1].strip()))
            literal = ""
        else:
            raise ValueError(f"prompt_template {template!r}: the brace at {match.start()} names no column; write {{{{ or }}}} for a brace")
    return (*parts, (literal + template[start:], None))
