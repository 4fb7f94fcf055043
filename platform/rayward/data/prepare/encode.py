"""The tokenizing step of `prepare`: rows with a place in a split become prepared rows. No Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from rayward.batch.comparison import shared_prefix_length
from rayward.contract.encoder import Encoder, Encoding
from rayward.contract.rendering import Conversation
from rayward.data.prepare.join import unfold
from rayward.data.prepare.judge import Policy
from rayward.data.prepare.rows import ENCODED_SCHEMA, printable
from rayward.data.prepared import label_columns
from rayward.data.record import BadRow, Comparison, RowRejected, load_record
from rayward.errors import AlreadyTemplatedError, ChangedTextError, ContractError, TooLongError, UnsupportedMessageError
from rayward.schema import digest

REASONS: dict[type[ContractError], BadRow] = {
    TooLongError: BadRow.TOO_LONG,
    UnsupportedMessageError: BadRow.UNSUPPORTED_MESSAGE,
    AlreadyTemplatedError: BadRow.ALREADY_TEMPLATED,
    ChangedTextError: BadRow.CHANGED_BY_TEMPLATE,
}
"""What an error of the contract means for a row; any other: the template rejects it."""


def encode(table: pa.Table, encoder: Encoder, policy: Policy) -> pa.Table:
    """Tokenize and give every row its place in the order; ADAPTED_SCHEMA -> ENCODED_SCHEMA.

    Args:
        table: rows after `judge`.
        encoder: the contract's encoder.
        policy: seed and policies.
    """

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        if row["split"] is not None:
            comparison = load_record(row["record"])
            try:
                row |= _encoded(comparison, row["prompt_key"], encoder, policy)
                # One sort orders both splits; the content breaks the tie between rows that share an id.
                row["order"] = f"{row['split']} {digest([policy.seed, comparison.id])} {row['content_key']}"
            except RowRejected as exc:
                row["split"], row["reason"], row["detail"] = None, exc.reason.value, exc.detail
        return row

    rows = [each for row in table.to_pylist() for each in unfold(row, encoded, policy.group_tokens or 0)]
    return pa.Table.from_pylist(rows, schema=ENCODED_SCHEMA)


def _encoded(comparison: Comparison, prompt_key: str, encoder: Encoder, policy: Policy) -> dict[str, Any]:
    separator = None if comparison.step_labels is None else policy.step_separator
    critiques: Sequence[str | None] = comparison.critiques or [None] * len(comparison.completions)
    conversations = [
        Conversation(comparison.prompt, text, critique, comparison.inputs)
        for text, critique in zip(comparison.completions, critiques, strict=True)
    ]
    encodings: list[Encoding] = []
    for index, found in enumerate(encoder.encode_all(conversations, separator=separator)):
        if isinstance(found, ContractError):
            raise RowRejected(REASONS.get(type(found), BadRow.TEMPLATE_REJECTED), f"completion {index}: {printable(found.problem)}")
        if found.truncated and policy.too_long == "quarantine":
            raise RowRejected(
                BadRow.TOO_LONG,
                f"completion {index}: {found.num_tokens} tokens, over {encoder.contract.max_tokens}, and data.too_long is 'quarantine'",
            )
        encodings.append(found)
    sequences = [encoding.ids for encoding in encodings]
    if len({tuple(ids) for ids in sequences}) != len(sequences):
        raise RowRejected(BadRow.IDENTICAL_COMPLETIONS, "two completions have the same token ids")
    shared = shared_prefix_length(sequences)
    return {
        "id": comparison.id,
        "source": comparison.source,
        "prompt_key": prompt_key,
        "prefix_ids": sequences[0][:shared],
        "branch_ids": [ids[shared:] for ids in sequences],
        "text_starts": [encoding.text_start for encoding in encodings],
        "step_ends": None if separator is None else [encoding.step_ends for encoding in encodings],
        **label_columns(comparison),
        "prompt_json": json.dumps(comparison.prompt),
        "completions_json": json.dumps(comparison.completions),
        "critiques_json": None if comparison.critiques is None else json.dumps(comparison.critiques),
        "inputs_json": comparison.inputs.to_json(),
        "truncated": any(encoding.truncated for encoding in encodings),
    }
