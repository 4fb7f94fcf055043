"""A user's own function as an adapter: `module:function`, from a row to a row of a known format. No Ray here.

The driver finds the module from the working directory and takes its text, and that of modules beside it that it uses. This text is part
of the data's identity, travels to the workers, and is what runs, on the driver too: no worker needs the files.
"""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rayward.data.record import BadRow, RowRejected
from rayward.errors import ConfigError
from rayward.schema import digest

FORMAT_KEY = "format"
"""Key of the row that the function returns: the name of its format; without it the format is detected."""

Function = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class Module:
    """One module as text.

    Attributes:
        name: as it is imported; path: where it was read.
        package: whether it holds others.
    """

    name: str
    path: str
    package: bool
    text: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """A user's function: its name, and the modules that it is made of."""

    name: str
    modules: tuple[Module, ...]

    def fingerprint(self) -> str:
        """Hash of what it does, wherever it lies."""
        return digest([self.name, sorted([module.name, module.text] for module in self.modules)])


def adapter_fingerprint(name: str) -> str:
    """Hash of the source of the function's module, and of the modules beside it that it uses."""
    return read_adapter(name).fingerprint()


def read_adapter(name: str) -> Adapter:
    """The function behind `module:function`, found from the working directory.

    Raises:
        ConfigError: there is no such module or function, or it cannot be imported.
    """
    module_name = name.partition(":")[0]
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    known = sys.modules.get(module_name)
    try:
        module = importlib.import_module(module_name) if known is None else known
        modules = _modules(module)
        adapter = Adapter(name, modules)
        load_adapter(adapter)
    except ConfigError:
        raise
    except Exception as exc:  # the module is the user's own: whatever it does at import is told
        raise _not_found(name, f"{module_name} cannot be imported: {type(exc).__name__}: {exc}") from exc
    return adapter


def _not_found(name: str, problem: str) -> ConfigError:
    return ConfigError(
        f"data.adapter {name!r}: {problem}",
        remedy=f"the working directory is {Path.cwd()}; put the module there, or on PYTHONPATH, and name it as module:function",
    )


def _modules(module: ModuleType) -> tuple[Module, ...]:
    """The module with its packages, and those under the same root that it uses, as the files are now; none of an installed package."""
    file = getattr(module, "__file__", None)
    installed = {"site-packages", "dist-packages"}.intersection(Path(file or "").parts)
    if file is None or not file.endswith(".py") or installed or module.__name__.partition(".")[0] in sys.stdlib_module_names:
        return ()
    depth = module.__name__.count(".") + int(hasattr(module, "__path__"))
    root = Path(file).parents[depth]
    found: dict[str, Module] = {}
    _collect(module, root, found)
    return tuple(found[name] for name in sorted(found))


def _collect(module: ModuleType, root: Path, found: dict[str, Module]) -> None:
    name, file = module.__name__, getattr(module, "__file__", None)
    top = name.partition(".")[0]
    beside = (root / top).is_dir() or (root / f"{top}.py").is_file()
    if name in found or file is None or not file.endswith(".py") or not beside or not Path(file).is_relative_to(root) or top == "rayward":
        return
    text = Path(file).read_text(encoding="utf-8", errors="backslashreplace")
    found[name] = Module(name, file, hasattr(module, "__path__"), text)
    used: list[ModuleType | None] = [sys.modules.get(name.rpartition(".")[0])]
    for value in list(vars(module).values()):
        used.append(value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or ""))
    for each in used:
        if each is not None:
            _collect(each, root, found)


class _Texts(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules from their texts."""

    def __init__(self, modules: Sequence[Module]) -> None:
        self.modules = {module.name: module for module in modules}

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """As Python asks for it."""
        module = self.modules.get(fullname)
        if module is None:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=module.path, is_package=module.package)

    def exec_module(self, module: ModuleType) -> None:
        """Run the text."""
        given = self.modules[module.__name__]
        module.__file__ = given.path
        exec(compile(given.text, given.path, "exec"), module.__dict__)


@lru_cache(maxsize=16)
def load_adapter(adapter: Adapter) -> Function:
    """The function, from the text of its modules.

    Raises:
        ConfigError: the module has no such function.
    """
    module_name, _, attribute = adapter.name.partition(":")
    texts = _Texts(adapter.modules)
    before = {name: sys.modules.pop(name) for name in texts.modules if name in sys.modules}
    sys.meta_path.insert(0, texts)
    try:
        found: Any = importlib.import_module(module_name)
    # Whatever stops the import, an interrupt too, leaves the modules as they were; it goes on from here.
    except BaseException:
        sys.modules.update(before)
        raise
    finally:
        sys.meta_path.remove(texts)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise _not_found(adapter.name, f"{module_name} has no function {attribute}")
    return found  # type: ignore[no-any-return]


def run_adapter(adapter: Adapter, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the function makes of a row.

    Raises:
        RowRejected: it refuses the row with a reason, fails, or returns something else than a row.
    """
    function, name = load_adapter(adapter), adapter.name
    try:
        made = function(copy.deepcopy(dict(row)))
    except ValueError as exc:
        raise RowRejected(BadRow.ADAPTER_REJECTED, f"{name}: {exc or 'ValueError without a text'}") from exc
    except Exception as exc:  # the function is the user's own: one row must not cost the others
        last = traceback.extract_tb(exc.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise RowRejected(BadRow.ADAPTER_FAILED, f"{name}: {type(exc).__name__}: {exc} ({where})") from exc
    if isinstance(made, tuple) and len(made) == 2 and made[0] is None:
        raise RowRejected(BadRow.ADAPTER_REJECTED, f"{name}: {made[1]}")
    if made is None:
        raise RowRejected(BadRow.ADAPTER_REJECTED, f"{name} returned None without a reason")
    if not isinstance(made, dict) or not all(isinstance(key, str) for key in made):
        raise RowRejected(BadRow.ADAPTER_FAILED, f"{name} returned {type(made).__name__}; the rule is a dict, or (None, reason)")
    return made
