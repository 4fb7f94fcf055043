"""A replica of Serve listens for calls of other replicas on every address of its machine; on a cluster of one machine it need not."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.serve._private import replica

from rayward.cluster import LOOPBACK

logger = logging.getLogger("ray.serve")

ANY_ADDRESS = "[::]"


def stay_on_loopback() -> None:
    """Called in the constructor of a deployment, which Serve runs before it opens that port: on a node whose address is the loopback one,
    the port is opened there too. Elsewhere nothing changes: other nodes have to reach it.
    """
    if ray.util.get_node_ip_address() != LOOPBACK:
        return
    open_port = getattr(replica, "add_port_to_grpc_server", None)
    if open_port is None:
        # It answers to nobody without Ray's token all the same.
        logger.warning("Ray %s opens the port of a replica in another way: it listens on all addresses", ray.__version__)
        return

    def open_on_loopback(server: Any, address: str) -> Any:
        return open_port(server, address.replace(ANY_ADDRESS, LOOPBACK))

    replica.add_port_to_grpc_server = open_on_loopback
