"""A model's own critiques of every completion of a data set: stage 2 of critique-out-loud (arXiv 2408.11791).

prepared rows ──blocks (Ray Data)──> actors write critiques ──> cache, a file a block ──> rows of format `ranking` with `critiques`

The cache is keyed by model version, row and sampling: the same command goes on where it was stopped, and a new model starts anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs

from rayward import storage
from rayward.cluster import connect
from rayward.config.placement import Placement
from rayward.config.run import Config
from rayward.contract.contract import Contract
from rayward.contract.conversation import TemplateInputs
from rayward.data.prepared import LABEL_COLUMNS
from rayward.errors import ConfigError, DataError
from rayward.schema import digest, identity
from rayward.scoring.batch import Work, items_of, pool
from rayward.wire.items import Asked, ItemError

if TYPE_CHECKING:
    from rayward.scoring.scored_model import ScoredModel


ROWS_PER_BLOCK = 16
"""Rows that an actor takes at once; what is lost when one dies."""

CACHE_FOLDER = "cache"
SPLITS: tuple[Literal["train", "validation"], ...] = ("train", "validation")

COLUMNS = ["id", "source", *LABEL_COLUMNS, "prompt_json", "completions_json", "inputs_json"]

_TASK = pa.schema([(name, pa.string()) for name in ("key", "prompt_json", "completions_json", "inputs_json")])


@dataclass(frozen=True, slots=True)
class Sampling:
    """How critiques are written.

    Attributes:
        temperature: 0 takes the likeliest text.
        seed: of sampled texts, and part of the cache's key.
    """

    temperature: float = 0.0
    seed: int = 0


def write_critiques(
    model: str,
    output: str,
    config: Config,
    *,
    sampling: Sampling = Sampling(),
    placement: Placement = Placement(),
) -> dict[str, tuple[int, int]]:
    """Write `<output>/train.jsonl` and `validation.jsonl`, rows of format `ranking` with a critique for every completion.

    Args:
        model: directory of an exported model that writes critiques.
        output: local directory or URI that all nodes share; what it holds in its cache is not written again.
        config: names the data, as for `prepare`; critiques in it are not read.
        sampling: how they are written.
        placement: where the writers run, and how many.

    Returns:
        For each split the rows written, and the rows left out because a completion has no room for a critique.

    Raises:
        ConfigError: the model writes no critiques.
        DataError, ContractError: the data cannot be read or prepared.
    """
    from rayward.data.prepare.job import prepare

    contract = Contract.load(Path(model))
    if contract.critique_lead_in is None:
        raise ConfigError(
            f"{model} writes no critiques: its contract has no critique_lead_in", remedy="train one with data.critique_lead_in set"
        )
    connect()
    prepared = prepare(config.model_copy(update={"data": config.data.model_copy(update={"critique_lead_in": None})}))
    output = storage.absolute(output)
    place = storage.join(output, CACHE_FOLDER)
    writer = (contract.model_version(), identity(sampling))
    rows = {split: [_keyed(row, writer) for table in prepared.tables(split, COLUMNS) for row in table.to_pylist()] for split in SPLITS}
    known = _cached(place)
    waiting = [row for split in SPLITS for row in rows[split] if row["key"] not in known]
    if waiting:
        work = partial(_write, place=place, sampling=sampling)
        _run(waiting, work, model, place, placement)
        known = _cached(place)
    counts: dict[str, tuple[int, int]] = {}
    for split in SPLITS:
        lines = [line for row in rows[split] if (line := _line(row, known, prepared.manifest.labels.attributes)) is not None]
        counts[split] = len(lines), len(rows[split]) - len(lines)
        filesystem, root = storage.resolve(output)
        storage.write_text(filesystem, f"{root}/{split}.jsonl", "".join(lines))
    return counts


def _keyed(row: dict[str, Any], writer: tuple[str, str]) -> dict[str, Any]:
    inputs = [row["inputs_json"]] if row.get("inputs_json") else []
    return {**row, "key": digest([*writer, row["id"], row["prompt_json"], row["completions_json"], *inputs])}


def _run(rows: Sequence[Mapping[str, Any]], work: Work, model: str, place: str, placement: Placement) -> None:
    filesystem, root = storage.resolve(place)
    filesystem.create_dir(root, recursive=True)
    tasks = [{name: row[name] for name in _TASK.names} for row in rows]
    starts = range(0, len(tasks), ROWS_PER_BLOCK)
    blocks = [pa.Table.from_pylist(tasks[start : start + ROWS_PER_BLOCK], schema=_TASK) for start in starts]
    written = pool(blocks, work, model=str(Path(model).resolve()), placement=placement, rows_per_call=ROWS_PER_BLOCK)
    total = sum(sum(block["num_rows"].to_pylist()) for block in written)
    if total != len(tasks):
        raise DataError(f"{len(tasks)} rows were sent to the writers and {total} came back", remedy="run the same command again")


def _write(model: ScoredModel, block: pa.Table, *, place: str, sampling: Sampling) -> pa.Table:
    # In an actor: a cache file for every block.
    from rayward.scoring.load import reward_model_of

    keys = block["key"].to_pylist()
    items = items_of(block, Asked(temperature=sampling.temperature), seed=sampling.seed)
    lines = []
    for key, found in zip(keys, reward_model_of(model).criticise(items), strict=True):
        critiques = None if isinstance(found, ItemError) or found.critiques is None else [texts[0] for texts in found.critiques]
        lines.append(json.dumps({"key": key, "critiques": critiques}) + "\n")
    filesystem, root = storage.resolve(place)
    storage.write_text(filesystem, f"{root}/{digest(keys)}.jsonl", "".join(lines))
    return pa.table({"num_rows": [len(keys)]})


def _cached(place: str) -> dict[str, list[str] | None]:
    filesystem, root = storage.resolve(place)
    known: dict[str, list[str] | None] = {}
    if not storage.exists(filesystem, root):
        return known
    names = (info.path for info in filesystem.get_file_info(pafs.FileSelector(root)))
    for path in sorted(name for name in names if name.endswith(".jsonl")):
        for line in storage.read_text(filesystem, path).splitlines():
            entry = json.loads(line)
            known[entry["key"]] = entry["critiques"]
    return known


def _line(row: Mapping[str, Any], known: Mapping[str, list[str] | None], attributes: Sequence[str]) -> str | None:
    critiques = known[row["key"]]
    # A model that says nothing gives nothing to learn.
    if critiques is None or not all(text.strip() for text in critiques):
        return None
    rated = row["attributes"] and [
        {name: None if math.isnan(value) else value for name, value in zip(attributes, values, strict=True)} for values in row["attributes"]
    ]
    inputs = TemplateInputs.from_json(row["inputs_json"])
    record = {
        "id": row["id"],
        "source": row["source"],
        "prompt": json.loads(row["prompt_json"]),
        "completions": json.loads(row["completions_json"]),
        "ranks": row["ranks"],
        "critiques": critiques,
        **({"tools": inputs.tools} if inputs.tools else {}),
        **({"chat_template_kwargs": dict(inputs.chat_template_kwargs)} if inputs.chat_template_kwargs else {}),
        **{name: row[name] for name in LABEL_COLUMNS if name not in ("ranks", "attributes") and row[name] is not None},
    }
    return json.dumps(record if not rated else {**record, "attributes": rated}) + "\n"
