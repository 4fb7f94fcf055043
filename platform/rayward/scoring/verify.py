"""What lies in a model's directory: checked against its contract, and read. No Ray."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rayward.cluster import gpu_reserved
from rayward.config.placement import Device
from rayward.contract.contract import Contract, verify_files
from rayward.errors import ContractError, ContractMismatchError, ModelLoadError
from rayward.model.weights import HEAD_PREFIX, head_sha256


def verify_artifacts(contract: Contract, directory: Path) -> None:
    """Check files and head against the contract.

    Raises:
        ContractMismatchError: saying which part was changed.
    """
    try:
        verify_files(contract, directory)
    except ContractMismatchError as exc:
        # The head lives in a weights file; name it when it is what was changed.
        if exc.problem.startswith("weights") and _head_differs(contract, directory):
            raise mismatch(f"head: {exc.problem.removeprefix('weights: ')}, and its head is another one") from exc
        raise
    if _head_differs(contract, directory):
        raise mismatch(f"head: its tensors in {directory} are not those that the contract was written for")


def is_intact(contract: Contract, directory: Path) -> bool:
    """Whether weights and all other files are those that the contract was written for."""
    try:
        verify_files(contract, directory)
    except ContractMismatchError:
        return False
    return all(path.name in contract.files for path in directory.glob("*.safetensors"))


def _head_differs(contract: Contract, directory: Path) -> bool:
    stored = _stored_head_sha256(directory)
    return None not in (stored, contract.head_sha256) and stored != contract.head_sha256


def _stored_head_sha256(directory: Path) -> str | None:
    # From the files, not from the loaded model: loading may cast. None when a file is damaged.
    head: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                head |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(HEAD_PREFIX)}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return head_sha256(head)


def mismatch(problem: str) -> ContractMismatchError:
    """The error that something is not the contract's."""
    return ContractMismatchError(problem, remedy="restore the exported files, or export the model again")


def pick_device(device: Device) -> torch.device:
    """The device that a setting means: in a Ray task or actor, CUDA only where a GPU is reserved for it.

    Raises:
        ModelLoadError: CUDA is asked for and not there, or not reserved.
    """
    if device == "cpu":
        return torch.device("cpu")
    unreserved = gpu_reserved() is False
    # The only place that asks: everywhere else the device is what was given.
    if not unreserved and torch.cuda.is_available():
        return torch.device("cuda")
    if device == "cuda":
        problem = "Ray reserved no GPU for this process" if unreserved else "torch sees no GPU"
        raise ModelLoadError(
            f"device is cuda and {problem}", remedy="use device: cpu, or reserve a GPU (gpus_per_scorer, gpus_per_writer, gpus_per_replica)"
        )
    return torch.device("cpu")


def torch_dtype(name: str) -> torch.dtype:
    """The parameter type that a contract names.

    Raises:
        ContractError: it is none.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ContractError(f"contract dtype {name!r} is not one of {', '.join(dtypes)}", remedy="export the model again")
    return dtypes[name]


def read_config(directory: Path) -> dict[str, object]:
    """`config.json` of a Transformers model.

    Raises:
        ModelLoadError: it cannot be read.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelLoadError(f"{directory}/config.json cannot be read ({exc})", remedy="point at a Transformers model directory") from exc
    if not isinstance(config, dict):
        raise ModelLoadError(f"{directory}/config.json is not a JSON object", remedy="download the model again")
    return config
