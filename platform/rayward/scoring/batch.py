"""Scoring blocks of rows on Ray Data with the scorer that serving uses: one pool of actors for rewards, features and critiques."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import pyarrow as pa
import ray.data
from ray.data import DataContext
from ray.exceptions import RayActorError

from rayward.cluster import Deferred, actor_options, ray_errors
from rayward.config.placement import Placement
from rayward.contract.conversation import TemplateInputs
from rayward.errors import DataError, ScoringError, marking
from rayward.wire.items import Asked, ItemError, ScoreItem

if TYPE_CHECKING:
    from rayward.scoring.scored_model import ScoredModel


T = TypeVar("T")

ROWS_PER_CALL = 256
"""Rows given to one scorer call; it cuts them into micro-batches by tokens."""

READER_CPUS = 0.1
"""Share of a CPU that a read task reserves beside the actors, which leave so much of theirs."""

BLOCK_BYTES = 64 * 1024
"""Of what is read: a part of a scoring job is a block."""

REWARDS_TYPE = pa.list_(pa.float32())
ERROR_TYPE = pa.struct([("code", pa.string()), ("message", pa.string())])

Blocks: TypeAlias = "Sequence[pa.Table] | ray.data.Dataset"
Work: TypeAlias = "Callable[[ScoredModel, pa.Table], pa.Table]"
"""What is done with a block; pickled, so a function of a module or a `partial` of one."""


def score_blocks(blocks: Blocks, *, model: str, asked: Asked = Asked(), placement: Placement = Placement()) -> Iterator[pa.Table]:
    """Add `rewards` (list of K finite float32, null where there is none), `error` (code and message, or null) and the model's `version`.

    Args:
        blocks: with columns `prompt_json` (JSON list of turns) and `completions_json` (JSON list of K texts, or
            lists of turns), and `inputs_json` where there are tools.
        model: directory of whatever scores; the same path on every node.

    Raises: as `pool`.
    """
    return pool(blocks, partial(_score, asked=asked), model=model, placement=placement)


def feature_blocks(blocks: Blocks, *, model: str, placement: Placement = Placement()) -> Iterator[pa.Table]:
    """Add what a head reads: `end_hidden` and `gate_hidden` (flattened float32 [K, hidden], null with an `error`).

    Args and raises: as `score_blocks`; the model is one with a head.
    """
    return pool(blocks, _features, model=model, placement=placement)


def reading(
    sources: Sequence[T],
    read: Callable[[T], Iterator[pa.Table]],
    *,
    scorers: int,
    in_order: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> ray.data.Dataset:
    """A data set of what tasks read, for a `pool` of so many scorers: nothing of it passes the driver, and little is read ahead.

    Args:
        sources: one read task each; what describes them goes to every task.
        read: tables of a source, each a block; pickled.
        in_order: whether the blocks come back from the pool as they were read.
        block_bytes: tasks and actors hand on what they made in blocks of about so much, but never less than one row.
    """
    context = DataContext.get_current().copy()
    context.target_max_block_size = block_bytes
    context.execution_options.preserve_order = in_order
    with DataContext.current(context):
        indices = ray.data.from_items([{"index": index} for index in range(len(sources))], override_num_blocks=len(sources))
        return indices.map_batches(
            partial(_read, sources=list(sources), read=read),
            batch_size=1,
            num_cpus=READER_CPUS,
            compute=ray.data.TaskPoolStrategy(size=min(2 * scorers, len(sources))),
        )


def _read(batch: dict[str, Any], sources: Sequence[T], read: Callable[[T], Iterator[pa.Table]]) -> Iterator[pa.Table]:
    with marking:
        for index in batch["index"]:
            yield from read(sources[int(index)])


def pool(blocks: Blocks, work: Work, *, model: str, placement: Placement, rows_per_call: int = ROWS_PER_CALL) -> Iterator[pa.Table]:
    """Let copies of a model work on blocks of rows, each copy in an actor of its own.

    Args:
        blocks: tables that the driver holds, or a data set, whose tasks must get along with the CPU share that the actors leave them
            (`reading`; other read tasks would wait for ever on a cluster whose CPUs are all held by the actors).
        rows_per_call: rows given to one call of `work`; what is lost when an actor dies.

    Yields:
        The blocks that `work` returns, in no certain order.

    Raises:
        ModelLoadError, ContractError: an actor cannot load the model; any other typed error that an actor met.
        ScoringError: an actor died.
    """
    size, cpus = placement.actors, 1.0 - READER_CPUS
    if not isinstance(blocks, ray.data.Dataset):
        if not blocks:
            return
        size, cpus = min(size, len(blocks)), 1.0
        blocks = ray.data.from_arrow(list(blocks))
    done = blocks.map_batches(
        _Worker,
        fn_constructor_args=(work, model, placement),
        batch_size=rows_per_call,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=cpus,
        **actor_options(placement.gpus_per_actor),
    )
    try:
        with ray_errors():
            found: Any = done.iter_batches(batch_size=None, batch_format="pyarrow")
            yield from found
    except RayActorError as exc:
        raise ScoringError(
            f"an actor that held the model died: {exc}", remedy="give it more memory, or fewer actors or tokens per batch; see its log"
        ) from exc


class _Worker:
    # One per actor of the pool: loads the model once.

    def __init__(self, work: Work, model: str, placement: Placement) -> None:
        from rayward.scoring.load import load_scored_model

        self._work = work
        self._model = Deferred(lambda: load_scored_model(model, placement))

    @marking
    def __call__(self, block: pa.Table) -> pa.Table:
        return self._work(self._model.get(), block)


def _score(model: ScoredModel, block: pa.Table, *, asked: Asked) -> pa.Table:
    results = model.score(items_of(block, asked))
    rewards = pa.array([result.rewards for result in results], REWARDS_TYPE)
    block = block.append_column("rewards", rewards).append_column("error", _errors([result.error for result in results]))
    return block.append_column("version", pa.array([model.version] * len(results), pa.string()))


def _features(model: ScoredModel, block: pa.Table) -> pa.Table:
    from rayward.scoring.load import reward_model_of

    ends: list[Any] = []
    gates: list[Any] = []
    errors: list[ItemError | None] = []
    for found in reward_model_of(model).features(items_of(block, Asked())):
        if isinstance(found, ItemError):
            hidden: tuple[Any, Any] = (None, None)
        else:
            hidden = (found[:, 0].flatten().numpy(), found[:, 1].flatten().numpy())
        ends.append(hidden[0])
        gates.append(hidden[1])
        errors.append(found if isinstance(found, ItemError) else None)
    for name, values in (("end_hidden", ends), ("gate_hidden", gates)):
        block = block.append_column(name, pa.array(values, pa.large_list(pa.float32())))
    return block.append_column("error", _errors(errors))


def _errors(errors: Sequence[ItemError | None]) -> pa.Array:
    return pa.array([None if error is None else asdict(error) for error in errors], ERROR_TYPE)


def items_of(block: pa.Table, asked: Asked, *, seed: int = 0) -> list[ScoreItem]:
    """The items of a block's rows.

    Raises:
        DataError: a column does not hold JSON lists.
    """
    inputs = block["inputs_json"].to_pylist() if "inputs_json" in block.column_names else [None] * block.num_rows
    items = []
    for prompt, completions, given in zip(block["prompt_json"].to_pylist(), block["completions_json"].to_pylist(), inputs, strict=True):
        texts = [text if isinstance(text, str) else tuple(text) for text in _loads(completions, "completions_json")]
        found = TemplateInputs.from_json(given)
        items.append(
            ScoreItem(
                tuple(_loads(prompt, "prompt_json")),
                tuple(texts),
                asked,
                seed=seed,
                tools=found.tools or None,
                chat_template_kwargs=dict(found.chat_template_kwargs) or None,
            )
        )
    return items


def _loads(text: str, column: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (TypeError, ValueError) as exc:
        raise DataError(f"column {column} holds {text!r:.80}, which is not JSON", remedy="score prepared rows, or write JSON") from exc
    if not isinstance(value, list):
        raise DataError(f"column {column} holds a {type(value).__name__}; the rule is a list", remedy="write the column as a JSON list")
    return value
