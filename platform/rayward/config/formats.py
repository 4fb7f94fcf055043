"""Names of the formats that data may be in."""

from __future__ import annotations

from typing import Literal

SourceFormat = Literal[
    "auto",
    "trl",
    "openrlhf",
    "hh_rlhf",
    "ultrafeedback_binarized",
    "helpsteer2_preference",
    "helpsteer3_preference",
    "ranking",
    "nectar",
    "ultrafeedback",
    "helpsteer2",
    "safe_rlhf",
    "scored",
    "pointwise",
    "stepwise",
    "critique",
    "alpaca",
    "sharegpt",
    "axolotl",
    "ms_swift",
    "nemo_rl",
    "kto",
    "arena",
    "shp",
    "distilabel",
    "prm800k",
    "rm_bench",
    "rmb",
]
