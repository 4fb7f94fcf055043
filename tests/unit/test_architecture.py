"""The import directions of the design, read from the source text, and what light modules may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "rayward"

FLOORS = (
    {"errors", "schema"},
    {"storage", "cluster", "contract"},
    {"batch", "wire"},
    {"objectives", "client"},
    {"config"},
    {"model", "data"},
    {"training", "scoring"},
    {"artifacts"},
    {"evaluation", "serving", "capacity"},
    {"workflows", "demo"},
    {"cli"},
)
"""The rooms, from the ground up: a room imports only rooms on lower floors, and its own. Rooms of one floor never see each other."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

LOOSE = {"errors", "schema", "storage", "cluster"}
"""The modules that stand in no room."""

MAY_IMPORT_RAY = {
    "client.adapters.nemo_rl",
    "cluster",
    "data.prepare.job",
    "data.prepare.numbering",
    "data.prepare.stages",
    "data.prepare.write",
    "data.stream.stream",
    "scoring.batch",
    "serving.app",
    "serving.applications",
    "serving.assembly",
    "serving.direct",
    "serving.handles",
    "serving.ingress",
    "serving.loopback",
    "serving.proxies",
    "serving.replica",
    "training.trainer",
}
MAY_IMPORT_DEEPSPEED = {"training.engines.deepspeed", "training.engines.operator"}


@dataclass(frozen=True)
class Import:
    module: str
    """Importing module, without the package's name."""
    target: str
    """Imported module, with its package's name."""
    line: int

    def __str__(self) -> str:
        return f"{self.module or '__init__'}:{self.line} imports {self.target}"


def imports_of(text: str, module: str, modules: frozenset[str]) -> list[Import]:
    """Every import statement of a source text, also those inside functions and those for type checkers."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [Import(module, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative imports hide the direction"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append(Import(module, whole if whole in modules else str(node.module), node.lineno))
    return found


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = frozenset(f"rayward.{name}".removesuffix(".") for name in SOURCES)
IMPORTS = [found for name, path in SOURCES.items() for found in imports_of(path.read_text(encoding="utf-8"), name, MODULES)]


def _against_the_floors(imports: list[Import]) -> list[str]:
    wrong = []
    for found in imports:
        package, _, inner = found.target.partition(".")
        if package != "rayward" or not found.module:
            continue
        here, there = found.module.partition(".")[0], inner.partition(".")[0]
        # `from rayward import name` of the package itself would load whatever its __init__ does.
        if there != here and (there not in FLOOR or FLOOR[there] >= FLOOR[here]):
            wrong.append(str(found))
    return wrong


def test_a_room_imports_only_lower_floors() -> None:
    assert _against_the_floors(IMPORTS) == []


def test_every_module_stands_in_a_room() -> None:
    assert {name.partition(".")[0] for name in SOURCES if name} <= set(FLOOR)
    assert {name for name in SOURCES if name and not (PACKAGE / name.partition(".")[0]).is_dir()} == LOOSE
    assert {i.target for i in IMPORTS if not i.module and i.target.startswith("rayward")} <= {"rayward.client", "rayward.client.client"}


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("errors", "import rayward.config.run"),
        ("storage", "from rayward.contract.contract import Contract"),
        ("contract.contract", "from rayward.batch.layout import pack"),
        ("batch.planner", "import rayward.objectives.table"),
        ("client.client", "from rayward.scoring.scorer import Scorer"),
        ("config.run", "from rayward.model import weights"),
        ("model.weights", "from rayward.data.prepared import PreparedData"),
        ("training.loop", "from rayward.scoring.scorer import Scorer"),
        ("scoring.scorer", "def f():\n    from rayward.training.engines.protocol import Engine"),
        ("evaluation.report", "if TYPE_CHECKING:\n    from rayward.serving.app import build"),
        ("workflows.train", "import rayward.demo.settings"),
        ("cli", "from rayward import RewardClient"),
    ],
)
def test_the_check_sees_a_forbidden_import(module: str, statement: str) -> None:
    assert len(_against_the_floors(imports_of(statement, module, MODULES))) == 1


def _importers(package: str) -> set[str]:
    return {i.module for i in IMPORTS if i.target.split(".")[0] == package}


def test_only_the_marked_modules_import_ray() -> None:
    assert _importers("ray") <= MAY_IMPORT_RAY
    assert _importers("ray") >= MAY_IMPORT_RAY, "a module that lost its Ray import should lose its mark here"


def test_only_what_runs_on_ray_or_starts_a_job_connects_to_it() -> None:
    assert {i.module for i in IMPORTS if i.target == "rayward.cluster"} <= MAY_IMPORT_RAY | {
        "cli.options",
        "demo.settings",
        "scoring.verify",
        "workflows.critique",
        "workflows.evaluate",
        "workflows.mixture",
        "workflows.score",
        "workflows.serve",
        "workflows.train",
    }


def test_only_the_engines_import_deepspeed() -> None:
    assert _importers("deepspeed") == MAY_IMPORT_DEEPSPEED


def test_evaluation_loads_ray_only_when_it_runs() -> None:
    program = "import sys, rayward.evaluation.run; print('ray' in sys.modules)"
    assert _run(program) == "False"


@pytest.mark.parametrize("folder", ["platform", "jobs", "cluster", "serve"])
def test_a_folder_that_would_shadow_a_module_is_no_package(folder: str) -> None:
    # `platform` as a package hides the standard library's; the others are scripts and files, not code to import.
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_standard_library_keeps_its_platform_module() -> None:
    program = "import sys; sys.path.insert(0, '.'); import platform; print(platform.__file__)"
    assert Path(_run(program)).name == "platform.py"


@pytest.mark.parametrize(
    "module",
    [
        "rayward",
        "rayward.cli",
        "rayward.client.client",
        "rayward.config.load",
        "rayward.config.scoring",
        "rayward.contract.contract",
        "rayward.contract.encoder",
        "rayward.contract.golden",
        "rayward.errors",
        "rayward.objectives.table",
        "rayward.schema",
        "rayward.wire.native",
        "rayward.wire.rules",
    ],
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    program = (
        f"import sys, importlib; importlib.import_module({module!r});"
        "print(sorted({'torch', 'ray', 'transformers', 'deepspeed', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    assert _run(program) == "[]"


def _run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_soft_ceilings_of_size() -> None:
    too_long = [f"{name}: {lines} lines" for name, path in SOURCES.items() if (lines := path.read_text(encoding="utf-8").count("\n")) > 400]
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > 80:
                    too_long.append(f"{name}.{node.name}: {length} lines")
    assert too_long == []
