from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.models import make_export
from tests.helpers.tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from rayward.config.placement import Placement
from rayward.config.scoring import ReplicaConfig
from rayward.model import weights_identity as module
from rayward.model.weights_identity import BLOCK_BYTES, NUM_BLOCKS, weights_identity
from rayward.scoring.combining import EnsembleRule, ImplicitRule
from rayward.scoring.ensemble import Ensemble
from rayward.scoring.implicit import ImplicitScorer
from rayward.scoring.scorer import Scorer

NAMES = ("model.embed.weight", "model.layers.0.weight", "model.layers.1.weight", "score.weight")


def write(path: Path, **changes: torch.Tensor) -> Path:
    tensors = {name: torch.full((64, 512), float(index)) for index, name in enumerate(NAMES)}
    path.parent.mkdir(exist_ok=True)
    save_file(tensors | changes, path)
    return path.parent


@pytest.mark.parametrize("name", NAMES)
def test_another_tensor_is_another_model_whichever_it_is(tmp_path: Path, name: str) -> None:
    before = weights_identity(write(tmp_path / "model" / "model.safetensors"))
    assert weights_identity(write(tmp_path / "model" / "model.safetensors", **{name: torch.full((64, 512), 0.5)})) != before
    assert weights_identity(write(tmp_path / "moved" / "model.safetensors")) == before


def test_a_single_value_is_missed_by_the_sample_and_found_in_full(tmp_path: Path) -> None:
    one, other = torch.zeros(64, 512), torch.zeros(64, 512)
    other[0, 0] = 1e-3
    directories = [write(tmp_path / str(index) / "model.safetensors", x=values) for index, values in enumerate((one, other))]
    assert weights_identity(directories[0]) == weights_identity(directories[1])
    assert weights_identity(directories[0], full=True) != weights_identity(directories[1], full=True)


def test_header_name_and_number_of_files_count(tmp_path: Path) -> None:
    whole = weights_identity(write(tmp_path / "a" / "model.safetensors"))
    renamed = {f"x{index}": torch.full((64, 512), float(index)) for index in range(4)}
    (tmp_path / "b").mkdir()
    save_file(renamed, tmp_path / "b" / "model.safetensors")
    found = {whole, weights_identity(tmp_path / "b"), weights_identity(write(tmp_path / "c" / "model-00001-of-00001.safetensors"))}
    write(tmp_path / "a" / "extra.safetensors")
    (tmp_path / "a" / "README.md").write_text("not a weight file")
    found.add(weights_identity(tmp_path / "a"))
    assert len(found) == 4


@pytest.mark.parametrize("name", ["model.safetensors", "headless.safetensors"])
def test_what_is_read_of_a_large_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # A file of 200 GB, all of it a hole: reading it whole would take minutes.
    size, num_tensors = 200 << 30, 500
    step = size // num_tensors
    entries = {f"t{i}": {"dtype": "U8", "shape": [step], "data_offsets": [i * step, (i + 1) * step]} for i in range(num_tensors)}
    header = json.dumps(entries).encode()
    with (tmp_path / name).open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header if name.startswith("model") else b"PK\x03\x04" + b"\xff" * 8)
        stream.truncate(8 + len(header) + num_tensors * step)
    read: list[int] = []
    places = module._places

    def counted(*arguments: object) -> list[tuple[int, int]]:
        found = list(places(*arguments))  # type: ignore[arg-type]
        read.extend(length for _, length in found)
        return found

    monkeypatch.setattr(module, "_places", counted)
    assert len(weights_identity(tmp_path)) == 64
    assert sum(read) <= max(NUM_BLOCKS * BLOCK_BYTES, len(header) + 8 + num_tensors * module.TENSOR_BYTES)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": {}}',
        (32).to_bytes(8, "little") + b'{"a": {"data_offsets": [0, 99]}}',
        (32).to_bytes(8, "little") + b'{"a": {"data_offsets": [-9, 2]}}',
    ],
)
def test_a_damaged_header_is_hashed_as_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    found = weights_identity(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content + b"x")
    assert weights_identity(tmp_path) != found


