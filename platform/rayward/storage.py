"""Local paths and pyarrow filesystem URIs behind the same few verbs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from rayward.errors import DataError
from rayward.schema import write_atomically

ARROW_SCHEMES = frozenset({"file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss"})
"""Schemes that pyarrow opens itself; all others go to fsspec, which knows many and takes more by `fsspec.register_implementation`."""


def resolve(location: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path in it for a local path or a URI (s3://…, gs://…, file://…, or any scheme of fsspec).

    Raises:
        DataError: no filesystem can be opened for the URI.
    """
    if "://" not in location:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))
    try:
        if location.partition("://")[0] in ARROW_SCHEMES:
            filesystem, path = pafs.FileSystem.from_uri(location)
        else:
            # Imported here: most runs never need it. ImportError: fsspec knows the scheme and its package is not installed.
            from fsspec.core import url_to_fs

            opened, path = url_to_fs(location)
            filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(opened))
    except (pa.ArrowException, OSError, ValueError, ImportError) as exc:
        raise DataError(
            f"{location}: no filesystem can be opened ({exc})",
            remedy="use a local path, a URI such as s3://, gs://, hdfs://, abfs:// or file://, or install the fsspec package of the scheme",
        ) from exc
    return filesystem, path


def absolute(location: str) -> str:
    """Local paths made absolute (workers run in other directories); URIs as they are."""
    return location if "://" in location else os.path.abspath(os.path.expanduser(location))


def join(location: str, *parts: str) -> str:
    """Append path parts to a path or URI, before its options."""
    place, options = split_options(location)
    return "/".join([place.rstrip("/"), *parts]) + options


def split_options(location: str) -> tuple[str, str]:
    """`s3://bucket/data?region=eu-west-1` -> `s3://bucket/data` and `?region=eu-west-1`; only pyarrow's URIs have options."""
    scheme, separator, _ = location.partition("://")
    if not separator or scheme not in ARROW_SCHEMES:
        return location, ""
    place, mark, options = location.partition("?")
    return place, mark + options


def read_text(filesystem: pafs.FileSystem, path: str) -> str:
    """Raises FileNotFoundError or OSError."""
    with filesystem.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read()).decode("utf-8")


def write_text(filesystem: pafs.FileSystem, path: str, text: str) -> None:
    """Write a small file so that readers see all of it or none (object stores write objects whole; local files are renamed)."""
    data = text.encode("utf-8")
    if isinstance(filesystem, pafs.LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), data)
        return
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(data)


def exists(filesystem: pafs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def version(filesystem: pafs.FileSystem, path: str) -> str:
    """What changes when the file does, by the filesystem's own word: the time of its last change, or what its store says of the object.

    Raises:
        OSError: the file is not there, or the filesystem cannot be asked.
    """
    if isinstance(filesystem, pafs.PyFileSystem) and isinstance(filesystem.handler, pafs.FSSpecHandler):
        return str(filesystem.handler.fs.ukey(path))
    return str(filesystem.get_file_info(path).mtime_ns)


def delete_dir(filesystem: pafs.FileSystem, path: str) -> None:
    """Delete a directory if it is there."""
    if exists(filesystem, path):
        filesystem.delete_dir(path)


@contextmanager
def localized(location: str, *names: str) -> Iterator[Path]:
    """A local directory with these files or folders of `location`: itself when local, else a copy that is removed at the end."""
    filesystem, root = resolve(location)
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield Path(root)
        return
    with tempfile.TemporaryDirectory(prefix="rayward-") as scratch:
        target = Path(scratch)
        for name in names:
            info = filesystem.get_file_info(f"{root}/{name}")
            if info.type == pafs.FileType.Directory:
                (target / name).mkdir(parents=True)
                pafs.copy_files(info.path, str(target / name), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem())
            elif info.type == pafs.FileType.File:
                with filesystem.open_input_stream(info.path, compression=None) as stream:
                    (target / name).write_bytes(bytes(stream.read()))
        yield target
