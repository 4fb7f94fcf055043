"""The port that a replica of Serve opens, on a cluster of one machine and on others."""

from __future__ import annotations

import inspect

import pytest

# Ray Serve 2.60 is imported inside the tests: its own models warn about deprecated pydantic settings.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(("node", "opened"), [("127.0.0.1", "127.0.0.1:0"), ("10.0.0.7", "[::]:0")])
def test_it_is_opened_where_the_node_is(monkeypatch: pytest.MonkeyPatch, node: str, opened: str) -> None:
    import ray
    from ray.serve._private import replica

    from rayward.serving.loopback import stay_on_loopback

    addresses: list[str] = []
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda _, address: addresses.append(address))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    stay_on_loopback()
    replica.add_port_to_grpc_server(None, "[::]:0")
    assert addresses == [opened]


def test_serve_still_opens_it_in_that_way() -> None:
    import ray
    from ray.serve._private import replica

    source = inspect.getsource(replica)
    said = f"Ray {ray.__version__} opens the port of a replica in another way: see rayward/serving/loopback.py"
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in source, said
