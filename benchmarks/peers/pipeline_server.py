#!/usr/bin/env python3
"""The server that people write first: FastAPI around a Transformers pipeline, one call of the pipeline per request."""

# No `from __future__ import annotations`: FastAPI reads the types of the handler, which are imported inside `main`.
import argparse
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from transformers import pipeline

    torch.set_num_threads(args.threads)
    classify = pipeline("text-classification", model=args.model, dtype=torch.float32, function_to_apply="none", top_k=None)
    app = FastAPI()

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict[str, list[float]]:
        texts = (await request.json())["query"]
        # A batch is a request, padded to its longest text: as fast as the pipeline gets.
        found: list[Any] = classify(texts, batch_size=len(texts), add_special_tokens=False)
        return {"rewards": [each[0]["score"] for each in found]}

    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
