"""Numbers that the code must reproduce: published figures, and closed forms worked out once in double precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FIXTURES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
