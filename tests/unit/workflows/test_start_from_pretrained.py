"""A run from a model directory: everything is checked on the driver, and the export scores as the run ended."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.jobs import make_config, make_job, make_prepared, run_session
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from rayward.config.run import Config
from rayward.errors import ModelLoadError
from rayward.model.weights import SINGLE_FILE
from rayward.scoring.scorer import Scorer
from rayward.training.checkpoints.store import choose_checkpoint
from rayward.training.trainer import resolve_job
from rayward.workflows.export import export

_SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **_SIZES, "moe_intermediate_size": 24, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2,
}  # fmt: skip


def config_from(directory: Path, tmp_path: Path, tokenizer: str, **model: Any) -> Config:
    config = make_config(tmp_path / "runs", tokenizer)
    settings = {"path": str(directory), "architecture": None, **model}
    return config.model_copy(update={"model": config.model.model_copy(update=settings)})


def language_model(directory: Path, model_type: str = "llama", **values: Any) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_SIZES, **values})).save_pretrained(directory)


def test_a_damaged_shard_is_found_before_any_worker_starts(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "prepared")
    language_model(tmp_path / "model")
    config = config_from(tmp_path / "model", tmp_path, f"{prepared.directory}/tokenizer")
    resolve_job(config, prepared)
    file = tmp_path / "model" / SINGLE_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(ModelLoadError, match=f"cannot be read: {SINGLE_FILE}"):
        resolve_job(config, prepared)
    file.write_bytes(whole)
    tensors = {name: value.clone() for name, value in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(tensors, file)
    with pytest.raises(ModelLoadError, match=r"no tensor for parameter model\.layers\.1\.mlp"):
        resolve_job(config, prepared)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "bert", "llama"])
def test_the_driver_says_once_what_starts_anew(tmp_path: Path, model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    prepared = make_prepared(tmp_path / "prepared")
    if model_type == "bert":
        AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **_SIZES)).save_pretrained(tmp_path / "model")
    else:
        language_model(tmp_path / "model", model_type, **(DEEPSEEK if model_type == "deepseek_v3" else {}))
    config = config_from(tmp_path / "model", tmp_path, f"{prepared.directory}/tokenizer")
    config = config.model_copy(update={"training": config.training.model_copy(update={"tokens_per_microbatch": 4096})})
    with caplog.at_level(logging.WARNING):
        resolve_job(config, prepared)
    expected = "bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias" if model_type == "bert" else "started anew: score.weight"
    assert expected in caplog.text


def test_a_head_of_layers_is_not_replaced_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared = make_prepared(tmp_path / "prepared")
    language_model(tmp_path / "model")
    file = tmp_path / "model" / SINGLE_FILE
    head = {
        "score.0.weight": torch.ones(8, 32),
        "score.0.bias": torch.ones(8),
        "score.2.weight": torch.ones(1, 8),
        "score.2.bias": torch.ones(1),
    }
    save_file({name: value.clone() for name, value in load_file(file).items()} | head, file)
    config = config_from(tmp_path / "model", tmp_path, f"{prepared.directory}/tokenizer")
    with caplog.at_level(logging.WARNING):
        resolve_job(config, prepared)
        assert "started anew" not in caplog.text
        resolve_job(config_from(tmp_path / "model", tmp_path, f"{prepared.directory}/tokenizer", head="fresh"), prepared)
    assert "started anew: score.weight" in caplog.text


@pytest.mark.parametrize("kind", ["deepseek_v3", "bert", "layers", "bias"])
def test_what_was_started_from_is_trained_and_exported(tmp_path: Path, kind: str) -> None:
    prepared = make_prepared(tmp_path / "prepared")
    directory = tmp_path / "model"
    if kind == "bert":
        AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **_SIZES)).save_pretrained(directory)
    elif kind == "deepseek_v3":
        language_model(directory, kind, **DEEPSEEK)
    else:
        language_model(directory)
    file = directory / SINGLE_FILE
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    for name, value in tensors.items():
        if name.endswith("e_score_correction_bias"):
            value.copy_(torch.tensor([0.5, -0.25, 0.125, 1.0]))
    if kind == "layers":
        shapes = {"score.0.weight": (8, 32), "score.0.bias": (8,), "score.2.weight": (1, 8), "score.2.bias": (1,)}
        tensors |= {name: torch.randn(shape) for name, shape in shapes.items()}
    elif kind == "bias":
        tensors |= {"score.weight": torch.randn(1, 32), "score.bias": torch.tensor([1.5])}
    save_file(tensors, file, metadata={"format": "pt"})
    job = make_job(tmp_path / "runs", prepared)
    job = replace(job, config=config_from(directory, tmp_path, f"{prepared.directory}/tokenizer"))
    engine = run_session(job, prepared)
    export(job.config, prepared, choose_checkpoint(job.store, "last"), job.store, tmp_path / "export")
    scorer = Scorer.load(tmp_path / "export", verify=True)
    exported = scorer._model.model.state_dict()
    for name, value in engine.reward_model.model.state_dict().items():
        torch.testing.assert_close(exported[name].float(), value.float(), rtol=1e-6, atol=1e-6)
    before = [name for name, value in tensors.items() if name in exported and name.startswith("score.") and value.equal(exported[name])]
    assert not before, "the head was trained"
    buffers = [value for name, value in exported.items() if name.endswith("e_score_correction_bias")]
    assert [value.tolist() for value in buffers] == ([[0.5, -0.25, 0.125, 1.0]] if kind == "deepseek_v3" else [])
