#!/usr/bin/env python3
"""The demo: generated pairs with a known true reward -> trained, exported, evaluated and served model, on two CPU cores.

Runs on a Ray of its own, which ends with it. The same command continues an interrupted demo.
"""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

NUM_SHOWN, NEW_SEED = 4, 12345


def main() -> None:
    from rayward.cli import load
    from rayward.config.scoring import ScoringConfig
    from rayward.demo.settings import demo_settings
    from rayward.demo.world import generate, true_reward
    from rayward.workflows.console import console
    from rayward.workflows.train import train_pipeline

    started = time.monotonic()
    os.chdir(ROOT)
    os.environ["RAY_ADDRESS"] = "local"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    result = train_pipeline(load(demo_settings()), export_to=None, evaluation=True)

    import ray
    from ray import serve

    from rayward import RewardClient
    from rayward.serving.app import serve_model

    model = f"{result.location}/export"
    url = serve_model(ScoringConfig(model=model, cpus_per_replica=0.5), port=0)
    console.print(f"\nendpoint: {url}/v1/score")
    with RewardClient(url) as client:
        for row in generate(NUM_SHOWN, seed=NEW_SEED):
            rewards = client.score(row["prompt"], row["completions"])
            console.print(f"\n{row['prompt'][-1]['content']}", style="bold")
            ordered = sorted(zip(rewards, row["completions"], strict=True), reverse=True)
            for reward, completion in ordered:
                true = true_reward(row["prompt"], completion)
                console.print(f"  {reward:+7.3f}  (true {true:+5.2f})  {completion}", markup=False, highlight=False)
    serve.shutdown()
    ray.shutdown()
    console.print(f"\nmodel: {model}\nreport: {model}-evaluation/report.html\nplots: {model}-evaluation/plots")
    console.print(f"served until now at {url}; serve it again with: rayward serve {model}")
    console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
