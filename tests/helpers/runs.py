"""A small training job on the generated world, for the tests that run the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rayward.config.load import parse_config
from rayward.config.run import Config
from rayward.demo.files import write_demo

ROOT = Path(__file__).resolve().parents[2]
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


def run_ranks(world: Path, storage: Path, *, world_size: int, budget: int, engine: str = "deepspeed", experts: bool = False) -> list[float]:
    """Losses of a run without Ray, one process per rank; with `experts` of a Mixtral whose routers are balanced."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from rayward.data.prepare.job import prepare

    config = tiny_config(world, storage, "ranks", tokens_per_microbatch=budget, engine=engine, router_coefficient=0.1 if experts else 0.0)
    if experts:
        mixtral = {**(config.model.architecture or {}), "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
        config = config.model_copy(update={"model": config.model.model_copy(update={"architecture": mixtral})})
    prepared = prepare(config)
    path = storage / "config.json"
    path.write_text(config.model_dump_json())
    # The store listens here on a port of its own choice and the ranks join it: a port that is chosen, closed and used later may be taken.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    arguments = [str(path), prepared.directory]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.zero3_rank", *arguments, str(rank), str(world_size), str(store.port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, outputs[0][1][-3000:]
    (line,) = [line for line in outputs[0][0].splitlines() if line.startswith("LOSSES ")]
    history: list[float] = json.loads(line.removeprefix("LOSSES "))
    return history
