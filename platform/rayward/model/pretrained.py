"""The one way weights come out of a model directory, for training and for scoring: checked at once, read slice by slice.

What is not in the directory is either the head, which training starts anew and says so, or an error. What is in the directory
and in no parameter is either known to mean nothing here, or an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rayward.config.model import ModelConfig
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.errors import ModelLoadError
from rayward.model.layouts import place
from rayward.model.views import Joined, Part, View, Zeros, read_flat
from rayward.model.weights import (
    LANGUAGE_HEAD,
    Checkpoint,
    RandomInit,
    WeightSource,
    persistent_buffers,
    resolve_model_dir,
)

logger = logging.getLogger(__name__)

FILL_ELEMENTS = 1 << 24
"""Elements that are in memory twice while a model is filled."""

PRETRAINING_HEADS = (
    "lm_head.", "embed_out.", "lm_loss.", "pred_layer.", "cls.", "predictions.", "sop_classifier.", "decoder.", "vocab_transform.",
    "vocab_layer_norm.", "vocab_projector.", "generator_predictions.", "generator_lm_head.", "discriminator_predictions.",
    "lm_predictions.", "mask_predictions.", "mtp.", "model.mtp.",
)  # fmt: skip
"""Parts of published models that predict tokens, which a reward does not need."""
CONSTANTS = re.compile(r"(rotary_emb\.inv_freq|(cos|sin)_cached|\.(attn|attention)\.(masked_)?bias|position_ids|token_type_ids)$")
"""Tensors that older versions of Transformers stored and that are computed now."""


class SafetensorsSource:
    """Slices of a model directory, for the parameters and persistent buffers of one model.

    Args:
        checkpoint: the directory.
        model: the modules, with or without values.
        head: whether the head may start anew: `auto` where there is none, `fresh` always, None never (a model that is to score).
        head_output: start the one output from this output of an exported model.
        fallback: values of what starts anew, and of buffers that are not stored.

    Attributes:
        notes: what was started anew or taken from a place of its own.

    Raises:
        ModelLoadError: a parameter is missing or of another shape, or a tensor is in the directory that no parameter takes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        *,
        fallback: WeightSource,
        head: str | None = "auto",
        head_output: str | None = None,
    ) -> None:
        self._directory = checkpoint.directory
        self._stored_names = checkpoint.stored_names
        self._model = model
        self._fallback = fallback
        self._shapes = shapes_of(model)
        placement = place(model, checkpoint.views, self._shapes)
        self._views, self._sources = placement.views, placement.sources
        self._refuse_unclaimed(placement.unclaimed, drop_heads=head == "fresh")
        self._fresh = self._not_taken(head)
        self._rows = None if head is None else self._head_rows(head_output)
        taken = [name for name in self._shapes if name in self._views and name not in self._fresh]
        self._views = {name: self._fitted(name, self._views[name]) for name in taken}
        self.notes = (*checkpoint.notes, *self._notes())

    def read(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        view = self._views.get(name)
        if view is None:
            return self._fallback.read(name, shape, start, stop)
        return read_flat(view, start, stop)

    def _not_taken(self, head: str | None) -> set[str]:
        # Names that get their values from the fallback.
        buffers = persistent_buffers(self._model)
        required = {name for name, _ in self._model.named_parameters()}
        missing = sorted((required | buffers.keys()) - self._views.keys())
        no_pooler = not any(self._is_pooler(name) for name in self._views)
        fresh, lost = {name for name in missing if name in buffers}, []
        for name in missing:
            if name in fresh:
                continue
            if head is not None and (self._is_head(name) or (no_pooler and self._is_pooler(name))):
                fresh.add(name)
            else:
                lost.append(name)
        if head is None and any(self._is_head(name) or self._is_pooler(name) for name in lost):
            raise ModelLoadError(
                f"{self._directory} lacks weights for {_some(lost)}: they would be random numbers",
                remedy="give a trained reward model; a language model has no reward head yet",
            )
        if lost:
            raise ModelLoadError(
                f"{self._directory} has no tensor for parameter {_some(lost)}",
                remedy="use a checkpoint of the architecture that its config.json names",
            )
        return fresh | {name for name in required if head == "fresh" and self._is_head(name)}

    def _refuse_unclaimed(self, unclaimed: dict[str, str], *, drop_heads: bool) -> None:
        base = f"{self._model.base_model_prefix}."
        ignored = [re.compile(pattern) for pattern in self._model._keys_to_ignore_on_load_unexpected or ()]
        buffers = {name for name, _ in self._model.named_buffers()}
        has_pooler = any(self._is_pooler(name) for name in self._shapes)
        bare = not any(name.startswith(base) for name in self._stored_names)
        refused = []
        for name, target in unclaimed.items():
            if any(pattern.search(name) or pattern.search(target) for pattern in ignored) or CONSTANTS.search(target):
                continue
            if target in buffers or base + target in buffers or target.startswith(PRETRAINING_HEADS):
                continue
            if not has_pooler and target.removeprefix(base).startswith("pooler."):
                continue
            if drop_heads and not bare and not target.startswith(base):
                continue
            refused.append(self._stored_names[name])
        if refused:
            raise ModelLoadError(
                f"{self._directory} holds {_some(refused)}, which {type(self._model).__name__} does not compute with",
                remedy="check that config.json matches the weights; set model.head=fresh to start a run without the head of a checkpoint",
            )

    def _head_rows(self, wanted: str | None) -> tuple[int, str] | None:
        # Row of the stored head at which the model's begins, and the name of the layer; None: the head starts anew.
        layer = output_layer(self._model)
        weight = self._views.get(f"{layer}.weight")
        if f"{layer}.weight" in self._fresh or (weight is None and wanted is None):
            return None
        names = cast(dict[int, str], self._model.config.id2label)
        outputs = tuple(names[index] for index in sorted(names))
        stored = Contract.load(self._directory).outputs if (self._directory / CONTRACT_FILE).is_file() else None
        if wanted is not None:
            if stored is None or weight is None or wanted not in stored or len(outputs) != 1:
                raise ModelLoadError(
                    f"model.head_output is {wanted!r}; the outputs of {self._directory} are {', '.join(stored or ()) or 'not known'}, "
                    f"those of the run {', '.join(outputs)}",
                    remedy="name an output of an exported model, for a run with one output",
                )
            return stored.index(wanted), cast(str, layer)
        num_rows = cast(View, weight).shape[0]
        if (stored is not None and stored != outputs) or num_rows != len(outputs):
            raise ModelLoadError(
                f"the head of {self._directory} has the outputs {', '.join(stored or (f'({num_rows} without names)',))}; "
                f"the run has {', '.join(outputs)}",
                remedy="set model.head=fresh to start the head anew, or model.head_output to start from one output of an exported model",
            )
        return 0, cast(str, layer)

    def _fitted(self, name: str, view: View) -> View:
        shape = self._shapes[name]
        if self._rows is not None and name in (f"{self._rows[1]}.weight", f"{self._rows[1]}.bias"):
            row = self._rows[0]
            view = Part(view, 0, row, row + shape[0]) if view.shape[0] != shape[0] else view
        grown = len(shape) == 2 and view.shape[1:] == shape[1:] and view.shape[0] < shape[0]
        if grown and name in (self._embedding_name(), LANGUAGE_HEAD):
            # A vocabulary grown by a pad token: the new rows are zero.
            return Joined((view, Zeros((shape[0] - view.shape[0], *shape[1:]))), 0)
        if view.shape != shape:
            keys = _some([self._stored_names[source] for source in self._sources[name]])
            remedy = "check that config.json matches the weights"
            raise ModelLoadError(
                f"{keys} in {self._directory} has shape {view.shape}, the model needs {shape}",
                remedy=f"{remedy}, or set model.head=fresh to start the head anew" if self._is_head(name) else remedy,
            )
        return view

    def _embedding_name(self) -> str | None:
        embedding = self._model.get_input_embeddings().weight
        return next((name for name, parameter in self._model.named_parameters() if parameter is embedding), None)

    def _is_head(self, name: str) -> bool:
        return not name.startswith(f"{self._model.base_model_prefix}.") and name != LANGUAGE_HEAD

    def _is_pooler(self, name: str) -> bool:
        return name.startswith(f"{self._model.base_model_prefix}.pooler.")

    def _notes(self) -> Iterable[str]:
        buffers = persistent_buffers(self._model)
        anew = sorted(self._fresh - buffers.keys())
        if anew:
            yield f"started anew: {', '.join(anew)}"
        if kept := sorted(self._fresh & buffers.keys()):
            yield f"{_some(kept)} are not stored and keep the values that the model is built with"


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and persistent buffers, also of those that ZeRO-3 has partitioned."""
    return {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in model.state_dict(keep_vars=True).items()}


def output_layer(model: PreTrainedModel) -> str | None:
    """Name of the linear layer that gives the outputs: the last one outside the backbone of that width."""
    base, width = f"{model.base_model_prefix}.", model.config.num_labels
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == width and not f"{name}.".startswith((base, "lm_head."))
    ]
    return found[-1] if found else None


def weight_source(model: PreTrainedModel, config: ModelConfig, *, seed: int, announce: bool = False) -> WeightSource:
    """Pretrained weights when `model.path` is set, else seeded random ones; everything is checked here, and nothing read yet.

    Args:
        announce: log what starts anew (one process of a run does).

    Raises:
        ModelLoadError: the directory does not fit the model.
    """
    random = RandomInit(model, seed=seed)
    if config.path is None:
        return random
    checkpoint = Checkpoint.open(resolve_model_dir(config.path, config.revision))
    source = SafetensorsSource(checkpoint, model, fallback=random, head=config.head, head_output=config.head_output)
    if announce:
        _announce(source, checkpoint.directory)
    return source


def scoring_source(model: PreTrainedModel, checkpoint: Checkpoint) -> WeightSource:
    """The weights of a trained reward model: nothing may be missing.

    Raises:
        ModelLoadError: the directory does not fit the model.
    """
    source = SafetensorsSource(checkpoint, model, fallback=RandomInit(model, seed=0), head=None)
    _announce(source, checkpoint.directory)
    return source


def _announce(source: SafetensorsSource, directory: Path) -> None:
    for note in source.notes:
        logger.warning("%s: %s", directory, note)


@torch.no_grad()
def fill(model: PreTrainedModel, source: WeightSource) -> None:
    """Give a model that is whole in this process its values, a piece at a time."""
    for name, tensor in chain(model.named_parameters(), persistent_buffers(model).items()):
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), FILL_ELEMENTS):
            stop = min(start + FILL_ELEMENTS, flat.numel())
            flat[start:stop].copy_(source.read(name, tuple(tensor.shape), start, stop))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
