#!/usr/bin/env python3
"""Shared prefixes on one GPU: values, scoring speed, training speed, against separate forwards of the same model and texts.

    python benchmarks/gpu_packing.py --parts values shapes scoring training

Models of published shapes with random weights, random token ids, bfloat16. Sides, all with the same token budget of a forward:

    shared      one comparison of a prompt and its n completions: the prompt once (FlexAttention with a block mask)
    eager       the same, layers not compiled; all other sides compile theirs
    unshared    every conversation a comparison of its own, packed without padding (the same attention)
    padded      every conversation a row of its own, sorted by length, PyTorch's scaled dot product attention

`values` compares the rewards of the first with forwards of one conversation each in float64; `shapes` runs batches of many different
lengths and counts what was compiled again. Times are medians of the wall clock around work that is waited for, after a warm-up. MFU
counts 6 x parameters of the layers x tokens (2 x when scoring) and the attention that is really needed, over 989 TFLOP/s (H100 and H200,
dense bf16).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import common

PEAK_FLOPS = 989e12
SHAPES: dict[str, dict[str, int]] = {
    "0.6B": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151_936,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 128_256,
    },
}  # fmt: skip
SIDES = ("shared", "eager", "unshared", "padded")
LOADS = ((256, 44, 1), (300, 300, 4), (300, 300, 16), (1000, 500, 4), (1000, 500, 16))
"""(tokens of the prompt, mean tokens of a completion, completions)."""


def make_model(
    shape: str, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, padded: bool = False, pad: int | None = 0
) -> Any:
    """A reward model of this shape with random weights, on the GPU."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from rayward.model.reward_model import RewardModel

    sizes: dict[str, Any] = {**SHAPES[shape], **({} if layers is None else {"num_hidden_layers": layers})}
    config = LlamaConfig(**sizes, max_position_embeddings=8192, num_labels=1, pad_token_id=pad, attn_implementation="sdpa")
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = LlamaForSequenceClassification(config)
    finally:
        torch.set_default_dtype(previous)
    if model.score.weight.numel():  # ZeRO-3 has taken it already
        model.score.weight.data.normal_(0.0, 0.02)
    return RewardModel(model, max_tokens=8192, layout="padded" if padded else None).eval()


def comparisons(load: tuple[int, int, int], count: int, vocabulary: int, *, seed: int = 0) -> list[Any]:
    """Random comparisons whose completions are half to one and a half times their mean length."""
    from rayward.batch.comparison import EncodedComparison, Labels

    prompt, mean, number = load
    rng = np.random.default_rng(seed)

    def ids(length: int) -> Any:
        return rng.integers(1, vocabulary, length, dtype=np.int32)

    made = []
    for index in range(count):
        lengths = rng.integers(mean // 2, mean + mean // 2 + 1, number)
        ranks = np.arange(number, dtype=np.float32)
        labels = Labels(ranks=ranks if number > 1 else None)
        made.append(EncodedComparison(str(index), ids(prompt), tuple(ids(int(length)) for length in lengths), labels))
    return made


def apart(given: Sequence[Any]) -> list[Any]:
    """Every conversation as a comparison of its own."""
    from rayward.batch.comparison import EncodedComparison, Labels

    return [
        EncodedComparison(c.id, np.concatenate([c.prefix_ids, branch])[:-1], (branch[-1:],), Labels())
        for c in given
        for branch in c.branch_ids
    ]


@torch.inference_mode()
def score(model: Any, given: Sequence[Any], budget: int) -> torch.Tensor:
    """Rewards of all conversations, in order, as the scorer computes them."""
    from rayward.batch.layout import pack
    from rayward.batch.planner import group_by_budget
    from rayward.model.reward_model import to_tensors

    found: list[torch.Tensor] = [torch.zeros(0)] * len(given)
    for group in group_by_budget(given, tokens_per_microbatch=budget, layout=model.layout):
        batch = pack([given[i] for i in group], layout=model.layout)
        values = model(to_tensors(batch, torch.device("cuda"))).cpu()[:, 0]
        for index, part in zip(group, torch.split(values, [given[i].num_completions for i in group]), strict=True):
            found[index] = part
    return torch.cat(found)


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repetition, the GPU waited for."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def layer_parameters(model: Any) -> int:
    """Parameters that every token passes: those of the layers."""
    # Of a parameter that ZeRO-3 has divided, `numel` is what this rank has gathered.
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in model.model.named_parameters() if ".layers." in name
    )


def useful_flops(model: Any, given: Sequence[Any], *, passes: int) -> float:
    """Of the tokens computed with shared prefixes: 2 per parameter and token, and 4 x hidden x attended pairs per layer."""
    config = model.model.config
    width = config.num_attention_heads * config.head_dim
    tokens = sum(c.num_tokens for c in given)
    pairs = 0.0
    for c in given:
        p = len(c.prefix_ids)
        pairs += p * (p + 1) / 2 + sum(len(b) * p + len(b) * (len(b) + 1) / 2 for b in c.branch_ids)
    return float(passes) * (2.0 * layer_parameters(model) * tokens + 4.0 * width * config.num_hidden_layers * pairs)


