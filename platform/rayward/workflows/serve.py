"""`rayward serve`: start a service, say where it is, take it down when interrupted."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from rayward.cluster import connect, started_here
from rayward.config.scoring import ScoringConfig
from rayward.schema import write_atomically
from rayward.serving.preflight import check_listening, check_sources
from rayward.workflows.console import console

MARK = Path("~/.rayward/serving/cluster.json")
"""Which process started the cluster that a service of this machine runs on; what a killed one leaves behind is known by it."""


def serve_until_interrupted(
    config: ScoringConfig, *, host: str | None, port: int | None, name: str, route_prefix: str, replace: bool
) -> None:
    """Serve in the foreground; raises as `rayward.serving.app.serve_model`."""
    # Before a cluster is started for it.
    check_listening(host, port, config)
    check_sources(config)
    connect()
    from rayward.serving.app import cluster_address, serve_model

    # What matters is said here; how Serve goes about it stands in its own logs.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    note_cluster(MARK.expanduser(), cluster_address())

    def ready(url: str) -> None:
        served = ", ".join([*([config.model] if config.model else []), *config.models.values()]) or "the models of its state"
        console.print(f"serving {served} at {url} (POST {url}/v1/score); Ctrl-C stops", markup=False)

    serve_model(
        config, host=host, port=port, name=name, route_prefix=route_prefix, replace=replace, blocking=True,
        on_ready=ready, on_note=lambda note: console.print(note, markup=False),
    )  # fmt: skip


def note_cluster(mark: Path, address: str) -> None:
    """Remember who started this cluster; say so where it was a process that is no longer there."""
    if started_here():
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(mark, json.dumps({"pid": os.getpid(), "address": address}))
        return
    left = left_behind(mark, address)
    if left is not None:
        console.print(
            f"note: this joins the cluster at {address}, which a `rayward serve` (process {left}) started and, killed, could not end. "
            "`ray stop` ends it, and every other Ray of yours on this machine.",
            markup=False,
        )


def left_behind(mark: Path, address: str) -> int | None:
    """The process that started the cluster and is gone; None where it lives, or the cluster is another one's."""
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
        pid = int(found["pid"])
        if found["address"] != address:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return pid
    except PermissionError:
        pass
    return None
