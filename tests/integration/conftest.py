"""A real local Ray for the tests of this directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when Ray is imported, which test modules do at collection
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Two CPUs, no dashboard, no token authentication, quiet."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    yield
    ray.shutdown()
