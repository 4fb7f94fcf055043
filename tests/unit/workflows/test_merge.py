from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.models import make_export
from torch import Tensor

from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ModelLoadError
from rayward.model.weights import INDEX_FILE
from rayward.scoring.scorer import Scorer
from rayward.workflows.merge import merge


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_export(root / f"m{seed}", seed=seed) for seed in range(3)]


@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (0.2, 0.5, 0.3), (1.0, 0.0, 0.0)])
def test_every_tensor_is_the_weighted_sum(models: list[Path], tmp_path: Path, weights: Sequence[float]) -> None:
    merge(models, weights, tmp_path / "merged")
    found, parts = tensors_of(tmp_path / "merged"), [tensors_of(model) for model in models]
    assert set(found) == set(parts[0])
    for name, tensor in found.items():
        expected = sum(weight * part[name].double() for weight, part in zip(weights, parts, strict=True))
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_expo_by_hand_and_its_ends(models: list[Path], tmp_path: Path) -> None:
    # Scalars 1 -> 2 with alpha 1.52 give 2.52.
    start, trained = models[:2]
    merge([start, trained], (-0.52, 1.52), tmp_path / "expo")
    name = "model.norm.weight"
    before, after = tensors_of(start)[name], tensors_of(trained)[name]
    torch.testing.assert_close(tensors_of(tmp_path / "expo")[name], before + 1.52 * (after - before))
    for alpha, same in ((0.0, start), (1.0, trained)):
        merge([start, trained], (1.0 - alpha, alpha), tmp_path / f"alpha{alpha}")
        for name, tensor in tensors_of(tmp_path / f"alpha{alpha}").items():
            assert torch.equal(tensor, tensors_of(same)[name])


def test_shards_of_different_models_need_not_agree(tmp_path: Path) -> None:
    one = make_export(tmp_path / "one", seed=0)
    sharded = make_export(tmp_path / "sharded", seed=1, max_shard_size="20KB")
    assert (sharded / INDEX_FILE).is_file()
    merge([one, sharded], (0.5, 0.5), tmp_path / "merged", max_shard_bytes=20_000)
    assert (tmp_path / "merged" / INDEX_FILE).is_file()
    found = tensors_of(tmp_path / "merged")
    for name, tensor in tensors_of(one).items():
        torch.testing.assert_close(found[name], (tensor + tensors_of(sharded)[name]) / 2)


def test_the_result_is_a_verified_model_with_its_own_golden_scores(models: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "merged"
    contract = merge(models[:2], (0.5, 0.5), output)
    assert contract == Contract.load(output)
    assert [golden.token_ids for golden in contract.golden] == [golden.token_ids for golden in Contract.load(models[0]).golden]
    assert contract.golden[0].reward != Contract.load(models[0]).golden[0].reward
    versions = {Scorer.load(directory, device="cpu").version for directory in (output, *models)}
    assert len(versions) == 4


def test_bf16_models_are_summed_in_fp32_and_stay_bf16(models: list[Path], tmp_path: Path) -> None:
    halves = []
    for index, model in enumerate(models[:2]):
        directory = make_export(tmp_path / f"half{index}", seed=index)
        save_file(
            {n: t.to(torch.bfloat16) for n, t in tensors_of(model).items()}, directory / "model.safetensors", metadata={"format": "pt"}
        )
        halves.append(directory)
    merge(halves, (0.25, 0.75), tmp_path / "merged")
    parts = [tensors_of(half) for half in halves]
    for name, tensor in tensors_of(tmp_path / "merged").items():
        assert tensor.dtype == torch.bfloat16
        # Half a step of bf16 is what rounding the sum may cost; a sum in bf16 would be off by more.
        expected = 0.25 * parts[0][name].double() + 0.75 * parts[1][name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=2.0**-8 * 1.001, atol=1e-9)


def test_what_does_not_fit_is_refused_and_leaves_nothing(models: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"sum to 0\.9"):
        merge(models[:2], (0.5, 0.4), output)
    with pytest.raises(ConfigError, match="1 models and 1 weights"):
        merge(models[:1], (1.0,), output)
    rated = make_export(tmp_path / "rated", outputs=("a", "b"), reward_weights=(1.0, 0.0))
    with pytest.raises(ModelLoadError, match="different contracts"):
        merge([models[0], rated], (0.5, 0.5), output)
    other = make_export(tmp_path / "other", seed=5)
    tensors = tensors_of(other)
    tensors.pop("model.norm.weight")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight"):
        merge([models[0], other], (0.5, 0.5), output)
    with pytest.raises(ConfigError, match="exists already"):
        merge(models[:2], (0.5, 0.5), models[0])
    assert not output.exists()
