"""Settings from YAML files and dotted overrides, resolved once, before anything heavy is imported. No torch, Ray or DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from typing_extensions import TypeVar

from rayward.config.run import DEFAULT_OBJECTIVE, Config
from rayward.errors import ConfigError
from rayward.objectives.base import ObjectiveSettings
from rayward.objectives.table import OBJECTIVES

T = TypeVar("T", bound=BaseModel, default=Config)


def load_config(
    paths: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    *,
    schema: type[T] = Config,  # type: ignore[assignment]
) -> T:
    """Read YAML files left to right, apply `section.key=value` overrides, validate.

    Args:
        paths: YAML files; later files win, mappings merge key by key.
        overrides: dotted assignments; values are parsed as YAML.
        schema: the model to validate against.

    Raises:
        ConfigError: a file cannot be read, or a key, type or combination is wrong.
    """
    return parse_config(merged_settings(paths, overrides), schema)


def parse_config(values: dict[str, Any], schema: type[T]) -> T:
    """Validate a mapping.

    Raises:
        ConfigError: naming every key that is wrong, its value and the rule.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(_explain(exc, schema, values), remedy="correct the keys above; `rayward config` prints all of them") from exc


def dump_config(config: BaseModel) -> str:
    """The fully resolved configuration as JSON (JSON keeps nulls), for run directories and exports."""
    return json.dumps(config.model_dump(mode="json"), indent=2)


def _explain(exc: ValidationError, schema: type[BaseModel], values: Mapping[str, Any]) -> str:
    lines = []
    for error in exc.errors():
        key = ".".join(str(part) for part in error["loc"] if part != "function-after")
        if error["type"] == "extra_forbidden":
            known = _keys_beside(schema, error["loc"], values)
            lines.append(f"{key} = {error['input']!r}: unknown key; known here: {', '.join(known)}")
        elif error["type"] == "value_error":
            lines.append(str(error["ctx"]["error"]))
        else:
            lines.append(f"{key} = {error['input']!r}: {error['msg']}")
    return "the configuration is not valid\n  " + "\n  ".join(lines)


def _keys_beside(schema: type[BaseModel], loc: tuple[int | str, ...], values: Mapping[str, Any]) -> list[str]:
    node: Any = schema
    for part in loc[:-1]:
        field = getattr(node, "model_fields", {}).get(part)
        if field is None:
            continue
        node = field.annotation
        # Of a list of blocks, the block.
        node = next((each for each in get_args(node) if hasattr(each, "model_fields")), node)
        if node is ObjectiveSettings:
            node = OBJECTIVES[values[str(part)].get("type", DEFAULT_OBJECTIVE.type)].settings
    return sorted(getattr(node, "model_fields", {}))


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
