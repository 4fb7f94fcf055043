"""YAML files and dotted overrides, merged into one mapping that the configuration is validated from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rayward.errors import ConfigError


def merged_settings(paths: Sequence[str | Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Files left to right, mappings key by key, then `section.key=value` overrides whose values are read as YAML.

    Raises:
        ConfigError: a file cannot be read, or an override is no assignment.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        _merge(merged, _read_yaml(Path(path)))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"override {override!r} is not of the form section.key=value", remedy="write for example training.num_workers=2"
            )
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as exc:
            raise ConfigError(f"override {override!r}: the value is not YAML ({exc})", remedy="quote the value") from exc
        if isinstance(value, str):
            value = _number(value)
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(merged, value)
    return merged


def _number(text: str) -> Any:
    # YAML 1.1 reads 1e-5 as a string; people who type learning rates mean the number.
    try:
        return float(text) if "e" in text.lower() else text
    except ValueError:
        return text


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"config file {path} cannot be read ({exc.strerror})", remedy="check the path") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"config file {path} is not YAML: {exc}", remedy="correct the file") from exc
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {path} holds a {type(loaded).__name__}; the rule is a mapping", remedy="use section: key: value")
    return loaded


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict) and key != "architecture":
            _merge(into[key], value)
        else:
            into[key] = value
