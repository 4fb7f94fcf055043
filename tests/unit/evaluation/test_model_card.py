from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.helpers.models import change_contract, make_export
from tests.unit.evaluation.table import evaluation_of, make_records

from rayward.config.load import dump_config
from rayward.config.run import Config
from rayward.contract.contract import Contract
from rayward.contract.conversation import Message
from rayward.contract.reading import RewardReadout
from rayward.errors import ConfigError
from rayward.evaluation.card import write_model_card
from rayward.evaluation.plots import write_plots
from rayward.evaluation.records import Evaluation
from rayward.scoring.scorer import ScoreItem, Scorer

MANIFEST: dict[str, Any] = {
    "fingerprint": "f00dfeed",
    "num_input_rows": 1234,
    "num_train": 1100,
    "num_validation": 100,
    "num_quarantined": {"tie": 30, "duplicate": 4, "too_long": 0},
    "sources": {"a|b": 1000, "helpful": 200},
}


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluation_of(make_records(200))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("models") / "export")


@pytest.fixture
def export(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "export"))


def write(export: Path, evaluation: Evaluation | None = None, **options: Any) -> str:
    contract = Contract.load(export)
    options = {"manifest": MANIFEST, **options}
    path = write_model_card(export, contract=contract, config_json=dump_config(Config()), evaluation=evaluation, **options)
    return path.read_text(encoding="utf-8")


