"""`rayward import`: any reward model that the loader reads, as an export with a contract whose golden scores are the source's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from rayward.artifacts.writer import new_model
from rayward.config.placement import Placement
from rayward.contract.contract import CONTRACT_FILE, Contract, TemplatedText, UnshownText
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer
from rayward.errors import ConfigError
from rayward.evaluation.card import write_model_card
from rayward.model.build import load_reward_model, read_hf_config
from rayward.model.capabilities import context_length, position_limit
from rayward.model.reward_model import RewardModel
from rayward.model.weights import Checkpoint, resolve_model_dir
from rayward.scoring.scorer import FOREIGN_MAX_TOKENS, Scorer
from rayward.scoring.verify import pick_device, read_config
from rayward.workflows.console import console

ORIGIN_FILE = "import.json"
DTYPES = ("float32", "bfloat16", "float16")


def import_model(
    source: Path,
    output: Path,
    *,
    max_tokens: int | None = None,
    outputs: tuple[str, ...] = (),
    weights: tuple[float, ...] = (),
    templated_text: TemplatedText = "refuse",
    unshown_text: UnshownText = "refuse",
    placement: Placement = Placement(),
) -> Contract:
    """Write a checkpoint of others as an export: the contract derives from its tokenizer, the golden scores from its own forward.

    Args:
        source: directory, or a name on the hub.
        output: a directory that does not exist yet.
        max_tokens: longest conversation; None: the smaller of 4,096 and the model's context.
        outputs: names of the head's outputs; needed where there are several.
        weights: of the outputs in the reward; needed where there are several.
        templated_text, unshown_text: rules of the contract.

    Raises:
        ConfigError: `output` exists, `source` is an export already, outputs and weights do not fit the head, or `max_tokens` the model.
        ContractError: there is no usable tokenizer.
        ContractMismatchError: what was written does not score as the source does.
        ModelLoadError: the checkpoint cannot be loaded.
    """
    name = source.name
    source = resolve_model_dir(str(source), None)
    if (source / CONTRACT_FILE).is_file():
        raise ConfigError(f"{source} has a contract already", remedy="use it as it is")
    with new_model(output, replace=False) as writer:
        config, tokenizer = read_config(source), load_tokenizer(str(source))
        dtype = _dtype(config)
        limit = _limit(max_tokens, context_length(read_hf_config(source)))
        model = load_reward_model(source, device=pick_device(placement.device), dtype=getattr(torch, dtype), max_tokens=limit)
        limit = min(limit, _limit(max_tokens, position_limit(model.model)))
        rules = Contract.from_tokenizer(tokenizer, max_tokens=limit, templated_text=templated_text, unshown_text=unshown_text)
        rules = rules.model_copy(update={"dtype": dtype})
        contract = _for_head(rules, int(model.model.config.num_labels or 0), outputs, weights)
        scorer = Scorer(model, Encoder(contract, tokenizer), model_id=source.name, version="", tokens_per_batch=placement.tokens_per_batch)
        contract = contract.model_copy(update={"golden": scorer.golden_scores()})
        for note in Checkpoint.open(source).notes:
            console.print(f"note: {note}")
        writer.write_tokenizer(tokenizer, contract)
        writer.write_weights(_tensors(model, len(tokenizer)))
        hf_config = model.model.config
        hf_config.id2label = dict(enumerate(contract.outputs))
        hf_config.label2id = {name: index for index, name in enumerate(contract.outputs)}
        hf_config.problem_type = "regression"
        if hasattr(model.model, "score") or hf_config.pad_token_id is None:
            # Where the pooled position is looked for; an encoder counts its positions by it and keeps its own.
            hf_config.pad_token_id = contract.pad_token_id
        hf_config.vocab_size = _rows(model, len(tokenizer))
        writer.write_config(hf_config, contract)
        writer.write_json(ORIGIN_FILE, {"imported": name})
        del model, scorer
        contract = writer.finish(contract, rescore=False)
        described = {"objective": {"type": "imported"}, "run": {"name": output.name}}
        write_model_card(writer.directory, contract=contract, config_json=json.dumps(described), manifest=None, evaluation=None)
    return contract


def _limit(max_tokens: int | None, room: int | None) -> int:
    if max_tokens is None:
        return min(FOREIGN_MAX_TOKENS, room or FOREIGN_MAX_TOKENS)
    if max_tokens < 1 or (room is not None and max_tokens > room):
        raise ConfigError(
            f"--max-tokens is {max_tokens}; the rule is 1 to the model's context length ({room or 'not stated'})",
            remedy=f"give at most {room or FOREIGN_MAX_TOKENS}",
        )
    return max_tokens


def _dtype(config: dict[str, object]) -> str:
    # What the weights are stored in, by their own word: their values do not change.
    stated = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return stated if stated in DTYPES else "float32"


def _for_head(contract: Contract, num_outputs: int, outputs: tuple[str, ...], weights: tuple[float, ...]) -> Contract:
    names = outputs or (("reward",) if num_outputs == 1 else ())
    shares = weights or ((1.0,) if num_outputs == 1 else ())
    if len(names) != num_outputs or len(shares) != num_outputs or len(set(names)) != num_outputs:
        raise ConfigError(
            f"the model has {num_outputs} outputs, and {len(names)} names and {len(shares)} weights are given; the rule is one "
            "different name and one weight for each",
            remedy="for example --outputs helpfulness,correctness --weights 0.5,0.5",
        )
    return contract.for_head(names, shares)


def _rows(model: RewardModel, num_tokens: int) -> int:
    return max(len(cast(Tensor, model.model.get_input_embeddings().weight)), num_tokens)


def _tensors(model: RewardModel, num_tokens: int) -> Iterator[tuple[str, Tensor]]:
    # The embedding grows by rows of zeros for a pad token that the contract added, as it does when a run starts from pretrained weights.
    embedding = cast(Tensor, model.model.get_input_embeddings().weight)
    written: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.model.state_dict().items():
        if (tensor.data_ptr(), tensor.shape) in written and tensor.numel():
            continue  # tied to one that is written: Transformers ties it again
        written.add((tensor.data_ptr(), tensor.shape))
        values = tensor.detach().cpu()
        if tensor.data_ptr() == embedding.data_ptr() and num_tokens > len(values):
            values = torch.cat([values, values.new_zeros(num_tokens - len(values), values.shape[1])])
        yield name, values
