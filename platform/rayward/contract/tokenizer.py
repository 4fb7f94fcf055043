"""Tokenizers: loading one, its fingerprint, and what a contract picks from it. Transformers is loaded by the functions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, cast

from rayward.errors import ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FROZEN_DATE = "26 Jul 2024"
_FROZEN_TIME = datetime(2024, 7, 26, 12, 0, 0)
_CLOCK = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(?:'([^'\\]*)'|\"([^\"\\]*)\")\s*\)")
PAD_TOKEN = "<|rayward_pad|>"

PLAIN_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{{ message['role'].capitalize() }}: {{ message['content'] }}"
    "{% if loop.last %}{{ end_token }}{% else %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
)
"""Used when the tokenizer brings no chat template: `Role: text`, turns separated by an empty line."""


def pick_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return (template, "tokenizer") if isinstance(template, str) and template else (PLAIN_TEMPLATE, "plain")


def without_clock(template: str) -> str:
    """The template with FROZEN_DATE wherever it would print the time of rendering: else the same text would score differently tomorrow.

    Raises:
        ContractError: a format of the date is not written out in the template.
    """
    fixed = _CLOCK.sub(lambda found: json.dumps(_FROZEN_TIME.strftime(found[1] if found[1] is not None else found[2])), template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise ContractError(
            "the chat template prints the current date in a format that it computes (strftime_now), so the same text would score "
            "differently tomorrow",
            remedy="save the tokenizer with a template that writes the format out, or without strftime_now",
        )
    return fixed


def bos_for_plain(tokenizer: PreTrainedTokenizerBase) -> str | None:
    # A tokenizer that puts BOS before text by itself was pre-trained with it.
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if tokenizer.bos_token_id is not None and ids and ids[0] == tokenizer.bos_token_id else None


def pick_pad(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    end = tokenizer.eos_token_id
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != end:
        return tokenizer.pad_token, tokenizer.pad_token_id
    spare = re.compile(r"pad|endoftext|finetune_right|reserved_special|unused|unk", re.IGNORECASE)
    added = tokenizer.added_tokens_decoder if hasattr(tokenizer, "added_tokens_decoder") else {}
    for token_id, token in sorted(added.items()):
        if token_id != end and token_id != tokenizer.bos_token_id and token.special and spare.search(token.content):
            tokenizer.pad_token = token.content
            return token.content, token_id
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return PAD_TOKEN, cast(int, tokenizer.convert_tokens_to_ids(PAD_TOKEN))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and the merge rules, without the state that batching leaves behind."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for transient in ("padding", "truncation"):
        backend.pop(transient, None)
    return hashlib.sha256(json.dumps(backend, sort_keys=True).encode()).hexdigest()


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a directory or the hub.

    Raises:
        ContractError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as exc:
        raise ContractError(f"no tokenizer can be loaded from {path!r}: {exc}", remedy="check model.tokenizer and model.path") from exc
