"""The forward of training is that of scoring, whatever modules do in training mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.comparisons import make_comparison
from tests.helpers.jobs import LLAMA, encoder_of, make_engine, make_job, make_prepared, run_session
from torch import Tensor, nn

from rayward.batch.layout import pack
from rayward.data.prepared import PreparedData
from rayward.errors import ModelLoadError
from rayward.scoring.scorer import Scorer
from rayward.training.checkpoints.store import choose_checkpoint
from rayward.training.engines.optimizer import set_training_mode
from rayward.training.engines.torch import TorchEngine
from rayward.training.golden import check_modes, golden_scores
from rayward.workflows.export import export

PHIMOE: dict[str, Any] = {
    **LLAMA, "model_type": "phimoe", "num_local_experts": 4, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return make_prepared(tmp_path_factory.mktemp("prepared"))


class Noise(nn.Module):
    """What a library may hide in a layer: `when` says in which mode it draws numbers."""

    def __init__(self, layer: nn.Module, when: str) -> None:
        super().__init__()
        self.layer, self.when = layer, when
        self.gradient_checkpointing = when == "checkpointing"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.layer(*args, **kwargs)
        return output * (1.0 + 0.1 * torch.rand_like(output)) if self.training or self.when == "always" else output


def with_noise(engine: TorchEngine, when: str) -> TorchEngine:
    mlp = engine.reward_model.model.model.layers[1].mlp
    mlp.up_proj = Noise(mlp.up_proj, when)
    set_training_mode(engine.reward_model)
    return engine


def test_a_router_that_samples_its_experts_in_training_mode_does_not_sample(tmp_path: Path, prepared: PreparedData) -> None:
    job = make_job(tmp_path, prepared, architecture=PHIMOE)
    engine = make_engine(job)
    trained = golden_scores(engine, encoder_of(prepared, job))
    engine.reward_model.train()
    assert golden_scores(engine, encoder_of(prepared, job)) != trained, "plain training mode draws experts"
    run_session(job, prepared)
    contract = export(job.config, prepared, choose_checkpoint(job.store, "last"), job.store, tmp_path / "export")
    assert contract.golden
    Scorer.load(tmp_path / "export", verify=True)


@pytest.mark.parametrize("architecture", [LLAMA, PHIMOE])
def test_gradient_checkpointing_still_works(tmp_path: Path, prepared: PreparedData, architecture: dict[str, Any]) -> None:
    job = make_job(tmp_path, prepared, architecture=architecture, gradient_checkpointing=True)
    engine = make_engine(job)
    calls: list[int] = []
    layer = engine.reward_model.model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert layer.training
    assert not layer.mlp.training
    outputs = engine.forward(pack([make_comparison("a", 5, [3, 4])], layout=engine.reward_model.layout))
    assert len(calls) == 1
    engine.backward(outputs.sum(), is_last=True)
    assert len(calls) == 2, "computed again in the backward pass"


def test_a_model_without_gradient_checkpointing_trains_without_it(
    tmp_path: Path, prepared: PreparedData, caplog: pytest.LogCaptureFixture
) -> None:
    architecture = {"model_type": "openai-gpt", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    job = make_job(tmp_path, prepared, architecture=architecture, gradient_checkpointing=True)
    run_session(job, prepared)
    assert "OpenAIGPTForSequenceClassification has no gradient checkpointing" in caplog.text
    assert job.store.latest() is not None


def test_a_module_that_always_draws_numbers_is_named(tmp_path: Path, prepared: PreparedData) -> None:
    job = make_job(tmp_path, prepared)
    engine = with_noise(make_engine(job), "always")
    with pytest.raises(ModelLoadError, match=r"LlamaForSequenceClassification .* model\.model\.layers\.1\.mlp\.up_proj \(Noise\)"):
        check_modes(engine, encoder_of(prepared, job))


def test_noise_in_training_mode_alone_is_switched_off(tmp_path: Path, prepared: PreparedData) -> None:
    job = make_job(tmp_path, prepared)
    engine = with_noise(make_engine(job), "training")
    check_modes(engine, encoder_of(prepared, job))


def test_noise_where_gradient_checkpointing_needs_training_mode_is_named_before_the_first_step(
    tmp_path: Path, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.jobs.make_engine", lambda job: with_noise(make_engine(job), "checkpointing"))
    job = make_job(tmp_path, prepared)
    with pytest.raises(ModelLoadError, match=r"up_proj \(Noise\)"):
        run_session(job, prepared)
    assert job.store.committed() == []