def test_front_matter_is_yaml_with_the_tags_that_the_hub_reads(export: Path, evaluation: Evaluation) -> None:
    card = write(export, evaluation)
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == "text-classification"
    assert "reward-model" in values["tags"]
    assert values["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(evaluation.overall.accuracy.value, abs=1e-4)
    assert body.lstrip().startswith("# rayward\n")


def test_card_holds_metrics_baselines_data_and_plots(export: Path, evaluation: Evaluation, tmp_path: Path) -> None:
    plots = write_plots(evaluation, tmp_path / "drawn")
    card = write(export, evaluation, plots=plots)
    for row in evaluation.rows:
        assert re.search(rf"\| {row.name} \| .* \| {re.escape(str(row.accuracy))} \|", card)
    assert "| rows read | 1,234 |" in card
    assert "| quarantined | 34 (duplicate: 4, tie: 30) |" in card
    assert "`f00dfeed`" in card
    assert "sigmoid(reward(A) - reward(B))" in card
    images = re.findall(r"!\[.+?\]\((.+?)\)", card)
    assert len(images) == 4
    for image, plot in zip(images, plots, strict=True):
        assert (export / image).read_bytes() == plot.read_bytes()


def test_tables_keep_their_shape_whatever_a_source_is_called(export: Path, evaluation: Evaluation) -> None:
    card = write(export, evaluation)
    assert r"&lt;b>arithmetic&lt;/b> \| x" in card
    for block in re.findall(r"(?:^\|.*\n)+", card, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_no_name_becomes_html_or_a_link(export: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> [x](javascript:1) `a` | b\n# c"
    records = [record.model_copy(update={"source": evil}) for record in make_records(40)]
    config = json.dumps({"run": {"name": evil, "seed": evil}, "objective": {"type": evil}, "model": {"path": f"/models/{evil}"}})
    manifest = MANIFEST | {"sources": {evil: 3}, "fingerprint": evil}
    contract = Contract.load(export).model_copy(update={"outputs": (evil,), "end_token": evil})
    card = write_model_card(export, contract=contract, config_json=config, manifest=manifest, evaluation=evaluation_of(records))
    text = card.read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\[x\]\(", text.split("---\n")[2])
    assert "\n# c" not in text
    assert yaml.safe_load(text.split("---\n")[1])["model-index"][0]["name"] == evil
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_card_without_evaluation_or_manifest_says_so(export: Path) -> None:
    card = write(export, None, manifest=None)
    assert "was not evaluated on held-out data" in card
    assert "The training data is not recorded." in card
    assert "model-index" not in card


def test_base_model_is_named_only_when_it_is_a_hub_name(export: Path) -> None:
    contract = Contract.load(export)

    def card(base: str) -> str:
        config = json.dumps({"model": {"path": base}, "run": {"name": "x"}})
        return write_model_card(export, contract=contract, config_json=config, manifest=None, evaluation=None).read_text(encoding="utf-8")

    assert 'base_model: "owner/small-lm"' in card("owner/small-lm")
    local = card("/models/small-lm")
    assert "base_model:" not in local
    assert "| started from | `small-lm` |" in local
    assert "base_model:" not in card(str(export))


@pytest.mark.parametrize("config_json", ["not json", "[]"])
def test_config_must_be_a_json_object(export: Path, config_json: str) -> None:
    with pytest.raises(ConfigError, match="resolved configuration"):
        write_model_card(export, contract=Contract.load(export), config_json=config_json, manifest=None, evaluation=None)


def run_block(code: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    return printed.getvalue().strip()


@pytest.mark.parametrize("template_source", ["tokenizer", "plain"])
def test_the_code_in_the_card_runs_and_gives_the_score(export: Path, monkeypatch: pytest.MonkeyPatch, template_source: str) -> None:
    if template_source == "plain":
        template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if loop.last %}{{ end_token }}{% endif %}{% endfor %}"
        change_contract(export, template=template, template_source="plain")
    monkeypatch.chdir(export)
    transformers_code, rayward_code = re.findall(r"```python\n(.*?)```", write(export), flags=re.DOTALL)
    prompt = (Message(role="user", content="What is the capital of France?"),)
    [expected] = Scorer.load(export, device="cpu").score([ScoreItem(prompt=prompt, completions=("Paris.",))])
    assert expected.rewards is not None
    assert float(run_block(transformers_code)) == pytest.approx(expected.rewards[0], abs=1e-5)
    first = float(run_block(rayward_code).strip("()[]").split(",")[0])
    assert first == pytest.approx(expected.rewards[0], abs=1e-5)


def test_the_code_of_a_card_with_several_outputs_gives_their_weighted_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rated = make_export(tmp_path / "rated", outputs=("a", "b"), reward_weights=(0.75, -0.5))
    card = write_model_card(rated, contract=Contract.load(rated), config_json="{}", manifest=None, evaluation=None).read_text(
        encoding="utf-8"
    )
    assert "`a` (0.75), `b` (-0.5)" in card
    monkeypatch.chdir(rated)
    prompt = (Message(role="user", content="What is the capital of France?"),)
    [expected] = Scorer.load(rated, device="cpu").score([ScoreItem(prompt=prompt, completions=("Paris.",))])
    assert expected.rewards is not None
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]
    assert float(run_block(code)) == pytest.approx(expected.rewards[0], abs=1e-5)


def test_the_card_of_a_mixture_says_what_plain_transformers_cannot(export: Path) -> None:
    contract = Contract.load(export).for_head(("a", "score"), (0.0, 1.0)).model_copy(update={"gate": ()})
    config = json.dumps({"objective": {"type": "mixture"}})
    card = write_model_card(export, contract=contract, config_json=config, manifest=None, evaluation=None).read_text(encoding="utf-8")
    assert "the gate that makes a score of them needs Rayward" in card
    assert "a gate reads off the prompt" in card


@pytest.mark.parametrize(
    ("changes", "objective", "said"),
    [
        ({"critique_lead_in": "Judge:"}, "bradley_terry", "writes a critique of the answer, and the reward is read after it"),
        (
            {"reading": RewardReadout(at="steps", separator="|", aggregate="product")},
            "process",
            "read at all steps of the answer and combined",
        ),
        ({"reading": RewardReadout(at="tokens", aggregate="last")}, "outcome", "calls it right"),
    ],
)
def test_a_card_says_where_the_reward_is_read(export: Path, changes: dict[str, Any], objective: str, said: str) -> None:
    contract = Contract.load(export).model_copy(update=changes)
    config = json.dumps({"objective": {"type": objective}, "run": {"name": "n"}})
    card = write_model_card(export, contract=contract, config_json=config, manifest=None, evaluation=None).read_text(encoding="utf-8")
    assert said in card
    assert "where the head is read, and critiques, need Rayward" in card
    assert "AutoModel" not in card.split("## Load it through Rayward")[0]
