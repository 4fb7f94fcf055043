from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.jobs import MAX_TOKENS, encoder_of, make_job, make_prepared, run_session
from tests.helpers.models import CONVERSATIONS
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import pack
from rayward.contract.contract import Contract
from rayward.contract.golden import GOLDEN_CONVERSATIONS
from rayward.data.prepared import PreparedData
from rayward.errors import CheckpointError, ConfigError, ContractMismatchError
from rayward.scoring.scorer import Scorer
from rayward.training.checkpoints.store import choose_checkpoint
from rayward.training.engines.torch import TorchEngine
from rayward.training.session import Job
from rayward.workflows.export import export

TEXTS = [*CONVERSATIONS, *GOLDEN_CONVERSATIONS[:4]]


class Run(NamedTuple):
    job: Job
    prepared: PreparedData
    engine: TorchEngine
    exported: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run and its export."""
    directory = tmp_path_factory.mktemp("run")
    prepared = make_prepared(directory / "prepared")
    job = make_job(directory, prepared)
    engine = run_session(job, prepared)
    export(job.config, prepared, choose_checkpoint(job.store, "last"), job.store, directory / "export")
    return Run(job, prepared, engine, directory / "export")


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    """An export to damage."""
    shutil.copytree(run.exported, tmp_path / "copy")
    return tmp_path / "copy"


def training_rewards(run: Run) -> Tensor:
    """Rewards of the texts in the training forward, all packed into one micro-batch."""
    encoder = encoder_of(run.prepared, run.job)
    comparisons = []
    for prompt, completion in TEXTS:
        ids = torch.tensor(encoder.encode(prompt, completion), dtype=torch.int32).numpy()
        comparisons.append(EncodedComparison("text", ids[:-2], (ids[-2:],), Labels()))
    with torch.no_grad():
        return run.engine.forward(pack(comparisons))


@pytest.mark.parametrize("side", ["left", "right", "one by one"])
def test_plain_transformers_gives_the_training_rewards(run: Run, side: str) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(run.exported, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(run.exported)
    conversations: list[Any] = [[*prompt, {"role": "assistant", "content": completion}] for prompt, completion in TEXTS]
    rendered = [str(tokenizer.apply_chat_template(turns, tokenize=False)).rstrip() for turns in conversations]
    if side == "one by one":
        batches = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in rendered]
    else:
        batches = [tokenizer(rendered, add_special_tokens=False, return_tensors="pt", padding=True, padding_side=side)]
    with torch.no_grad():
        rewards = torch.cat([model.eval()(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in batches])
    expected = training_rewards(run)
    assert expected.std() > 1e-3
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)


def test_the_scorer_gives_the_training_rewards_and_verifies_the_golden_ones(run: Run) -> None:
    from rayward.wire.items import ScoreItem

    scorer = Scorer.load(run.exported)
    results = scorer.score([ScoreItem(tuple({"role": t["role"], "content": t["content"]} for t in p), (c,)) for p, c in TEXTS])
    rewards = [result.rewards[0] for result in results if result.rewards is not None]
    torch.testing.assert_close(torch.tensor(rewards)[:, None], training_rewards(run), rtol=1e-5, atol=1e-5)
    assert len(scorer.contract.golden) > 3


def test_the_model_is_a_regression_model_with_a_pad_token_of_its_own(run: Run) -> None:
    config = json.loads((run.exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["problem_type"], config["pad_token_id"]) == ("regression", 0)
    contract = Contract.load(run.exported)
    assert contract.pad_token_id != contract.end_token_id
    assert contract.max_tokens == MAX_TOKENS
    assert contract.fingerprint() == run.job.contract.fingerprint()
    names = {path.name for path in run.exported.iterdir()}
    assert names == {*contract.files, "contract.json", "README.md"}
    assert {"model.safetensors", "training_config.json", "data_manifest.json", "tokenizer.json", "config.json"} <= names
    assert json.loads((run.exported / "data_manifest.json").read_text())["fingerprint"] == run.prepared.manifest.fingerprint


def test_many_small_shards_hold_the_same_weights(run: Run, tmp_path: Path) -> None:
    checkpoint = choose_checkpoint(run.job.store, "last")
    export(run.job.config, run.prepared, checkpoint, run.job.store, tmp_path / "sharded", max_shard_bytes=20_000)
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 3
    whole = load_file(run.exported / "model.safetensors")
    # A single tensor over the limit stands alone.
    assert all(path.stat().st_size < 22_000 or len(load_file(path)) == 1 for path in shards)
    assert {name for path in shards for name in load_file(path)} == set(whole)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sharded")
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    Scorer.load(tmp_path / "sharded")


def test_the_weights_are_those_of_the_chosen_checkpoint(run: Run, tmp_path: Path) -> None:
    last = load_file(run.exported / "model.safetensors")
    for partition in run.engine.partitions():
        assert torch.equal(last[partition.name].reshape(-1), run.engine.read_state(partition, "weight"))
    export(run.job.config, run.prepared, choose_checkpoint(run.job.store, "4"), run.job.store, tmp_path / "earlier")
    earlier = load_file(tmp_path / "earlier" / "model.safetensors")
    assert not torch.equal(earlier["score.weight"], last["score.weight"])


def test_a_checkpoint_that_is_not_there(run: Run) -> None:
    for which in ("5", "best", "newest"):
        with pytest.raises(CheckpointError, match="committed steps: 6, 4"):
            choose_checkpoint(run.job.store, which)


def test_a_directory_that_is_no_export_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("ten years of work")
    checkpoint = choose_checkpoint(run.job.store, "last")
    with pytest.raises(ConfigError, match="exists and is not an exported model"):
        export(run.job.config, run.prepared, checkpoint, run.job.store, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_an_export_is_replaced_as_a_whole(run: Run, copy: Path) -> None:
    (copy / "left over.txt").write_text("old")
    export(run.job.config, run.prepared, choose_checkpoint(run.job.store, "4"), run.job.store, copy)
    assert not (copy / "left over.txt").exists()
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    Scorer.load(copy)


def _edit(name: str, old: str, new: str, directory: Path) -> None:
    path = directory / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _scale(name: str, directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("part", "file"),
    [("tokenizer", "tokenizer.json"), ("template", "chat_template.jinja"), ("model config", "config.json"), ("weights", ""), ("head", "")],
)
def test_each_tampering_is_named(copy: Path, part: str, file: str) -> None:
    match part:
        case "tokenizer":
            _edit(file, '"a"', '"\u00e6"', copy)
        case "template":
            _edit(file, "<|im_start|>", "<|im_end|>", copy)
        case "model config":
            _edit(file, '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03', copy)
        case "weights":
            _scale("model.layers.0.mlp.up_proj.weight", copy)
        case "head":
            _scale("score.weight", copy)
    with pytest.raises(ContractMismatchError, match=f"^{part}: ") as caught:
        Scorer.load(copy)
    assert "remedy" in str(caught.value)


def test_a_forged_contract_still_fails_its_golden_scores(copy: Path) -> None:
    from rayward.model.weights import head_sha256
    from rayward.schema import file_sha256

    _scale("score.weight", copy)
    contract = Contract.load(copy)
    files = {**contract.files, "model.safetensors": file_sha256(copy / "model.safetensors")}
    head = head_sha256(load_file(copy / "model.safetensors"))
    contract.model_copy(update={"files": files, "head_sha256": head}).save(copy)
    with pytest.raises(ContractMismatchError, match="golden scores: conversation 0 scores"):
        Scorer.load(copy)
