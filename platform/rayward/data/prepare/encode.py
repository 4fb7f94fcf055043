"""The tokenizing step of `prepare`: rows become prepared rows with their keys and a place in the order. No Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from rayward.batch.comparison import shared_prefix_length
from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder, Encoding
from rayward.contract.rendering import Conversation
from rayward.data.prepare.identity import identify, near_prompt_key
from rayward.data.prepare.judge import Policy, order_of, side_of
from rayward.data.prepare.leftover import Leftovers
from rayward.data.prepare.rows import BENCHMARK, ENCODED_SCHEMA, RAW_LIMIT, READ_SCHEMA, Adaptation, Draft, adapt
from rayward.data.prepared import label_columns
from rayward.data.record import BadRow, Comparison, RowRejected, dump_record
from rayward.errors import AlreadyTemplatedError, ChangedTextError, ContractError, TooLongError, UnsupportedMessageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 2**31 - 1
REASONS: dict[type[ContractError], BadRow] = {
    TooLongError: BadRow.TOO_LONG,
    UnsupportedMessageError: BadRow.UNSUPPORTED_MESSAGE,
    AlreadyTemplatedError: BadRow.ALREADY_TEMPLATED,
    ChangedTextError: BadRow.CHANGED_BY_TEMPLATE,
}
"""What an error of the contract means for a row; any other: the template rejects it."""
Found = Encoding | ContractError


class Encoders(NamedTuple):
    """What text is encoded with.

    Attributes:
        contract: by the contract.
        bare: with no turn gone and no critique, which is what tells rows apart.
        unknown_id: the token that different characters may become.
    """

    contract: Encoder
    bare: Encoder
    unknown_id: int | None = None

    @classmethod
    def of(cls, contract: Contract, tokenizer: PreTrainedTokenizerBase) -> Encoders:
        """Both encoders of a contract."""
        bare = contract.model_copy(update={"max_tokens": NO_LIMIT, "critique_lead_in": None})
        return cls(Encoder(contract, tokenizer), Encoder(bare, tokenizer), tokenizer.unk_token_id)


def encode(table: pa.Table, plan: Adaptation, encoders: Encoders, policy: Policy, leftovers: Leftovers | None = None) -> pa.Table:
    """Adapt and tokenize the rows of a table; READ_SCHEMA -> ENCODED_SCHEMA.

    Args:
        plan: how rows are adapted.
        policy: seed and policies.
        leftovers: counts the columns that nothing reads.
    """
    drafts = adapt(table, plan, leftovers)
    roles = table.column("role").to_pylist()
    rows: list[dict[str, Any]] = [{} for _ in drafts]
    for separator in (None, policy.step_separator):
        chosen = [index for index, draft in enumerate(drafts) if _separator(draft, policy) == separator and draft.comparison is not None]
        conversations = [_conversations(drafts[index].comparison, roles[index]) for index in chosen]
        encoded = _nested(encoders.contract.encode_all([c for each in conversations for c in each], separator=separator), conversations)
        odd = [place for place, each in enumerate(encoded) if _needs_bare(each, encoders.contract.contract)]
        again = [[replace(each, critique=None) for each in conversations[place]] for place in odd]
        bare = dict(zip(odd, _nested(encoders.bare.encode_all([c for each in again for c in each]), again), strict=True))
        for place, index in enumerate(chosen):
            found = encoded[place]
            try:
                rows[index] = _row(drafts[index], roles[index], found, bare.get(place, found), encoders, policy)
            except RowRejected as exc:
                drafts[index].reject(exc)
    return _table(table, drafts, rows)


def _separator(draft: Draft, policy: Policy) -> str | None:
    return None if draft.comparison is None or draft.comparison.step_labels is None else policy.step_separator


def _conversations(comparison: Comparison | None, role: str) -> list[Conversation]:
    assert comparison is not None
    if role == BENCHMARK:  # only its prompt counts, which is the same whatever follows
        return [Conversation(comparison.prompt, "x", "x", comparison.inputs)]
    critiques: Sequence[str | None] = comparison.critiques or [None] * len(comparison.completions)
    return [
        Conversation(comparison.prompt, completion, critique, comparison.inputs)
        for completion, critique in zip(comparison.completions, critiques, strict=True)
    ]


def _nested(flat: Sequence[Found], like: Sequence[Sequence[object]]) -> list[list[Found]]:
    each = iter(flat)
    return [[next(each) for _ in part] for part in like]


def _needs_bare(found: Sequence[Found], contract: Contract) -> bool:
    encoded = [each for each in found if isinstance(each, Encoding)]
    return len(encoded) == len(found) and (contract.critique_lead_in is not None or any(each.truncated for each in encoded))


def _row(draft: Draft, role: str, found: Sequence[Found], bare: Sequence[Found], encoders: Encoders, policy: Policy) -> dict[str, Any]:
    comparison = draft.comparison
    assert comparison is not None
    if role == BENCHMARK:
        (encoding,) = _checked(bare)
        return {"near_prompt": near_prompt_key(encoding, unknown_id=encoders.unknown_id)}
    encodings = _checked(found)
    limit = encoders.contract.contract.max_tokens
    for index, encoding in enumerate(encodings):
        if encoding.truncated and policy.too_long == "quarantine":
            problem = f"completion {index}: {encoding.num_tokens} tokens; model.max_tokens is {limit}, and data.too_long 'quarantine'"
            raise RowRejected(BadRow.TOO_LONG, problem)
    sequences = [encoding.ids for encoding in encodings]
    if len({tuple(ids) for ids in sequences}) != len(sequences):
        raise RowRejected(BadRow.IDENTICAL_COMPLETIONS, "two completions have the same token ids")
    texts = {
        "prompt_json": json.dumps(comparison.prompt),
        "completions_json": json.dumps(comparison.completions),
        "critiques_json": None if comparison.critiques is None else json.dumps(comparison.critiques),
    }
    identity = identify(comparison, _checked(bare), "\n".join(map(str, texts.values())), unknown_id=encoders.unknown_id)
    # What must not stand on both sides is what the split, and everything that is kept unseen, goes by.
    apart = identity.near_prompt if policy.split_by == "prompt" else identity.near_content
    side = side_of(role, apart, policy)
    shared = shared_prefix_length(sequences)
    return {
        "id": comparison.id,
        "prompt_key": encodings[0].prompt_key,
        "prefix_ids": sequences[0][:shared],
        "branch_ids": [ids[shared:] for ids in sequences],
        "text_starts": [encoding.text_start for encoding in encodings],
        "step_ends": None if comparison.step_labels is None else [encoding.step_ends for encoding in encodings],
        **label_columns(comparison),
        **texts,
        "inputs_json": comparison.inputs.to_json(),
        "near_prompt": apart,
        "content": identity.content,
        "near_content": identity.near_content,
        "judgement": identity.judgement,
        "record_key": identity.record,
        "tied": comparison.ranks is not None and len(set(comparison.ranks)) == 1,
        "split": side,
        "order": order_of(side, comparison.id, identity.content, policy),
        "record": dump_record(comparison) if policy.joins else None,
        "completion_keys": identity.completions if policy.joins else None,
        "truncated": any(encoding.truncated for encoding in encodings),
        "trimmed": any(encoding.trimmed for encoding in encodings),
        "changed": next((encoding.changed for encoding in encodings if encoding.changed is not None), None),
    }


def _checked(found: Sequence[Found]) -> list[Encoding]:
    encodings = []
    for index, each in enumerate(found):
        if isinstance(each, ContractError):
            reason = REASONS.get(type(each), BadRow.TEMPLATE_REJECTED)
            raise RowRejected(reason, f"completion {index}: {each.problem}; {each.remedy}")
        encodings.append(each)
    return encodings


_COMPUTED = tuple(name for name in ENCODED_SCHEMA.names if name not in {*READ_SCHEMA.names, "source", "beside", "leftover"})


def _table(read: pa.Table, drafts: Sequence[Draft], rows: Sequence[dict[str, Any]]) -> pa.Table:
    columns: dict[str, Any] = {name: read.column(name) for name in ("kind", "role", "file", "number")}
    columns["raw"] = [raw[:RAW_LIMIT] for raw in read.column("raw").to_pylist()]
    columns["source"] = [draft.source for draft in drafts]
    columns["reason"] = [draft.reason for draft in drafts]
    # Marks bring a detail of their own.
    columns["detail"] = [draft.detail for draft in drafts]
    columns |= {name: [row.get(name) for row in rows] for name in _COMPUTED}
    columns["beside"] = columns["leftover"] = pa.nulls(len(rows), pa.string())
    arrays = [
        values if isinstance(values, pa.ChunkedArray | pa.Array) else pa.array(values, field.type)
        for field in ENCODED_SCHEMA
        for values in (columns[field.name],)
    ]
    return pa.Table.from_arrays(arrays, schema=ENCODED_SCHEMA)
