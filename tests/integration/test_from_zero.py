"""A version of which no replica runs while nothing is asked: every request that comes then starts one, and is answered."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from tests.helpers.command import serving
from tests.helpers.models import make_export
from tests.helpers.processes import named, until

from rayward import RewardClient
from rayward.scoring.scorer import Scorer
from rayward.wire.items import ScoreItem

pytestmark = pytest.mark.drill

PROMPT, COMPLETIONS = "Hi", ["Hello", "No!"]


def test_it_goes_to_zero_and_comes_back_again_and_again(tmp_path: Path) -> None:
    export = make_export(tmp_path / "tiny")
    (result,) = Scorer.load(export, device="cpu").score([ScoreItem(({"role": "user", "content": PROMPT},), tuple(COMPLETIONS))])
    assert result.rewards is not None
    with serving(export, "min_replicas=0", "max_replicas=1", "downscale_delay_s=1") as service, RewardClient(service.url) as client:
        for _ in range(3):
            until(lambda: not named(":scorer", service.processes()))
            assert httpx.get(f"{service.url}/readyz", timeout=60.0).status_code == 200
            assert client.score(PROMPT, COMPLETIONS) == pytest.approx(result.rewards, abs=1e-5)
