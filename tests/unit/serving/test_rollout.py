"""What an administrator may do to the table of routes, and what the manager makes of it over a Serve that is a dictionary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.models import make_export

from rayward.config.scoring import ReplicaConfig, ScoringConfig
from rayward.contract.contract import Contract
from rayward.errors import ConfigError, ContractMismatchError, ModelLoadError, RaywardError, RuleError, UnavailableError, VersionError
from rayward.serving import rollout
from rayward.serving.manager import LINGER_S, RETRY_S, Manager, Standing, declared_models
from rayward.serving.routes import Release, RouteTable, application_of
from rayward.serving.table_store import StaleTableError, TableStore, table_location
from rayward.wire.native import ModelInfo

FRONT = "front"


def info(version: str) -> ModelInfo:
    return ModelInfo(id="m", version=version, max_tokens=8, outputs=["reward"], weight_sets=[], normaliser=None, writes_critiques=False)


def ready_table(*versions: str) -> RouteTable:
    """A table of the model `m` with these versions, the first of them current."""
    table = RouteTable()
    for version in versions:
        table = rollout.publish(table, "m", Release(version=version, source=f"/{version}"))
        table = rollout.loaded(table, "m", version, info(version), front=FRONT)
    return table


def test_only_the_first_version_of_a_model_promotes_itself() -> None:
    routes = ready_table("a", "b").models["m"]
    assert (routes.current, routes.previous) == ("a", None)
    assert set(routes.releases) == {"a", "b"}
    assert ready_table("a").default_model == "m"


def test_promote_keeps_one_version_for_a_rollback_and_lets_the_one_before_go() -> None:
    table = rollout.promote(ready_table("a", "b", "c"), "m", "b")
    assert (table.models["m"].current, table.models["m"].previous) == ("b", "a")
    table = rollout.promote(table, "m", "c")
    routes = table.models["m"]
    assert (routes.current, routes.previous, set(routes.releases)) == ("c", "b", {"b", "c"})
    back = rollout.rollback(table, "m").models["m"]
    assert (back.current, back.previous, set(back.releases)) == ("b", "c", {"b", "c"})
    assert rollout.promote(table, "m", "c") == table


def test_a_version_with_another_part_outlives_its_time_as_the_previous_one() -> None:
    table = rollout.promote(ready_table("a", "b", "c"), "m", "b")
    table = rollout.promote(rollout.canary(table, "m", "a", 0.1), "m", "c")
    routes = table.models["m"]
    assert routes.canary is not None
    assert set(routes.releases) == {"a", "b", "c"}
    assert set(rollout.canary(table, "m", "a", 0.0).models["m"].releases) == {"a", "b", "c"}


def test_a_promoted_canary_or_shadow_loses_that_part() -> None:
    table = rollout.shadow(rollout.canary(ready_table("a", "b"), "m", "b", 0.25), "m", "b")
    routes = rollout.promote(table, "m", "b").models["m"]
    assert (routes.current, routes.canary, routes.shadow) == ("b", None, None)
    assert rollout.shadow(table, "m", None).models["m"].shadow is None


def test_what_cannot_be_done_is_refused() -> None:
    table = rollout.publish(ready_table("a"), "m", Release(version="b", source="/b"))
    with pytest.raises(VersionError, match="is loading"):
        rollout.promote(table, "m", "b")
    for change in (rollout.promote, rollout.shadow, rollout.retire):
        with pytest.raises(RuleError) as caught:
            change(table, "m", "z")
        assert caught.value.code == "unknown_version"
        with pytest.raises(RuleError) as caught:
            change(table, "n", "a")
        assert caught.value.code == "unknown_model"
    with pytest.raises(VersionError, match="no version"):
        rollout.rollback(table, "m")
    with pytest.raises(VersionError, match="already"):
        rollout.canary(table, "m", "a", 0.1)
    with pytest.raises(VersionError, match="already"):
        rollout.shadow(table, "m", "a")
    with pytest.raises(VersionError, match="promote another one first"):
        rollout.retire(table, "m", "a")
    for share in (1.0, -0.1, 2.0, float("nan")):
        with pytest.raises(RuleError, match="share"):
            rollout.canary(table, "m", "b", share)
    with pytest.raises(RuleError, match="name"):
        rollout.publish(table, "org/model", Release(version="b", source="/b"))


def test_retire_takes_every_part_away_and_a_whole_model_with_its_name() -> None:
    table = rollout.promote(ready_table("a", "b", "c"), "m", "b")
    table = rollout.shadow(rollout.canary(table, "m", "c", 0.5), "m", "a")
    table = rollout.retire(rollout.retire(table, "m", "a"), "m", "c")
    routes = table.models["m"]
    assert (routes.previous, routes.canary, routes.shadow, set(routes.releases)) == (None, None, None, {"b"})
    assert rollout.retire(table, "m", None).models == {}
    assert rollout.retire(table, "m", None).default_model is None


def test_a_failed_version_leaves_the_others_and_may_be_published_again() -> None:
    table = rollout.publish(ready_table("a"), "m", Release(version="b", source="/b", promote=True))
    table = rollout.failed(table, "m", "b", ModelLoadError("no", remedy="mend it"))
    assert table.models["m"].current == "a"
    assert RaywardError.from_json(table.models["m"].releases["b"].error or "").problem == "no"
    again = rollout.publish(table, "m", Release(version="b", source="/b2")).models["m"].releases["b"]
    assert (again.state, again.error, again.source) == ("loading", None, "/b2")


def test_a_published_version_that_is_ready_takes_new_settings_and_stays_ready() -> None:
    table = rollout.publish(ready_table("a"), "m", Release(version="a", source="/other", config=ReplicaConfig(max_replicas=4)))
    release = table.models["m"].releases["a"]
    assert (release.state, release.source, release.config.max_replicas) == ("ready", "/a", 4)


def test_a_version_is_what_its_replica_says() -> None:
    key = rollout.unnamed("/foreign", None)
    table = rollout.publish(RouteTable(), "m", Release(version=key, source="/foreign"))
    application = table.application(FRONT, "m", key)
    table = rollout.loaded(table, "m", key, info("unverified-1"), front=FRONT)
    assert set(table.models["m"].releases) == {"unverified-1"}
    assert table.application(FRONT, "m", "unverified-1") == application == application_of(FRONT, "m", key)
    # The same files once more, from elsewhere: nothing new runs.
    again = rollout.unnamed("/copy", None)
    table = rollout.publish(table, "m", Release(version=again, source="/copy"))
    table = rollout.loaded(table, "m", again, info("unverified-1"), front=FRONT)
    assert set(table.models["m"].releases) == {"unverified-1"}
    assert table.application(FRONT, "m", "unverified-1") == application
    # An exported model that was exchanged between publishing and loading.
    table = rollout.publish(table, "m", Release(version="c1", source="/c"))
    table = rollout.loaded(table, "m", "c1", info("c2"), front=FRONT)
    assert table.models["m"].releases["c1"].state == "failed"


# ---- storage ----


def test_a_table_survives_its_writers_and_each_change_counts_once(tmp_path: Path) -> None:
    store = TableStore(table_location(str(tmp_path), front=FRONT, session="s"))
    assert store.read() == RouteTable()
    table = store.change(lambda t: rollout.publish(t, "m", Release(version="a", source="/a")))
    assert table.generation == 1
    assert TableStore(store.location).read() == table
    assert store.change(lambda t: t).generation == 1
    with pytest.raises(RuleError):
        store.change(lambda t: rollout.promote(t, "m", "z"))
    assert store.read() == table


def test_two_writers_never_lose_a_change(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    stores = [TableStore(str(tmp_path)) for _ in range(4)]

    def publish(number: int) -> None:
        stores[number % 4].change(lambda t: rollout.publish(t, "m", Release(version=f"v{number}", source="/x")))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(publish, range(40)))
    table = stores[0].read()
    assert (table.generation, len(table.models["m"].releases)) == (40, 40)


def test_an_object_store_notices_another_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    fsspec.filesystem("memory").store.clear()
    first, second = TableStore("memory://routes"), TableStore("memory://routes")
    first.change(lambda t: rollout.publish(t, "m", Release(version="a", source="/a")))

    def meanwhile(table: RouteTable) -> RouteTable:
        second.change(lambda t: rollout.publish(t, "m", Release(version="b", source="/b")))
        return rollout.publish(table, "m", Release(version="c", source="/c"))

    with pytest.raises(StaleTableError):
        first.change(meanwhile)
    assert set(first.read().models["m"].releases) == {"a", "b"}


def test_a_damaged_table_is_named_and_an_absent_storage_is_retryable(tmp_path: Path) -> None:
    (tmp_path / "routes.json").write_text("{")
    with pytest.raises(ConfigError, match="table of routes"):
        TableStore(str(tmp_path)).read()
    (tmp_path / "routes.json").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError) as caught:
        TableStore(str(tmp_path / "file")).change(lambda t: ready_table("a"))
    assert caught.value.retryable


def test_without_state_a_table_belongs_to_its_cluster() -> None:
    one, other = (table_location(None, front=FRONT, session=session) for session in ("s1", "s2"))
    assert one != other
    assert table_location("s3://bucket/state", front=FRONT, session="s1") == f"s3://bucket/state/{FRONT}"


# ---- the manager ----


class Serve:
    """Applications by name; what becomes of one that is started is decided by its source."""

    def __init__(self) -> None:
        self.apps: dict[str, Standing] = {}
        self.versions: dict[str, str] = {}
        self.errors: dict[str, RaywardError] = {}
        self.started: list[str] = []

    def standing(self) -> dict[str, Standing]:
        return dict(self.apps)

    def start(self, application: str, model: str, release: Release) -> None:
        self.started.append(application)
        error = self.errors.get(release.source)
        if error is not None:
            self.apps[application] = Standing("failed", f"Traceback\n{error.marked().__notes__[0]}")
            return
        self.apps[application] = Standing("running", num_replicas=1)
        config = Path(release.source) / "contract.json"
        self.versions[application] = Contract.load(config.parent).model_version() if config.exists() else "unverified-1"

    def stop(self, application: str) -> None:
        self.apps.pop(application)

    def info(self, application: str) -> ModelInfo:
        return info(self.versions[application])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two exported models with different weights."""
    root = tmp_path_factory.mktemp("exports")
    return [make_export(root / "one"), make_export(root / "two", seed=5)]


