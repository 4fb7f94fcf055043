"""A user's own function as an adapter: `module:function`, from a row to a row of a known format. No Ray here.

The module is found from the working directory, on the driver and on the workers, and the hash of its source is part of the data's identity.
"""

from __future__ import annotations

import copy
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
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


@lru_cache(maxsize=64)
def load_adapter(name: str) -> Function:
    """The function behind `module:function`.

    Raises:
        ConfigError: there is no such module or function, or it cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    remedy = f"the working directory is {here}; put the module there, or on PYTHONPATH, and name it as module:function"
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as exc:  # the module is the user's own: whatever it does at import is told
        raise ConfigError(f"data.adapter {name!r}: {module_name} cannot be imported: {type(exc).__name__}: {exc}", remedy=remedy) from exc
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"data.adapter {name!r}: {module_name} has no function {attribute}", remedy=remedy)
    return found  # type: ignore[no-any-return]


def adapter_fingerprint(name: str) -> str:
    """Hash of the source of the function's module, and of the modules beside it that it uses."""
    load_adapter(name)
    modules: dict[str, str] = {}
    _collect(sys.modules[name.partition(":")[0]], modules)
    return digest([name, sorted(modules.items())])


def _collect(module: ModuleType, into: dict[str, str]) -> None:
    file = getattr(module, "__file__", None)
    if file is None or module.__name__ in into:
        return
    into[module.__name__] = Path(file).read_text(encoding="utf-8", errors="backslashreplace")
    beside = Path(file).parent
    for value in list(vars(module).values()):
        used = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", None) or "")
        place = getattr(used, "__file__", None)
        if used is not None and place is not None and Path(place).is_relative_to(beside):
            _collect(used, into)


def run_adapter(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the function makes of a row.

    Raises:
        RowRejected: it refuses the row with a reason, fails, or returns something else than a row.
    """
    function = load_adapter(name)
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
