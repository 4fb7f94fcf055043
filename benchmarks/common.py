"""What the benchmarks share: the machine's description, result files, prepared pairs, and one process per side."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform as host
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "platform"))

if TYPE_CHECKING:
    from rayward.batch.comparison import EncodedComparison
    from rayward.data.prepared import PreparedData

RESULTS = HERE / "results"
PACKAGES = ("rayward", "torch", "transformers", "deepspeed", "ray", "trl")
HH_FILE = "hh_rlhf_harmless_base_test.jsonl.gz"


def cache_directory() -> Path:
    """Where models and prepared data are kept between runs: $RAYWARD_BENCH_CACHE, or ~/.cache/rayward-bench."""
    directory = Path(os.environ.get("RAYWARD_BENCH_CACHE", "~/.cache/rayward-bench")).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    return directory


# ---- results ----------------------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    """Processor, memory, versions and date; no host or user names."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{host.system()} {host.machine()}, Python {host.python_version()}",
        "versions": versions,
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return host.processor() or host.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = [" | ".join(header), " | ".join(["---"] + ["---:"] * (len(header) - 1))]
    lines += [" | ".join(str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def write_results(name: str, *, machine: dict[str, Any], text: str, values: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write `<name>-<date>.md` and `.json` and print the text.

    Args:
        machine: `describe_machine()` from before the measurement, so that the load is that of the others.
        text: the Markdown below the title.
        values: everything measured, for the JSON file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stem = directory / f"{name}-{machine['date'][:10]}"
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    head = (
        f"# {name}\n\n{machine['date']} · {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB · {machine['system']} · "
        f"load before the start {machine['load_average'][0]}  \n{versions}  \nCommand: `{command_line()}`\n"
    )
    stem.with_suffix(".md").write_text(f"{head}\n{text}\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps({"machine": machine, **values}, indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}\n\nresults: {stem.with_suffix('.md')} and .json")
    return stem


def command_line() -> str:
    """How the benchmark was started, without this machine's directories."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for index, word in enumerate(words[:-1]):
        if word == "--data":
            words[index + 1] = "DATA"
    return "python benchmarks/" + " ".join(words)


# ---- one process per side ---------------------------------------------------------------------------------------


def run_side(script: str, spec: dict[str, Any], *, num_threads: int) -> dict[str, Any]:
    """Run `script --worker SPEC OUT` in a process of its own and return what it wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch, "spec.json"), Path(scratch, "out.json")
        given.write_text(json.dumps(spec), encoding="utf-8")
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(num_threads),
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(
            [sys.executable, script, "--worker", str(given), str(out)], env=environment, capture_output=True, text=True, cwd=scratch
        )
        if done.returncode != 0 or not out.exists():
            raise SystemExit(f"{script} failed on {spec}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return result


def worker_arguments() -> tuple[dict[str, Any], Path] | None:
    """(spec, output file) inside a process that `run_side` started, else None."""
    if len(sys.argv) == 4 and sys.argv[1] == "--worker":
        return json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), Path(sys.argv[3])
    return None


def peak_memory_gib() -> float:
    """Largest resident size of this process so far (since `reset_peak_memory`, where the system can reset it)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def reset_peak_memory() -> None:
    """Forget the peak of loading, so that the next reading is that of training (Linux; elsewhere the whole run counts)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


# ---- data -------------------------------------------------------------------------------------------------------


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """`--data DIRECTORY`."""
    parser.add_argument("--data", type=Path, required=True, help="directory with the preference files that benchmarks/README.md lists")


def data_file(directory: Path, name: str = HH_FILE) -> Path:
    """A file of the data directory, absolute."""
    path = (directory / name).resolve()
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; benchmarks/README.md says which files are needed and where they come from")
    return path


def prepare_pairs(sources: Sequence[str], *, tokenizer: str, max_tokens: int, data_format: str = "auto") -> PreparedData:
    """Run Rayward's own prepare job on the files (cached between runs); nothing is held out."""
    import ray

    from rayward.cluster import connect
    from rayward.config.load import parse_config
    from rayward.config.run import Config
    from rayward.data.prepare.job import prepare

    config = parse_config(
        {
            "run": {"storage_path": str(cache_directory())},
            "data": {"train": list(sources), "format": data_format, "validation_fraction": 0.0, "max_bad_fraction": 0.5},
            "model": {"path": tokenizer, "max_tokens": max_tokens},
            "training": {"tokens_per_microbatch": max(4096, max_tokens)},
        },
        Config,
    )
    connect()
    try:
        return prepare(config)
    finally:
        ray.shutdown()


def read_pairs(prepared_directory: str, count: int | None = None) -> list[EncodedComparison]:
    """The first `count` prepared training comparisons, in training order."""
    from rayward.data.prepared import COMPARISON_COLUMNS, PreparedData, comparisons_from_table

    comparisons: list[EncodedComparison] = []
    for table in PreparedData.load(prepared_directory).tables("train", COMPARISON_COLUMNS):
        comparisons += comparisons_from_table(table)
        if count is not None and len(comparisons) >= count:
            return comparisons[:count]
    if count is not None:
        raise SystemExit(f"{prepared_directory} holds {len(comparisons)} comparisons, {count} are needed; lower --steps or the step's size")
    return comparisons
