"""What of the application needs no running Serve."""

from __future__ import annotations

import inspect
import socket
import traceback
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from rayward.config.scoring import ReplicaConfig, ScoringConfig
from rayward.errors import ConfigError, ContractMismatchError, ModelLoadError, RaywardError, ServerError
from rayward.serving.preflight import check_model, check_sources, free_port, startup_error
from rayward.serving.routes import Release

# Ray Serve 2.60 is imported inside the tests: its own models warn about deprecated pydantic settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SERVE = Path(__file__).parents[3] / "serve"
CONFIG_FILES = [path for path in sorted(SERVE.glob("*.yaml")) if "applications" in yaml.safe_load(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.name)
def test_every_serve_file_is_valid(path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert schema.http_options.host == "127.0.0.1"
    for application in schema.applications:
        assert application.import_path == "rayward.serving.app:build"
        assert application.args is not None
        ScoringConfig.model_validate(application.args)


def test_serve_can_validate_the_arguments_of_its_file() -> None:
    from rayward.serving.app import build

    # By the annotation itself: its name as a string would let any key through.
    assert inspect.signature(build).parameters["args"].annotation is ScoringConfig


def test_there_is_a_serve_file() -> None:
    assert CONFIG_FILES


def test_the_front_is_an_ingress_and_one_manager() -> None:
    from rayward.serving.app import INGRESS_SLACK, build

    given = ScoringConfig(model="./x/my-model", models={"other": "s3://b/m"}, ingress_replicas=2, max_requests=11)
    ingress = build(given)._bound_deployment
    assert (ingress.num_replicas, ingress.max_ongoing_requests) == (2, 11 + INGRESS_SLACK)
    config, _, manager = ingress.init_args
    assert manager._bound_deployment.num_replicas == 1
    # Its processes have another working directory than whoever reads the file.
    assert config.models == {"my-model": str(Path("x/my-model").resolve()), "other": "s3://b/m"}
    assert (config.model, config.default_model) == (None, "my-model")


def test_the_settings_of_a_version_reach_its_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayward.serving.applications import scorer_application

    monkeypatch.setenv("PYTHONPATH", "/found/here")
    config = ReplicaConfig(
        min_replicas=0, max_replicas=3, max_ongoing_requests=11, drain_s=7.0, threads_per_replica=2, gpus_per_replica=1.0
    )
    release = Release(version="v", source="/m", config=config, content="abc")
    scorer = scorer_application("front", "m", release)._bound_deployment
    options = scorer._deployment_config
    assert (scorer.name, options.max_ongoing_requests, options.graceful_shutdown_timeout_s, options.max_surge_percent) == (
        "scorer",
        11,
        7.0,
        100,
    )
    scaling = options.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (0, 1, 3)
    assert scorer.init_args == ("/m", config, "m", "front", "abc")
    environment = scorer.ray_actor_options["runtime_env"]["env_vars"]
    assert (environment["PYTHONPATH"], environment["OMP_NUM_THREADS"]) == ("/found/here", "2")
    assert scorer.ray_actor_options["num_gpus"] == 1.0


def test_keys_reach_the_ingress_as_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayward.serving.app import build

    monkeypatch.setenv("RAYWARD_API_KEYS", "ops:not-to-be-seen-anywhere:admin")
    options = build(ScoringConfig(model="m"))._bound_deployment.ray_actor_options
    assert "ops:sha256=" in options["runtime_env"]["env_vars"]["RAYWARD_API_KEYS"]
    assert "not-to-be-seen" not in repr(options)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "a/m", "models": {"m": "b/m"}}, "'m'"),
        ({"model": "a", "default_model": "b"}, "default_model is 'b'"),
        ({"models": {"a b": "x"}}, "'a b'"),
    ],
)
def test_models_that_contradict_each_other_are_refused_before_anything_starts(settings: dict[str, Any], says: str) -> None:
    from rayward.serving.app import build

    with pytest.raises(ConfigError, match=says):
        build(ScoringConfig(**settings))


def listing(current: str | None = None, **versions: tuple[str, str | None]) -> dict[str, Any]:
    """What the manager says: version -> its state and Serve's."""
    error = {"type": "ContractMismatchError", "message": "head: changed", "remedy": "restore it"}
    described = [
        {"version": v, "state": state, "serve": serve, "source": f"/{v}", "message": "", "error": error if state == "failed" else None}
        for v, (state, serve) in versions.items()
    ]
    return {"models": {"m": {"current": current, "versions": described}}, "declared": {"m": "/b"}, "unreadable": {}}


def test_a_start_waits_for_the_version_that_it_was_given() -> None:
    from rayward.serving.app import _waits_for

    def waits(told: dict[str, Any]) -> bool:
        return _waits_for(told, "m", "/b") is not None

    assert waits({"models": {}, "declared": {}, "unreadable": {}})
    assert waits(listing(b=("loading", "starting")))
    assert waits(listing("b", b=("ready", "starting")))
    assert waits(listing("a", a=("ready", "running"), b=("loading", "starting")))
    assert not waits(listing("b", b=("ready", "running")))
    # Promoted by an administrator, who has retired what the settings name: the table counts.
    assert not waits(listing("a", a=("ready", "running")))
    # The manager that takes over has not read the new settings yet.
    assert waits({**listing("a", a=("ready", "running")), "declared": {"m": "/a"}})
    with pytest.raises(ContractMismatchError, match="head: changed"):
        waits(listing("a", a=("ready", "running"), b=("failed", None)))
    with pytest.raises(ModelLoadError, match="no network"):
        waits({**listing(), "unreadable": {"m": {"type": "ModelLoadError", "message": "no network", "remedy": "x"}}})


STATUS = """The deployment failed to start 1 times in a row. See controller logs for details. Error:
Traceback (most recent call last):
  File "replica.py", line 1928, in initialize
{}
  File "scorer.py", line 98, in _load_export
"""


@pytest.mark.parametrize("kind", [ContractMismatchError, ModelLoadError])
def test_start_up_error_gets_its_type_back(kind: type[RaywardError]) -> None:
    original = kind("tokenizer: a.json is not the file\nthat the contract was written for", remedy="export the model\n  again")
    error = startup_error(STATUS.format("\n".join(traceback.format_exception(original.marked()))))
    assert type(error) is kind
    assert (error.problem, error.remedy) == (original.problem, original.remedy)


@pytest.mark.parametrize("reason", ["out of memory", "rayward.errors.NoSuchError: x\n  remedy: y"])
def test_other_start_up_failures_are_reported_whole(reason: str) -> None:
    error = startup_error(STATUS.format(reason))
    assert type(error) is ServerError
    assert STATUS.format(reason) in error.problem


def test_a_scorer_that_cannot_load_its_model_marks_the_reason(tmp_path: Path) -> None:
    from rayward.serving.replica import ScorerDeployment

    with pytest.raises(ModelLoadError) as caught:
        cast(Any, ScorerDeployment).func_or_class(str(tmp_path / "absent"), ReplicaConfig(), "m")
    assert type(startup_error(STATUS.format("\n".join(traceback.format_exception(caught.value))))) is ModelLoadError


def test_missing_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is not a directory"):
        check_model(tmp_path / "nothing")
    with pytest.raises(ModelLoadError, match=r"neither contract.json nor config.json"):
        check_model(tmp_path)
    with pytest.raises(ModelLoadError, match="is not a directory"):
        check_sources(ScoringConfig(models={"m": str(tmp_path / "nothing")}))
    with pytest.raises(ConfigError, match="no model"):
        check_sources(ScoringConfig())
    check_sources(ScoringConfig(state=str(tmp_path)))


def test_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0
