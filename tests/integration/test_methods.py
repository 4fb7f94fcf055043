"""Every method by its recipe: trains on ZeRO-3, exports, passes its contract, is evaluated and scored over HTTP, and has learned.

Real here: the recipes as they ship (with a smaller model and fewer rows), Ray Data, Ray Train with two workers, Ray Serve.
Three methods and the mixture stand for the kinds of reading; the whole table, critiques and the extrapolation are drills.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rayward import RewardClient
from rayward.config.load import load_config
from rayward.config.mixture import MixtureConfig
from rayward.config.placement import Placement
from rayward.config.run import Config
from rayward.config.scoring import ScoringConfig
from rayward.contract.contract import Contract
from rayward.demo.files import write_demo
from rayward.demo.world import generate, true_reward

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.filterwarnings("default")]

RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"
KIND = "color"  # one kind of task is learnt in a minute, all eight in an hour
SMALLER = [
    "training.comparisons_per_step=16",
    "training.max_steps=60",
    "training.learning_rate=4e-3",
    "training.cpus_per_worker=0.25",
    "training.evaluate_every_steps=null",
    "checkpoint.every_steps=40",
    "tracking.tensorboard=false",
]
METHODS = [
    "bradley_terry_pairs", "margin", "scaled", "plackett_luce", "regression", "outcome", "outcome_tokens", "process", "language_auxiliary",
]  # fmt: skip
# Read at the end, at steps, and with a language head of tied weights; what continues after a loss, and the others, are drills.
IN_EVERY_RUN = [("bradley_terry_pairs", False), ("process", False), ("language_auxiliary", True)]
DRILLS = [(name, True) for name in METHODS if (name, True) not in IN_EVERY_RUN]
TWO_EPOCHS = ["training.num_epochs=2", "training.max_steps=126"]


@pytest.fixture(scope="module", autouse=True)
def _in_a_directory_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The recipes name `runs/demo/data` in the working directory."""
    directory = tmp_path_factory.mktemp("methods")
    data = directory / "runs" / "demo" / "data"
    write_demo(data, 7000, 700, 0)
    for path in data.glob("*.jsonl"):
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in rows if json.loads(line)["source"] == KIND), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield


@pytest.fixture(scope="module", autouse=True)
def _serve_ends() -> Iterator[None]:
    yield
    from ray import serve

    serve.shutdown()


def recipe(name: str, *overrides: str) -> Config:
    files = [RECIPES / "demo.yaml", RECIPES / "methods" / f"{name}.yaml"]
    config = load_config(files, [*SMALLER, *overrides])
    if config.model.architecture is None:
        return config
    architecture = {**config.model.architecture, "hidden_size": 64, "intermediate_size": 192}
    if name == "language_auxiliary":
        architecture["tie_word_embeddings"] = True  # one parameter in two modules under ZeRO-3
    return load_config(files, [*SMALLER, *overrides, f"model.architecture={json.dumps(architecture)}"])


def train(config: Config) -> Path:
    from rayward.workflows.train import train_pipeline

    train_pipeline(config, export_to=None, evaluation=True)
    return Path(config.run.storage_path, config.run.name, "export").resolve()


def resumed(config: Config) -> Path:
    """Train, lose the last checkpoint as a machine that died would have, and run the same command again: the same weights."""
    from rayward.workflows.train import train_pipeline

    train_pipeline(config, export_to=None, evaluation=False)
    run = Path(config.run.storage_path, config.run.name)
    first = Contract.load(run / "export")
    shutil.rmtree(max((run / "checkpoints").glob("step_*")))
    export = train(config)
    notes = [record["message"] for record in lines_of(run / "metrics.jsonl") if record["kind"] == "note"]
    assert any(note.startswith("continuing at step") for note in notes)
    second = Contract.load(export)
    assert second.head_sha256 == first.head_sha256
    assert second.files == first.files
    assert second.golden == first.golden
    return export


@contextmanager
def over_http(export: Path, **options: Any) -> Iterator[RewardClient]:
    """A client of an endpoint that serves an export, and that is taken down afterwards: its CPUs are for the next training."""
    from rayward.serving.app import serve_model, take_down
    from rayward.serving.proxies import running_address

    port = 0 if running_address() is None else None
    config = ScoringConfig(model=str(export), cpus_per_replica=0.5)
    url = serve_model(config, port=port, name="methods")
    try:
        with RewardClient(url, **options) as client:
            yield client
    finally:
        take_down(config, "methods")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def accuracy_over_http(client: RewardClient) -> float:
    """Share of the pairs of new rankings that are ordered by their true reward."""
    correct = total = 0
    rows = [row for row in generate(600, seed=99) if row["source"] == KIND]
    scores = client.score_items([{"prompt": row["prompt"], "completions": row["completions"]} for row in rows])
    for row, result in zip(rows, scores.results, strict=True):
        assert result.rewards is not None
        true = [true_reward(row["prompt"], text) for text in row["completions"]]
        for i in range(len(true)):
            for j in range(i):
                total += 1
                correct += (result.rewards[i] > result.rewards[j]) == (true[i] > true[j])
    return correct / total


