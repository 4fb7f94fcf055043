"""Versions of a model on a real local Serve: published, compared, promoted, rolled back, retired under load, the manager killed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from tests.helpers.models import make_export
from tests.helpers.processes import named, until

from rayward.config.scoring import ScoringConfig
from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ContractMismatchError, RaywardError, VersionError
from rayward.scoring.scorer import Scorer
from rayward.wire.items import ScoreItem
from rayward.workflows.publish import Service, publish_model

# Ray Serve 2.60 is imported inside fixtures and tests: its own models warn about deprecated pydantic settings.
pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # A socket of Ray's own that is collected late would fail whichever test runs then.
    pytest.mark.filterwarnings("default::ResourceWarning"),
]

APP = f"rollout-{os.getpid()}"
KEY = "for-the-administrator-of-a-test"
PROMPT, COMPLETIONS = "Hi", ("Hello", "No!", "Good morning to you")
ITEM = {"prompt": PROMPT, "completions": COMPLETIONS}


@pytest.fixture(scope="module")
def app(ray_local: None) -> Iterator[ModuleType]:
    """The module that imports ray.serve; Serve is gone afterwards."""
    from ray import serve

    from rayward.serving import app

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAYWARD_API_KEYS", f"ops:{KEY}:score+admin")
        environment.setenv("RAYWARD_API_KEY", KEY)
        yield app
    serve.shutdown()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions of one model."""
    root = tmp_path_factory.mktemp("versions")
    return [make_export(root / "one"), make_export(root / "two", seed=5)]


@pytest.fixture(scope="module")
def versions(exports: list[Path]) -> list[str]:
    return [Contract.load(path).model_version() for path in exports]


@pytest.fixture(scope="module")
def expected(exports: list[Path], versions: list[str]) -> dict[str, tuple[float, ...]]:
    """Version -> the rewards of `ITEM`, scored without any service."""
    item = ScoreItem(({"role": "user", "content": PROMPT},), COMPLETIONS)
    found = {version: Scorer.load(path, device="cpu").score([item])[0].rewards for version, path in zip(versions, exports, strict=True)}
    assert None not in found.values()
    return {version: rewards for version, rewards in found.items() if rewards is not None}