@pytest.fixture
def serve() -> Serve:
    return Serve()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def manager_of(tmp_path: Path, serve: Serve, clock: Clock, **config: Any) -> Manager:
    return Manager(TableStore(str(tmp_path / "state")), serve, ScoringConfig(**config), front=FRONT, clock=clock, now=lambda: 1e9)


def ask(manager: Manager, verb: str, **body: Any) -> dict[str, Any]:
    return manager.administer(verb, json.dumps(body).encode())


def settle(manager: Manager) -> dict[str, Any]:
    """As many rounds as anything needs that does not wait for the clock."""
    for _ in range(3):
        manager.tick()
    return manager.listing()


def versions_of(exports: list[Path]) -> list[str]:
    return [Contract.load(path).model_version() for path in exports]


def test_a_model_of_the_settings_is_loaded_and_answers(tmp_path: Path, serve: Serve, clock: Clock, exports: list[Path]) -> None:
    first, _ = versions_of(exports)
    listing = settle(manager_of(tmp_path, serve, clock, model=str(exports[0]), model_name="m"))
    assert listing["models"]["m"]["current"] == first
    (version,) = listing["models"]["m"]["versions"]
    assert (version["state"], version["roles"], version["serve"]) == ("ready", ["current"], "running")
    assert serve.started == [application_of(FRONT, "m", first)]