def foreign(directory: Path, change: str | None = None, at: int = 0) -> Path:
    # A model of others: the export's files without its contract, one value changed.
    make_export(directory)
    (directory / "contract.json").unlink()
    if change:
        tensors = load_file(directory / "model.safetensors")
        tensors[change].flatten()[at] += 1.0
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_foreign_models_of_one_shape_have_versions_of_their_own(tmp_path: Path) -> None:
    # The head is the same: nothing but the backbone's weights tells them apart.
    changed = "model.layers.1.mlp.down_proj.weight"
    first = Scorer.load(foreign(tmp_path / "first"), device="cpu").version
    middle = Scorer.load(foreign(tmp_path / "second", changed, at=1000), device="cpu").version
    assert first != middle
    assert Scorer.load(shutil.copytree(tmp_path / "first", tmp_path / "again"), device="cpu").version == first


def test_every_byte_counts_unless_it_is_not_asked_for(tmp_path: Path) -> None:
    # The first value of the embedding lies outside of the sample.
    directories = [foreign(tmp_path / "first"), foreign(tmp_path / "second", "model.embed_tokens.weight")]
    assert len({Scorer.load(path, device="cpu", hash_weights="sampled").version for path in directories}) == 1
    assert len({Scorer.load(path, device="cpu").version for path in directories}) == 2
    ensembles = []
    for index, path in enumerate(directories):
        (tmp_path / f"ensemble{index}").mkdir()
        EnsembleRule(rule="mean", members=(str(path), str(path))).save(tmp_path / f"ensemble{index}")
        ensembles.append(Ensemble.load(tmp_path / f"ensemble{index}", device="cpu").version)
    assert ensembles[0] != ensembles[1]


def test_every_byte_counts_of_everything_that_is_served() -> None:
    assert {ReplicaConfig().placement.hash_weights, Placement().hash_weights} == {"full"}


def test_weights_that_were_changed_beside_a_contract_never_carry_its_version(tmp_path: Path) -> None:
    directory = make_export(tmp_path / "model")
    trusted = Scorer.load(directory, device="cpu").version
    assert Scorer.load(directory, device="cpu", verify=False).version == trusted
    versions = {trusted}
    for step in (1.0, 2.0):
        tensors = load_file(directory / "model.safetensors")
        tensors["model.norm.weight"][0] += step
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        versions.add(Scorer.load(directory, device="cpu", verify=False).version)
    assert len(versions) == 3
    assert sum(version.startswith("unverified-") for version in versions) == 2


def test_weights_in_another_format_are_neither_read_nor_part_of_the_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = foreign(tmp_path / "model")
    expected = Scorer.load(directory, device="cpu").version
    (directory / "pytorch_model.bin").write_bytes(b"a pickle that must not be opened")
    with caplog.at_level(logging.WARNING):
        assert Scorer.load(directory, device="cpu").version == expected
    assert "pytorch_model.bin is not read: the weights are those in safetensors" in caplog.text


def test_an_implicit_reward_is_known_by_its_policies_and_not_by_their_place(tmp_path: Path) -> None:
    def policy(name: str, seed: int) -> None:
        tokenizer = make_tokenizer(tmp_path / name)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)

    for seed, name in enumerate(("base", "one", "two")):
        policy(name, seed)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    versions = {}
    for name, reference in (("one", "base"), ("two", "base"), ("one", "two"), ("moved", "base")):
        rule = tmp_path / f"{name}-{reference}"
        rule.mkdir()
        ImplicitRule(policy=f"../{name}", reference=f"../{reference}", max_tokens=128).save(rule)
        versions[name, reference] = ImplicitScorer.load(rule, device="cpu").version
    assert len(set(versions.values())) == 3
    assert versions["moved", "base"] == versions["one", "base"]