@pytest.mark.parametrize(("name", "loses"), [*IN_EVERY_RUN, *(pytest.param(*case, marks=pytest.mark.drill) for case in DRILLS)])
def test_a_method_from_recipe_to_endpoint(name: str, loses: bool) -> None:
    settings = TWO_EPOCHS if name == "process" else []  # one epoch of this little data does not suffice
    export = resumed(recipe(name, f"run.name={name}_resumed", *settings)) if loses else train(recipe(name, *settings))
    config = recipe(name)
    contract = Contract.load(export)
    assert contract.outputs == config.outputs
    assert contract.normaliser is not None
    metrics = json.loads((export.parent / "export-evaluation" / "metrics.json").read_text())
    assert metrics["num_errors"] == 0
    with over_http(export) as client:
        info = client.models()[0]
        assert (info.version, tuple(info.outputs)) == (contract.model_version(), contract.outputs)
        assert info.normaliser is not None
        assert accuracy_over_http(client) > 0.6
        (result,) = client.score_items(
            [{"prompt": "What is the color of corn?", "completions": ["It is yellow. I checked it twice."]}]
        ).results
        assert [len(steps) for steps in result.steps or ()] == ([2] if name == "process" else [])


@pytest.mark.drill
def test_critiques_are_learned_written_and_scored_after() -> None:
    from rayward.workflows.critique import write_critiques

    written = resumed(recipe("critique_sft"))
    demo = load_config([RECIPES / "demo.yaml"])
    cache = Path("runs/critiques/cache")
    counts = write_critiques(str(written), "runs/critiques", demo)
    rows = lines_of(Path("runs/critiques/train.jsonl"))
    assert counts["train"] == (len(rows), 0)
    given = {row["id"]: row for row in lines_of(Path("runs/demo/data/rankings.jsonl"))}
    right = [ours == theirs for row in rows for ours, theirs in zip(row["critiques"], given[row["id"]]["critiques"], strict=True)]
    assert sum(right) / len(right) > 0.1  # of more than ten different ones
    # What is in the cache is not written again, what is lost is written as before.
    lost = sorted(cache.glob("*.jsonl"))[0]
    before, others = lines_of(lost), {path: path.stat().st_mtime_ns for path in sorted(cache.glob("*.jsonl"))[1:]}
    lost.unlink()
    assert write_critiques(str(written), "runs/critiques", demo) == counts
    entries = {entry["key"]: entry for path in cache.glob("*.jsonl") for entry in lines_of(path)}
    assert all(entries[entry["key"]] == entry for entry in before)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    export = resumed(recipe("critique"))
    with over_http(export, n_critiques=3, temperature=0.5) as client:
        assert client.models()[0].writes_critiques
        assert accuracy_over_http(client) > 0.6
        (result,) = client.score_items([{"prompt": "What is the color of corn?", "completions": ["yellow", "red"]}]).results
    assert [len(texts) for texts in result.critiques or ()] == [3, 3]
    assert len(result.reward_std or ()) == 2


def test_a_mixture_of_objectives_on_the_model_of_all_pairs() -> None:
    from rayward.workflows.mixture import fit_mixture

    settings = ["model=runs/bradley_terry_pairs/export", "gate_steps=150"]
    if not Path("runs/bradley_terry_pairs/export").exists():  # the test runs alone
        train(recipe("bradley_terry_pairs"))
    export = fit_mixture(load_config([RECIPES / "mixture" / "demo.yaml"], settings, schema=MixtureConfig))
    report = json.loads((export / "mixture.json").read_text())
    assert report["gate_loss"]["last"] < report["gate_loss"]["first"]
    assert Contract.load(export).outputs == ("correctness", "completeness", "concision", "tone", "score")
    with over_http(export) as client:
        assert accuracy_over_http(client) > 0.6


@pytest.mark.drill
def test_scaled_bradley_terry_from_one_attribute_and_the_extrapolation_of_the_two() -> None:
    from rayward.scoring.load import load_scored_model
    from rayward.workflows.merge import merge

    start = train(recipe("regression", "run.name=correctness", "data.attributes=[correctness]", "objective.weights=null"))
    tuned = resumed(recipe("scaled_from_regression", "training.learning_rate=1e-3", "training.max_steps=20", "checkpoint.every_steps=10"))
    first = json.loads((tuned.parent / "metrics.jsonl").read_text().splitlines()[0])
    assert first["accuracy"] > 0.55  # it did not start from a random head
    merged = Path("runs/expo").resolve()
    merge([start, tuned], (1.0 - 1.52, 1.52), merged)
    ensemble = Path("runs/ensemble")
    ensemble.mkdir()
    (ensemble / "ensemble.json").write_text(json.dumps({"rule": "mean", "members": [str(merged), str(tuned)]}))
    with over_http(ensemble.resolve()) as client:
        assert client.models()[0].outputs == ["0_expo", "1_export", "spread"]
        (result,) = client.score_items([{"prompt": "Hello", "completions": ["Hi."]}]).results
    members = [load_scored_model(path, Placement(device="cpu")) for path in (merged, tuned)]
    from rayward.wire.items import ScoreItem

    item = ScoreItem(({"role": "user", "content": "Hello"},), ("Hi.",))
    alone = [member.score([item])[0].rewards[0] for member in members]  # type: ignore[index]
    assert result.rewards == pytest.approx([sum(alone) / 2], abs=1e-5)
