from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayward.config.load import dump_config, load_config, parse_config
from rayward.config.placement import Placement
from rayward.config.run import Config
from rayward.config.scoring import ScoringConfig
from rayward.errors import ConfigError


def problem_of(*overrides: str, schema: type[Config] | type[ScoringConfig] = Config) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides, schema=schema)
    return caught.value


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        # key, value and rule of each
        (["training.lr=1e-5"], ["training.lr", "1e-05", "unknown key", "learning_rate"]),
        (["trainning.learning_rate=1"], ["trainning", "unknown key", "training"]),
        (["training.learning_rate=fast"], ["training.learning_rate", "'fast'", "valid number"]),
        (["training.learning_rate=-1"], ["training.learning_rate", "-1", "greater than 0"]),
        (["training.num_workers=[1,2,3]"], ["training.num_workers", "[1, 2, 3]"]),
        (["training.num_workers=0"], ["training.num_workers", "0", "1 <= min <= max"]),
        (["training.num_workers=[3,2]"], ["training.num_workers", "(3, 2)", "1 <= min <= max"]),
        (["training.engine=torch", "training.num_workers=2"], ["training.engine", "2 workers", "deepspeed"]),
        (["data.format=csv"], ["data.format", "'csv'", "hh_rlhf"]),
        (["data.validation_fraction=1.0"], ["data.validation_fraction", "1.0", "less than 1"]),
        (["run.name=../x"], ["run.name", "../x", "pattern"]),
        (["model.path=a", "model.architecture={model_type: llama}"], ["model.path", "model.architecture", "one of them"]),
        (["model.architecture={hidden_size: 8}", "model.tokenizer=t"], ["model.architecture", "model_type"]),
        (["model.architecture={model_type: llama}"], ["model.architecture", "model.tokenizer"]),
        (["training.tokens_per_microbatch=100", "model.max_tokens=200"], ["training.tokens_per_microbatch is 100", "model.max_tokens 200"]),
        (["objective.type=bradley"], ["objective.type", "'bradley'", "bradley_terry"]),
        (["objective.label_smoothing=0.5"], ["objective.label_smoothing", "0.5", "less than 0.5"]),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_with_key_value_and_rule(overrides: list[str], parts: list[str]) -> None:
    error = problem_of(*overrides)
    for part in parts:
        assert part in error.problem
    assert error.remedy
    assert error.exit_code == 2
    assert "remedy: " in str(error)


def test_every_wrong_key_is_named_at_once() -> None:
    error = problem_of("training.lr=1", "data.trian=[a]", "run.seed=-1")
    assert all(key in error.problem for key in ("training.lr", "data.trian", "run.seed"))


def test_the_scoring_configuration_has_its_own_rules() -> None:
    error = problem_of("min_replicas=3", "max_replicas=2", schema=ScoringConfig)
    assert "min_replicas is 3 and max_replicas 2" in error.problem
    assert "tokens_per_batch" in problem_of("tokens_per_batsh=1", schema=ScoringConfig).problem


def test_files_merge_left_to_right_and_overrides_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("run: {name: first, seed: 1}\ntraining:\n  learning_rate: 1.0e-3\n")
    second.write_text("run:\n  name: second\n")
    config = load_config([first, second], ["training.warmup_fraction=0.5", "run.seed=7"])
    assert (config.run.name, config.run.seed) == ("second", 7)
    assert (config.training.learning_rate, config.training.warmup_fraction) == (1e-3, 0.5)


def test_an_architecture_is_replaced_not_merged(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: {tokenizer: t, architecture: {model_type: llama, num_key_value_heads: 2}}\n")
    second.write_text("model: {architecture: {model_type: gpt2}}\n")
    assert load_config([first, second]).model.architecture == {"model_type": "gpt2"}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.learning_rate=1e-5", "learning_rate", 1e-5),  # YAML 1.1 reads this as a string
        ("training.learning_rate=3E-4", "learning_rate", 3e-4),
        ("training.num_workers=[1, 4]", "num_workers", (1, 4)),
        ("training.max_steps=null", "max_steps", None),
        ("training.gradient_checkpointing=false", "gradient_checkpointing", False),
    ],
)
def test_override_values_are_yaml(override: str, key: str, value: object) -> None:
    assert getattr(load_config(overrides=[override]).training, key) == value


def test_an_override_may_hold_equal_signs_and_words_with_an_e() -> None:
    assert load_config(overrides=["data.train=[a=b.jsonl]"]).data.train == ("a=b.jsonl",)
    assert load_config(overrides=["run.name=release"]).run.name == "release"


@pytest.mark.parametrize("override", ["training.learning_rate", "=3", "training.learning_rate=[1"])
def test_a_malformed_override_is_shown(override: str) -> None:
    assert repr(override) in problem_of(override).problem


@pytest.mark.parametrize(("text", "rule"), [("a: [", "not YAML"), ("- 1\n", "mapping"), ("\xff\xfe", "unknown key")])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text if rule != "unknown key" else "surprise: 1")
    with pytest.raises(ConfigError, match=rule):
        load_config([path])
    with pytest.raises(ConfigError, match="No such file"):
        load_config([tmp_path / "absent.yaml"])


def test_the_dump_parses_to_the_same_configuration() -> None:
    config = load_config(overrides=["training.num_workers=[1,3]", "data.train=[a,b]", "training.max_steps=5"])
    assert parse_config(json.loads(dump_config(config)), Config) == config


def test_a_configuration_without_model_is_an_error_where_the_model_is_needed() -> None:
    with pytest.raises(ConfigError, match="a model is needed"):
        _ = Config().model.tokenizer_path
    assert load_config(overrides=["model.path=p"]).model.tokenizer_path == "p"
    assert load_config(overrides=["model.path=p", "model.tokenizer=t"]).model.tokenizer_path == "t"


def test_where_scoring_runs_is_one_value() -> None:
    config = ScoringConfig(device="cpu", gpus_per_replica=2, tokens_per_batch=100, verify_golden=False)
    assert config.placement == Placement(device="cpu", actors=1, gpus_per_actor=2, tokens_per_batch=100, verify=False)
    with pytest.raises(ConfigError, match="tokens_per_batch = 3"):
        parse_config({"tokens_per_batch": 3}, Placement)
