from __future__ import annotations

import errno
import json
import logging
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.comparisons import random_comparisons
from tests.helpers.ranks import Group, PartitionedEngine, State
from tests.helpers.training import draft, make_shares, steps_in, tiny_engine, train

from rayward.contract.contract import GoldenScore
from rayward.errors import CheckpointError
from rayward.objectives.pairs import BradleyTerryObjective
from rayward.objectives.table import Objective
from rayward.training.checkpoints import reader as reader_module
from rayward.training.checkpoints.format import COMMIT_FILE, Commit
from rayward.training.checkpoints.reader import CheckpointReader
from rayward.training.checkpoints.store import CheckpointStore, CommitDraft
from rayward.training.engines.protocol import STATE_KINDS
from rayward.training.engines.torch import TorchEngine

OBJECTIVE = Objective(BradleyTerryObjective())
SHAPES: dict[str, tuple[int, ...]] = {"matrix": (7, 5), "vector": (11,), "one": (1,), "score.weight": (1, 32), "two": (2, 1)}


def state_of(engine: TorchEngine) -> State:
    return {(p.name, kind): engine.read_state(p, kind).clone() for p in engine.partitions() for kind in STATE_KINDS}


@pytest.fixture(scope="module")
def trained() -> TorchEngine:
    """An engine after two steps, so that it has moments."""
    engine = tiny_engine()
    train(engine, make_shares(random_comparisons(16, seed=1)), OBJECTIVE, stop_step=2)
    return engine


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "checkpoints"))


def committed_steps(store: CheckpointStore) -> list[int]:
    return [checkpoint.commit.step for checkpoint in store.committed()]


def path_of(store: CheckpointStore, step: int) -> Path:
    return Path(store.root) / f"step_{step:08d}"


def test_no_checkpoint_yet(store: CheckpointStore) -> None:
    assert store.committed() == []
    assert store.latest() is None


def test_a_resumed_run_continues_bit_for_bit(store: CheckpointStore) -> None:
    comparisons = random_comparisons(96, seed=2)
    undisturbed = tiny_engine()
    whole = train(undisturbed, make_shares(comparisons), OBJECTIVE, stop_step=12)
    first = tiny_engine()
    train(first, make_shares(comparisons), OBJECTIVE, stop_step=7)
    assert store.save(first, draft(7)) is None
    checkpoint = store.latest()
    assert checkpoint is not None
    resumed = tiny_engine(seed=99)
    store.load(resumed, checkpoint)
    rest = train(resumed, make_shares(comparisons, first_step=7), OBJECTIVE, first_step=checkpoint.commit.step, stop_step=12)
    assert [metrics["loss"] for metrics in rest] == [metrics["loss"] for metrics in whole[7:]]
    expected, found = state_of(undisturbed), state_of(resumed)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_commit_says_what_was_saved(store: CheckpointStore, trained: TorchEngine) -> None:
    golden = (GoldenScore(prompt=({"role": "user", "content": "q"},), completion="a", token_ids=(1, 2), reward=(0.1,)),)
    note = CommitDraft(
        step=2, total_steps=9, trajectory={"seed": 4}, keep_last=1, golden=golden, validation_accuracy=0.5, metrics={"loss": 0.25}
    )
    assert store.save(trained, note) is None
    latest = store.latest()
    assert latest is not None
    commit = latest.commit
    assert (commit.step, commit.total_steps, commit.world_size, commit.trajectory) == (2, 9, 1, {"seed": 4})
    assert (commit.golden, commit.validation_accuracy, commit.metrics) == (golden, 0.5, {"loss": 0.25})
    assert Commit.model_validate_json(commit.model_dump_json()) == commit
    shapes = {name: tuple(p.shape) for name, p in trained.reward_model.model.named_parameters()}
    assert {name: entry.shape for name, entry in commit.parameters.items()} == shapes


def test_a_rank_file_is_plain_safetensors(store: CheckpointStore, trained: TorchEngine) -> None:
    store.save(trained, draft(2))
    stored = load_file(path_of(store, 2) / "rank_00000.safetensors")
    expected = state_of(trained)
    assert set(stored) == {f"{kind}/{name}" for name, kind in expected}
    assert all(torch.equal(stored[f"{kind}/{name}"], values) for (name, kind), values in expected.items())


def whole_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {(name, kind): torch.randn(math.prod(shape), generator=generator) for kind in STATE_KINDS for name, shape in SHAPES.items()}


def save_at(store: CheckpointStore, world_size: int, state: State, step: int, full_disk: int | None = None) -> list[OSError | None]:
    group = Group(world_size)
    return group.run(lambda rank: store.save(PartitionedEngine(group, rank, SHAPES, state, full_disk=rank == full_disk), draft(step)))