def test_publish_canary_promote_rollback_and_retire(tmp_path: Path, serve: Serve, clock: Clock, exports: list[Path]) -> None:
    first, second = versions_of(exports)
    manager = manager_of(tmp_path, serve, clock, model=str(exports[0]), model_name="m")
    settle(manager)
    assert ask(manager, "publish", model="m", source=str(exports[1]))["published"] == second
    with pytest.raises(VersionError):
        ask(manager, "promote", model="m", version=second)
    assert settle(manager)["models"]["m"]["current"] == first
    assert ask(manager, "canary", model="m", version=second, share=0.2)["models"]["m"]["canary_share"] == 0.2
    assert ask(manager, "promote", model="m", version=second)["models"]["m"]["current"] == second
    listing = ask(manager, "rollback", model="m")
    assert (listing["models"]["m"]["current"], listing["models"]["m"]["previous"]) == (first, second)
    ask(manager, "retire", model="m", version=second)
    settle(manager)
    assert application_of(FRONT, "m", second) in serve.apps, "every ingress must have read the table first"
    clock.now += LINGER_S
    settle(manager)
    assert set(serve.apps) == {application_of(FRONT, "m", first)}


def test_a_model_that_does_not_verify_leaves_the_running_one_alone(tmp_path: Path, serve: Serve, clock: Clock, exports: list[Path]) -> None:
    first, second = versions_of(exports)
    settle(manager_of(tmp_path, serve, clock, model=str(exports[0]), model_name="m"))
    serve.errors[str(exports[1])] = ContractMismatchError("head: changed", remedy="restore it")
    # The application is redeployed with the damaged model in its settings.
    manager = manager_of(tmp_path, serve, clock, model=str(exports[1]), model_name="m")
    listing = settle(manager)
    assert listing["models"]["m"]["current"] == first
    states = {v["version"]: (v["state"], v["error"] and v["error"]["type"]) for v in listing["models"]["m"]["versions"]}
    assert states == {first: ("ready", None), second: ("failed", "ContractMismatchError")}
    assert set(serve.apps) == {application_of(FRONT, "m", first)}
    clock.now += 10 * RETRY_S
    settle(manager)
    assert serve.started.count(application_of(FRONT, "m", second)) == 1


