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

MAY_IMPORT_RAY = {
    "cluster",
    "critiques",
    "data.prepare",
    "data.stream",
    "evaluation.evaluate",
    "mixture",
    "scoring.app",
    "scoring.batch",
    "training.trainer",
}
MAY_IMPORT_DEEPSPEED = {"training.engine"}

# Room -> rooms it may import from (its own always). A module stands in the room named by its longest matching prefix here.
DIRECTION: dict[str, set[str]] = {
    "errors": set(),
    "storage": {"errors"},
    "cluster": {"errors"},
    "reading": set(),
    "section": {"errors", "reading"},
    "ranking": {"errors", "reading", "data.packing"},
    "correctness": {"errors", "reading", "section", "ranking", "data.packing"},
    "overrides": {"errors"},
    "objectives": {"errors", "section", "ranking", "correctness", "data.packing"},
    "config": {"errors", "section", "objectives", "overrides"},
    "data.comparison": {"errors", "config"},
    "data.packing": {"errors", "reading"},
    "data.shares": {"errors", "reading", "data.packing"},
    "contract": {"errors", "reading", "section", "config", "data.comparison"},
    "encoder": {"errors", "contract", "data.comparison", "data.packing"},
    "data": {
        "errors", "reading", "section", "config", "storage", "cluster", "contract", "encoder", "data.comparison", "data.packing",
        "data.shares",
    },
    "metrics": {"errors", "config"},
    "model": {"errors", "config", "contract", "data.comparison", "data.packing", "metrics"},
    "training": {
        "errors", "reading", "config", "storage", "cluster", "contract", "encoder", "data", "data.comparison", "data.packing",
        "data.shares", "objectives", "ranking", "metrics", "model", "golden",
    },
    "scoring.wire": {"errors", "section"},
    "scoring.exchange": {"errors", "section", "scoring.wire"},
    "scoring.client": {"errors", "section", "scoring.wire", "scoring.exchange"},
    "scoring": {
        "errors", "reading", "config", "storage", "cluster", "contract", "encoder", "data", "data.comparison", "data.packing", "metrics",
        "model", "scoring.wire",
    },
    "evaluation": {
        "errors", "config", "storage", "cluster", "contract", "data", "data.comparison", "data.packing", "metrics", "scoring",
        "scoring.wire",
    },
    "capacity": {"errors", "config"},
    "pipeline": {
        "errors", "section", "config", "storage", "cluster", "contract", "data", "model", "training", "scoring", "evaluation",
    },
    "golden": {"contract", "data.comparison"},
    "mixture_config": {"section", "config"},
    "mixture": {
        "errors", "config", "mixture_config", "storage", "cluster", "contract", "golden", "data", "model", "scoring", "evaluation",
    },
    "critiques": {"errors", "config", "storage", "cluster", "contract", "data", "data.comparison", "scoring", "scoring.wire"},
    "demo": {"errors", "cluster", "data"},
    "cli": {
        "errors", "config", "cluster", "data", "scoring", "scoring.client", "evaluation", "capacity", "pipeline", "demo", "mixture_config",
        "mixture", "critiques",
    },
    "": {"errors", "scoring.client"},
}  # fmt: skip


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


def room_of(module: str) -> str:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in DIRECTION:
            return ".".join(parts[:length])
    raise AssertionError(f"module {module} stands in no room of DIRECTION")


def _against_direction(imports: list[Import]) -> list[str]:
    wrong = []
    for found in imports:
        package, _, inner = found.target.partition(".")
        if package != "rayward":
            continue
        here = room_of(found.module) if found.module else ""
        there = room_of(inner) if inner else None
        # `from rayward import name` of the package itself would load whatever its __init__ does.
        if there is None or (there != here and there not in DIRECTION[here]):
            wrong.append(str(found))
    return wrong


def test_every_import_follows_the_direction() -> None:
    assert _against_direction(IMPORTS) == []


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("errors", "import rayward.config"),
        ("config", "from rayward.contract import Contract"),
        ("contract", "from rayward.model import loading"),
        ("training.loop", "from rayward.scoring.scorer import Scorer"),
        ("scoring.scorer", "def f():\n    from rayward.training.engine import Engine"),
        ("model.loading", "from rayward.training.checkpoint import Commit"),
        ("evaluation.report", "if TYPE_CHECKING:\n    from rayward.training.loop import Schedule"),
        ("scoring.client", "from rayward.scoring.scorer import Scorer"),
        ("data.packing", "import rayward.objectives"),
    ],
)
def test_the_check_sees_a_forbidden_edge(module: str, statement: str) -> None:
    assert len(_against_direction(imports_of(statement, module, MODULES))) == 1


def _importers(package: str) -> set[str]:
    return {i.module for i in IMPORTS if i.target.split(".")[0] == package}


def test_only_the_marked_modules_import_ray() -> None:
    assert _importers("ray") <= MAY_IMPORT_RAY
    assert _importers("ray") >= MAY_IMPORT_RAY, "a module that lost its Ray import should lose its mark here"


def test_only_what_runs_on_ray_or_starts_a_job_connects_to_it() -> None:
    assert {i.module for i in IMPORTS if i.target == "rayward.cluster"} <= MAY_IMPORT_RAY | {"cli", "demo", "pipeline"}


def test_only_the_engine_imports_deepspeed() -> None:
    assert _importers("deepspeed") == MAY_IMPORT_DEEPSPEED


def test_evaluation_loads_ray_only_when_it_runs() -> None:
    program = "import sys, rayward.evaluation.evaluate; print('ray' in sys.modules)"
    assert _run(program) == "False"


def test_training_and_scoring_never_meet() -> None:
    rooms = {"training": "rayward.scoring", "scoring": "rayward.training"}
    wrong = [str(i) for i in IMPORTS for room, other in rooms.items() if i.module.split(".")[0] == room and i.target.startswith(other)]
    assert wrong == []


@pytest.mark.parametrize("folder", ["platform", "jobs", "cluster", "serve"])
def test_a_folder_that_would_shadow_a_module_is_no_package(folder: str) -> None:
    # `platform` as a package hides the standard library's; the others are scripts and files, not code to import.
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_standard_library_keeps_its_platform_module() -> None:
    program = "import sys; sys.path.insert(0, '.'); import platform; print(platform.__file__)"
    assert Path(_run(program)).name == "platform.py"


@pytest.mark.parametrize(
    "module", ["rayward", "rayward.config", "rayward.errors", "rayward.scoring.wire", "rayward.scoring.client", "rayward.cli"]
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
