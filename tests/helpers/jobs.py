"""A resolved training job over a prepared directory that holds just what sessions and exports read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.helpers.comparisons import random_comparisons
from tests.helpers.tokenizer import make_tokenizer
from tests.helpers.training import make_shares

from rayward.batch.comparison import EncodedComparison
from rayward.config.load import parse_config
from rayward.config.run import Config
from rayward.contract.contract import Contract
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer
from rayward.data.prepared import MANIFEST_FILE, Manifest, PreparedData
from rayward.data.stream.shares import StepShare
from rayward.model.build import build_reward_model, resolve_hf_config
from rayward.model.pretrained import weight_source
from rayward.model.reward_model import RewardModel
from rayward.training.engines.build import initialize, pretrained
from rayward.training.engines.torch import TorchEngine
from rayward.training.session import Job, Session

MAX_TOKENS = 256
COMPARISONS_PER_STEP = 4
STEPS = 6


def make_prepared(directory: Path) -> PreparedData:
    """Tokenizer, contract and manifest; no shards."""
    contract = Contract.from_tokenizer(make_tokenizer(directory / "tokenizer"), max_tokens=MAX_TOKENS)
    contract.save(directory)
    manifest = Manifest(
        fingerprint="f" * 8,
        num_input_rows=24,
        num_train=24,
        num_validation=0,
        num_quarantined={},
        train_shards=(),
        validation_shards=(),
        longest_comparison_tokens=160,
        longest_conversation_tokens=80,
        total_train_tokens=1,
        total_train_tokens_unshared=1,
        length_histogram={},
        max_completions=3,
        sources={"test": 24},
    )
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return PreparedData(str(directory), manifest)


LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip


def make_config(storage: Path, tokenizer: str, architecture: dict[str, Any] | None = None, **training: object) -> Config:
    """A two-layer llama unless told otherwise, checkpoints every two of six steps."""
    return parse_config(
        {
            "run": {"name": "run", "storage_path": str(storage)},
            "model": {
                "tokenizer": tokenizer,
                "max_tokens": MAX_TOKENS,
                "architecture": {"vocab_size": 259, **(architecture or LLAMA)},
            },
            "training": {
                "engine": "torch", "comparisons_per_step": COMPARISONS_PER_STEP, "tokens_per_microbatch": 256, "learning_rate": 3e-3,
                "gradient_checkpointing": False, **training,
            },
            "checkpoint": {"every_steps": 2, "keep_last": 2},
            "tracking": {"tensorboard": False},
        },
        Config,
    )  # fmt: skip


def make_job(storage: Path, prepared: PreparedData, *, architecture: dict[str, Any] | None = None, **training: object) -> Job:
    """What the driver would have resolved."""
    return Job(
        config=make_config(storage, f"{prepared.directory}/tokenizer", architecture, **training),
        contract=Contract.load(Path(prepared.directory)),
        location=f"{storage}/run",
        total_steps=STEPS,
        steps_per_epoch=STEPS,
        data_fingerprint=prepared.manifest.fingerprint,
    )


def make_engine(job: Job) -> TorchEngine:
    """An engine with the job's initial weights."""
    hf_config = resolve_hf_config(job.config.model, job.contract, vocab_size=259)

    def build(dtype: torch.dtype) -> RewardModel:
        with_language = job.config.objective.language_coefficient > 0
        return build_reward_model(hf_config, max_tokens=job.contract.max_tokens, dtype=dtype, with_language=with_language)

    engine = TorchEngine(build, job.config.training)
    initialize(engine, weight_source(pretrained(engine), job.config.model, seed=job.config.run.seed))
    return engine


def encoder_of(prepared: PreparedData, job: Job) -> Encoder:
    return Encoder(job.contract, load_tokenizer(f"{prepared.directory}/tokenizer"))


def train_comparisons() -> list[EncodedComparison]:
    return random_comparisons(COMPARISONS_PER_STEP * STEPS, seed=7)


def validation_shares() -> list[StepShare]:
    return list(make_shares(random_comparisons(8, seed=8), per_step=COMPARISONS_PER_STEP, budget=256))


def run_session(
    job: Job,
    prepared: PreparedData,
    *,
    validation: bool = False,
    stop_after: int | None = None,
    comparisons: list[EncodedComparison] | None = None,
) -> TorchEngine:
    """Run or continue the job in this process; `stop_after` ends the stream there, as a dying worker would."""
    engine = make_engine(job)
    checkpoint = job.store.latest()
    first = checkpoint.commit.step if checkpoint else 0
    reported: list[dict[str, float]] = []
    session = Session(
        engine,
        job,
        encoder_of(prepared, job),
        validation=validation_shares if validation else None,
        report=reported.append,
    )
    shares = make_shares(
        (comparisons or train_comparisons())[: (stop_after or STEPS) * COMPARISONS_PER_STEP],
        per_step=COMPARISONS_PER_STEP,
        first_step=first,
        read=job.config.objective.place,
        layout=engine.reward_model.layout,
    )
    session.run(lambda _epoch: shares, checkpoint)
    assert reported
    return engine