def test_changed_settings_promote_and_the_same_ones_leave_an_administrators_choice(
    tmp_path: Path, serve: Serve, clock: Clock, exports: list[Path]
) -> None:
    first, second = versions_of(exports)
    settle(manager_of(tmp_path, serve, clock, model=str(exports[0]), model_name="m"))
    manager = manager_of(tmp_path, serve, clock, model=str(exports[1]), model_name="m")
    assert settle(manager)["models"]["m"]["current"] == second
    ask(manager, "rollback", model="m")
    again = manager_of(tmp_path, serve, clock, model=str(exports[1]), model_name="m")
    assert settle(again)["models"]["m"]["current"] == first


def test_a_new_cluster_with_the_same_state_serves_the_same_table(tmp_path: Path, serve: Serve, clock: Clock, exports: list[Path]) -> None:
    first, second = versions_of(exports)
    manager = manager_of(tmp_path, serve, clock, model=str(exports[0]), model_name="m")
    settle(manager)
    ask(manager, "publish", model="m", source=str(exports[1]), promote=True)
    before = settle(manager)
    assert before["models"]["m"]["current"] == second
    empty = Serve()
    again = manager_of(tmp_path, empty, clock, model=str(exports[0]), model_name="m")
    again.tick()
    starting = {version: release.starting for version, release in TableStore(str(tmp_path / "state")).read().models["m"].releases.items()}
    assert starting == {first: True, second: True}, "verified before, but nobody can score yet"
    after = settle(again)
    assert not any(release.starting for release in TableStore(str(tmp_path / "state")).read().models["m"].releases.values())
    assert after["models"] == before["models"]
    assert set(empty.apps) == {application_of(FRONT, "m", version) for version in (first, second)}


def test_new_settings_of_a_version_reach_serve_once(tmp_path: Path, serve: Serve, clock: Clock, exports: list[Path]) -> None:
    manager = manager_of(tmp_path, serve, clock, model=str(exports[0]), model_name="m")
    settle(manager)
    ask(manager, "publish", model="m", source=str(exports[0]), config={"max_replicas": 3})
    settle(manager)
    assert len(serve.started) == 2
    release = TableStore(str(tmp_path / "state")).read().models["m"].releases[versions_of(exports)[0]]
    assert (release.state, release.config.max_replicas) == ("ready", 3)


def test_a_running_version_whose_new_start_fails_is_kept_and_tried_again(
    tmp_path: Path, serve: Serve, clock: Clock, exports: list[Path]
) -> None:
    first, _ = versions_of(exports)
    manager = manager_of(tmp_path, serve, clock, model=str(exports[0]), model_name="m")
    settle(manager)
    empty = Serve()
    empty.errors[str(exports[0])] = ModelLoadError("the disk is away", remedy="mount it")
    manager = manager_of(tmp_path, empty, clock, model=str(exports[0]), model_name="m")
    listing = settle(manager)
    (version,) = listing["models"]["m"]["versions"]
    assert (version["state"], version["error"]["message"], listing["models"]["m"]["current"]) == ("ready", "the disk is away", first)
    assert len(empty.started) == 1
    empty.errors.clear()
    clock.now += RETRY_S
    (version,) = settle(manager)["models"]["m"]["versions"]
    assert (version["state"], version["error"], len(empty.started)) == ("ready", None, 2)


