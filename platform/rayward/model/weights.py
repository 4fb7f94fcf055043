"""Weights in: every rank reads just its own slice of every parameter, from wherever the weights are.

A `WeightSource` answers "elements start..stop of this parameter, flattened". Pretrained safetensors, seeded random
initialisation and training checkpoints (`training/checkpoint.py`) are such sources, so a model is never materialised
anywhere but in its partitions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rayward.errors import ModelLoadError
from rayward.model.bounds import refuse_absurd_counts
from rayward.model.views import Stored, View
from rayward.schema import digest

HEAD_PREFIX = "score."
LANGUAGE_HEAD = "lm_head.weight"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
VALUE_HEAD_FILE = "value_head.safetensors"
OTHER_WEIGHTS = ("pytorch_model*.bin", "consolidated*.pt*", "tf_model.h5", "flax_model.msgpack")
INIT_CHUNK = 1 << 20
WRAPPERS = ("module.", "base_model.model.", "pretrained_model.")
"""What training frameworks put before the names of a model that they wrapped: DDP and DeepSpeed, PEFT, TRL."""
WRAPPERS_INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and activation checkpointing put anywhere into them."""
VALUE_HEADS = ("v_head.summary.", "v_head.", "value_head.")
"""Names of a reward head in other frameworks (TRL and LLaMA-Factory, InternLM, OpenRLHF), here called `score`."""


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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a model directory, by the names that they have without the wrappers of training frameworks.

    Attributes:
        views: the tensors; nothing is read yet.
        stored_names: their names in the files.
        notes: what was understood that is not said by the names themselves.
    """

    directory: Path
    views: dict[str, View]
    stored_names: dict[str, str]
    notes: tuple[str, ...]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Check the files of a directory (all of them, by their headers and sizes) and list their tensors.

        Raises:
            ModelLoadError: the files are missing, damaged or ambiguous, or hold something that is not computed here.
        """
        config = raw_config(directory)
        _refuse_what_is_not_computed(directory, config)
        tensors = [(key, file, shape) for key, (file, shape) in read_headers(directory).items()]
        if (directory / VALUE_HEAD_FILE).is_file():
            tensors += [(key, VALUE_HEAD_FILE, shape) for key, shape in _header(directory, VALUE_HEAD_FILE).items()]
        refuse_absurd_counts(directory, config, len(tensors))
        prefixes = (*VALUE_HEADS, *([f"{prefix}."] if (prefix := config.get("value_head_prefix")) else []))
        opened: dict[str, Any] = {}

        def slice_of(file: str, key: str) -> Any:
            if file not in opened:
                opened[file] = safe_open(directory / file, framework="pt")
            return opened[file].get_slice(key)

        names = {key: _plain_name(key, prefixes) for key, _, _ in tensors}
        notes = [*_notes(names)]
        if isinstance(config.get("text_config"), dict):
            names, left_out = _text_names(names)
            notes += [f"the text model is used alone, without {', '.join(left_out)}"] if left_out else []
        notes += _not_read(directory)
        checkpoint = cls(directory, {}, {}, tuple(notes))
        for key, file, shape in tensors:
            if key not in names:
                continue
            name = names[key]
            if name in checkpoint.views:
                raise ModelLoadError(
                    f"{checkpoint.stored_names[name]} and {key} in {directory} are both the tensor {name}",
                    remedy="remove the one that is not meant",
                )
            checkpoint.views[name] = Stored(shape, partial(slice_of, file, key))
            checkpoint.stored_names[name] = key
        return checkpoint


def _plain_name(key: str, value_heads: tuple[str, ...]) -> str:
    for wrapper in WRAPPERS_INSIDE:
        key = key.replace(wrapper, "")
    while (prefix := next((p for p in WRAPPERS if key.startswith(p)), None)) is not None:
        key = key.removeprefix(prefix)
    prefix = next((p for p in value_heads if key.startswith(p)), None)
    return key if prefix is None else HEAD_PREFIX + key.removeprefix(prefix)


def _text_names(names: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    # Of a model of several modalities: the names that its text model has by itself, and the parts that are left out.
    inside = re.compile(r"(model\.)?language_model\.(model\.)?")
    nested = any(inside.match(name) for name in names.values())
    kept, left_out = {}, set()
    for key, name in names.items():
        if found := inside.match(name):
            rest = name[found.end() :]
            kept[key] = rest if rest.startswith("lm_head.") else f"model.{rest}"
        elif name.startswith(("lm_head.", HEAD_PREFIX)) or not (nested or name.startswith(("visual.", "model.visual."))):
            kept[key] = name
        else:
            left_out.add(name.removeprefix("model.").split(".", maxsplit=1)[0])
    return kept, sorted(left_out)


def _notes(renamed: Mapping[str, str]) -> Iterator[str]:
    heads = sorted(key for key, name in renamed.items() if name.startswith(HEAD_PREFIX) and not key.endswith(name))
    if heads:
        yield f"the reward head is {', '.join(heads)}"
    wrappers = [p for p in (*WRAPPERS, *WRAPPERS_INSIDE) if any(p in key for key, name in renamed.items() if key != name)]
    if wrappers:
        yield f"the names are read without {', '.join(wrappers)}"


def _not_read(directory: Path) -> list[str]:
    names = sorted(path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern))
    return [f"{', '.join(names[:4])} is not read: the weights are those in safetensors"] if names else []


