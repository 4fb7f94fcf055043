from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "transformers", "deepspeed", "pyarrow", "numpy", "fastapi")


@pytest.mark.parametrize(
    "statement",
    [
        "import rayward; assert rayward.__version__",
        "import rayward.errors",
        "import rayward.config.run",
        "import rayward.wire.native",
        "import rayward.wire.rules",
        "import rayward.client.client",
        "from rayward import RewardClient, AsyncRewardClient",
    ],
)
def test_import_loads_nothing_heavy(statement: str) -> None:
    program = f"import sys; {statement}; print(sorted(set(sys.modules) & set({HEAVY!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_alone_does_not_load_httpx() -> None:
    program = "import sys, rayward; print('httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unknown_attribute_of_the_package() -> None:
    import rayward

    with pytest.raises(AttributeError, match="no attribute 'Reward'"):
        _ = rayward.Reward