@pytest.mark.parametrize("saved_at", [1, 2, 3, 5])
@pytest.mark.parametrize("loaded_at", [1, 2, 3, 5])
def test_a_checkpoint_loads_at_any_number_of_ranks(store: CheckpointStore, saved_at: int, loaded_at: int) -> None:
    state = whole_state(seed=saved_at)
    assert save_at(store, saved_at, state, step=6) == [None] * saved_at
    checkpoint = store.latest()
    assert checkpoint is not None
    assert sorted(checkpoint.commit.files) == [f"rank_{rank:05d}.safetensors" for rank in range(saved_at)]
    group = Group(loaded_at)
    engines = [PartitionedEngine(group, rank, SHAPES, None) for rank in range(loaded_at)]
    group.run(lambda rank: store.load(engines[rank], checkpoint))
    assert {engine.optimizer_steps for engine in engines} == {6}
    for key, expected in state.items():
        assert torch.equal(torch.cat([engine.local[key] for engine in engines]), expected)


@pytest.mark.parametrize("saved_at", [1, 3, 5])
def test_any_range_can_be_read(store: CheckpointStore, saved_at: int) -> None:
    state = whole_state(seed=0)
    save_at(store, saved_at, state, step=1)
    checkpoint = store.latest()
    assert checkpoint is not None
    reader = CheckpointReader(store.filesystem, checkpoint)
    for name, shape in SHAPES.items():
        numel = math.prod(shape)
        for start in range(numel + 1):
            for stop in range(start, numel + 1):
                assert torch.equal(reader.read(name, shape, start, stop, kind="exp_avg"), state[name, "exp_avg"][start:stop])