def raw_config(directory: Path) -> dict[str, Any]:
    """`config.json` as it stands; empty where there is none.

    Raises:
        ModelLoadError: it is no JSON.
    """
    path = directory / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelLoadError(f"{path} cannot be read: {exc}", remedy="download or save the model again") from exc
    return config if isinstance(config, dict) else {}


def _refuse_what_is_not_computed(directory: Path, config: Mapping[str, Any]) -> None:
    # Ignored in silence, each of these would make another model of the directory.
    if (directory / "adapter_config.json").is_file():
        raise ModelLoadError(
            f"{directory} holds an adapter (adapter_config.json), which is not applied here",
            remedy="merge it into its base model (PEFT: merge_and_unload, then save_pretrained) and name that directory; "
            "or remove adapter_config.json to use the base weights alone",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "a method without a name")
        raise ModelLoadError(
            f"the weights of {directory} are quantised ({method})", remedy="use the weights in bfloat16, or dequantise and save them first"
        )
    if config.get("normalize_reward"):
        raise ModelLoadError(
            f"{directory}/config.json asks for rewards with mean {config.get('mean')} and standard deviation {config.get('std')} taken out "
            "(normalize_reward), which is not computed here",
            remedy="set normalize_reward to false in config.json to use the raw rewards; `rayward normalise` can scale those of an export",
        )
    if (directory / "value_head.bin").is_file() and not (directory / VALUE_HEAD_FILE).is_file():
        raise ModelLoadError(
            f"{directory} keeps its reward head in value_head.bin; only safetensors are read",
            remedy=f"save its tensors as {VALUE_HEAD_FILE} (safetensors.torch.save_file)",
        )


def weight_map(directory: Path) -> dict[str, str]:
    """File of every tensor of a checkpoint; `read_headers` says what is checked."""
    return {key: file for key, (file, _) in read_headers(directory).items()}


def read_headers(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """File and shape of every stored tensor, by the index or from the single file; every file is checked.

    Raises:
        ModelLoadError: there are no safetensors, both an index and a single file that is no part of it, a file that is missing or
            damaged, or a tensor that the index names and its file does not have.
    """
    index = directory / INDEX_FILE
    single = (directory / SINGLE_FILE).is_file()
    if not index.is_file() and not single:
        raise _no_safetensors(directory)
    placed: dict[str, str] = {}
    if index.is_file():
        try:
            placed = {str(key): str(file) for key, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ModelLoadError(f"the weights in {directory} cannot be read: {exc!r}", remedy="download or save the model again") from exc
        if single and SINGLE_FILE not in placed.values():
            raise ModelLoadError(
                f"{directory} holds two models: {INDEX_FILE} with its files, and {SINGLE_FILE}, which is none of them",
                remedy="remove the one that is stale",
            )
    files = sorted(set(placed.values())) or [SINGLE_FILE]
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise ModelLoadError(
            f"{directory} lacks {', '.join(missing[:4])} ({len(missing)} of the {len(files)} files that {INDEX_FILE} names)",
            remedy="download the missing files, or save the model again",
        )
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        for key, shape in _header(directory, file).items():
            if placed.get(key, file) == file:
                found[key] = (file, shape)
    lost = sorted(placed.keys() - found.keys())
    if lost:
        raise ModelLoadError(
            f"{placed[lost[0]]} in {directory} does not hold {lost[0]}, which {INDEX_FILE} says it does",
            remedy="download or save the model again",
        )
    return found


def _header(directory: Path, file: str) -> dict[str, tuple[int, ...]]:
    # The library compares the header with the size of the file, so that a truncated one is found here.
    try:
        with safe_open(directory / file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise ModelLoadError(
            f"the weights in {directory} cannot be read: {file}: {exc}", remedy="download or save the model again"
        ) from exc


def _no_safetensors(directory: Path) -> ModelLoadError:
    others = (
        sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth") and p.is_file()) if directory.is_dir() else []
    )
    kept = f"; its weights are in {', '.join(others[:4])}" if others else ""
    return ModelLoadError(
        f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE}{kept}; only safetensors are read",
        remedy="convert the weights to safetensors: load them with Transformers and save_pretrained them to another directory",
    )


def check_language_head(directory: Path, config: PretrainedConfig) -> None:
    """Check that a checkpoint brings the language-model head that a run keeps.

    Raises:
        ModelLoadError: it has none, or one with a bias.
    """
    names = Checkpoint.open(directory).views
    if "lm_head.bias" in names:
        raise ModelLoadError(
            f"the language-model head of {directory} has a bias, which is not computed here", remedy="use another architecture"
        )
    if LANGUAGE_HEAD not in names and not is_tied(config):
        raise ModelLoadError(
            f"{directory} has no {LANGUAGE_HEAD}; a language-model loss and critiques need the head of a language model",
            remedy="start from a causal language model, or from an export that was trained with objective.language_coefficient above 0",
        )


def is_tied(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


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
