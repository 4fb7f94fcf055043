"""How a driver connects: which cluster, with which environment for the workers. Ray itself is not started."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.data
from ray._private import ray_constants, services

from rayward import cluster
from rayward.errors import ConfigError

# Ray Data 2.60 warns about its own deprecated settings when it makes its context.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


class Calls:
    """Stands where `ray.init` is called; `running`: a cluster runs on this machine."""

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []
        self.running = False
        self.on_loopback: list[bool] = []

    def __call__(self, **settings: Any) -> None:
        if settings.get("address") == "auto" and not self.running:
            raise ConnectionError("Could not find any running Ray instance.")
        self.settings.append(settings)
        self.on_loopback.append(os.environ.get(cluster.LOOPBACK_VARIABLE) == "0" and not ray_constants.ENABLE_RAY_CLUSTER)

    @property
    def environment(self) -> dict[str, str]:
        (settings,) = self.settings
        variables: dict[str, str] = settings["runtime_env"]["env_vars"]
        return variables


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Calls]:
    """A clean environment outside of any job, and no Ray."""
    recorded = Calls()
    monkeypatch.setattr(ray, "init", recorded)
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(recorded.settings))
    monkeypatch.setattr(cluster, "_started_here", False)
    monkeypatch.setattr(os, "environ", {"PATH": "/bin", "HOME": str(tmp_path)})
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray._private.authentication.authentication_token_setup")]
    levels = [logger.level for logger in loggers]
    yield recorded
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def test_a_local_driver_gives_workers_the_package_by_its_absolute_path(calls: Calls) -> None:
    cluster.connect()
    assert calls.environment == {**cluster.WORKER_ENV, "PYTHONPATH": str(cluster.SOURCE_ROOT)}
    assert (cluster.SOURCE_ROOT / "rayward" / "cluster.py").is_file()
    assert {name: os.environ[name] for name in cluster.WORKER_ENV} == cluster.WORKER_ENV
    assert calls.settings[0]["log_to_driver"] is False
    assert cluster.started_here()


def test_a_cluster_that_runs_on_this_machine_is_joined(calls: Calls) -> None:
    calls.running = True
    cluster.connect()
    assert calls.settings[0]["address"] == "auto"
    assert not cluster.started_here()


@pytest.mark.parametrize(("address", "started"), [("local", True), ("ray-head:6379", False)])
def test_an_address_is_taken_as_it_is_given(calls: Calls, address: str, started: bool) -> None:
    os.environ["RAY_ADDRESS"] = address
    cluster.connect()
    assert "address" not in calls.settings[0]
    assert cluster.started_here() is started


def test_ray_still_marks_the_entry_point_of_a_job_by_the_variable_that_we_read() -> None:
    from ray._private.runtime_env import constants

    found = getattr(constants, "RAY_JOB_CONFIG_JSON_ENV_VAR", None)
    assert found == cluster.JOB_VARIABLE, f"Ray {ray.__version__} no longer has {cluster.JOB_VARIABLE}: see rayward/cluster.py"


def test_ray_still_says_whether_a_process_is_one_of_its_workers() -> None:
    from ray.runtime_context import RuntimeContext

    context = RuntimeContext(SimpleNamespace(mode="any"))
    found = getattr(getattr(context, "worker", None), "mode", None)
    assert found == "any", f"Ray {ray.__version__} no longer has RuntimeContext.worker.mode: see gpu_reserved in rayward/cluster.py"
    assert hasattr(ray, "WORKER_MODE"), f"Ray {ray.__version__} no longer has ray.WORKER_MODE: see gpu_reserved in rayward/cluster.py"


def test_who_is_connected_stays_so(calls: Calls) -> None:
    cluster.connect()
    cluster.connect()
    assert len(calls.settings) == 1


def token_file() -> Path:
    return Path(os.environ["HOME"]) / ".ray" / "auth_token"


def test_a_cluster_that_is_started_here_is_on_loopback_and_asks_for_a_token_that_only_the_user_reads(calls: Calls) -> None:
    cluster.connect()
    assert calls.on_loopback == [True]
    # Unset, Ray asks for the token; what was set for the start is gone.
    assert "RAY_AUTH_MODE" not in os.environ
    assert cluster.LOOPBACK_VARIABLE not in os.environ
    assert ray_constants.ENABLE_RAY_CLUSTER
    assert len(token_file().read_text()) == 64
    assert stat.S_IMODE(token_file().stat().st_mode) == 0o600


def test_a_token_that_is_there_is_kept(calls: Calls) -> None:
    token_file().parent.mkdir()
    token_file().write_text("mine")
    cluster.connect()
    assert token_file().read_text() == "mine"


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "secret"), ("RAY_AUTH_TOKEN_PATH", "/x")])
def test_no_token_is_made_where_the_user_says_otherwise(calls: Calls, name: str, value: str) -> None:
    os.environ[name] = value
    cluster.connect()
    assert calls.on_loopback == [True]
    assert not token_file().exists()
    assert os.environ[name] == value


def test_a_home_that_takes_no_token_is_named(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    os.environ["HOME"] = str(tmp_path / "home")
    with pytest.raises(ConfigError, match="auth_token"):
        cluster.connect()
    assert not calls.settings


@pytest.mark.parametrize("address", [None, "ray-head:6379"])
def test_for_a_cluster_that_is_joined_no_token_is_made(calls: Calls, address: str | None) -> None:
    calls.running = True
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    cluster.connect()
    # A cluster that was started so is found under the address that it has; others are none the worse.
    assert calls.on_loopback == [True]
    assert "RAY_AUTH_MODE" not in os.environ
    assert not token_file().exists()


def test_ray_still_takes_the_loopback_address_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"Ray {ray.__version__} no longer has it: see _on_loopback in rayward/cluster.py"
    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR == cluster.LOOPBACK_VARIABLE, said
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    assert services.get_node_ip_address() == cluster.LOOPBACK, said


def test_authentication_that_the_user_chose_is_kept(calls: Calls) -> None:
    os.environ["RAY_AUTH_MODE"] = "token"
    cluster.connect()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_in_a_submitted_job_workers_find_the_package_in_their_own_working_directory(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"
    monkeypatch.chdir(cluster.SOURCE_ROOT.parent)
    cluster.connect()
    # Relative: the working directory lies elsewhere on every node.
    assert calls.environment["PYTHONPATH"] == cluster.SOURCE_ROOT.name
    assert "RAY_AUTH_MODE" not in os.environ
    assert not cluster.started_here()


def test_a_submitted_job_with_an_installed_package_takes_it_from_there(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"
    monkeypatch.chdir(tmp_path)
    cluster.connect()
    assert calls.environment["PYTHONPATH"] == str(cluster.SOURCE_ROOT)


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False)])
def test_the_output_of_workers_is_shown_on_request(calls: Calls, value: str, shown: bool) -> None:
    os.environ[cluster.SHOW_WORKER_LOGS] = value
    cluster.connect()
    assert calls.settings[0]["log_to_driver"] is shown


def test_results_of_a_submitted_job_outlive_its_working_directory(calls: Calls) -> None:
    assert cluster.lasting("runs/a") == "runs/a"
    os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"
    os.environ["HOME"] = "/home/someone"
    assert cluster.lasting("runs/a") == "/home/someone/rayward/runs/a"
    assert cluster.lasting("/data/runs") == "/data/runs"
    assert cluster.lasting("s3://bucket/runs") == "s3://bucket/runs"


def test_a_worker_without_a_gpu_sees_none() -> None:
    assert cluster.device_environment(0) == {"CUDA_VISIBLE_DEVICES": ""}
    assert cluster.device_environment(0.5) == {}
