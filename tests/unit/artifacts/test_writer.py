from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.models import MAX_TOKENS, change_contract, make_export, make_model
from tests.helpers.tokenizer import make_tokenizer
from torch import Tensor

from rayward.artifacts import staging
from rayward.artifacts.tensors import TensorFiles
from rayward.artifacts.writer import ModelWriter, new_model
from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ContractMismatchError
from rayward.model.weights import INDEX_FILE, head_sha256
from rayward.scoring.scorer import Scorer


def everything_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def copy_of(source: Path, writer: ModelWriter, *, scale: float = 1.0, max_shard_bytes: int = 1 << 30) -> Contract:
    """The contract of `source` over its weights, all scaled."""
    with TensorFiles(source) as files:
        writer.copy_small_files(source)
        writer.write_weights(((name, files.read(name) * scale) for name in files.names), max_shard_bytes=max_shard_bytes)
    return Contract.load(source)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "source", seed=1)


def test_shards_are_written_as_their_tensors_come(tmp_path: Path) -> None:
    shapes = [3, 300, 40, 40, 40, 7, 900, 1]
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for number, size in enumerate(shapes):
            tensor = torch.full((size,), float(number))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(found.numel() for ref in alive if (found := ref()) is not None))
            yield f"t{number}", tensor

    writer = ModelWriter(tmp_path)
    writer.write_weights(tensors(), max_shard_bytes=4 * 130)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(shapes)
    files = sorted(path.name for path in tmp_path.glob("*"))
    assert files == [*(f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)), INDEX_FILE]
    assert {name: file[6:11] for name, file in index["weight_map"].items()} == {
        "t0": "00001", "t1": "00002", "t2": "00003", "t3": "00003", "t4": "00003", "t5": "00003", "t6": "00004", "t7": "00005",
    }  # fmt: skip
    for number, size in enumerate(shapes):
        assert load_file(tmp_path / index["weight_map"][f"t{number}"])[f"t{number}"].tolist() == [float(number)] * size
    # The largest tensor and what waits for its shard.
    assert most <= 900 + 300


@pytest.mark.parametrize("max_shard_bytes", [20_000, 1 << 30])
def test_a_written_model_is_scored_verified_and_then_there(source: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    output = tmp_path / "new" / "model"
    with new_model(output, replace=False) as writer:
        contract = copy_of(source, writer, scale=0.9, max_shard_bytes=max_shard_bytes)
        written = writer.finish(contract, rescore=True)
        assert not output.exists()
    scorer = Scorer.load(output, device="cpu")
    assert scorer.contract == written
    assert [golden.token_ids for golden in written.golden] == [golden.token_ids for golden in contract.golden]
    assert written.golden[0].reward != contract.golden[0].reward
    assert set(written.files) == {path.name for path in output.iterdir()} - {"contract.json"}
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_a_contract_without_golden_scores_gets_some(source: Path, tmp_path: Path) -> None:
    with new_model(tmp_path / "model", replace=False) as writer:
        contract = copy_of(source, writer)
        written = writer.finish(contract.model_copy(update={"golden": ()}), rescore=True)
    assert len(written.golden) > 3
    Scorer.load(tmp_path / "model", device="cpu")


def _weights_end_early(source: Path, output: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "score.weight", torch.ones(1, 32)
        raise OSError("no space left on device")

    with new_model(output, replace=True) as writer:
        writer.write_weights(tensors(), max_shard_bytes=1)


def _golden_scores_differ(source: Path, output: Path) -> None:
    with new_model(output, replace=True) as writer:
        writer.finish(copy_of(source, writer, scale=1.1), rescore=False)


def _interrupted(source: Path, output: Path) -> None:
    with new_model(output, replace=True) as writer:
        writer.finish(copy_of(source, writer), rescore=False)
        raise KeyboardInterrupt


def _never_verified(source: Path, output: Path) -> None:
    with new_model(output, replace=True) as writer:
        copy_of(source, writer).save(writer.directory)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (_weights_end_early, OSError),
        (_golden_scores_differ, ContractMismatchError),
        (_interrupted, KeyboardInterrupt),
        (_never_verified, AssertionError),
    ],
)
def test_a_failure_leaves_nothing_and_the_old_model_untouched(
    source: Path, tmp_path: Path, fail: Callable[[Path, Path], None], error: type[BaseException], there: bool
) -> None:
    output = tmp_path / "model"
    if there:
        make_export(output, seed=2)
    before = everything_in(tmp_path)
    with pytest.raises(error):
        fail(source, output)
    assert everything_in(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if there else [])


