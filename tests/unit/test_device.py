"""The device is what was given: on a machine with a GPU, whatever has none runs on the CPU.

`torch.cuda.is_available` says yes here although there is no CUDA: whoever believes it fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.helpers.comparisons import random_comparisons
from tests.helpers.jobs import make_job, make_prepared, run_session
from tests.helpers.models import make_export
from tests.helpers.training import tiny_model
from torch.nn.attention.flex_attention import BlockMask

from rayward.batch.layout import pack
from rayward.cluster import actor_options, device_environment, gpu_reserved
from rayward.config.placement import Device
from rayward.config.scoring import ScoringConfig
from rayward.config.training import TrainingConfig
from rayward.errors import ModelLoadError
from rayward.model.attention import packed_attention, packed_mask
from rayward.model.reward_model import to_tensors
from rayward.model.weights import RandomInit
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.scoring.verify import pick_device
from rayward.training.engines.build import build_engine, initialize

PACKAGE = Path(__file__).parents[2] / "platform" / "rayward"
ITEM = ScoreItem(({"role": "user", "content": "Two and two?"},), ("Four.", "Five."))


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@contextmanager
def in_ray(*, worker: bool, gpus: list[str]) -> Iterator[None]:
    """This process as Ray would describe it."""
    context = SimpleNamespace(worker=SimpleNamespace(mode=1 if worker else 0), get_accelerator_ids=lambda: {"GPU": gpus, "TPU": []})
    ray = SimpleNamespace(is_initialized=lambda: True, init=None, WORKER_MODE=1, get_runtime_context=lambda: context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        yield


@pytest.mark.usefixtures("gpu_machine")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_training_run_without_a_gpu_ends(tmp_path: Path, gradient_checkpointing: bool) -> None:
    prepared = make_prepared(tmp_path)
    engine = run_session(make_job(tmp_path, prepared, gradient_checkpointing=gradient_checkpointing), prepared, validation=True)
    assert {p.device.type for p in engine.reward_model.parameters()} == {"cpu"}


@pytest.mark.usefixtures("gpu_machine")
def test_a_model_computes_where_its_batch_is() -> None:
    engine = build_engine(lambda dtype: tiny_model(dtype), TrainingConfig(engine="torch"))
    initialize(engine, RandomInit(engine.reward_model.model, seed=0))
    batch = to_tensors(pack(random_comparisons(3, seed=1)), engine.device)
    outputs = engine.reward_model(batch)
    outputs.sum().backward()
    assert batch.segments is not None
    assert isinstance(packed_mask(batch.segments, batch.input_ids.shape[1], torch.device("cpu")), torch.Tensor)


def test_a_block_mask_is_computed_by_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:

    from rayward.model import attention
    from rayward.model.block_mask import flex_mask

    def flex(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[str, None]:
        assert isinstance(mask, BlockMask)
        return f"flex {kwargs['scaling']}", None

    batch = pack(random_comparisons(3, seed=1))
    assert batch.segments is not None
    monkeypatch.setattr(attention, "flex_attention_forward", flex)
    mask = flex_mask(torch.from_numpy(batch.segments), batch.input_ids.shape[1], torch.device("cpu"))
    x = torch.zeros(1, 1, batch.input_ids.shape[1], 4)
    assert packed_attention(torch.nn.Identity(), x, x, x, mask, scaling=0.5)[0] == "flex 0.5"


@pytest.mark.usefixtures("gpu_machine")
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_scorer_takes_no_gpu_that_is_not_reserved_for_it(tmp_path: Path, device: Device) -> None:
    directory = make_export(tmp_path / "export")
    with in_ray(worker=True, gpus=[]):
        (result,) = Scorer.load(directory, device=device).score([ITEM])
    assert result.rewards is not None


@pytest.mark.usefixtures("gpu_machine")
@pytest.mark.parametrize(
    ("worker", "gpus", "device", "expected"),
    [
        (True, [], "auto", "cpu"),
        (True, ["1"], "auto", "cuda"),
        (True, ["0"], "cuda", "cuda"),
        (True, ["0"], "cpu", "cpu"),
        (False, [], "auto", "cuda"),
        (False, [], "cuda", "cuda"),
    ],
)
def test_what_a_setting_means_in_a_ray_process(worker: bool, gpus: list[str], device: Device, expected: str) -> None:
    with in_ray(worker=worker, gpus=gpus):
        assert pick_device(device).type == expected


@pytest.mark.usefixtures("gpu_machine")
def test_cuda_without_a_reservation_is_refused_with_the_reason() -> None:
    with in_ray(worker=True, gpus=[]), pytest.raises(ModelLoadError, match="Ray reserved no GPU"):
        pick_device("cuda")


def test_ray_has_what_it_is_asked_for() -> None:
    # `RuntimeContext.worker` is not documented: when this fails, look how the new version tells a driver from a worker.
    import ray
    from ray.runtime_context import RuntimeContext

    worker = SimpleNamespace(mode=ray.WORKER_MODE)
    assert RuntimeContext(worker).worker is worker
    assert ray.WORKER_MODE != ray.SCRIPT_MODE
    assert callable(RuntimeContext.get_accelerator_ids)


def test_outside_of_ray_the_machine_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_reserved() is None
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device("auto").type == expected
    with pytest.raises(ModelLoadError, match="torch sees no GPU"):
        pick_device("cuda")


# Ray Serve 2.60's own models warn about deprecated pydantic settings.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whatever_has_no_gpu_sees_none() -> None:
    from rayward.config.scoring import ReplicaConfig
    from rayward.serving.app import build
    from rayward.serving.applications import scorer_environment
    from rayward.training.trainer import worker_environment

    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert (device_environment(0), device_environment(0.5)) == (hidden, {})
    assert actor_options(0.0)["runtime_env"]["env_vars"] == hidden
    for gpus in (0.0, 1.0):
        trained = worker_environment(TrainingConfig(gpus_per_worker=gpus))
        ingress = build(ScoringConfig(model="x", gpus_per_replica=gpus))._bound_deployment
        served = scorer_environment(ReplicaConfig(gpus_per_replica=gpus))
        assert [env.get("CUDA_VISIBLE_DEVICES") for env in (trained, served)] == ([""] * 2 if gpus == 0 else [None] * 2)
        assert hidden.items() <= ingress.ray_actor_options["runtime_env"]["env_vars"].items()
        assert ("DS_ACCELERATOR" in trained) == (gpus == 0)


def test_one_place_asks_whether_there_is_a_gpu() -> None:
    found = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "is_available" in line or "device_count(" in line
    ]
    assert found == ["scoring/verify.py"]
