"""What the driver refuses before any worker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.helpers.jobs import LLAMA, MAX_TOKENS, make_config, make_prepared

from rayward.errors import ConfigError
from rayward.training.trainer import resolve_job

BUDGET = {"tokens_per_microbatch": 4 * MAX_TOKENS}


def roberta(positions: int) -> dict[str, Any]:
    return {**LLAMA, "model_type": "roberta", "max_position_embeddings": positions}


def test_positions_that_begin_behind_the_pad_id_are_counted_before_workers_start(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path / "prepared")
    tokenizer = f"{prepared.directory}/tokenizer"
    pad_id = resolve_job(make_config(tmp_path, tokenizer, roberta(1024), **BUDGET), prepared)[0].contract.pad_token_id
    short, enough = (roberta(MAX_TOKENS + pad_id + more) for more in (0, 1))
    with pytest.raises(ConfigError, match=f"has positions for {MAX_TOKENS - 1} tokens"):
        resolve_job(make_config(tmp_path, tokenizer, short, **BUDGET), prepared)
    assert resolve_job(make_config(tmp_path, tokenizer, enough, **BUDGET), prepared)[1] == "padded"
