"""A local cluster whose autoscaler adds and removes nodes: Ray's own fake ones, which are processes of this machine."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HEAD_ID = "f" * 51 + "0" * 5
HEAD_TYPE = "ray.head.default"
"""Both as Ray's provider of fake nodes calls its head."""


def free_ports(count: int) -> list[int]:
    """Outside of the range in which Ray's workers listen."""
    found: list[int] = []
    for port in random.sample(range(21_000, 30_000), 2000):
        with socket.socket() as probe:
            if len(found) < count and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


@contextmanager
def cluster() -> Iterator[str]:
    """Address of a head of one CPU, whose autoscaler adds up to three nodes of two."""
    import psutil
    import ray

    directory = tempfile.mkdtemp(prefix="rw", dir="/tmp")  # short: socket paths are limited to 107 characters
    port, dashboard, agent, client = free_ports(4)
    address = f"{ray.util.get_node_ip_address()}:{port}"
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
        "gcs_address": address,
    }
    types = {
        HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    }
    config = {
        "cluster_name": "bench", "max_workers": 3, "idle_timeout_minutes": 0.2, "provider": provider, "head_node_type": HEAD_TYPE,
        "available_node_types": types, "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip
    path = Path(directory, "cluster.json")
    path.write_text(json.dumps(config))
    environment = {
        **os.environ, "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1", f"--autoscaling-config={path}",
        f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--temp-dir={directory}", "--disable-usage-stats", "--object-store-memory=100000000",
    ]  # fmt: skip
    with open(Path(directory, "head.log"), "w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120.0
        while socket.socket().connect_ex((address.partition(":")[0], port)) != 0:
            if head.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the head did not start:\n{Path(directory, 'head.log').read_text()[-3000:]}")
            time.sleep(0.5)
        yield address
    finally:
        mine = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        # A fake node's processes need not be children of the head any more; they carry the directory in their command line.
        mine += [each for each in psutil.process_iter(["cmdline"]) if any(directory in word for word in each.info["cmdline"] or ())]
        _, alive = psutil.wait_procs(mine, timeout=15)
        for process in alive:
            process.kill()
        shutil.rmtree(directory, ignore_errors=True)
