"""`rayward import-armo`: a published mixture-of-objectives checkpoint as an export."""

from __future__ import annotations

import json
from pathlib import Path

from rayward.contract.contract import Contract
from rayward.errors import ModelLoadError
from rayward.workflows.mixture import OTHER_HEADS, write_mixture


def import_armo(source: Path, output: Path, *, attributes: tuple[str, ...], gate_ids: tuple[int, ...], max_tokens: int) -> Contract:
    """A checkpoint in the published layout (regression_layer, reward_transform_matrix, gating) as an export of ours.

    The backbone must be of a type that Transformers builds for sequence classification. The layout's published scores on this
    code are not verified: the published weights could not be had.

    Args:
        gate_ids: token ids of the assistant's header; the gate reads where they begin last (Llama 3: 128009, 128006, 78191, 128007, 271).

    Raises:
        ModelLoadError: a tensor of the layout is missing.
    """
    from rayward.artifacts.tensors import TensorFiles
    from rayward.contract.tokenizer import load_tokenizer
    from rayward.model.gate import Gating

    with TensorFiles(source) as files:
        needed = {"regression_layer.weight", "gating.logit_scale"} - set(files.names)
        if needed:
            raise ModelLoadError(f"{source} lacks {', '.join(sorted(needed))}", remedy="give a checkpoint in ArmoRM's layout")
        extra = {name: files.read(name) for name in files.names if name.startswith(OTHER_HEADS)}
    contract = Contract.from_tokenizer(load_tokenizer(str(source)), max_tokens=max_tokens)
    gate = Gating.from_tensors({name: value for name, value in extra.items() if not name.startswith("regression_layer.")})
    return write_mixture(
        source, output, extra["regression_layer.weight"], gate, contract, attributes, gate_ids=gate_ids,
        report={"imported": source.name, "attributes": list(attributes)}, settings=json.dumps({"imported": source.name}),
    )  # fmt: skip
