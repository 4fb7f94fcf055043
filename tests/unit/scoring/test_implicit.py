from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import PackedBatch, pack
from rayward.config.placement import Placement
from rayward.contract.contract import Contract
from rayward.contract.conversation import Completion
from rayward.contract.encoder import Encoder
from rayward.contract.tokenizer import load_tokenizer
from rayward.errors import ModelLoadError
from rayward.model.language_model import LanguageModel
from rayward.scoring.combining import ImplicitRule
from rayward.scoring.implicit import ImplicitScorer
from rayward.scoring.load import load_scored_model
from rayward.scoring.scorer import ScoreItem
from rayward.serving.preflight import check_model
from rayward.wire.items import Asked, ItemError
from rayward.workflows.normalise import normalise_pipeline

BETA = 0.3
ITEMS = [
    ScoreItem(({"role": "user", "content": "Name a colour."},), ("Red.", "Rust, which is a kind of red.", "Red or blue.")),
    ScoreItem(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2+2?"}), ("4",)),
]


def make_policy(directory: Path, seed: int) -> Path:
    tokenizer = make_tokenizer(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate(("policy", "reference")):
        (root / name).mkdir()
        make_policy(root / name, seed)
    return root


def write_rule(policies: Path, name: str, **content: object) -> Path:
    directory = policies / name
    directory.mkdir(exist_ok=True)
    rule = {"policy": "../policy", "reference": "../reference", "beta": BETA, "max_tokens": 192, **content}
    (directory / ImplicitRule.file).write_text(json.dumps(rule))
    return directory


def plain_log_prob(model: PreTrainedModel, encoder: Encoder, item: ScoreItem, completion: Completion) -> tuple[float, int]:
    """Sum over the tokens after the prompt by plain Transformers, and their number."""
    encoding = encoder.encode_parts(item.prompt, completion)  # type: ignore[arg-type]
    ids, prompt = encoding.ids, encoding.text_start
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(prompt, len(ids))), len(ids) - prompt


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("tokens_per_batch", [64, 8192])
def test_the_reward_is_the_scaled_difference_of_log_probabilities(policies: Path, per_token: bool, tokens_per_batch: int) -> None:
    scorer = load_scored_model(
        write_rule(policies, "implicit", per_token=per_token), Placement(device="cpu", tokens_per_batch=tokens_per_batch)
    )
    assert isinstance(scorer, ImplicitScorer)
    tokenizer = load_tokenizer(str(policies / "policy"))
    encoder = Encoder(Contract.from_tokenizer(tokenizer, max_tokens=192), tokenizer)
    models = [AutoModelForCausalLM.from_pretrained(policies / name).eval() for name in ("policy", "reference")]
    for item, result in zip(ITEMS, scorer.score(ITEMS), strict=True):
        for index, completion in enumerate(item.completions):
            (policy, length), (reference, _) = (plain_log_prob(model, encoder, item, completion) for model in models)
            assert result.outputs is not None
            assert result.outputs[index] == pytest.approx((policy, reference), rel=1e-5)
            scale = BETA / (length if per_token else 1)
            assert result.rewards is not None
            # A difference is known as well as the two sums are: to 1e-6 of them.
            assert result.rewards[index] == pytest.approx(scale * (policy - reference), abs=scale * 1e-6 * abs(policy + reference))
    assert encoder.encode_parts(ITEMS[1].prompt, "4").text_start > 10  # type: ignore[arg-type]


def test_a_policy_equal_to_its_reference_has_no_preference(policies: Path) -> None:
    scorer = ImplicitScorer.load(write_rule(policies, "same", reference="../policy"), device="cpu")
    assert scorer.score(ITEMS)[0].rewards == pytest.approx((0.0, 0.0, 0.0), abs=1e-5)


def test_shared_and_padded_rows_agree(policies: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policies / "policy").eval()
    generator = torch.Generator().manual_seed(0)
    comparisons = []
    for prefix, branches in ((5, (3, 1)), (1, (4, 2, 2)), (9, (1,))):
        ids = [torch.randint(3, 200, (n,), generator=generator, dtype=torch.int32).numpy() for n in (prefix, *branches)]
        comparisons.append(EncodedComparison("x", ids[0], tuple(ids[1:]), Labels()))
    with torch.no_grad():
        packed = LanguageModel(model, max_tokens=192, layout="packed").completion_log_probs(pack(comparisons))
        model.set_attn_implementation("sdpa")
        padded = LanguageModel(model, max_tokens=192, layout="padded").completion_log_probs(pack(comparisons, layout="padded"))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


def test_items_that_cannot_be_scored_are_errors(policies: Path) -> None:
    scorer = ImplicitScorer.load(write_rule(policies, "errors"), device="cpu")
    too_long = ScoreItem(ITEMS[0].prompt, ("word " * 200,))
    asked = [ITEMS[0], too_long, replace(ITEMS[0], asked=Asked(weights="w")), replace(ITEMS[0], asked=Asked(normalise="centred"))]
    codes = [result.error.code if result.error else None for result in scorer.score(asked)]
    assert codes == [None, "too_long", "unknown_weights", "no_normaliser"]


def test_an_id_that_one_of_the_models_has_no_embedding_for_is_an_error_of_its_item(policies: Path) -> None:
    for name in ("long-policy", "long-reference"):
        (policies / name).mkdir()
        tokenizer = load_tokenizer(str(make_policy(policies / name, 0)))
        tokenizer.add_tokens(["unheard"])
        tokenizer.save_pretrained(policies / name)
    rule = write_rule(policies, "long", policy="../long-policy", reference="../long-reference")
    good, bad = ImplicitScorer.load(rule, device="cpu").score([ITEMS[0], replace(ITEMS[0], completions=("An unheard word",))])
    assert good.rewards is not None
    assert bad.error is not None
    assert bad.error.code == "token_out_of_range"


def test_its_rewards_can_be_normalised(policies: Path) -> None:
    directory = write_rule(policies, "normalised")
    before = ImplicitScorer.load(directory, device="cpu")
    lines = [json.dumps({"prompt": "Name a colour.", "completions": list(ITEMS[0].completions)})]
    output, given = policies / "normalised-again", (directory / ImplicitRule.file).read_bytes()
    found = normalise_pipeline(str(directory), lines, output=output, reference="three colours", placement=Placement(device="cpu"))
    assert (directory / ImplicitRule.file).read_bytes() == given
    after = ImplicitScorer.load(output, device="cpu")
    assert after.version == before.version
    rewards = after.score([replace(ITEMS[0], asked=Asked(normalise="standardised"))])[0].rewards
    assert rewards is not None
    assert found.num_rewards == 3
    assert sum(rewards) == pytest.approx(0.0, abs=1e-5)
    assert sum(reward**2 for reward in rewards) / 3 == pytest.approx(1.0, rel=1e-5)


def test_what_does_not_fit_together_is_refused(policies: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="betta"):
        ImplicitScorer.load(write_rule(policies, "wrong", betta=1), device="cpu")
    other = tmp_path / "other"
    other.mkdir()
    tokenizer = make_tokenizer(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelLoadError, match="different tokenizers"):
        ImplicitScorer.load(write_rule(policies, "two", reference=str(other)), device="cpu")
    check_model(write_rule(policies, "fine"))


def test_a_model_that_raises_for_one_item_fails_no_other(policies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ImplicitScorer.load(write_rule(policies, "poisoned"), device="cpu")
    expected = [result.rewards for result in scorer.score(ITEMS)]
    (tilde,) = load_tokenizer(str(policies / "policy"))("~", add_special_tokens=False)["input_ids"]
    log_probs = LanguageModel.completion_log_probs

    def raising(model: LanguageModel, batch: PackedBatch) -> torch.Tensor:
        if model is scorer._models[1] and (batch.input_ids == tilde).any():
            raise IndexError("index out of range in self")
        return log_probs(model, batch)

    monkeypatch.setattr(LanguageModel, "completion_log_probs", raising)
    first, bad, second = scorer.score([ITEMS[0], ScoreItem(ITEMS[0].prompt, ("~",)), ITEMS[1]])
    for result, rewards in zip((first, second), expected, strict=True):
        assert result.rewards == pytest.approx(rewards, abs=1e-5)
    assert bad.error == ItemError("failed", "IndexError in the forward")
