#!/usr/bin/env python3
"""OpenRLHF's reward server on a CPU: its own `RewardModelProxy` in float32, its own route around it.

Needs `pip install --no-deps openrlhf peft pylatexenc`. FlashAttention, which its modules import and a CPU has not, is replaced by a name;
nothing of it is called with `packing_samples` off. It loads bf16 or fp16 alone; the weights are widened afterwards: a CPU computes bf16
slowly.
"""

# No `from __future__ import annotations`: FastAPI reads the types of the handler, which are imported inside `main`.
import argparse
import sys
from argparse import Namespace
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed", "ring_flash_attn"):
        module: ModuleType = MagicMock()
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from openrlhf.cli import serve_rm

    torch.set_num_threads(args.threads)
    settings = Namespace(
        reward=Namespace(model_name_or_path=args.model, normalize_enable=False),
        ds=Namespace(
            attn_implementation="sdpa", experts_implementation=None, param_dtype="bf16", load_in_4bit=False, value_head_prefix="score",
            packing_samples=False,
        ),
        data=Namespace(disable_fast_tokenizer=False, max_len=2048),
        batch_size=None,
    )  # fmt: skip
    reward_model = serve_rm.RewardModelProxy(settings)
    reward_model.reward_model.float()
    app = FastAPI()

    # Its handler is a coroutine that computes in the event loop.
    @app.post("/get_reward")
    async def get_reward(request: Request) -> JSONResponse:
        data = await request.json()
        rewards = reward_model.get_reward(data.get("query"))
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": {"dummy_scores": rewards}})

    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
