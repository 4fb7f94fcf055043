"""The tokenizing step of `prepare`: rows with a place in a split become prepared rows. No Ray."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from rayward.batch.comparison import shared_prefix_length
from rayward.contract.encoder import Encoder, Encoding
from rayward.data.prepare.join import unfold
from rayward.data.prepare.judge import Policy
from rayward.data.prepare.rows import ENCODED_SCHEMA, printable
from rayward.data.prepared import label_columns
from rayward.data.record import BadRow, Comparison, RowRejected, load_record
from rayward.errors import ContractError, TooLongError
from rayward.schema import digest


def encode(table: pa.Table, encoder: Encoder, full: Encoder, policy: Policy) -> pa.Table:
    """Tokenize and give every row its place in the order; ADAPTED_SCHEMA -> ENCODED_SCHEMA.

    Args:
        table: rows after `judge`.
        encoder: the contract's encoder.
        full: the same without a token limit, to see whether anything was cut.
        policy: seed and policies.
    """

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        if row["split"] is not None:
            comparison = load_record(row["record"])
            try:
                row |= _encoded(comparison, row["prompt_key"], encoder, full, policy)
                # One sort orders both splits; the content breaks the tie between rows that share an id.
                row["order"] = f"{row['split']} {digest([policy.seed, comparison.id])} {row['content_key']}"
            except RowRejected as exc:
                row["split"], row["reason"], row["detail"] = None, exc.reason.value, exc.detail
        return row

    rows = [each for row in table.to_pylist() for each in unfold(row, encoded, policy.group_tokens or 0)]
    return pa.Table.from_pylist(rows, schema=ENCODED_SCHEMA)


def _encoded(comparison: Comparison, prompt_key: str, encoder: Encoder, full: Encoder, policy: Policy) -> dict[str, Any]:
    limit, too_long = encoder.contract.max_tokens, policy.too_long
    separator = None if comparison.step_labels is None else policy.step_separator
    encodings: list[Encoding] = []
    truncated = False
    for index, completion in enumerate(comparison.completions):
        try:
            critique = None if comparison.critiques is None else comparison.critiques[index]
            encoding = full.encode_parts(comparison.prompt, completion, critique, separator=separator)
            if (length := len(encoding.ids)) > limit:
                if too_long == "quarantine":
                    raise RowRejected(
                        BadRow.TOO_LONG, f"completion {index}: {length} tokens, over {limit}, and data.too_long is 'quarantine'"
                    )
                encoding, truncated = encoder.encode_parts(comparison.prompt, completion, critique, separator=separator), True
        except TooLongError as exc:
            raise RowRejected(BadRow.TOO_LONG, f"completion {index}: {printable(exc.problem)}") from exc
        except ContractError as exc:
            raise RowRejected(BadRow.TEMPLATE_REJECTED, printable(exc.problem)) from exc
        encodings.append(encoding)
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
        "truncated": truncated,
    }