def test_rank_files_are_closed_and_few_at_once(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    state = whole_state(seed=0)
    save_at(store, 5, state, step=1)
    checkpoint = store.latest()
    assert checkpoint is not None
    opened: list[pa.NativeFile] = []
    most = 0

    class Counting:
        def open_input_file(self, path: str) -> pa.NativeFile:
            nonlocal most
            opened.append(store.filesystem.open_input_file(path))
            most = max(most, sum(not file.closed for file in opened))
            return opened[-1]

    monkeypatch.setattr(reader_module, "MAX_OPEN_FILES", 2)
    with CheckpointReader(cast(pafs.FileSystem, Counting()), checkpoint) as reader:
        for name, shape in SHAPES.items():
            assert torch.equal(reader.read(name, shape, 0, math.prod(shape)), state[name, "weight"])
        assert most == 2
    assert len(opened) >= 5
    assert all(file.closed for file in opened)


def test_loading_leaves_no_file_open(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_at(store, 3, whole_state(seed=0), step=1)
    checkpoint = store.latest()
    assert checkpoint is not None
    files: list[pa.NativeFile] = []
    real = CheckpointReader._file

    def remembered(self: CheckpointReader, rank: int) -> pa.NativeFile:
        files.append(real(self, rank))
        return files[-1]

    monkeypatch.setattr(CheckpointReader, "_file", remembered)
    group = Group(2)
    engines = [PartitionedEngine(group, rank, SHAPES, None) for rank in range(2)]
    group.run(lambda rank: store.load(engines[rank], checkpoint))
    assert files
    assert all(file.closed for file in files)


def test_a_model_of_another_shape_is_refused(store: CheckpointStore) -> None:
    save_at(store, 2, whole_state(seed=0), step=1)
    checkpoint = store.latest()
    assert checkpoint is not None
    reader = CheckpointReader(store.filesystem, checkpoint)
    with pytest.raises(CheckpointError, match=r"has matrix with shape \(7, 5\); the model needs \(5, 7\)"):
        reader.read("matrix", (5, 7), 0, 3)
    with pytest.raises(CheckpointError, match="has unknown with shape None"):
        reader.read("unknown", (5,), 0, 3)


def test_what_was_never_committed_does_not_count(store: CheckpointStore, trained: TorchEngine, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        store.save(trained, draft(step))
    (path_of(store, 2) / COMMIT_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        assert committed_steps(store) == [1]
    assert "step_00000002: it was never committed" in caplog.text
    assert store.save(trained, draft(2)) is None, "the half-written directory is no obstacle"
    assert committed_steps(store) == [2, 1]


def _truncate(directory: Path) -> None:
    path = directory / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _remove(directory: Path) -> None:
    (directory / "rank_00000.safetensors").unlink()


def _half_commit(directory: Path) -> None:
    path = directory / COMMIT_FILE
    path.write_bytes(path.read_bytes()[:100])


def _binary_commit(directory: Path) -> None:
    (directory / COMMIT_FILE).write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("damage", [_truncate, _remove, _half_commit, _binary_commit])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    store: CheckpointStore, trained: TorchEngine, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    for step in (1, 2):
        store.save(trained, draft(step))
    assert callable(damage)
    damage(path_of(store, 2))
    with caplog.at_level(logging.WARNING):
        assert committed_steps(store) == [1]
    assert "skipping checkpoint" in caplog.text


def test_a_flipped_bit_is_found_and_the_next_attempt_takes_the_one_before(store: CheckpointStore, trained: TorchEngine) -> None:
    for step in (1, 2):
        store.save(trained, draft(step))
    path = path_of(store, 2) / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    latest = store.latest()
    assert latest is not None
    assert latest.commit.step == 2, "the size is right, so only loading can tell"
    engine = tiny_engine(seed=5)
    before = state_weights(engine)
    with pytest.raises(CheckpointError, match=r"step_00000002: the content of rank_00000\.safetensors is not what was committed") as caught:
        store.load(engine, latest)
    assert caught.value.retryable
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(state_weights(engine), before, strict=True))
    previous = store.latest()
    assert previous is not None
    assert previous.commit.step == 1
    store.load(engine, previous)


def state_weights(engine: TorchEngine) -> list[torch.Tensor]:
    return [engine.read_state(p, "weight").clone() for p in engine.partitions()]


@pytest.mark.parametrize("damaged_rank", [0, 1, 2])
def test_all_ranks_stop_when_one_file_is_damaged(store: CheckpointStore, damaged_rank: int) -> None:
    save_at(store, 3, whole_state(seed=0), step=1)
    path = path_of(store, 1) / f"rank_{damaged_rank:05d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    checkpoint = store.latest()
    assert checkpoint is not None
    group = Group(2)

    def attempt(rank: int) -> str:
        with pytest.raises(CheckpointError) as caught:
            store.load(PartitionedEngine(group, rank, SHAPES, None), checkpoint)
        return caught.value.problem

    problems = group.run(attempt)
    assert problems[0] == problems[1]
    assert path.name in problems[0]


def test_the_newest_and_the_best_are_kept(store: CheckpointStore, trained: TorchEngine) -> None:
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.6), (4, None), (5, 0.7)):
        assert store.save(trained, draft(step, keep_last=2, accuracy=accuracy)) is None
    assert committed_steps(store) == [5, 4, 2]
    assert store.save(trained, draft(6, keep_last=2, accuracy=0.9)) is None
    assert committed_steps(store) == [6, 5], "of equal accuracies the newer one is the best"


def test_without_validation_only_the_newest_are_kept(store: CheckpointStore, trained: TorchEngine) -> None:
    for step in range(1, 6):
        store.save(trained, draft(step, keep_last=3))
    assert committed_steps(store) == [5, 4, 3]


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing more than this into one file fails, as on a full disk (the error is EFBIG, an OSError like ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_rubbish(store: CheckpointStore, trained: TorchEngine) -> None:
    assert store.save(trained, draft(1)) is None
    size = (path_of(store, 1) / "rank_00000.safetensors").stat().st_size
    with largest_file(size // 2):
        problem = store.save(trained, draft(2))
    assert problem is not None
    assert problem.errno == errno.EFBIG
    assert str(problem.strerror).startswith("rank 0: ")
    assert "File too large" in str(problem)
    assert steps_in(store.root) == [1]
    latest = store.latest()
    assert latest is not None
    store.load(tiny_engine(), latest)
    assert store.save(trained, draft(2)) is None
    assert committed_steps(store) == [2, 1]


def test_a_disk_that_is_full_on_one_rank_stops_the_commit_on_all(store: CheckpointStore) -> None:
    state = whole_state(seed=0)
    save_at(store, 3, state, step=1)
    problems = save_at(store, 3, state, step=2, full_disk=1)
    assert [problem and (problem.errno, problem.strerror) for problem in problems] == [(28, "rank 1: No space left on device")] * 3
    assert steps_in(store.root) == [1]


def test_a_storage_that_cannot_be_written_at_all(tmp_path: Path, trained: TorchEngine) -> None:
    (tmp_path / "file").write_text("in the way")
    problem = CheckpointStore(str(tmp_path / "file" / "checkpoints")).save(trained, draft(1))
    assert problem is not None
    assert "rank 0: " in str(problem)


def test_nothing_in_a_checkpoint_is_code(store: CheckpointStore, trained: TorchEngine) -> None:
    store.save(trained, draft(1))
    assert sorted(path.name for path in path_of(store, 1).iterdir()) == [COMMIT_FILE, "rank_00000.safetensors"]
    json.loads((path_of(store, 1) / COMMIT_FILE).read_text())
