"""One item cannot hurt another: whatever an item does ends in its own result. No Ray, and torch only where something is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from rayward.errors import ContractError
from rayward.scoring.scored_model import encoding_error
from rayward.wire.items import ItemError, ItemResult

if TYPE_CHECKING:
    import torch

    from rayward.scoring.units import EncodedItem, UnitValues, Values

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def item_error(exc: BaseException, doing: str) -> ItemError:
    """What an exception means for the item that raised it.

    Args:
        doing: what was done with the item, for errors that are not of its contract. Their message names the type of the exception
            and never its words, which may quote the text of the item; those are in the log.
    """
    if isinstance(exc, ContractError):
        return encoding_error(exc)
    logger.warning("an item failed %s", doing, exc_info=exc)
    return ItemError("failed", f"{type(exc).__name__} {doing}")


def each(items: Sequence[T | ItemError], make: Callable[[T], R | ItemError], *, doing: str) -> list[R | ItemError]:
    """`make` of every item, or why it could not be made; items that are errors already stay what they are."""
    made: list[R | ItemError] = []
    for item in items:
        if isinstance(item, ItemError):
            made.append(item)
            continue
        try:
            made.append(make(item))
        # Broad on purpose: templates and tokenizers run whatever they are given, and raise whatever they like.
        except BaseException as exc:
            if not _is_of_the_item(exc):
                raise
            made.append(item_error(exc, doing))
    return made


def _is_of_the_item(exc: BaseException) -> bool:
    # A panic in the Rust code of a tokenizer is no Exception; interrupts and exits are nobody's fault.
    return isinstance(exc, Exception) or type(exc).__name__ == "PanicException"


def together(
    parts: Sequence[T], compute: Callable[[Sequence[T]], Sequence[R]], *, device: torch.device, good: Callable[[R], bool] = lambda _: True
) -> list[R | ItemError]:
    """`compute` of all parts in one call; where that raises, of each in a call of its own, once.

    Args:
        good: of a value; parts whose value is not are computed alone, because NaN of one row reaches its neighbours through masked
            attention (0 x NaN is NaN).

    Returns:
        For each part its value, or `failed` for those that raised alone too.

    Raises:
        Exception: the device is out of memory for a single part, or broken: then it is not the part's fault.
    """
    if not parts:
        return []
    values: list[R] | None = None
    try:
        values = list(compute(parts))
    # Broad on purpose: one part must not cost the others their result, whatever it is that it raises.
    except Exception as exc:
        logger.warning("%d items failed together (%s); each is repeated alone", len(parts), type(exc).__name__)
    # Outside the handler: the exception holds the tensors of the failed call.
    if values is None:
        return [_alone(part, compute, device) for part in parts]
    if len(parts) == 1:
        return list(values)
    return [value if good(value) else _alone(part, compute, device) for part, value in zip(parts, values, strict=True)]


def _alone(part: T, compute: Callable[[Sequence[T]], Sequence[R]], device: torch.device) -> R | ItemError:
    import torch

    try:
        (value,) = compute([part])
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # Broad on purpose, as above.
    except Exception as exc:
        # Errors of CUDA's libraries have no type of their own, but leave a device on which nothing works any more.
        torch.ones(1, device=device).sum().item()
        return item_error(exc, "in the forward")
    return value


def finished(encoded: EncodedItem, values: Sequence[Values], make: Callable[[Sequence[UnitValues]], ItemResult]) -> ItemResult:
    """The result of an item, if all its units have values and `make` can make one of them."""
    error = encoded.error or next((value for value in values if isinstance(value, ItemError)), None)
    if error is not None:
        return ItemResult(error=error, taken_as=encoded.taken_as)
    return settled(lambda: make([value for value in values if not isinstance(value, ItemError)]))


def settled(make: Callable[[], ItemResult]) -> ItemResult:
    """The result, if it can be made and all its numbers are finite; else the error of the item."""
    (result,) = each([None], lambda _: make(), doing="while its result was made")
    if isinstance(result, ItemError):
        return ItemResult(error=result)
    if not result.is_finite():
        error = ItemError("non_finite", "the model gave NaN or Inf, or its rewards leave the range of numbers")
        return ItemResult(error=error, tokens=result.tokens, tokens_computed=result.tokens_computed)
    return result
