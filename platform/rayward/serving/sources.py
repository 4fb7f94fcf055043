"""A model by directory, URI or hub name: what is there, and a directory with it on this machine. No Ray, no torch.

A source that is no directory is copied once per machine into a cache, under the identity of its content, and read from there by every
process. Whatever lies elsewhere is asked with a time limit: a start without network ends in seconds, with a word.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from rayward.errors import DataError, ModelLoadError
from rayward.schema import digest
from rayward.storage import resolve, version

T = TypeVar("T")

CACHE_VARIABLE = "RAYWARD_CACHE"
"""Environment variable: directory of the cache; default `~/.cache/rayward`."""
HUB_NAME = re.compile(r"(?:hf:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
READ_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
"""What a model is read from: no pickled weights, no code."""
CONTACT_S = 15.0
"""How long a source elsewhere may take to say what it has."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a source holds.

    Attributes:
        content: identity of it; None for a directory of this machine, which is read where it lies.
        files: names relative to the source, with their sizes in bytes.
    """

    source: str
    content: str | None
    files: tuple[tuple[str, int], ...] = ()


def is_elsewhere(source: str) -> bool:
    """Whether the source has to be copied before it is read."""
    return not Path(source).expanduser().is_dir() and ("://" in source or HUB_NAME.fullmatch(source) is not None)


def settled_source(source: str) -> str:
    """The same source for processes with another working directory."""
    return source if is_elsewhere(source) else str(Path(source).expanduser().resolve())


def look_up(source: str, *, contact_s: float = CONTACT_S) -> Found:
    """What is there, without copying it.

    Raises:
        ModelLoadError: there is no such directory; or the place does not answer in time, does not know it, or has no model there.
    """
    if not is_elsewhere(source):
        if not Path(source).expanduser().is_dir():
            raise ModelLoadError(
                f"{source} is not a directory",
                remedy="point at an exported or downloaded model: a directory, a URI, or a hub name org/model",
            )
        return Found(source, None)
    found = _within(contact_s, source, _look_up_uri if "://" in source else _look_up_hub)
    names = {Path(name).name for name, _ in found.files}
    if not names & {"config.json", "contract.json", "ensemble.json", "implicit.json"}:
        raise ModelLoadError(f"{source} has neither contract.json nor config.json", remedy="point at an exported or downloaded model")
    return found


def localise(source: str, content: str | None = None) -> Path:
    """A directory of this machine with what the source holds: itself, or a copy in the cache, made once.

    Args:
        content: what was published; a copy of it is taken without asking the place again, and nothing else is taken for it.

    Raises:
        ModelLoadError: as `look_up`; the content is another one now; or it cannot be copied.
    """
    if not is_elsewhere(source):
        look_up(source)
        return Path(source).expanduser()
    if content is not None and (kept := _copy_of(content)).is_dir():
        return kept
    found = look_up(source)
    assert found.content is not None
    if content is not None and found.content != content:
        raise ModelLoadError(
            f"{source} is not what was published: it has changed since", remedy="publish it again; a served model must not change"
        )
    target = _copy_of(found.content)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.is_dir():
                _copy(found, target)
    except OSError as exc:
        raise ModelLoadError(
            f"{source} cannot be copied to {target} ({exc})",
            remedy=f"see that there is room, or name another directory in {CACHE_VARIABLE}",
        ) from exc
    return target


def cache_directory() -> Path:
    """Where copies are kept; a copy that is no longer wanted may be deleted at any time that nothing loads it."""
    return Path(os.environ.get(CACHE_VARIABLE, "~/.cache/rayward")).expanduser() / "models"


def _copy_of(content: str) -> Path:
    return cache_directory() / content


def _copy(found: Found, target: Path) -> None:
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        beside.mkdir()
        if "://" in found.source:
            filesystem, root = resolve(found.source)
            for name, _ in found.files:
                (beside / name).parent.mkdir(parents=True, exist_ok=True)
                pafs.copy_files(
                    f"{root}/{name}", str(beside / name), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem()
                )
        else:
            _download_hub(found, beside)
        wrong = [name for name, size in found.files if not (beside / name).is_file() or (beside / name).stat().st_size != size]
        if wrong:
            raise ModelLoadError(f"{found.source}: {wrong[0]} did not arrive whole", remedy="try again")
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _look_up_uri(source: str) -> Found:
    try:
        filesystem, root = resolve(source)
        entries = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except FileNotFoundError as exc:
        raise ModelLoadError(f"{source} is not there", remedy="point at an exported or downloaded model") from exc
    except DataError as exc:
        raise ModelLoadError(exc.problem, remedy=exc.remedy) from exc
    except (OSError, pa.ArrowException) as exc:
        raise ModelLoadError(f"{source} cannot be read ({exc})", remedy="check the URI, the network and the credentials") from exc
    files = [entry for entry in entries if entry.is_file and entry.path.endswith(READ_SUFFIXES)]
    listed = sorted(
        (os.path.relpath(entry.path, root), int(entry.size), entry.mtime_ns or version(filesystem, entry.path)) for entry in files
    )
    return Found(source, digest([source, listed])[:24], tuple((name, size) for name, size, _ in listed))


def _look_up_hub(source: str) -> Found:
    # Imported here: most services have their models in directories.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    matched = HUB_NAME.fullmatch(source)
    assert matched is not None
    try:
        info = HfApi().model_info(matched[1], revision=matched[2], files_metadata=True, timeout=CONTACT_S)
    except HfHubHTTPError as exc:
        raise ModelLoadError(
            f"{source} is neither a directory here nor a model that the hub shows ({exc.response.status_code})",
            remedy="correct the path or the name, or set HF_TOKEN for a model that is not public",
        ) from exc
    # Broad on purpose: errors of the transport come as those of whichever HTTP package this release of the hub's client is built on.
    except Exception as exc:
        raise ModelLoadError(
            f"{source} is neither a directory here, nor can the hub be asked for a model of that name ({type(exc).__name__})",
            remedy="correct the path, or check the network",
        ) from exc
    files = [(entry.rfilename, int(entry.size or 0)) for entry in info.siblings or () if entry.rfilename.endswith(READ_SUFFIXES)]
    return Found(source, f"hub-{info.sha}", tuple(files))


def _download_hub(found: Found, target: Path) -> None:
    from huggingface_hub import snapshot_download

    matched = HUB_NAME.fullmatch(found.source)
    assert matched is not None
    assert found.content is not None
    patterns = [f"*{suffix}" for suffix in READ_SUFFIXES]
    try:
        snapshot_download(matched[1], revision=found.content.removeprefix("hub-"), local_dir=target, allow_patterns=patterns)
    # Broad on purpose, as above.
    except Exception as exc:
        raise ModelLoadError(f"{found.source} could not be downloaded ({exc})", remedy="try again") from exc
    # What the download kept for its own resumption.
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _within(seconds: float, source: str, work: Callable[[str], T]) -> T:
    # In a thread that may be left behind: the libraries retry for minutes, and offer no limit that holds for all that they do.
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work(source))
        # Whatever it is, it is raised in the thread that waits.
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=run, name="look up a model", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise ModelLoadError(
            f"{source} did not answer within {seconds:g} s",
            remedy="check the network (and a proxy's settings), or copy the model here first",
        )
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    # Replicas of one machine start together: one copies, the others wait for its copy.
    lock = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
