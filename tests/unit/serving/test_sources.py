"""A model by directory, URI or hub name: what is taken for which, copied once, and what is said where nothing answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rayward.config.scoring import ScoringConfig
from rayward.errors import ConfigError, ModelLoadError
from rayward.serving import sources
from rayward.serving.preflight import check_listening, free_port

FILES = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "sub/tokenizer.json": "{}",
    "pytorch_model.bin": "pickle",
    "modeling.py": "code",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store() -> Iterator[Any]:
    """A bucket in memory with a model in it."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name, text in FILES.items():
        memory.pipe(f"/bucket/model/{name}", text.encode())
    yield memory
    memory.store.clear()


def test_a_directory_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A directory of two parts could be a hub name: what is here counts.
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sources.localise("org/model") == Path("org/model")
    assert sources.settled_source("org/model") == str(tmp_path / "org" / "model")
    assert sources.settled_source("s3://bucket/model") == "s3://bucket/model"
    assert [sources.is_elsewhere(s) for s in ("org/model", "org/other", "hf:org/model@v1", "a/b/c", "./x", "gs://a/b", "x")] == [
        False, True, True, False, False, True, False,
    ]  # fmt: skip


def test_a_uri_is_copied_once_without_code_and_pickles(store: Any, cache: Path) -> None:
    source = "memory://bucket/model"
    with ThreadPoolExecutor(4) as threads:
        (directory,) = set(threads.map(lambda _: sources.localise(source), range(4)))
    copied = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert copied == {"config.json", "model.safetensors", "sub/tokenizer.json"}
    assert (directory / "model.safetensors").read_text() == "weights"
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == [directory]


def test_what_was_published_is_what_is_loaded(store: Any) -> None:
    source = "memory://bucket/model"
    content = sources.look_up(source).content
    kept = sources.localise(source, content)
    store.pipe("/bucket/model/model.safetensors", b"sthgiew")
    # The copy is of what was published; without it, the change is noticed.
    assert sources.localise(source, content) == kept
    assert sources.look_up(source).content != content
    for path in kept.rglob("*"):
        if path.is_file():
            path.unlink()
    for path in sorted(kept.rglob("*"), reverse=True):
        path.rmdir()
    kept.rmdir()
    with pytest.raises(ModelLoadError, match="has changed since"):
        sources.localise(source, content)


def test_a_copy_that_is_not_whole_is_not_kept(store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sources.look_up("memory://bucket/model")
    store.pipe("/bucket/model/model.safetensors", b"half")
    monkeypatch.setattr(sources, "look_up", lambda source: found)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors did not arrive whole"):
        sources.localise("memory://bucket/model")
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_what_is_no_model_is_said_before_anything_is_copied(store: Any, tmp_path: Path) -> None:
    store.pipe("/bucket/other/readme.json", b"{}")
    with pytest.raises(ModelLoadError, match=r"neither contract\.json nor config\.json"):
        sources.localise("memory://bucket/other")
    with pytest.raises(ModelLoadError, match="is not there"):
        sources.localise("memory://bucket/nothing")
    with pytest.raises(ModelLoadError, match="is not a directory"):
        sources.localise(str(tmp_path / "nothing"))


def test_a_place_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()
    monkeypatch.setattr(sources, "_look_up_uri", lambda source: silent.wait())
    with pytest.raises(ModelLoadError, match=r"did not answer within 0\.01 s"):
        sources.look_up("s3://bucket/model", contact_s=0.01)
    silent.set()


def test_a_hub_that_cannot_be_asked_is_named() -> None:
    # tests/unit sets HF_HUB_OFFLINE.
    with pytest.raises(ModelLoadError, match=r"org/model is neither a directory here, nor can the hub be asked"):
        sources.look_up("org/model")


@pytest.mark.parametrize("port", [80808, -1, 65536])
def test_what_is_no_port_is_refused_before_anything_starts(port: int) -> None:
    with pytest.raises(ConfigError, match=str(port)):
        check_listening(None, port, ScoringConfig())


def test_an_address_of_the_network_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYWARD_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match="no keys"):
        check_listening("0.0.0.0", 8000, ScoringConfig())
    check_listening("0.0.0.0", 8000, ScoringConfig(allow_anonymous=True))
    check_listening("127.0.0.1", None, ScoringConfig())


def test_what_is_no_address_of_this_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        free_port("192.0.2.1", 0)
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
        free_port("no.such.host.invalid", 0)