@pytest.fixture(scope="module")
def config(exports: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ScoringConfig:
    return ScoringConfig(
        model=str(exports[0]), model_name="m", state=str(tmp_path_factory.mktemp("state")), device="cpu", cpus_per_replica=0.25
    )


@pytest.fixture(scope="module")
def url(app: ModuleType, config: ScoringConfig) -> str:
    return str(app.serve_model(config, port=0, name=APP))


@pytest.fixture
def service(url: str) -> Service:
    return Service(url)


class Load:
    """Callers that score one item again and again, and keep their ledger.

    Attributes:
        answers: replies by version.
        wrong: replies whose rewards are not those of their version, and everything that was no reply.
    """

    def __init__(self, url: str, expected: dict[str, tuple[float, ...]], num_callers: int = 3) -> None:
        self._url, self._expected = url, expected
        self._stopped = threading.Event()
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(num_callers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, headers={"authorization": f"Bearer {KEY}"}, timeout=60.0) as http:
            while not self._stopped.is_set():
                response = http.post("/v1/score", json={"items": [ITEM]})
                if response.status_code != 200:
                    self.wrong.append(f"{response.status_code} {response.text[:200]}")
                    continue
                reply = response.json()
                rewards = reply["results"][0].get("rewards")
                if rewards is None or rewards != pytest.approx(self._expected[reply["version"]], abs=1e-5):
                    self.wrong.append(str(reply))
                self.answers[reply["version"]] += 1


def wait_for(load: Load, version: str, number: int = 5) -> None:
    """Until so many more replies are of a version."""
    before = load.answers[version]
    until(lambda: load.answers[version] >= before + number)


def test_publish_shadow_canary_promote_rollback_and_retire_lose_nothing(
    app: ModuleType, url: str, service: Service, exports: list[Path], versions: list[str], expected: dict[str, tuple[float, ...]]
) -> None:
    first, second = versions
    with Load(url, expected) as load:
        wait_for(load, first)
        assert publish_model(service, "m", str(exports[1]))["published"] == second
        assert set(load.answers) == {first}, "published is not promoted"
        service.ask("shadow", {"model": "m", "version": second})

        def drift() -> dict[str, float] | None:
            (found,) = [v["drift"] for v in service.ask("list", {})["models"]["m"]["versions"] if v["version"] == second]
            return found  # type: ignore[no-any-return]

        until(lambda: drift() is not None)
        differences = [abs(a - b) for a, b in zip(expected[first], expected[second], strict=True)]
        compared = drift()
        assert compared is not None
        assert compared["max_abs_difference"] == pytest.approx(max(differences), abs=1e-4)
        assert compared["mean_abs_difference"] == pytest.approx(sum(differences) / 3, abs=1e-4)
        service.ask("canary", {"model": "m", "version": second, "share": 0.5})
        wait_for(load, second)
        wait_for(load, first)
        service.ask("promote", {"model": "m", "version": second})
        wait_for(load, second, 20)
        service.ask("rollback", {"model": "m"})
        wait_for(load, first, 20)
        service.ask("promote", {"model": "m", "version": second})
        wait_for(load, second)
        service.ask("retire", {"model": "m", "version": first})
        until(lambda: [name for name in app.serve.status().applications if name.startswith(f"{APP}.")] == [f"{APP}.m.{second}"])
        wait_for(load, second)
    assert load.wrong == []
    pinned = httpx.post(
        f"{url}/v1/score", json={"items": [ITEM], "version": first}, headers={"authorization": f"Bearer {KEY}"}, timeout=60.0
    )
    assert pinned.status_code == 409


def test_a_model_that_fails_its_verification_leaves_the_running_one_alone(
    url: str, service: Service, exports: list[Path], versions: list[str], expected: dict[str, tuple[float, ...]], tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(exports[0], tmp_path / "bad"))
    (bad / "tokenizer.json").write_text((bad / "tokenizer.json").read_text() + " ")
    with Load(url, expected, 1) as load:
        with pytest.raises(ContractMismatchError, match="tokenizer:"):
            publish_model(service, "m", str(bad), promote=True)
        wait_for(load, versions[1])
    assert load.wrong == []
    routes = service.ask("list", {})["models"]["m"]
    assert routes["current"] == versions[1]
    assert {v["version"]: v["state"] for v in routes["versions"]} == {versions[0]: "failed", versions[1]: "ready"}
    with pytest.raises(VersionError, match="is failed"):
        service.ask("promote", {"model": "m", "version": versions[0]})


def test_only_keys_of_scope_admin_publish(url: str) -> None:
    for headers in ({}, {"authorization": "Bearer another-key-that-nobody-has"}):
        assert httpx.post(f"{url}/admin/models/list", headers=headers, timeout=60.0).status_code == 401


def test_a_name_and_a_port_belong_to_who_took_them(app: ModuleType, config: ScoringConfig, url: str, exports: list[Path]) -> None:
    other = config.model_copy(update={"model": str(exports[1]), "state": None})
    with pytest.raises(ConfigError, match="runs on this cluster already"):
        app.serve_model(other, name=APP)
    with pytest.raises(ConfigError, match="Serve listens on"):
        app.serve_model(other, name="other", port=1, route_prefix="/other")
    with pytest.raises(RaywardError):
        app.serve_model(other, name="other", route_prefix="/")
    assert {name.partition(".")[0] for name in app.serve.status().applications} == {APP}
    assert httpx.get(f"{url}/readyz", timeout=60.0).status_code == 200


@pytest.mark.drill
def test_a_killed_manager_goes_on_where_it_was(
    app: ModuleType, url: str, service: Service, exports: list[Path], versions: list[str], expected: dict[str, tuple[float, ...]]
) -> None:
    title = f"ray::ServeReplica:{APP}:manager"

    def managers() -> list[int]:
        return [process.pid for process in named(title)]

    (before,) = managers()
    with Load(url, expected, 1) as load:
        service.ask("publish", {"model": "m", "source": str(exports[0]), "promote": True})
        os.kill(before, signal.SIGKILL)
        # Whoever comes next finds in the table what was asked for.
        wait_for(load, versions[0])
        until(lambda: managers() not in ([before], []))
    assert load.wrong == []


@pytest.mark.drill
def test_a_new_service_with_the_same_state_serves_the_same_versions(
    app: ModuleType, config: ScoringConfig, url: str, versions: list[str], expected: dict[str, tuple[float, ...]]
) -> None:
    # Promoted by an administrator is another version than the settings name.
    until(lambda: Service(url).ask("list", {})["models"]["m"]["current"] == versions[0])
    Service(url).ask("rollback", {"model": "m"})
    app.take_down(config, APP)
    assert not [name for name in app.serve.status().applications if name.startswith(APP)]
    again = str(app.serve_model(config, name=APP))
    with Load(again, expected, 1) as load:
        wait_for(load, versions[1])
    assert set(load.answers) == {versions[1]}
    assert load.wrong == []


@pytest.mark.drill
def test_changed_settings_swap_the_model_without_a_gap(
    app: ModuleType, config: ScoringConfig, url: str, exports: list[Path], versions: list[str], expected: dict[str, tuple[float, ...]]
) -> None:
    with Load(url, expected) as load:
        app.serve_model(config.model_copy(update={"model": str(exports[1])}), name=APP, replace=True)
        app.serve_model(config, name=APP, replace=True)
        wait_for(load, versions[0])
    assert load.wrong == []
