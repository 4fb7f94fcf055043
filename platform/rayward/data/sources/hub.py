"""Data sets of the Hugging Face hub, stored once where every node can read them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pyarrow import fs as pafs

from rayward import storage
from rayward.data.sources.find import Role, SourceFile
from rayward.errors import DataError

HUB_PREFIX = "hf:"


@dataclass(frozen=True, slots=True)
class HubName:
    """`hf:owner/name[/config][@split]`, taken apart."""

    name: str
    config: str | None
    split: str


def parse_hub_name(location: str, role: Role) -> HubName:
    """Take `hf:owner/name[/config][@split]` apart; the split defaults to `train`, `validation` or (of a benchmark) `test`, by role.

    Raises:
        DataError: the name does not have that form.
    """
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:/([^@/]+))?(?:@(.+))?", location)
    if match is None:
        raise DataError(f"{location!r} is not a hub name", remedy="write hf:owner/name, hf:owner/name/config or hf:owner/name/config@split")
    return HubName(match[1], match[2], match[3] or ("test" if role == "contamination" else role))


def download(hub: HubName, directory: str, role: Role) -> SourceFile:
    """Load a hub data set and store it once as Parquet under `directory`, where every node can read it.

    Raises:
        DataError: there is no such data set, configuration or split, or the hub cannot be reached.
    """
    import datasets

    label = f"{HUB_PREFIX}{hub.name}{'/' + hub.config if hub.config else ''}@{hub.split}"
    try:
        loaded = datasets.load_dataset(hub.name, hub.config, split=hub.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as exc:
        raise DataError(f"{label} cannot be loaded: {exc}", remedy="check the name, the configuration, the split and the network") from exc
    name = re.sub(r"[^\w.-]+", "--", label.removeprefix(HUB_PREFIX))
    uri = storage.join(directory, f"{name}-{loaded._fingerprint}.parquet")
    filesystem, path = storage.resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.NotFound:
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        partial = f"{path}.partial-{os.getpid()}"
        with filesystem.open_output_stream(partial) as stream:
            loaded.to_parquet(stream)
        filesystem.move(partial, path)
    uri = uri if "://" in uri else path
    return SourceFile(uri, "parquet", False, hub.name.partition("/")[2], role, filesystem.get_file_info(path).size)
