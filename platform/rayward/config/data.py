"""The `data:` block."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rayward.config.formats import SourceFormat
from rayward.config.sources import SourceConfig
from rayward.schema import Frozen

__all__ = ["DataConfig", "SourceConfig", "SourceFormat"]


class DataConfig(Frozen):
    train: tuple[str, ...] = ()
    """Files, globs, directories, URIs, or Hugging Face data sets as `hf:owner/name[/config][@split]`."""
    validation: tuple[str, ...] = ()
    """Like `train`; when empty, `validation_fraction` of the prompts is held out."""
    sources: tuple[SourceConfig, ...] = ()
    """Sources with a mapping of their own; `train` and `validation` are the short form of those without."""
    adapter: str | None = Field(None, pattern=r"^[\w.]+:[\w.]+$")
    """`module:function` of yours, found from the working directory, for every source without an adapter of its own: from a row (a dict) it
    makes a row of a known format, with `format` in it or detected, or `(None, "reason")`."""
    format: SourceFormat = "auto"
    """Format of every source; `auto` detects it from the columns."""
    ignore: tuple[str, ...] = ()
    """Columns that may stay unread although their names say that they belong to the text or the judgement of a row (wildcards `*`, `?`)."""
    prompt_key: str | None = None
    """OpenRLHF-style column name of the prompt (None: implicit in chosen and rejected)."""
    chosen_key: str = "chosen"
    """Column name of the better completion, for formats `trl` and `openrlhf`."""
    rejected_key: str = "rejected"
    """Column name of the worse completion."""
    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of prompts (not rows) held out when `validation` is empty."""
    contamination: tuple[str, ...] = ()
    """Benchmarks, named like `train`: train rows whose prompt stands in one (the same token ids, or the same text but for case, spaces and
    punctuation) are quarantined."""
    split_by: Literal["prompt", "row"] = "prompt"
    """What stands on one side of the split only: a prompt with all its rows, or a row with those that say the same; for data in which one
    prompt is given to all."""
    ties: Literal["quarantine", "keep"] = "quarantine"
    """What to do with completions ranked equal: quarantine, or train them towards probability one half."""
    votes: Literal["quarantine", "majority", "soft"] = "quarantine"
    """Rows that judge the same completions differently: quarantine them as contradictions, make one row by majority (as many votes for
    one as for the other is a tie), or one row with the share of the votes as a soft target (`objective.type=bradley_terry`)."""
    too_long: Literal["truncate", "quarantine"] = "truncate"
    """`truncate` drops the oldest turns of the prompt and keeps the whole completion; rows that still do not fit
    are quarantined either way."""
    attributes: tuple[str, ...] = ()
    """Ratings to keep, by name and in this order (`objective: regression` learns them); a row may lack some of them."""
    attribute_range: tuple[float, float] | None = None
    """Smallest and largest rating; a row with another one is quarantined. None: any finite number."""
    rank_by: str | None = None
    """Attribute that ranks the completions of rows without a ranking (a higher rating is better); None: they stay unranked."""
    preference: Literal["better", "safer"] = "better"
    """Which judgement of format `safe_rlhf` orders the completions."""
    merge_prompts: bool = False
    """Unranked rows of one prompt (single rated completions) become one comparison with all their completions."""
    step_separator: str | None = Field(None, min_length=1)
    """Text between two steps of a completion, for process rewards; goes into their scoring contract. None: an empty line in format
    `stepwise`; elsewhere labels of steps are ignored."""
    critique_lead_in: str | None = Field(None, min_length=1)
    """Every completion is followed by a user turn of this text and its critique, and judged at the end of it; goes into the scoring
    contract. None: critiques in the data are ignored."""
    group_pairs: bool = False
    """Ranked rows of one prompt become one comparison of K completions where their judgements determine one order of all of them."""
    group_tokens: int | None = Field(None, ge=8)
    """Largest such comparison in tokens, the prompt once; a larger one stays as its rows. None: twice `model.max_tokens`, like a pair."""
    max_bad_fraction: float = Field(0.05, ge=0.0, le=1.0)
    """More quarantined rows than this share stop the run before training (duplicates, ties and
    training rows whose prompt stands in the validation data are not counted)."""
    outlier_factor: float | None = Field(1000.0, gt=1.0)
    """A margin, strength, weight or rating beyond so many times the median magnitude of its column is an outlier; None: beyond 1e9."""
    rows_per_shard: int = Field(10_000, ge=1)
    """Rows in one Parquet shard of the prepared data."""

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Those of `train`, `validation` and `sources`."""
        short = [
            SourceConfig(path=(path,), role=role)
            for role, paths in (("train", self.train), ("validation", self.validation))
            for path in paths
        ]
        return (*short, *self.sources)

    @property
    def train_paths(self) -> tuple[str, ...]:
        """Where training data lies."""
        return tuple(path for source in self.all_sources if source.role == "train" for path in source.path)

    @property
    def holds_out(self) -> bool:
        """Whether validation data is named, so that nothing of the training data is held out."""
        return any(source.role == "validation" for source in self.all_sources)

    @model_validator(mode="after")
    def _mixture(self) -> Self:
        mapped = [source.path[0] for source in self.sources if not source.plain]
        if self.adapter is not None and mapped:
            raise ValueError(
                f"data.adapter is set and data.sources maps {mapped[0]}; the rule is one of the two; give sources their own adapter"
            )
        if self.split_by == "row" and (self.merge_prompts or self.group_pairs or self.contamination):
            raise ValueError(
                "data.split_by is row beside merge_prompts, group_pairs or contamination, which are about prompts; the rule is one of the "
                "two; remove one"
            )
        shares = [source.share for source in self.all_sources if source.role == "train"]
        given = [share for share in shares if share is not None]
        if given and (len(given) != len(shares) or abs(sum(given) - 1.0) > 1e-6):
            raise ValueError(
                f"data.sources: the shares of the training sources are {shares}; the rule is one for each, 1 together; correct them"
            )
        return self

    @model_validator(mode="after")
    def _ratings(self) -> Self:
        if len(set(self.attributes)) != len(self.attributes):
            raise ValueError(f"data.attributes is {list(self.attributes)}; the rule is that each name stands once; remove the repetition")
        if self.attribute_range is not None and not self.attribute_range[0] < self.attribute_range[1]:
            raise ValueError(f"data.attribute_range is {list(self.attribute_range)}; the rule is smallest < largest; correct it")
        if self.rank_by is not None and self.rank_by not in self.attributes:
            raise ValueError(
                f"data.rank_by is {self.rank_by!r} and data.attributes is {list(self.attributes)}; the rule is one of them; add it there"
            )
        if self.group_tokens is not None and not self.group_pairs:
            raise ValueError("data.group_tokens is set and data.group_pairs is false; nothing is grouped; set it, or remove the first")
        return self