def part_values() -> dict[str, Any]:
    """Rewards of shared prefixes against one conversation a forward in float64."""
    torch.backends.cuda.matmul.allow_tf32 = False
    given = comparisons((700, 300, 4), 4, SHAPES["8B"]["vocab_size"])
    single = apart(given)
    exact = make_model("8B", layers=4, dtype=torch.float64, padded=True)
    reference = torch.cat([score(exact, [each], 1) for each in single])
    del exact
    found: dict[str, Any] = {"reward_std": float(reference.std())}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for side, padded in (("shared", False), ("separate forwards", True)):
            model = make_model("8B", layers=4, dtype=torch.float64, padded=padded)
            # Parameters alone: the frequencies of the positions stay as exact as a loaded model has them.
            for parameter in model.model.parameters():
                parameter.data = parameter.data.to(dtype)
            rewards = score(model, given, 1 << 20) if side == "shared" else torch.cat([score(model, [each], 1) for each in single])
            found[f"{name}, {side}"] = float((rewards - reference).abs().max())
            del model
            torch.cuda.empty_cache()
    return found


def part_shapes(num_batches: int) -> dict[str, Any]:
    """Batches of as many different lengths: seconds of each, and how often something was compiled."""
    import torch._dynamo.utils

    model = make_model("0.6B")
    rng = np.random.default_rng(1)
    seconds, largest = [], 0.0
    torch._dynamo.utils.counters.clear()
    for index in range(num_batches):
        number, prompt, mean = int(rng.integers(1, 9)), int(rng.integers(50, 1500)), int(rng.integers(20, 700))
        given = comparisons((prompt, mean, number), int(rng.integers(1, 9)), SHAPES["0.6B"]["vocab_size"], seed=index)
        seconds += timed(lambda given=given: score(model, given, 16_384), 1)  # type: ignore[misc]
        largest = max(largest, torch.cuda.max_memory_allocated() / 2**30)
    counters = {key: dict(value) for key, value in torch._dynamo.utils.counters.items() if key in ("stats", "frames", "recompile_limit")}
    half = num_batches // 2
    return {
        "batches": num_batches,
        "first_s": seconds[0],
        "slowest_of_first_half_s": max(seconds[1:half]),
        "slowest_of_second_half_s": max(seconds[half:]),
        "median_s": statistics.median(seconds),
        "peak_gib": largest,
        "compiled": counters,
    }


