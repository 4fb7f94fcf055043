"""A small training job on the generated world, for the tests that run the real thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayward.config.load import parse_config
from rayward.config.run import Config
from rayward.demo.files import write_demo

NUM_TRAIN = 192
COMPARISONS_PER_STEP = 8
NUM_STEPS = NUM_TRAIN // COMPARISONS_PER_STEP


def write_world(directory: Path) -> Path:
    """Data and tokenizer of the generated world: 192 training and 24 validation pairs."""
    write_demo(directory, NUM_TRAIN, 24, 0)
    return directory


def tiny_config(world: Path, storage: Path, name: str, **training: Any) -> Config:
    """A two-layer llama from random weights; 24 optimizer steps."""
    return parse_config(
        {
            "run": {"name": name, "storage_path": str(storage), "seed": 3},
            "data": {"train": [str(world / "train.jsonl")], "validation": [str(world / "validation.jsonl")], "format": "trl"},
            "model": {
                "tokenizer": str(world / "tokenizer"),
                "max_tokens": 128,
                "architecture": {
                    "model_type": "llama",
                    "vocab_size": 1000,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 256,
                },
            },
            "training": {
                "comparisons_per_step": COMPARISONS_PER_STEP,
                "tokens_per_microbatch": 512,
                "learning_rate": 1e-3,
                "cpus_per_worker": 0.25,
                **training,
            },
            "checkpoint": {"every_steps": 6, "keep_last": 3},
            "tracking": {"tensorboard": False},
        },
        Config,
    )


def losses(run: Path) -> list[float]:
    """Training loss per step, steps 1, 2, 3, … without gap or repetition."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == list(range(1, len(trained) + 1))
    return [record["loss"] for record in trained]


def final_weights(run: Path, step: int = NUM_STEPS) -> dict[str, bytes]:
    """Bytes of the rank files of one checkpoint."""
    directory = run / "checkpoints" / f"step_{step:08d}"
    return {path.name: path.read_bytes() for path in sorted(directory.glob("rank_*.safetensors"))}
