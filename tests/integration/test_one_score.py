"""Promise 1: one text has one reward, wherever it is computed.

Real here: a training job on ZeRO-3 with two workers, its export, the command line, a Serve application over HTTP, plain
Transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tests.helpers.runs import tiny_config, write_world

from rayward import RewardClient
from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import pack
from rayward.config.scoring import ScoringConfig
from rayward.contract.contract import Contract
from rayward.contract.conversation import Message
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.filterwarnings("default")]

NUM_TEXTS = 50
TOLERANCE = 1e-5

Text = tuple[tuple[Message, ...], str]


@pytest.fixture(scope="module")
def texts(world: Path) -> list[Text]:
    rows = [json.loads(line) for line in (world / "rankings.jsonl").read_text().splitlines()]
    found = [(tuple(row["prompt"]), completion) for row in rows for completion in row["completions"]]
    strange = [
        ((Message(role="user", content="Grüße, 你好 🙂 \t tabs\n\nand lines"),), "ok " * 30),
        ((Message(role="user", content="a"),), "b"),
    ]
    return [*strange, *found][:NUM_TEXTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A finished run and its export."""
    from rayward.workflows.train import train_pipeline

    storage = tmp_path_factory.mktemp("run")
    config = tiny_config(world, storage, "run", num_workers=2, max_steps=8)
    result = train_pipeline(config, export_to=storage / "model", evaluation=False)
    return storage / "model", result


@pytest.fixture(scope="module")
def plain(trained: tuple[Path, object], texts: list[Text]) -> list[float]:
    """Rewards from Transformers alone, in padded batches of eight."""
    from transformers import AutoModelForSequenceClassification

    directory = trained[0]
    encoder = Encoder(Contract.load(directory), load_tokenizer(str(directory)))
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"
    ids = [encoder.encode(prompt, completion) for prompt, completion in texts]
    rewards: list[float] = []
    for start in range(0, len(ids), 8):
        batch = load_tokenizer(str(directory)).pad({"input_ids": ids[start : start + 8]}, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            rewards += model(**batch).logits[:, 0].tolist()
    assert np.std(rewards) > 100 * TOLERANCE  # else everything would agree with everything
    return rewards


def encoded(directory: Path, texts: list[Text]) -> list[EncodedComparison]:
    encoder = Encoder(Contract.load(directory), load_tokenizer(str(directory)))
    rows = [np.array(encoder.encode(prompt, completion), dtype=np.int32) for prompt, completion in texts]
    return [EncodedComparison(str(i), row[:-1], (row[-1:],), Labels()) for i, row in enumerate(rows)]


def test_the_training_forward_packed_and_unpacked(trained: tuple[Path, object], texts: list[Text], plain: list[float]) -> None:
    from rayward.model.build import build_reward_model, resolve_hf_config
    from rayward.training.engines.torch import TorchEngine
    from rayward.training.trainer import TrainResult

    directory, result = trained
    assert isinstance(result, TrainResult)
    contract = Contract.load(directory)
    config = result.job.config
    hf_config = resolve_hf_config(config.model, contract, vocab_size=len(load_tokenizer(str(directory))))
    engine = TorchEngine(lambda dtype: build_reward_model(hf_config, max_tokens=contract.max_tokens, dtype=dtype), config.training)
    result.job.store.load(engine, result.checkpoint)
    comparisons = encoded(directory, texts)
    with torch.no_grad():
        together = torch.cat([engine.forward(pack(comparisons[i : i + 10])) for i in range(0, NUM_TEXTS, 10)])[:, 0].tolist()
        alone = torch.cat([engine.forward(pack([comparison])) for comparison in comparisons])[:, 0].tolist()
    assert together == pytest.approx(plain, abs=TOLERANCE)
    assert alone == pytest.approx(plain, abs=TOLERANCE)


def test_the_command_line(trained: tuple[Path, object], texts: list[Text], plain: list[float]) -> None:
    lines = "".join(json.dumps({"prompt": list(prompt), "completions": [completion]}) + "\n" for prompt, completion in texts)
    done = subprocess.run(
        [sys.executable, "-m", "rayward.cli", "score", str(trained[0])],
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    rewards = [json.loads(line)["rewards"][0] for line in done.stdout.splitlines()]
    assert rewards == pytest.approx(plain, abs=TOLERANCE)


@pytest.fixture(scope="module")
def endpoint(trained: tuple[Path, object], ray_local: None) -> Iterator[str]:
    from ray import serve

    from rayward.serving.app import serve_model

    yield serve_model(ScoringConfig(model=str(trained[0]), cpus_per_replica=0.5), port=0, name="one-score")
    serve.shutdown()


def test_over_http(endpoint: str, texts: list[Text], plain: list[float]) -> None:
    with RewardClient(endpoint) as client:
        rewards = [client.score(cast(Any, prompt), [completion])[0] for prompt, completion in texts]
    assert rewards == pytest.approx(plain, abs=TOLERANCE)


def test_golden_scores_come_from_the_training_forward(trained: tuple[Path, object]) -> None:
    from rayward.scoring.scorer import ScoreItem, Scorer

    contract = Contract.load(trained[0])
    assert len(contract.golden) >= 6
    scorer = Scorer.load(str(trained[0]))
    for golden in contract.golden:
        (result,) = scorer.score([ScoreItem(prompt=cast(Any, golden.prompt), completions=(golden.completion,))])
        assert result.rewards == pytest.approx(golden.reward, abs=TOLERANCE)
