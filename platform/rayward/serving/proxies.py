"""Where Serve's proxies listen: the one file that uses a private interface of Serve, which has no public one for it."""

from __future__ import annotations

import ray
import ray.serve.context

from rayward.errors import ServerError


def running_address() -> tuple[str, int] | None:
    """Host and port of the proxies, if Serve runs on this cluster.

    Raises:
        ServerError: this version of Ray has not the interface any more.
    """
    try:
        client = ray.serve.context._get_global_client(raise_if_no_controller_running=False)
        return None if client is None else (client.http_config.host, client.http_config.port)
    except (AttributeError, TypeError) as exc:
        raise ServerError(
            f"Ray {ray.__version__} no longer has ray.serve.context._get_global_client(raise_if_no_controller_running).http_config ({exc})",
            remedy="see rayward/serving/proxies.py, or use Ray 2.60",
        ) from exc
