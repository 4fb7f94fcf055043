"""How files named on a command line are read: the `data:` block and the settings of one source, in short. Light."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayward.config.data import DataConfig
from rayward.config.load import merged_settings, parse_config
from rayward.config.run import Config
from rayward.config.sources import SourceConfig

_NOT_HERE = ("train", "validation", "sources")
_OF_SOURCE = set(SourceConfig.model_fields) - set(DataConfig.model_fields) - {"path", "role"}


def reading_config(settings: Sequence[str], locations: Sequence[str], judged: bool = True, **flags: Any) -> DataConfig:
    """The `data:` block with which files are read for evaluation.

    Args:
        settings: YAML files and `key=value`. A key is one of the `data:` block (with or without `data.` before it) or of a source
            (`columns.prompt=question`); a whole training configuration does too. Of several `sources` each location takes the one that
            names it; a single one is taken for all.
        locations: the files to read.
        judged: whether a mapping must say what the judgement is.
        flags: keys of the block that win, where they are not None.

    Raises:
        ConfigError: a key, a type or a combination is wrong, or none of several sources names a location.
    """
    given = merged_settings([each for each in settings if "=" not in each], [each for each in settings if "=" in each])
    block = given.pop("data", None) or {}
    rest = {key: value for key, value in given.items() if key not in Config.model_fields or key in DataConfig.model_fields}
    block = {**block, **rest, **{key: value for key, value in flags.items() if value is not None}}
    own = {key: block.pop(key) for key in list(block) if key in _OF_SOURCE}
    listed = block.pop("sources", None) or ()
    kept = {key: value for key, value in block.items() if key not in _NOT_HERE}
    if not own and not listed:
        return parse_config(kept, DataConfig)
    sources = [
        {**_named(listed, location), **own, "path": location, "role": "validation", **({} if judged else {"judged": False})}
        for location in locations
    ]
    return parse_config({**kept, "sources": sources}, DataConfig)


def _named(listed: Sequence[Any], location: str) -> dict[str, Any]:
    # A mixture is of training only: how often a row is used has no meaning here.
    entries = [
        {key: value for key, value in entry.items() if key not in ("repeat", "share")} for entry in listed if isinstance(entry, Mapping)
    ]
    for entry in entries:
        path = entry.get("path")
        if location == path or (isinstance(path, list | tuple) and location in path):
            return entry
    return entries[0] if len(entries) == 1 else {}
