"""`rayward data describe`: what is in a source, how it is read, and what three of its rows become."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rayward.batch.comparison import shared_prefix_length
from rayward.config.data import DataConfig
from rayward.config.sources import SourceConfig
from rayward.contract.contract import Contract
from rayward.contract.conversation import turns_of
from rayward.contract.encoder import Encoder, Encoding
from rayward.contract.reading import DEFAULT_SEPARATOR
from rayward.contract.rendering import Conversation
from rayward.contract.tokenizer import load_tokenizer
from rayward.data.formats.columns import described
from rayward.data.formats.suggest import shown, suggest
from rayward.data.formats.table import adapt, choose_format, columns_of
from rayward.data.record import Comparison, RowRejected, validate
from rayward.data.sources.find import find_files
from rayward.data.sources.hub import HUB_PREFIX
from rayward.data.sources.read import sample_rows
from rayward.errors import ContractError, DataError, DataFormatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayward.data.formats.fields import Row, SourceOptions

ROWS_SHOWN = 3
TEXT_SHOWN = 600


def describe(path: str, config: DataConfig, *, tokenizer: str | None = None, max_tokens: int = 2048) -> Iterator[str]:
    """The description of a source, line by line: its first file and what the others are.

    Args:
        path: a file, glob, directory or URI.
        config: how it is read, with the mapping of `path` in `sources` if there is one.
        tokenizer: directory or hub name; rows are then shown as tokens too.
        max_tokens: longest conversation.

    Raises:
        DataError: the path holds no data file, or the file no row.
        ContractError: the tokenizer cannot be loaded.
    """
    mapping = config.sources[0] if config.sources else SourceConfig(path=path)
    if path.startswith(HUB_PREFIX):
        raise DataError(f"{path} is a hub data set, and files are described", remedy="download one of its files, and name that")
    files = find_files([path], "train")[0]
    shower = None if tokenizer is None else _Shower(load_tokenizer(tokenizer, None), max_tokens, config)
    file = files[0]
    rows, seen = sample_rows(file)
    more = f", the first of {len(files)} files" if len(files) > 1 else ""
    yield f"file: {file.uri}{more}; {len(rows)} objects among the first {seen} rows"
    if not rows:
        raise DataError(f"{file.uri}: no row is a JSON object", remedy="use JSON lines (one object a line), a JSON list, or Parquet")
    yield "columns:"
    for name, (kinds, count, example) in described(rows).items():
        yield f"  {shown(name)[1:-1]}: {kinds}, {count / len(rows):.0%} of rows, {shown(example)}"
    try:
        chosen = choose_format(rows, config, where=path, source=file.source, mapping=mapping)
    except DataFormatError as exc:
        yield f"format: none\n  {exc}"
        yield f"a block to paste and correct:\n{suggest(path, rows)}".rstrip()
        return
    yield from _read(rows, chosen, config, shower)
    yield f"a block to paste:\n{_block(path, chosen[0], mapping)}".rstrip()


def _read(rows: Sequence[Row], chosen: tuple[str, SourceOptions], config: DataConfig, shower: _Shower | None) -> Iterator[str]:
    name, options = chosen
    columns = columns_of(name, options)
    yield f"format: {name}" + (f" through {options.adapter.name}" if options.adapter else "")
    unused = {key: f"{key} ({kinds})" for key, (kinds, _, _) in described(rows).items() if any(key in columns.unused(row) for row in rows)}
    yield f"not used: {', '.join(unused.values()) or 'none'}"
    yield "rows as they would be trained:"
    reasons: dict[str, tuple[int, str]] = {}
    used = 0
    for number, row in enumerate(rows, 1):
        try:
            comparison = adapt(name, columns, row, options)
            validate(comparison, ties=config.ties)
        except RowRejected as exc:
            count, example = reasons.get(exc.reason, (0, exc.detail))
            reasons[exc.reason] = count + 1, example
            continue
        used += 1
        if used <= ROWS_SHOWN:
            yield from _shown(number, comparison, config)
            if shower is not None:
                yield from shower.tokens(comparison)
    yield f"of these rows {used} would be used" + "".join(
        f"\n  {reason}: {count}, for example {shown(example, 160)[1:-1]}" for reason, (count, example) in reasons.items()
    )


def _shown(number: int, comparison: Comparison, config: DataConfig) -> Iterator[str]:
    known = [f"id {shown(comparison.id)}", f"source {shown(comparison.source)}"]
    for label in ("strength", "margin"):
        value = getattr(comparison, label)
        known += [] if value is None else [f"{label} {value:g}"]
    yield f"  row {number}: {', '.join(known)}"
    for turn in comparison.prompt:
        yield f"    {turn['role']}: {shown(dict(turn) if len(turn) > 2 else turn['content'], TEXT_SHOWN)}"
    for index, completion in enumerate(comparison.completions):
        rank = "" if comparison.ranks is None else f" (rank {comparison.ranks[index]:g})"
        ratings = None if comparison.attributes is None else dict(zip(config.attributes, comparison.attributes[index], strict=True))
        turns = turns_of(completion)
        said = turns[0]["content"] if len(turns) == 1 and len(turns[0]) == 2 else [dict(turn) for turn in turns]
        yield f"    completion {index}{rank}{'' if ratings is None else f' {ratings}'}: {shown(said, TEXT_SHOWN)}"
        if comparison.critiques is not None and config.critique_lead_in is not None:
            yield f"      critique: {shown(comparison.critiques[index], TEXT_SHOWN)}"


class _Shower:
    """Rows as tokens: which of them the completions share, and where each one is judged."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, config: DataConfig) -> None:
        self._tokenizer = tokenizer
        contract = Contract.from_tokenizer(tokenizer, max_tokens=max_tokens, critique_lead_in=config.critique_lead_in)
        self._encoder = Encoder(contract, tokenizer)
        self._separator = config.step_separator or DEFAULT_SEPARATOR

    def tokens(self, comparison: Comparison) -> Iterator[str]:
        """Lines about one row."""
        critiques = comparison.critiques or (None,) * len(comparison.completions)
        conversations = [
            Conversation(comparison.prompt, completion, critique, comparison.inputs)
            for completion, critique in zip(comparison.completions, critiques, strict=True)
        ]
        separator = None if comparison.step_labels is None else self._separator
        encodings = self._encoder.encode_all(conversations, separator=separator)
        whole = [encoding for encoding in encodings if isinstance(encoding, Encoding)]
        for index, encoding in enumerate(encodings):
            if isinstance(encoding, ContractError):
                yield f"    completion {index} would be quarantined: {shown(encoding.problem, 200)[1:-1]}"
        if len(whole) != len(encodings):
            return
        shared = shared_prefix_length([encoding.ids for encoding in whole])
        yield f"    shared by all, {shared} tokens: {self._text(whole[0].ids[:shared])}"
        for index, encoding in enumerate(whole):
            branch, last = encoding.ids[shared:], len(encoding.ids) - 1
            cut = f", after {encoding.num_tokens - len(encoding.ids)} tokens of the oldest turns went" if encoding.truncated else ""
            where = f"its text from position {encoding.text_start}, judged at position {last} (token {self._text(encoding.ids[-1:])})"
            yield f"    branch {index}, {len(branch)} tokens, {where}{cut}: {self._text(branch)}"

    def _text(self, ids: Sequence[int]) -> str:
        return shown(self._tokenizer.decode(list(ids), skip_special_tokens=False), TEXT_SHOWN)


def _block(path: str, name: str, mapping: SourceConfig) -> str:
    given = mapping.model_dump(mode="json", exclude_defaults=True, exclude={"path", "role"})
    if mapping.plain and mapping.adapter is None:
        given["format"] = name
    import yaml

    block = {"data": {"sources": [{"path": path, **json.loads(json.dumps(given))}]}}
    return yaml.safe_dump(block, sort_keys=False, allow_unicode=True, width=120)