def part_scoring(shapes: Sequence[str], repeats: int, budget: int) -> list[dict[str, Any]]:
    """Conversations a second of the three sides."""
    rows = []
    for shape in shapes:
        packed, padded, eager = make_model(shape), make_model(shape, padded=True), make_model(shape)
        packed.compile_layers()
        padded.compile_layers()
        for load in LOADS:
            count = max(2, (131_072 if shape == "0.6B" else 65_536) // ((load[0] + load[1]) * load[2]))
            given = comparisons(load, count, SHAPES[shape]["vocab_size"])
            single = apart(given)
            sides = {"shared": (packed, given), "eager": (eager, given), "unshared": (packed, single), "padded": (padded, single)}
            times: dict[str, list[float]] = {}
            difference = float((score(packed, given, budget) - score(eager, given, budget)).abs().max())
            for name, (model, texts) in sides.items():
                score(model, texts, budget)
                times[name] = timed(lambda model=model, texts=texts: score(model, texts, budget), repeats)  # type: ignore[misc]
            mfu = useful_flops(packed, given, passes=1) / statistics.median(times["shared"]) / PEAK_FLOPS
            speed = {name: len(single) / statistics.median(seconds) for name, seconds in times.items()}
            rows.append(
                {
                    "shape": shape,
                    "load": load,
                    "conversations": len(single),
                    "per_s": speed,
                    "mfu": mfu,
                    "seconds": times,
                    "compiled_differs": difference,
                }
            )
            print(
                shape,
                load,
                {name: round(value, 1) for name, value in speed.items()},
                f"MFU {mfu:.3f}, compiled differs by {difference:.1e}",
                flush=True,
            )
        del packed, padded, eager
        torch.cuda.empty_cache()
    return rows


def part_training(layers: int, repeats: int, budget: int) -> list[dict[str, Any]]:
    """Steps of the ZeRO-3 engine on a stack of 8B layers: tokens a second, MFU; the prompt once, and once per completion."""
    import os

    from torch import distributed

    from rayward.batch.layout import pack
    from rayward.batch.planner import plan_step
    from rayward.config.training import TrainingConfig
    from rayward.objectives.pairs import BradleyTerryObjective, bradley_terry, bradley_terry_count
    from rayward.training.engines.build import build_engine

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29731")
    distributed.init_process_group("nccl", rank=0, world_size=1)
    rows = []
    objective = BradleyTerryObjective(type="bradley_terry")
    for checkpointing in (True, False):
        config = TrainingConfig(gpus_per_worker=1, gradient_checkpointing=checkpointing, tokens_per_microbatch=budget)
        engine = build_engine(lambda dtype: make_model("8B", layers=layers, dtype=dtype, pad=None), config)
        for load in ((1000, 500, 2), (300, 300, 2), (1000, 500, 8)):
            given = comparisons(load, max(2, 65_536 // ((load[0] + load[1]) * load[2])), SHAPES["8B"]["vocab_size"])
            (plan,) = plan_step(given, world_size=1, tokens_per_microbatch=budget)
            batches = [pack([given[i] for i in group]) for group in plan]
            count = sum(bradley_terry_count(batch.labels, objective, ()) for batch in batches)

            def step(engine: Any = engine, batches: list[Any] = batches, count: float = count) -> None:
                for number, batch in enumerate(batches):
                    loss = bradley_terry(engine.forward(batch), batch.labels, objective, ()).loss_sum / count
                    engine.backward(loss, is_last=number == len(batches) - 1)
                engine.step(1e-6)

            step()
            seconds = timed(step, repeats)
            tokens = sum(c.num_tokens for c in given)
            flops = useful_flops(engine.reward_model, given, passes=3)
            rows.append(
                {
                    "checkpointing": checkpointing, "load": load, "tokens": tokens, "seconds": seconds,
                    "tokens_per_s": tokens / statistics.median(seconds), "mfu": flops / statistics.median(seconds) / PEAK_FLOPS,
                    "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                }
            )  # fmt: skip
            print("training", rows[-1], flush=True)
        del engine
        torch.cuda.empty_cache()
    return rows


def _report(found: dict[str, Any]) -> str:
    parts = []
    if "values" in found:
        rows = [[name, f"{value:.2e}"] for name, value in found["values"].items()]
        parts.append(
            "Largest difference from float64, one conversation a forward (4 layers of the 8B shape):\n\n"
            + common.table(["side", "|difference|"], rows)
        )
    if "shapes" in found:
        shapes = found["shapes"]
        slowest = f"{shapes['slowest_of_first_half_s']:.2f} s in the first half, {shapes['slowest_of_second_half_s']:.2f} s in the second"
        parts.append(
            f"{shapes['batches']} batches of different lengths (0.6B shape): first {shapes['first_s']:.1f} s, slowest of the others "
            f"{slowest}, median {shapes['median_s']:.3f} s, peak {shapes['peak_gib']:.1f} GiB. Compiled: {shapes['compiled']}."
        )
    if "scoring" in found:
        rows = []
        for row in found["scoring"]:
            prompt, mean, number = row["load"]
            speed = row["per_s"]
            rows.append(
                [row["shape"], str(prompt), str(mean), str(number), *(f"{speed[name]:,.1f}" for name in SIDES),
                 f"{speed['shared'] / speed['unshared']:.2f}", f"{speed['shared'] / speed['padded']:.2f}", f"{row['mfu']:.3f}"]
            )  # fmt: skip
        header = [
            "shape",
            "prompt",
            "completion",
            "n",
            "shared/s",
            "eager/s",
            "unshared/s",
            "padded/s",
            "over unshared",
            "over padded",
            "MFU",
        ]
        parts.append("Scoring, conversations a second:\n\n" + common.table(header, rows))
    if "training" in found:
        rows = [
            [str(row["checkpointing"]), "x".join(map(str, row["load"])), f"{row['tokens']:,}", f"{statistics.median(row['seconds']):.2f}",
             f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.3f}", f"{row['peak_gib']:.0f}"]
            for row in found["training"]
        ]  # fmt: skip
        header = ["checkpointing", "prompt x completion x n", "tokens a step", "s a step", "tokens/s", "MFU", "peak GiB"]
        parts.append("Training, ZeRO-3 engine on one rank, layers of the 8B shape:\n\n" + common.table(header, rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["values", "shapes", "scoring", "training"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=8, help="layers of the 8B shape that are trained (default: %(default)s)")
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of one forward (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="directory of the result files")
    args = parser.parse_args()
    machine = common.describe_machine() | {"gpu": torch.cuda.get_device_name()}
    found: dict[str, Any] = {}
    for name, part in {
        "values": part_values,
        "shapes": lambda: part_shapes(60),
        "scoring": lambda: part_scoring(args.shapes, args.repeats, args.budget),
        "training": lambda: part_training(args.layers, args.repeats, args.budget),
    }.items():
        if name in args.parts:
            start = time.perf_counter()
            found[name] = part()
            print(f"{name}: {time.perf_counter() - start:.0f} s", found[name] if name in ("values", "shapes") else "", flush=True)
            text = (
                f"{machine['gpu']}. Load: tokens of the prompt, mean tokens of a completion, completions n of a prompt.\n\n{_report(found)}"
            )
            common.write_results("gpu_packing", machine=machine, text=text, values={"parts": found}, directory=args.results)


if __name__ == "__main__":
    main()
