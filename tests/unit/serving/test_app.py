"""What of the application needs no running Serve."""

from __future__ import annotations

import inspect
import socket
import traceback
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from rayward.config.scoring import ScoringConfig
from rayward.errors import ConfigError, ContractMismatchError, ModelLoadError, RaywardError, ServerError
from rayward.serving.preflight import check_model, free_port, startup_error

# Ray Serve 2.60 is imported inside the tests: its own models warn about deprecated pydantic settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CONFIG_FILES = sorted((Path(__file__).parents[3] / "serve").glob("*.yaml"))


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


def test_replicas_and_limits_reach_serve() -> None:
    from rayward.serving.app import build

    config = ScoringConfig(model="x/my-model", min_replicas=1, max_replicas=3, max_ongoing_requests=11)
    application = build(config)
    ingress = application._bound_deployment
    scorer = ingress.init_args[2]._bound_deployment
    assert scorer.max_ongoing_requests == 11
    scaling = scorer._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    # All that the scorers run and queue fits through the ingress, else refusals would come from Serve without our body.
    assert ingress.max_ongoing_requests >= 3 * 11
    assert scorer.init_args[1] == "my-model"


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
        cast(Any, ScorerDeployment).func_or_class(ScoringConfig(model=str(tmp_path / "absent")), "m")
    assert type(startup_error(STATUS.format("\n".join(traceback.format_exception(caught.value))))) is ModelLoadError


def test_missing_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is not a directory"):
        check_model(tmp_path / "nothing")
    with pytest.raises(ModelLoadError, match=r"neither contract.json nor config.json"):
        check_model(tmp_path)


def test_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0
