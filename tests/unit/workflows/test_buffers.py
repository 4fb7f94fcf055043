"""Persistent buffers are state: checkpoints, resumed runs and exports carry them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.jobs import LLAMA, make_engine, make_job, make_prepared, run_session
from transformers import AutoModelForSequenceClassification

from rayward.errors import CheckpointError, StreamOrderError
from rayward.model.weights import RandomInit
from rayward.scoring.scorer import Scorer
from rayward.training.checkpoints.format import BUFFERS_FILE
from rayward.training.checkpoints.store import choose_checkpoint
from rayward.training.engines.build import initialize
from rayward.training.engines.torch import TorchEngine
from rayward.training.session import Job
from rayward.workflows.export import export

DEEPSEEK: dict[str, Any] = {
    **LLAMA, "model_type": "deepseek_v3", "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def make_biased_engine(job: Job) -> TorchEngine:
    """An engine whose expert bias came from a pretrained model."""
    engine = make_engine(job)
    engine.buffers()[BIAS].copy_(torch.tensor([0.5, -0.25, 0.125, 1.0]))
    return engine


def test_buffers_go_through_checkpoint_resume_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = make_prepared(tmp_path / "prepared")
    job = make_job(tmp_path, prepared, architecture=DEEPSEEK)
    with monkeypatch.context() as patched:
        patched.setattr("tests.helpers.jobs.make_engine", make_biased_engine)
        with pytest.raises(StreamOrderError):
            run_session(job, prepared, stop_after=4)
    stored = Path(choose_checkpoint(job.store, "last").directory, BUFFERS_FILE)
    assert list(load_file(stored)) == [BIAS]
    # The engine that goes on was never given the bias.
    engine = run_session(job, prepared)
    assert engine.buffers()[BIAS].tolist() == [0.5, -0.25, 0.125, 1.0]
    export(job.config, prepared, choose_checkpoint(job.store, "last"), job.store, tmp_path / "export")
    Scorer.load(tmp_path / "export", verify=True)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.state_dict()[BIAS].tolist() == [0.5, -0.25, 0.125, 1.0]


def test_buffers_are_hashed_and_a_checkpoint_without_them_still_loads(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "prepared")
    job = make_job(tmp_path, prepared, architecture=DEEPSEEK)
    run_session(job, prepared)
    last = job.store.committed()[0]
    stored = Path(last.directory, BUFFERS_FILE)
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    with pytest.raises(CheckpointError, match=BUFFERS_FILE):
        job.store.load(make_engine(job), last)
    earlier = job.store.committed()[0]
    commit = json.loads(Path(earlier.directory, "commit.json").read_text())
    del commit["files"][BUFFERS_FILE]
    Path(earlier.directory, "commit.json").write_text(json.dumps(commit))
    Path(earlier.directory, BUFFERS_FILE).unlink()
    engine = make_biased_engine(job)
    job.store.load(engine, job.store.committed()[0])
    assert engine.buffers()[BIAS].tolist() == [0.5, -0.25, 0.125, 1.0], "those that the model had"


def test_a_fresh_model_keeps_the_buffers_that_it_was_built_with(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "prepared")
    minimax = {**LLAMA, "model_type": "minimax", "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}
    engine = make_engine(make_job(tmp_path, prepared, architecture=minimax))
    built = {name: buffer.clone() for name, buffer in engine.buffers().items()}
    assert any(buffer.std() > 0 for buffer in built.values())
    initialize(engine, RandomInit(engine.reward_model.model, seed=3))
    assert all(torch.equal(buffer, built[name]) for name, buffer in engine.buffers().items())
