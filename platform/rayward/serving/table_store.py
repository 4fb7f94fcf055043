"""Where the table of routes lies: one file in storage, written by compare-and-swap of its generation."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from rayward.errors import ConfigError, UnavailableError
from rayward.serving.routes import RouteTable
from rayward.storage import absolute, join, read_text, resolve, write_text

TABLE_FILE = "routes.json"
DEFAULT_STATE = Path("~/.rayward/serving")


class StaleTableError(UnavailableError):
    """Example: two managers run for a moment while one replaces the other, and both write generation 8."""


def table_location(state: str | None, *, front: str, session: str) -> str:
    """The directory of an application's table.

    Args:
        state: of the configuration; several applications may share it.
        front: name of the application that has the ingress.
        session: of the Ray cluster. Without `state` the table belongs to the cluster: another one must not find yesterday's models.
    """
    return join(absolute(state), front) if state else str(DEFAULT_STATE.expanduser() / session / front)


class TableStore:
    """Reads and writes the table of one application.

    Args:
        location: directory or URI.

    Raises:
        ConfigError: no filesystem can be opened for it.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._filesystem, root = resolve(location)
        self._path = f"{root}/{TABLE_FILE}"

    def read(self) -> RouteTable:
        """The table as it stands; an empty one where nothing was published yet.

        Raises:
            ConfigError: the file is no table, or was written by a newer Rayward.
            UnavailableError: storage does not answer.
        """
        try:
            text = read_text(self._filesystem, self._path)
        except FileNotFoundError:
            return RouteTable()
        except (OSError, pa.ArrowException) as exc:
            raise UnavailableError(
                f"the table of routes {self.location}/{TABLE_FILE} cannot be read ({exc})",
                remedy="retry; see that its storage is reachable",
            ) from exc
        return RouteTable.parse(text, where=f"{self.location}/{TABLE_FILE}", error=ConfigError)

    def change(self, changed: Callable[[RouteTable], RouteTable]) -> RouteTable:
        """Put what a function makes of the table in its place, one generation on; nothing is written where it changes nothing.

        Raises:
            StaleTableError: somebody else wrote meanwhile; nothing was written.
            UnavailableError: storage does not answer.
            Exception: what the function raises; nothing was written.
        """
        with self._alone():
            before = self.read()
            after = changed(before)
            if after == before:
                return before
            after = after.model_copy(update={"generation": before.generation + 1})
            # On a disk the lock is what keeps others out. Object stores have none through pyarrow: there it is Serve that runs one manager,
            # and this look narrows what is left of the race while one replaces another.
            if self.read().generation != before.generation:
                raise StaleTableError(f"the table of routes was changed while generation {after.generation} was made", remedy="retry")
            try:
                write_text(self._filesystem, self._path, after.model_dump_json(indent=1) + "\n")
            except (OSError, pa.ArrowException) as exc:
                raise UnavailableError(
                    f"the table of routes {self.location}/{TABLE_FILE} cannot be written ({exc})",
                    remedy="retry; see that its storage is writable",
                ) from exc
            return after

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not isinstance(self._filesystem, pafs.LocalFileSystem):
            yield
            return
        try:
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise UnavailableError(
                f"the directory {self.location} of the table of routes cannot be written ({exc.strerror})",
                remedy="retry; see that it is writable, or name another `state`",
            ) from exc
        try:
            # Ends with the process that holds it, whatever it dies of.
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
