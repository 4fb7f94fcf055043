"""A scoring service for the page, in this process: four models of every kind, rewards by a rule, a board with five minutes of traffic. No Ray, no torch.

    with PageService() as service:
        browser.open(service.url)

`python tests/helpers/page_service.py 8099` serves it until interrupted.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import uvicorn
from starlette.applications import Starlette

from rayward.config.scoring import ScoringConfig
from rayward.contract.conversation import text_of
from rayward.errors import ModelLoadError, OverloadedError, ServerError
from rayward.serving.auth import Keys
from rayward.serving.calls import QUEUED_TOKENS, TOKENS_PER_S, ScoredCall
from rayward.serving.front import Front
from rayward.serving.http import build_http
from rayward.serving.metrics import Recorder
from rayward.serving.reporting import Board
from rayward.serving.routes import Canary, ModelRoutes, Release, RouteTable
from rayward.serving.seeing import seeing_endpoints
from rayward.serving.status import build_status
from rayward.wire.dialect import Timings
from rayward.wire.endpoints import ENDPOINTS
from rayward.wire.items import ItemError, ItemResult, ScoreItem, TokenTrace
from rayward.wire.native import ModelInfo, WireNormaliser, WireRelease