def test_a_first_model_that_cannot_be_read_is_tried_again(tmp_path: Path, serve: Serve, clock: Clock, exports: list[Path]) -> None:
    later = tmp_path / "later"
    manager = manager_of(tmp_path, serve, clock, model=str(later), model_name="m")
    assert settle(manager)["unreadable"]["m"]["type"] == "ModelLoadError"
    later.symlink_to(exports[0])
    clock.now += RETRY_S
    listing = settle(manager)
    assert (listing["unreadable"], listing["models"]["m"]["current"]) == ({}, versions_of(exports)[0])


def test_the_applications_of_others_are_not_touched(tmp_path: Path, serve: Serve, clock: Clock) -> None:
    serve.apps = {name: Standing("running") for name in ("frontal", "other", "front", "front-b.m.v")}
    manager = manager_of(tmp_path, serve, clock)
    settle(manager)
    clock.now += 2 * LINGER_S
    settle(manager)
    assert len(serve.apps) == 4
    with pytest.raises(ConfigError, match="letters"):
        Manager(TableStore(str(tmp_path)), serve, ScoringConfig(), front="front.b")


def test_the_versions_end_with_the_application_and_not_with_its_manager(
    tmp_path: Path, serve: Serve, clock: Clock, exports: list[Path]
) -> None:
    manager = manager_of(tmp_path, serve, clock, model=str(exports[0]), model_name="m")
    settle(manager)
    serve.apps |= {FRONT: Standing("running"), "other": Standing("running")}
    manager.end()
    assert len(serve.apps) == 3
    serve.apps[FRONT] = Standing("stopping")
    manager.end()
    assert set(serve.apps) == {FRONT, "other"}


@pytest.mark.parametrize(
    ("verb", "body", "code"),
    [
        ("publish", {"model": "m"}, "missing_field"),
        ("publish", {"model": "m", "source": "a/b/c"}, "bad_source"),
        ("publish", {"model": "a b", "source": "/x"}, "bad_name"),
        ("publish", {"model": "m", "source": "/x", "config": {"max_replica": 2}}, "bad_config"),
        ("publish", {"model": "m", "source": "/x", "config": {"model": "y"}}, "bad_config"),
        ("promote", {"model": "m", "version": 1}, "wrong_type"),
        ("promote", {"model": "m", "version": "a", "extra": 1}, "unknown_field"),
        ("canary", {"model": "m", "version": "a", "share": "much"}, "wrong_type"),
        ("destroy", {}, "not_found"),
    ],
)
def test_what_is_asked_wrongly_is_named(tmp_path: Path, serve: Serve, clock: Clock, verb: str, body: dict[str, Any], code: str) -> None:
    manager = manager_of(tmp_path, serve, clock)
    with pytest.raises(RuleError) as caught:
        ask(manager, verb, **body)
    assert caught.value.code == code
    with pytest.raises(RuleError) as caught:
        manager.administer("publish", b"[1]")
    assert caught.value.code == "wrong_type"
    with pytest.raises(RuleError) as caught:
        manager.administer("publish", b"{")
    assert caught.value.code == "invalid_json"


def test_publishing_what_is_no_model_changes_nothing(tmp_path: Path, serve: Serve, clock: Clock) -> None:
    manager = manager_of(tmp_path, serve, clock)
    with pytest.raises(ModelLoadError):
        ask(manager, "publish", model="m", source=str(tmp_path / "nothing"))
    assert manager.listing()["models"] == {}


def test_models_of_the_settings_have_names() -> None:
    assert declared_models(ScoringConfig(model="x/first", models={"second": "/y"})) == {"first": "x/first", "second": "/y"}
    assert list(declared_models(ScoringConfig(model="s3://bucket/dir/m?region=x"))) == ["m"]
    assert list(declared_models(ScoringConfig(model="hf:org/model@main"))) == ["model"]
    for wrong in ({"model": "/a/m", "models": {"m": "/b"}}, {"model_name": "m"}, {"models": {"a b": "/x"}}):
        with pytest.raises(ConfigError):
            declared_models(ScoringConfig(**wrong))
