"""Weights in: every rank reads just its own slice of every parameter, from wherever the weights are.

A `WeightSource` answers "elements start..stop of this parameter, flattened". Pretrained safetensors, seeded random
initialisation and training checkpoints (`training/checkpoint.py`) are such sources, so a model is never materialised
anywhere but in its partitions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rayward.config.model import ModelConfig
from rayward.contract.contract import CONTRACT_FILE, Contract
from rayward.errors import ModelLoadError
from rayward.schema import digest

HEAD_PREFIX = "score."
LANGUAGE_HEAD = "lm_head.weight"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
INIT_CHUNK = 1 << 20


class WeightSource(Protocol):
    """Where parameter values come from."""

    def read(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`, fp32."""
        ...


class RandomInit:
    """Seeded initial values that do not depend on the number of ranks: each chunk has its own generator.

    Matrices are normal with `initializer_range`, the head with 1 / (hidden + 1) (small first rewards, loss near log 2), biases
    zero, norm weights one (zero where the layer computes 1 + weight). Persistent buffers keep the values that the model was built with.
    """

    def __init__(self, model: PreTrainedModel, *, seed: int) -> None:
        self._seed = seed
        self._buffers = persistent_buffers(model)
        self._std = float(getattr(model.config, "initializer_range", 0.02))
        self._zero_centred = {
            f"{name}.weight" for name, module in model.named_modules() if "1P" in type(module).__name__ or "GemmaRMSNorm" in _bases(module)
        }

    def read(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name in self._buffers:
            return self._buffers[name].reshape(-1)[start:stop].float()
        if len(shape) < 2:
            constant = 0.0 if name.endswith("bias") or name in self._zero_centred else 1.0
            return torch.full((stop - start,), constant)
        std = 1.0 / (shape[-1] + 1) if name.startswith(HEAD_PREFIX) else self._std
        pieces = []
        for chunk in range(start // INIT_CHUNK, (max(stop, start + 1) - 1) // INIT_CHUNK + 1):
            generator = torch.Generator().manual_seed(int(digest([self._seed, name, chunk])[:15], 16))
            values = torch.empty(INIT_CHUNK).normal_(0.0, std, generator=generator)
            offset = chunk * INIT_CHUNK
            pieces.append(values[max(start - offset, 0) : max(min(stop - offset, INIT_CHUNK), 0)])
        return torch.cat(pieces)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of a model's state, by name."""
    state = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in state}


def _bases(module: nn.Module) -> str:
    return " ".join(cls.__name__.replace("Gemma2", "Gemma").replace("Gemma3", "Gemma") for cls in type(module).__mro__)


class SafetensorsSource:
    """Slices of a pretrained checkpoint; a fresh head comes from `fallback`.

    Args:
        base_prefix: name of the backbone inside the model (`model`, `transformer`, …), which checkpoints may leave out.
        head_row: row of the stored head at which the model's head begins; None: a fresh head.
        embedding: parameter name of the input embedding, which may have more rows than the checkpoint (a vocabulary grown by a pad token;
            the new rows are zero), as may the language-model head.

    Raises:
        ModelLoadError: no safetensors files, or a backbone parameter is missing or of another shape.
    """

    def __init__(
        self, directory: Path, *, base_prefix: str, fallback: WeightSource, embedding: str | None = None, head_row: int | None = None
    ) -> None:
        self._base = f"{base_prefix}."
        self._embedding = embedding
        self._fallback = fallback
        self._head_row = head_row
        self._directory = directory
        self._file_of = weight_map(directory)
        self._open: dict[str, Any] = {}

    def read(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name.startswith(HEAD_PREFIX) and (self._head_row is None or name not in self._file_of):
            return self._fallback.read(name, shape, start, stop)
        key = next((k for k in (name, name.removeprefix(self._base), self._base + name) if k in self._file_of), None)
        if key is None:
            raise ModelLoadError(
                f"{self._directory} has no tensor for parameter {name}",
                remedy="use a checkpoint of the architecture that its config.json names, saved by a current Transformers",
            )
        view = self._slice(key)
        stored = tuple(view.get_shape())
        if name.startswith(HEAD_PREFIX):
            assert self._head_row is not None
            skipped = self._head_row * math.prod(shape[1:])
            return _flat_slice(view, stored, start + skipped, stop + skipped)
        grown = len(shape) == 2 and stored[1:] == shape[1:] and stored[0] < shape[0] and name in (self._embedding, LANGUAGE_HEAD)
        if stored != shape and not grown:
            raise ModelLoadError(
                f"{key} in {self._directory} has shape {stored}, the model needs {shape}",
                remedy="check that config.json matches the weights",
            )
        return _flat_slice(view, stored, start, stop)

    def _slice(self, key: str) -> Any:
        name = self._file_of[key]
        if name not in self._open:
            self._open[name] = safe_open(self._directory / name, framework="pt")
        return self._open[name].get_slice(key)


def weight_map(directory: Path) -> dict[str, str]:
    """File of every tensor of a checkpoint, by its index or from its single file.

    Raises:
        ModelLoadError: there are no safetensors, or they cannot be read.
    """
    index = directory / INDEX_FILE
    try:
        if index.is_file():
            return cast(dict[str, str], json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if (directory / SINGLE_FILE).is_file():
            with safe_open(directory / SINGLE_FILE, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE_FILE)
    except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as exc:
        raise ModelLoadError(f"the weights in {directory} cannot be read: {exc}", remedy="download or save the model again") from exc
    raise ModelLoadError(
        f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}", remedy="convert the weights to safetensors (save_pretrained does)"
    )


def _flat_slice(view: Any, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    # Elements [start, stop) of the flattened tensor, reading only the rows that hold them; missing rows (a vocabulary
    # grown by a pad token) are zero.
    if not shape:
        return cast(Tensor, view[...]).float().reshape(1)[start:stop]
    row = 1
    for size in shape[1:]:
        row *= size
    first, last = start // row, min(-(-stop // row), shape[0])
    values = view[first:last].float().reshape(-1) if last > first else torch.zeros(0)
    values = values[start - first * row : stop - first * row]
    missing = stop - start - values.numel()
    return torch.cat([values, torch.zeros(missing)]) if missing > 0 else values


def weight_source(model: PreTrainedModel, config: ModelConfig, *, seed: int) -> WeightSource:
    """Pretrained weights when `model.path` is set, else seeded random ones."""
    random = RandomInit(model, seed=seed)
    if config.path is None:
        return random
    embedding = model.get_input_embeddings().weight
    directory = resolve_model_dir(config.path, config.revision)
    names = cast(dict[int, str], model.config.id2label)
    return SafetensorsSource(
        directory,
        head_row=head_row(directory, config, tuple(names[index] for index in sorted(names))),
        base_prefix=model.base_model_prefix,
        fallback=random,
        embedding=next((name for name, parameter in model.named_parameters() if parameter is embedding), None),
    )


def check_language_head(directory: Path, config: PretrainedConfig) -> None:
    """Check that a checkpoint brings the language-model head that a run keeps.

    Raises:
        ModelLoadError: it has none, or one with a bias.
    """
    file_of = weight_map(directory)
    if "lm_head.bias" in file_of:
        raise ModelLoadError(
            f"the language-model head of {directory} has a bias, which is not computed here", remedy="use another architecture"
        )
    if LANGUAGE_HEAD not in file_of and not is_tied(config):
        raise ModelLoadError(
            f"{directory} has no {LANGUAGE_HEAD}; a language-model loss and critiques need the head of a language model",
            remedy="start from a causal language model, or from an export that was trained with objective.language_coefficient above 0",
        )


def is_tied(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def head_row(directory: Path, config: ModelConfig, outputs: tuple[str, ...]) -> int | None:
    """Row of the stored head at which a head with these outputs begins; None when it is to start anew.

    Raises:
        ModelLoadError: the stored head has other outputs than the run, or not the one that `model.head_output` names.
    """
    file_of = weight_map(directory)
    name = f"{HEAD_PREFIX}weight"
    if config.head == "fresh" or (name not in file_of and config.head_output is None):
        return None
    stored = Contract.load(directory).outputs if (directory / CONTRACT_FILE).is_file() else None
    if config.head_output is not None:
        if stored is None or config.head_output not in stored or len(outputs) != 1:
            raise ModelLoadError(
                f"model.head_output is {config.head_output!r}; the outputs of {directory} are {', '.join(stored or ()) or 'not known'}, "
                f"those of the run {', '.join(outputs)}",
                remedy="name an output of an exported model, for a run with one output",
            )
        return stored.index(config.head_output)
    with safe_open(directory / file_of[name], framework="pt") as file:
        num_rows = file.get_slice(name).get_shape()[0]
    if (stored is not None and stored != outputs) or num_rows != len(outputs):
        raise ModelLoadError(
            f"the head of {directory} has the outputs {', '.join(stored or (f'({num_rows} without names)',))}; "
            f"the run has {', '.join(outputs)}",
            remedy="set model.head=fresh to start the head anew, or model.head_output to start from one output of an exported model",
        )
    return 0


def head_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the head's tensors (names with `score.`), as fp32 bytes."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(HEAD_PREFIX):
            state.update(name.encode())
            state.update(tensors[name].detach().float().contiguous().cpu().numpy().tobytes())
    return state.hexdigest()


def resolve_model_dir(path: str, revision: str | None) -> Path:
    """A local directory as it is; a hub name downloaded into the hub cache (configuration, tokenizer and safetensors).

    Raises:
        ModelLoadError: neither works.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise ModelLoadError(
            f"model {path!r} is neither a local directory nor a hub model that can be downloaded: {exc}",
            remedy="check model.path, or download the model first and give its directory",
        ) from exc
