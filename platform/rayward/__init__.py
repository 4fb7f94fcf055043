"""Rayward: trains, evaluates and serves reward models on Ray.

Importing this package loads nothing heavy; the clients are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayward.client.client import AsyncRewardClient, RewardClient

__version__ = "0.1.0"
__all__ = ["AsyncRewardClient", "RewardClient", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("AsyncRewardClient", "RewardClient"):
        from rayward.client import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