@pytest.mark.parametrize("swap", [True, False])
def test_a_replaced_model_stays_whole_for_those_who_opened_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    if not swap:
        monkeypatch.setattr(staging, "_swap", lambda _first, _second: False)
    output = make_export(tmp_path / "model", seed=2)
    old = (output / "model.safetensors").read_bytes()
    with (output / "model.safetensors").open("rb") as reader:
        with new_model(output, replace=True) as writer:
            writer.finish(copy_of(source, writer), rescore=False)
        assert reader.read() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert Scorer.load(output, device="cpu").contract.golden == Contract.load(source).golden


def test_the_old_model_comes_back_when_the_new_one_cannot_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = make_export(tmp_path / "model", seed=2)
    before = everything_in(output)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError("stale file handle")
        return rename(path, target)

    monkeypatch.setattr(staging, "_swap", lambda _first, _second: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="stale"), staging.staged(output, replace=True):
        pass
    assert everything_in(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_in_the_way_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("ten years of work")
    before = everything_in(tmp_path)
    for name, problem in (("file", "no directory"), ("link", "no directory"), ("folder", "not an exported model")):
        with pytest.raises(ConfigError, match=problem), staging.staged(tmp_path / name, replace=True):
            raise AssertionError("not reached")
    with pytest.raises(ConfigError, match="exists already"), staging.staged(source, replace=False):
        raise AssertionError("not reached")
    with pytest.raises(ConfigError, match="exists already"), staging.staged(tmp_path / "late", replace=False):
        (tmp_path / "late").mkdir()
    assert everything_in(tmp_path) == before


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from rayward.artifacts.staging import staged\n"
        "with staged(Path(sys.argv[1]), replace=False) as directory:\n"
        "    (directory / 'half').write_text('a model'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "model")], check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    living = tmp_path / left.name.replace(left.name.rsplit("-", 2)[1], str(os.getpid()))
    living.mkdir()
    other = tmp_path / left.name.replace("model", "model2", 1)
    other.mkdir()
    with staging.staged(tmp_path / "model", replace=False):
        assert not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", living.name, other.name}


def test_a_revision_shares_its_files_and_copies_its_card(source: Path, tmp_path: Path) -> None:
    model = make_export(tmp_path / "model")
    (model / "README.md").write_text("card")
    (model / "plots").mkdir()
    (model / "plots" / "a.png").write_bytes(b"png")
    contract = Contract.load(model)
    with new_model(tmp_path / "again", replace=False) as writer:
        writer.finish_revision(model, contract)
    assert everything_in(tmp_path / "again") == everything_in(model)
    same = {name: (tmp_path / "again" / name).samefile(model / name) for name in everything_in(model)}
    assert same == {name: name in contract.files for name in same}
    (model / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ContractMismatchError, match="weights"), new_model(tmp_path / "third", replace=False) as writer:
        writer.finish_revision(model, contract)
    assert not (tmp_path / "third").exists()


def test_files_are_copied_where_they_cannot_be_linked(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with new_model(tmp_path / "again", replace=False) as writer:
        writer.finish_revision(source, Contract.load(source))
    assert everything_in(tmp_path / "again") == everything_in(source)
    assert not (tmp_path / "again" / "model.safetensors").samefile(source / "model.safetensors")


def test_the_head_is_hashed_wherever_it_stands(tmp_path: Path) -> None:
    model = make_model(make_tokenizer(tmp_path), num_labels=2, seed=4)
    make_export(tmp_path / "source", outputs=("a", "b"), reward_weights=(1.0, 0.5), seed=4)
    change_contract(tmp_path / "source", reward_weights=(0.5, 0.5))
    with new_model(tmp_path / "model", replace=False) as writer:
        written = writer.finish(copy_of(tmp_path / "source", writer, max_shard_bytes=1), rescore=False)
    assert written.head_sha256 == head_sha256(model.state_dict())
    assert written.max_tokens == MAX_TOKENS


def test_tensor_files_are_closed(source: Path) -> None:
    def open_weights() -> int:
        return Path("/proc/self/maps").read_text().count(f"{source}/model.safetensors")

    with TensorFiles(source) as files:
        tensor = files.read("score.weight")
        assert tensor.shape == (1, 32)
        assert open_weights() > 0
        del tensor
    assert open_weights() == 0
