"""Rows per second and memory of `rayward prepare` over the size of the data, against `datasets.map` and TRL's own preparation.

    python benchmarks/prepare_scale.py --sizes 100000 400000 1600000

Generated pairs of English words in one file of JSON lines: a prompt of one to three turns, two answers. Every side gets the same file, chat
template and tokenizer and two processes, and runs in a process of its own, one after the other:

    rayward       the whole job: read, checked, encoded, duplicates, split, sorted, Parquet shards, report
    map           load_dataset("json").map: a function of one row renders and tokenizes both conversations
    map batched   the same with 1000 rows a call, one call of the tokenizer
    trl           load_dataset("json") and RewardTrainer's own preparation: tokenizes row by row, drops what is too long

Starting Ray does not count: it does not grow with the rows. Memory is that of the process that starts the others (driver), and of the
largest other one (worker), without what it shares with others; disk and object store at their fullest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
from smollm2 import smollm2

SIDES = ("rayward", "map", "map batched", "trl")
PROCESSES = 2
WORDS = """
the of and to a in is it you that he was for on are with as his they be at one have this from or had by hot but some
what there we can out other were all your when up use word how said an each she which do their time if will way about
many then them would write like so these her long make thing see him two has look more day could go come did my sound
no most number who over know water than call first people may down side been now find any new work part take get place
made live where after back little only round man year came show every good me give our under name very through just
form much great think say help low line before turn cause same mean differ move right boy old too does tell sentence
set three want air well also play small end put home read hand port large spell add even land here must big high such
follow act why ask men change went light kind off need house picture try us again animal point mother world near build
self earth father head stand own page should country found answer school grow study still learn plant cover food sun
four thought let keep eye never last door between city tree cross since hard start might story saw far sea draw left
late run while press close night real life few stop open seem together next white children begin got walk example ease
paper often always music those both mark book letter until mile river car feet care second group carry took rain eat
room friend began idea fish mountain north once base hear horse cut sure watch color face wood main enough plain girl
usual young ready
""".split()  # noqa: SIM905


# ---- data -------------------------------------------------------------------------------------------------------


def write_pairs(path: Path, count: int) -> None:
    """Pairs with a seed of their own, so that a smaller file is the beginning of a larger one."""
    generator = random.Random(0)
    cumulative = list(itertools.accumulate(1 / (rank + 4) for rank in range(len(WORDS))))

    def text(low: int, high: int) -> str:
        words = generator.choices(WORDS, cum_weights=cumulative, k=generator.randint(low, high))
        return " ".join(words).capitalize() + "."

    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            turns = [{"role": "user", "content": f"{number}: {text(10, 100)}"}]
            if number % 4 == 0:
                turns += [{"role": "assistant", "content": text(20, 120)}, {"role": "user", "content": text(5, 60)}]
            row = {"prompt": turns} | {name: [{"role": "assistant", "content": text(20, 160)}] for name in ("chosen", "rejected")}
            out.write(json.dumps(row) + "\n")


# ---- sides ------------------------------------------------------------------------------------------------------


def run_rayward(spec: dict[str, Any], watch: Callable[[Path], Any]) -> int:
    """The job; back comes the number of its rows."""
    import ray

    from rayward.config.load import parse_config
    from rayward.config.run import Config
    from rayward.data.prepare.job import prepare

    storage = Path(spec["scratch"]) / "storage"
    storage.mkdir()
    settings = {
        "run": {"storage_path": str(storage)},
        "data": {"train": [spec["file"]]},
        "model": {"path": spec["tokenizer"], "max_tokens": spec["max_tokens"]},
    }
    config = parse_config(settings, Config)
    ray.init(num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with watch(storage):
        manifest = prepare(config).manifest
    ray.shutdown()
    return manifest.num_input_rows


def run_map(spec: dict[str, Any], watch: Callable[[Path], Any]) -> int:
    """`datasets.map`, or TRL's preparation; back comes the number of rows."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    cache = Path(spec["scratch"]) / "cache"
    tokenizer = AutoTokenizer.from_pretrained(spec["tokenizer"])

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{name}_ids": tokenizer.apply_chat_template(row["prompt"] + row[name], tokenize=True, return_dict=False)
            for name in ("chosen", "rejected")
        }

    def tokenize_all(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [
            tokenizer.apply_chat_template(prompt + answer, tokenize=False)
            for name in ("chosen", "rejected")
            for prompt, answer in zip(rows["prompt"], rows[name], strict=True)
        ]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return {"chosen_ids": ids[: len(ids) // 2], "rejected_ids": ids[len(ids) // 2 :]}

    with watch(cache):
        data = load_dataset("json", data_files=spec["file"], split="train", cache_dir=str(cache))
        if spec["side"] == "map":
            data = data.map(tokenize, num_proc=PROCESSES)
        elif spec["side"] == "map batched":
            data = data.map(tokenize_all, batched=True, num_proc=PROCESSES)
        else:
            from types import SimpleNamespace

            from trl import RewardTrainer

            given = SimpleNamespace(dataset_num_proc=PROCESSES, max_length=spec["max_tokens"])
            data = RewardTrainer._prepare_dataset(None, data, tokenizer, given, "train")
    return len(data)


class Watch:
    """Time, and by samples the memory and CPU time of this process and of all that it started."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.worker = self.disk = self.shared = 0

    @contextmanager
    def __call__(self, directory: Path) -> Iterator[None]:
        import psutil

        me, done = psutil.Process(), threading.Event()
        cpu: dict[int, list[float]] = {}
        before = shutil.disk_usage("/dev/shm").used if Path("/dev/shm").is_dir() else 0

        def sample() -> None:
            for process in (me, *me.children(recursive=True)):
                try:
                    times, memory = process.cpu_times(), process.memory_info()
                except psutil.Error:
                    continue
                cpu.setdefault(process.pid, [times.user + times.system, 0.0])[1] = times.user + times.system
                if process.pid != me.pid:
                    self.worker = max(self.worker, memory.rss - getattr(memory, "shared", 0))
            if Path("/dev/shm").is_dir():
                self.shared = max(self.shared, shutil.disk_usage("/dev/shm").used - before)
            files = [path for path in directory.rglob("*") if path.is_file()] if directory.is_dir() else []
            self.disk = max(self.disk, sum(_size(path) for path in files))

        def samples() -> None:
            while not done.wait(0.5):
                sample()

        sample()
        started, thread = time.perf_counter(), threading.Thread(target=samples)
        thread.start()
        try:
            yield
        finally:
            self.seconds = time.perf_counter() - started
            done.set()
            thread.join()
            sample()
            self.cpu_seconds = sum(last - first for first, last in cpu.values())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone meanwhile
        return 0


def worker(spec: dict[str, Any], out: Path) -> None:
    """One side, one size."""
    watch = Watch()
    common.reset_peak_memory()
    rows = (run_rayward if spec["side"] == "rayward" else run_map)(spec, watch)
    found = {
        "side": spec["side"],
        "rows": spec["rows"],
        "kept": rows,
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu_seconds,
        "driver_gib": common.peak_memory_gib(),
        "worker_gib": watch.worker / 2**30,
        "disk_gib": watch.disk / 2**30,
        "object_store_gib": watch.shared / 2**30,
    }
    out.write_text(json.dumps(found), encoding="utf-8")


# ---- report -----------------------------------------------------------------------------------------------------


def exponent(results: list[dict[str, Any]], value: str) -> tuple[float, float]:
    """(a, b) of a * rows ** b, by least squares of the logarithms."""
    points = [(math.log(each["rows"]), math.log(each[value])) for each in results]
    if len(points) < 2:
        return results[0][value] / results[0]["rows"], 1.0
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return math.exp(mean_y - slope * mean_x), slope


def report(results: list[dict[str, Any]]) -> str:
    """The table, the exponents, and what ten million rows would take."""
    rows = []
    for each in results:
        ours = next((r for r in results if r["side"] == "rayward" and r["rows"] == each["rows"]), None)
        ratio = "" if ours is None else f"{each['seconds'] / ours['seconds']:.2f}"
        rows.append(
            (
                each["side"], f"{each['rows']:,}", f"{each['rows'] / each['seconds']:,.0f}", ratio,
                f"{1000 * each['cpu_seconds'] / each['rows']:.2f}", f"{each['driver_gib']:.2f}", f"{each['worker_gib']:.2f}",
                f"{each['object_store_gib']:.2f}", f"{each['disk_gib']:.2f}",
            )
        )  # fmt: skip
    header = (
        "side",
        "pairs",
        "pairs/s",
        "rayward's pairs/s over it",
        "CPU ms/pair",
        "driver GiB",
        "worker GiB",
        "object store GiB",
        "disk GiB",
    )
    lines = [common.table(header, rows)]
    for side in dict.fromkeys(each["side"] for each in results):
        of_side = [each for each in results if each["side"] == side]
        (_, by_time), (_, by_cpu) = exponent(of_side, "seconds"), exponent(of_side, "cpu_seconds")
        if len(of_side) > 1:
            lines.append(f"{side}: time grows with the pairs to the power {by_time:.3f}, CPU time {by_cpu:.3f}.")
    mine = [each for each in results if each["side"] == "rayward"]
    if mine:
        (factor, power), largest = exponent(mine, "seconds"), max(mine, key=lambda each: each["rows"])
        memories = [each["driver_gib"] for each in mine]
        per_row = {name: largest[f"{name}_gib"] / largest["rows"] * 1e7 for name in ("disk", "object_store")}
        # Not less than at the rate of the largest size: what does not grow with the pairs makes the smaller ones slow.
        hours = max(factor * 1e7**power, 1e7 * largest["seconds"] / largest["rows"]) / 3600
        lines.append(
            f"The driver's peak is {min(memories):.2f} to {max(memories):.2f} GiB over the sizes. Ten million pairs of this kind would "
            f"take {hours:.1f} hours on {PROCESSES} cores, and hold {per_row['disk']:.0f} GiB of disk at the fullest "
            f"and {per_row['object_store']:.1f} GiB in the object store."
        )
    return "\n\n".join(lines)


def main() -> None:
    """Write the files, run the sides, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 400_000, 1_600_000], help="numbers of pairs")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="what is measured (default: all)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="limit of a conversation (default: 1024)")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="directory of the result files")
    given = parser.parse_args()
    machine, results = common.describe_machine(), []
    with tempfile.TemporaryDirectory() as scratch:
        for size in given.sizes:
            file = Path(scratch, f"pairs-{size}.jsonl")
            write_pairs(file, size)
            for side in given.sides:
                with tempfile.TemporaryDirectory(dir=scratch) as place:
                    spec = {
                        "side": side, "rows": size, "file": str(file), "scratch": place, "tokenizer": str(smollm2()),
                        "max_tokens": given.max_tokens,
                    }  # fmt: skip
                    os.environ["HF_DATASETS_CACHE"] = place
                    found = common.run_side(__file__, spec, num_threads=1)
                results.append(found)
                print(f"{side}, {size:,} pairs: {size / found['seconds']:,.0f} a second", flush=True)
            file.unlink()
    values = {"results": results, "processes": PROCESSES}
    common.write_results("prepare_scale", machine=machine, text=report(results), values=values, directory=given.results)


if __name__ == "__main__":
    if (arguments := common.worker_arguments()) is not None:
        worker(*arguments)
    else:
        main()
