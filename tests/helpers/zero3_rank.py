"""One rank of a training run without Ray: `python -m tests.helpers.zero3_rank CONFIG.json PREPARED RANK WORLD_SIZE PORT`.

Prints the loss per step as JSON (rank 0).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import torch

from rayward.config.run import Config
from rayward.contract.contract import Contract
from rayward.contract.tokenizer import load_tokenizer
from rayward.data.prepared import PreparedData
from rayward.data.stream.shares import STREAM_COLUMNS, plan_block, read_share
from rayward.model.build import build_reward_model, resolve_hf_config
from rayward.model.pretrained import weight_source
from rayward.objectives.table import Objective
from rayward.training.engines.build import build_engine, initialize, pretrained
from rayward.training.engines.deepspeed import init_process_group
from rayward.training.loop import Schedule, run_steps


def main(config_path: str, prepared_path: str, rank: int, world_size: int, port: int) -> None:
    torch.set_num_threads(1)
    config = Config.model_validate_json(Path(config_path).read_text())
    prepared = PreparedData.load(prepared_path)
    contract = Contract.load(Path(prepared_path))
    tokenizer = load_tokenizer(f"{prepared_path}/tokenizer")
    init_process_group(rank=rank, world_size=world_size, master_port=port)
    hf_config = resolve_hf_config(config.model, contract, vocab_size=len(tokenizer))
    engine = build_engine(lambda dtype: build_reward_model(hf_config, max_tokens=contract.max_tokens, dtype=dtype), config.training)
    initialize(engine, weight_source(pretrained(engine), config.model, seed=config.run.seed))
    table = pa.concat_tables(prepared.tables("train", STREAM_COLUMNS))
    size = config.training.comparisons_per_step
    num_steps = -(-table.num_rows // size)
    shares = (
        read_share(
            plan_block(
                table.slice(step * size, size),
                world_size=world_size,
                comparisons_per_step=size,
                tokens_per_microbatch=config.training.tokens_per_microbatch,
                layout="packed",
            ).slice(rank, 1),
            layout="packed",
            pad_token_id=contract.pad_token_id,
        )
        for step in range(num_steps)
    )
    training = config.training
    schedule = Schedule(training.learning_rate, num_steps, training.warmup_fraction, training.min_lr_fraction)
    history: list[float] = []
    run_steps(
        engine,
        shares,
        objective=Objective(config.objective),
        schedule=schedule,
        first_step=0,
        stop_step=num_steps,
        on_step=lambda _step, metrics: history.append(metrics["loss"]),
        router_coefficient=training.router_coefficient,
    )
    if rank == 0:
        print("LOSSES " + json.dumps(history), flush=True)
    torch.distributed.barrier()
    # The work is done and printed. Interpreter shutdown races with gloo's threads now and then ("terminate called …").
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(argument) for argument in sys.argv[3:6]))
