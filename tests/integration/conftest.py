"""A real local Ray for the tests of this directory."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from tests.helpers.chromium import INSTALL, find_chromium

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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # The frames of an exception that the last test waited for, or logged, hold actors, and these hold CPUs that this test needs.
    gc.collect()


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser; CI installs Debian's where there is none."""
    found = find_chromium()
    if found is None and os.environ.get("CI") and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["bash", "-c", INSTALL], check=True, capture_output=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        found = find_chromium()
    if found is None:
        message = f"tests of the page need Chromium: as root, {INSTALL}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found
