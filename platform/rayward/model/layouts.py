"""Which stored tensors each parameter is made of.

Transformers converts published layouts when it loads them: names change, and the experts of a mixture, stored one by one, are
fused into one parameter. Its own table of conversions is followed here, with the same names and the same order, but every
operation makes a view instead of a tensor: a rank reads the part of the experts that it holds. This is the only module
that touches that table, which is no public interface of Transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedModel

from rayward.errors import ModelLoadError
from rayward.model.views import Joined, Part, Stacked, Transposed, View

Shapes = Mapping[str, tuple[int, ...]]
_Views = dict[str, list[View]]


@dataclass(slots=True)
class Placement:
    """Where a checkpoint's tensors go.

    Attributes:
        views: what each parameter (or persistent buffer) is made of, by its name.
        sources: the stored names behind each of them.
        unclaimed: stored tensors that no parameter takes, with the names that they would have in the model.
    """

    views: dict[str, View] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    unclaimed: dict[str, str] = field(default_factory=dict)


def place(model: PreTrainedModel, stored: Mapping[str, View], shapes: Shapes) -> Placement:
    """Assign stored tensors to the parameters of a model.

    Args:
        model: the modules, with or without values.
        stored: the tensors of a checkpoint by their names.
        shapes: of the parameters and persistent buffers, by name.

    Raises:
        ModelLoadError: two tensors are meant for one parameter, some of the parts of a parameter are missing, or this
            Transformers converts the layout with an operation that is not known here.
    """
    library = _library()
    transforms = library.mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, library.renaming)]
    converters = [entry for entry in transforms if isinstance(entry, library.converter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    placement = Placement()
    collected: dict[str, tuple[Any, _Views]] = {}
    for name in sorted(stored, key=library.natural_key):
        target, pattern = library.rename(name, renamings, converters, model.base_model_prefix, shapes)
        if target not in shapes and name in shapes:
            target, pattern = name, None
        if target not in shapes:
            placement.unclaimed[name] = target
            continue
        placement.sources.setdefault(target, []).append(name)
        if pattern is not None:
            _, inputs = collected.setdefault(target, (converter_of[pattern], {}))
            inputs.setdefault(pattern, []).append(stored[name])
        elif target in placement.views:
            raise ModelLoadError(
                f"{' and '.join(placement.sources[target])} are both stored for parameter {target}",
                remedy="remove the one that is not meant",
            )
        else:
            placement.views[target] = stored[name]
    for target, (converter, inputs) in collected.items():
        names = placement.sources.pop(target)
        for result, view in _convert(converter, inputs, target, shapes).items():
            placement.views[result] = view
            placement.sources[result] = names
    return placement


def _convert(converter: Any, inputs: _Views, target: str, shapes: Shapes) -> dict[str, View]:
    sources = ", ".join(converter.source_patterns)
    missing = [pattern for pattern in converter.source_patterns if pattern not in inputs]
    if missing:
        raise ModelLoadError(
            f"parameter {target} is made of the tensors {sources}, and there are none for {', '.join(missing)}",
            remedy="download or save the model again",
        )
    for operation in converter.operations:
        name = type(operation).__name__
        if name not in _OPERATIONS:
            raise ModelLoadError(
                f"transformers {transformers.__version__} makes parameter {target} from {sources} with {name}, which is not known here",
                remedy="load the model with Transformers and save it with save_pretrained(…, save_original_format=False)",
            )
        inputs = _OPERATIONS[name](operation, inputs, converter, target, shapes)
    # The operations name their results by the pattern of the target; the rest of the name comes from the target itself.
    first = next(pattern for pattern in inputs if pattern in target)
    prefix, _, suffix = target.partition(first)
    return {prefix + pattern + suffix: views[0] for pattern, views in inputs.items()}


def _merge(operation: Any, inputs: _Views, converter: Any, target: str, shapes: Shapes) -> _Views:
    # One pattern: the result is the target. More than one: the first of a chain, whose next operation joins them.
    name = converter.target_patterns[0] if len(inputs) == 1 else None
    for pattern, views in inputs.items():
        if len({view.shape for view in views}) > 1:
            raise ModelLoadError(
                f"the tensors {pattern} of parameter {target} have different shapes", remedy="download or save the model again"
            )
    return {name or pattern: [Stacked(views, operation.dim)] for pattern, views in inputs.items()}


def _concatenate(operation: Any, inputs: _Views, converter: Any, target: str, shapes: Shapes) -> _Views:
    parts = [view for pattern in converter.source_patterns for view in inputs[pattern]]
    return {converter.target_patterns[0]: [Joined(parts, operation.dim)]}


def _chunk(operation: Any, inputs: _Views, converter: Any, target: str, shapes: Shapes) -> _Views:
    (whole,) = _only(inputs)
    size = -(-whole.shape[operation.dim] // len(converter.target_patterns))
    return _parts(whole, operation.dim, converter.target_patterns, [size] * len(converter.target_patterns))


def _split(operation: Any, inputs: _Views, converter: Any, target: str, shapes: Shapes) -> _Views:
    (whole,) = _only(inputs)
    patterns = converter.target_patterns
    return _parts(whole, operation.dim, patterns, [shapes[target.replace(patterns[0], pattern)][operation.dim] for pattern in patterns])


def _transpose(operation: Any, inputs: _Views, converter: Any, target: str, shapes: Shapes) -> _Views:
    ((pattern, (whole,)),) = inputs.items()
    name = converter.target_patterns[0] if len(converter.target_patterns) == 1 else pattern
    if getattr(operation, "check_dims", False) and whole.shape == shapes[target]:
        return {name: [whole]}
    return {name: [Transposed(whole, (operation.dim0, operation.dim1))]}


def _only(inputs: _Views) -> list[View]:
    (views,) = inputs.values()
    return views


def _parts(whole: View, dim: int, names: list[str], sizes: list[int]) -> _Views:
    result: _Views = {}
    start, end = 0, whole.shape[dim]
    for name, size in zip(names, sizes, strict=True):
        result[name] = [Part(whole, dim, start, min(start + size, end))]
        start += size
    return result


_OPERATIONS: dict[str, Callable[[Any, _Views, Any, str, Shapes], _Views]] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
}


@dataclass(frozen=True, slots=True)
class _Library:
    mapping: Callable[..., list[Any]]
    rename: Callable[..., tuple[str, str | None]]
    natural_key: Callable[[str], Any]
    renaming: type[Any]
    converter: type[Any]


def _library() -> _Library:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError as exc:
        raise ModelLoadError(
            f"transformers {transformers.__version__} keeps its conversions of published layouts elsewhere ({exc})",
            remedy="install a release of Transformers that this version of Rayward names",
        ) from exc
    return _Library(get_model_conversion_mapping, rename_source_key, dot_natural_key, WeightRenaming, WeightConverter)
