"""Unit tests start no Ray and never sleep: both raise here. Tests of one process, on one thread."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest

# Read when the libraries are imported, hence before any test module is.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"


def _refuse_ray(*_args: object, **_kwargs: object) -> NoReturn:
    raise RuntimeError("a unit test started Ray; such a test belongs into tests/integration")


def _refuse_sleep(_seconds: float) -> NoReturn:
    raise RuntimeError("a unit test slept; inject the clock instead")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_ray_and_no_sleep(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Ray is heavy to import, so it is guarded only where a test (or what it imports) has loaded it.
    ray = sys.modules.get("ray")
    if ray is not None:
        monkeypatch.setattr(ray, "init", _refuse_ray)
    monkeypatch.setattr(time, "sleep", _refuse_sleep)
    yield
    ray = sys.modules.get("ray")
    if ray is not None:
        assert not ray.is_initialized(), "a unit test started Ray"
