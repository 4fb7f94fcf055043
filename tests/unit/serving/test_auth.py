"""Keys: where they come from, what they allow, how they are revoked, what is never shown of them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from rayward.config.scoring import ScoringConfig
from rayward.errors import AccessError, ConfigError
from rayward.serving.auth import Keys, check_exposure, is_domain, is_loopback, parse_variable, read_keys, without_secrets

SECRET = "s3cret-0123456789abcdef"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()
OTHER = "another-0123456789abcdef"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write(path: Path, *entries: Any) -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def caller(keys: Keys, secret: str) -> str:
    return keys.caller_of(f"Bearer {secret}", "10.0.0.1").name


def test_keys_of_a_file_have_names_scopes_and_limits(tmp_path: Path) -> None:
    path = write(
        tmp_path / "keys.jsonl",
        "# who trains",
        {"name": "ppo", "key": SECRET, "requests_per_s": 5, "max_concurrent": 2},
        "",
        {"name": "ops", "sha256": hashlib.sha256(OTHER.encode()).hexdigest().upper(), "scopes": ["score", "admin"]},
    )
    keys = Keys(path=path)
    found = keys.caller_of(f"Bearer {SECRET}", None)
    assert (found.name, found.scopes, found.limits.requests_per_s, found.limits.max_concurrent) == ("ppo", frozenset({"score"}), 5.0, 2)
    keys.caller_of(f"Bearer {OTHER}", None).require("admin")
    with pytest.raises(AccessError) as caught:
        found.require("admin")
    assert caught.value.status == 403


def test_a_revoked_key_is_refused_from_the_next_request_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    path = write(tmp_path / "keys", {"name": "a", "key": SECRET}, {"name": "b", "key": OTHER})
    keys = Keys(path=path, clock=clock)
    assert caller(keys, SECRET) == "a"
    write(path, {"name": "b", "key": OTHER})
    clock.now += 2.0
    with pytest.raises(AccessError, match="not known here, or was revoked"):
        caller(keys, SECRET)
    assert caller(keys, OTHER) == "b"
    assert SECRET not in caplog.text


def test_a_file_that_is_replaced_by_one_of_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path / "keys", {"name": "a", "key": SECRET})
    stat = path.stat()
    keys = Keys(path=path, clock=clock)
    new = write(tmp_path / "new", {"name": "b", "key": SECRET[::-1]})
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new.replace(path)
    assert path.stat().st_size == stat.st_size
    clock.now += 2.0
    assert caller(keys, SECRET[::-1]) == "b"


def test_a_broken_file_keeps_the_former_keys_and_a_missing_one_keeps_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    path = write(tmp_path / "keys", {"name": "a", "key": SECRET})
    keys = Keys(path=path, clock=clock)
    write(path, '{"name": "a", "key": "' + OTHER)
    clock.now += 2.0
    assert caller(keys, SECRET) == "a"
    assert "former keys stay valid" in caplog.text
    assert OTHER not in caplog.text
    path.unlink()
    clock.now += 2.0
    with pytest.raises(AccessError):
        caller(keys, SECRET)
    # It still asks for a key: losing the file opens nothing.
    with pytest.raises(AccessError):
        keys.caller_of(None, "127.0.0.1")
    write(path, {"name": "back", "key": SECRET})
    clock.now += 2.0
    assert caller(keys, SECRET) == "back"


def test_keys_of_the_environment() -> None:
    keys = Keys.of(
        ScoringConfig(), {"RAYWARD_API_KEYS": f" ppo:{SECRET} ,ops:sha256={hashlib.sha256(OTHER.encode()).hexdigest()}:score+admin,"}
    )
    assert caller(keys, SECRET) == "ppo"
    keys.caller_of(f"Bearer {OTHER}", None).require("admin")
    assert not Keys.of(ScoringConfig(), {}).required


def test_the_file_goes_before_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path / "keys", {"name": "a", "key": SECRET})
    keys = Keys.of(ScoringConfig(keys_file=str(path)), {"RAYWARD_API_KEYS": f"b:{OTHER}"})
    assert caller(keys, SECRET) == "a"
    with pytest.raises(AccessError):
        caller(keys, OTHER)


def test_what_other_processes_are_given_holds_no_key() -> None:
    text = f"ppo:{SECRET}, ops:{OTHER}:admin+score"
    hidden = without_secrets(text)
    assert SECRET not in hidden
    assert OTHER not in hidden
    assert parse_variable(hidden) == parse_variable(text)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        json.dumps({"name": "a"}),
        json.dumps({"name": "a", "key": SECRET, "sha256": DIGEST}),
        json.dumps({"name": "a", "key": "short"}),
        json.dumps({"name": "a", "key": SECRET + " "}),
        json.dumps({"name": "a", "key": SECRET + "é"}),
        json.dumps({"name": "a b", "key": SECRET}),
        json.dumps({"name": "a", "key": SECRET, "scopes": ["root"]}),
        json.dumps({"name": "a", "key": SECRET, "scope": ["score"]}),
        json.dumps({"name": "a", "sha256": "12"}),
        json.dumps({"name": "a", "key": SECRET, "requests_per_s": 0}),
    ],
)
def test_a_wrong_line_is_named_and_never_quoted(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "keys", "# comment", line)
    with pytest.raises(ConfigError, match="line 2") as caught:
        read_keys(path)
    assert SECRET not in str(caught.value)
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("text", [SECRET, f"a:{SECRET}:score:more", f"a:{SECRET}:root", "a:short", f"a b:{SECRET}"])
def test_a_wrong_entry_of_the_variable_is_named_and_never_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match="RAYWARD_API_KEYS, entry 2") as caught:
        parse_variable(f"good:{OTHER},{text}")
    assert SECRET not in str(caught.value)


def test_two_keys_of_one_name_may_do_the_same_so_that_keys_can_be_changed(tmp_path: Path) -> None:
    read_keys(write(tmp_path / "a", {"name": "ppo", "key": SECRET}, {"name": "ppo", "key": OTHER}))
    with pytest.raises(ConfigError, match="two keys of the name ppo"):
        read_keys(write(tmp_path / "b", {"name": "ppo", "key": SECRET}, {"name": "ppo", "key": OTHER, "scopes": ["admin"]}))
    with pytest.raises(ConfigError, match="same key twice"):
        read_keys(write(tmp_path / "c", {"name": "ppo", "key": SECRET}, {"name": "b", "sha256": DIGEST}))


def test_a_file_that_is_not_there_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(path=tmp_path / "none")


def test_a_server_is_not_opened_to_the_network_by_accident() -> None:
    none, some = Keys(), Keys(parse_variable(f"a:{SECRET}"))
    for host in ("0.0.0.0", "10.0.0.5", "::", "example.com"):
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            check_exposure(host, ScoringConfig(), none)
        check_exposure(host, ScoringConfig(), some)
        check_exposure(host, ScoringConfig(allow_anonymous=True), none)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        check_exposure(host, ScoringConfig(), none)


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("127.0.0.1:8000", False),
        ("[::1]:8000", False),
        ("::1", False),
        ("localhost:8000", False),
        ("node-3", False),
        ("rm.localhost", False),
        (None, False),
        ("rewards.example.com", True),
        ("rewards.example.com:8000", True),
        ("127.0.0.1.example.com.", True),
    ],
)
def test_a_server_without_keys_is_called_by_no_name_of_the_internet(host: str | None, domain: bool) -> None:
    assert is_domain(host) is domain
    if domain:
        with pytest.raises(AccessError):
            Keys().caller_of(None, "127.0.0.1", host)
        assert Keys(allow_anonymous=True).caller_of(None, "127.0.0.1", host).scopes == {"score"}
        assert Keys(parse_variable(f"a:{SECRET}")).caller_of(f"Bearer {SECRET}", None, host).name == "a"
    else:
        assert Keys().caller_of(None, "127.0.0.1", host).scopes == {"score"}


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:10.0.0.1", False),
        ("", False),
        (None, False),
    ],
)
def test_what_loopback_is(host: str | None, loopback: bool) -> None:
    assert is_loopback(host) is loopback
