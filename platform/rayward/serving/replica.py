"""The scorer's deployment: one version of a model in a process of its own, and the engine that scores with it."""

import asyncio
import logging
import sys
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from rayward.config.scoring import ReplicaConfig
from rayward.errors import marking
from rayward.serving.calls import ScoreCall, ScoredCall, Stats
from rayward.serving.handles import new_handle
from rayward.serving.loopback import stay_on_loopback
from rayward.serving.reporting import report_forever
from rayward.wire.native import ModelInfo, WireNormaliser

logger = logging.getLogger("ray.serve")

MANAGER = "manager"
"""Name of the manager's deployment in the front application."""

SWITCH_S = 0.001
"""How long a thread that computes in Python may keep the others waiting: the compute thread needs the interpreter before every kernel."""


@serve.deployment(name="scorer")
class ScorerDeployment:
    """Scores by one version.

    Args:
        source: directory, URI or hub name of the model.
        config: how it runs.
        model_name: its name in requests.
        front: application of the manager that is sent what was counted; empty: nobody is.
        content: identity of what the source held when it was published; another content is refused.

    Raises:
        RaywardError: the model cannot be loaded, or is not what its contract says.
    """

    # Of a constructor that fails, Serve keeps the text of the traceback only.
    @marking
    def __init__(self, source: str, config: ReplicaConfig, model_name: str, front: str = "", content: str | None = None) -> None:
        import torch

        from rayward.scoring.load import load_scored_model
        from rayward.serving.engine.engine import Engine
        from rayward.serving.sources import localise

        stay_on_loopback()
        torch.set_num_threads(config.threads_per_replica)
        sys.setswitchinterval(SWITCH_S)
        self._model = load_scored_model(localise(source, content), config.placement)
        facts = self._model.facts
        self._info = ModelInfo(
            id=model_name,
            version=self._model.version,
            max_tokens=facts.max_tokens,
            outputs=list(facts.outputs),
            weight_sets=list(facts.weight_sets),
            normaliser=None if facts.normaliser is None else WireNormaliser(**facts.normaliser.model_dump()),
            writes_critiques=facts.writes_critiques,
        )
        self._engine = Engine(self._model, config, model_name=model_name, name=_replica_name(model_name))
        self._front = front
        self._manager: Any = None
        self._reports = asyncio.get_running_loop().create_task(report_forever(self._engine.stats, self._send)) if front else None

    async def score(self, call: ScoreCall) -> ScoredCall:
        """Rewards or errors of one request's items, in order; see `Engine.score`."""
        return await self._engine.score(call)

    async def info(self) -> ModelInfo:
        """What is served."""
        return self._info

    async def stats(self) -> Stats:
        """What was counted."""
        return self._engine.stats()

    def check_health(self) -> None:
        """Called by Serve; never waits for a forward.

        Raises:
            ServerError: the replica should be replaced.
        """
        self._engine.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve; what the autoscaling policy reads."""
        return self._engine.load()

    def __del__(self) -> None:
        # Called by Serve when the replica has finished what it held; a constructor that failed has no engine.
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()

    async def _send(self, stats: Stats) -> None:
        if self._manager is None:
            self._manager = new_handle(self._front, MANAGER, check_exists=False)
        await self._manager.report.remote(stats)


def _replica_name(model_name: str) -> str:
    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return model_name
