from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.models import make_export
from tests.helpers.tokenizer import make_tokenizer
from transformers import AutoModel, LlamaConfig, LlamaModel

from rayward.batch.comparison import EncodedComparison, Labels
from rayward.batch.layout import pack
from rayward.contract.contract import Contract
from rayward.contract.conversation import Message
from rayward.contract.encoder import Encoder, gate_position
from rayward.contract.tokenizer import load_tokenizer
from rayward.errors import ConfigError, ContractError, ModelLoadError
from rayward.evaluation.statistics import spearman
from rayward.model.build import load_reward_model
from rayward.model.gate import GATING_FILE, Gating
from rayward.scoring.scorer import ScoreItem, Scorer
from rayward.workflows.import_armo import import_armo
from rayward.workflows.mixture import SCORE, write_mixture
from rayward.workflows.mixture_fit import ALPHAS, PENALTIES, debiasing, fit_gate, ridge

ITEMS = [
    ScoreItem(({"role": "user", "content": "Name a colour."},), ("Red.", "Rust, which is a kind of red.", "42")),
    ScoreItem(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2+2?"}), ("4",)),
]


def random_gate(hidden: int, num_objectives: int, seed: int = 0) -> Gating:
    torch.manual_seed(seed)
    gate = Gating(hidden, num_objectives, width=16, depth=2, temperature=2.0).eval()
    gate.transform.copy_(torch.eye(num_objectives) - 0.3 * torch.rand(num_objectives, num_objectives))
    return gate


def test_the_score_by_hand() -> None:
    # Rewards .8, .6, .7 (the last one verbosity), penalties .5, .25, 1, weights .2, .5, .3.
    gate = Gating(4, 3).eval()
    gate.transform[2] -= torch.tensor([0.5, 0.25, 1.0])
    rewards = torch.tensor([[0.8, 0.6, 0.7]])
    weights = torch.tensor([[0.2, 0.5, 0.3]])
    torch.testing.assert_close(rewards @ gate.transform, torch.tensor([[0.45, 0.425, 0.0]]))
    coefficients = weights @ gate.transform.T
    torch.testing.assert_close(coefficients, torch.tensor([[0.2, 0.5, -0.225]]))
    assert (weights * (rewards @ gate.transform)).sum().item() == pytest.approx(0.3025)
    assert (coefficients * rewards).sum().item() == pytest.approx(0.3025)


def test_the_weights_are_a_tempered_softmax_times_the_scale() -> None:
    gate = Gating(2, 3, width=4, depth=1).eval()
    with torch.no_grad():
        gate.layers[-1].weight.zero_()
        gate.layers[-1].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        gate.logit_scale.fill_(1.5)
    expected = 1.5 * torch.tensor([[0.30060961, 0.33222499, 0.3671654]])
    torch.testing.assert_close(gate.coefficients(torch.randn(1, 2)), expected)


def test_ridge_against_the_normal_equations_with_missing_ratings() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 6))
    true = generator.normal(size=(3, 6))
    y = x @ true.T + generator.normal(size=(300, 3)) * [[0.01, 3.0, 30.0]]
    y[generator.random((300, 3)) < 0.4] = np.nan
    out = generator.random(300) < 0.2
    found = ridge(x, y, out)
    assert found.num_ratings == tuple((~np.isnan(y)).sum(axis=0))
    assert found.alphas[0] < found.alphas[2], "the noisier objective needs the larger penalty"
    for column, alpha in enumerate(found.alphas):
        train, test = ~np.isnan(y[:, column]) & ~out, ~np.isnan(y[:, column]) & out

        def solve(penalty: float, train: Any = train, column: int = column) -> np.ndarray:
            rows = x[train]
            return np.linalg.solve(rows.T @ rows + penalty * np.eye(6), rows.T @ y[train, column])

        np.testing.assert_allclose(found.weights[column], solve(alpha), rtol=1e-6, atol=1e-9)
        errors = [float(np.mean((x[test] @ solve(a) - y[test, column]) ** 2)) for a in ALPHAS]
        assert found.validation_mse[column] == pytest.approx(min(errors))
        assert alpha == ALPHAS[int(np.argmin(errors))]


def test_an_objective_without_ratings_on_a_side_is_refused() -> None:
    with pytest.raises(ConfigError, match="objective 1 has 0 ratings to fit"):
        ridge(np.ones((4, 2)), np.array([[1, np.nan], [1, np.nan], [1, np.nan], [1, 2]]), np.array([False, False, True, True]))


def test_debiasing_takes_the_smallest_share_that_suffices() -> None:
    generator = np.random.default_rng(1)
    verbosity = generator.normal(size=2000)
    noise = generator.normal(size=(2000, 3))
    rewards = np.stack([verbosity * 0.4 + noise[:, 0], -verbosity + noise[:, 1], 3 * verbosity + 0.01 * noise[:, 2], verbosity], axis=1)
    transform = debiasing(rewards, verbosity=3)
    debiased = rewards @ transform
    penalties = -transform[3, :3]
    assert np.all(debiased[:, 3] == 0.0)
    assert 0.3 < penalties[0] <= 0.5
    assert spearman(debiased[:, 0], verbosity) <= 0.03
    smaller = PENALTIES[PENALTIES.index(round(float(penalties[0]), 3)) - 1]
    assert spearman(rewards[:, 0] - smaller * verbosity, verbosity) > 0.03
    assert penalties[1] == 0.0, "what already runs against verbosity is left alone"
    assert penalties[2] == 1.0, "where no share suffices, all of it"


def test_a_gate_learns_which_objective_counts_for_which_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(600, 8, generator=generator)
    wanted = (prompts[:, 0] > 0).long()
    better, worse = torch.randn(600, 2, generator=generator), torch.randn(600, 2, generator=generator)
    swap = better.gather(1, wanted[:, None]) < worse.gather(1, wanted[:, None])
    better, worse = torch.where(swap, worse, better), torch.where(swap, better, worse)
    torch.manual_seed(0)
    gate = Gating(8, 2, width=32, depth=2, temperature=1.0, dropout=0.1)

    def accuracy() -> float:
        with torch.no_grad():
            return float((gate.eval().score(better, prompts) > gate.score(worse, prompts)).float().mean())

    before = accuracy()
    losses = fit_gate(gate, prompts, better, worse, steps=200, batch_size=128, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    assert accuracy() > 0.93 > before

    def first_losses() -> list[float]:
        torch.manual_seed(0)
        fresh = Gating(8, 2, width=32, depth=2, temperature=1.0, dropout=0.1)
        return fit_gate(fresh, prompts, better, worse, steps=5, batch_size=128, learning_rate=1e-2)

    assert first_losses() == first_losses()


def test_a_gate_survives_saving_under_the_published_names(tmp_path: Path) -> None:
    gate = random_gate(8, 3)
    gate.save(tmp_path)
    assert set(load_file(tmp_path / GATING_FILE)) == {
        *(f"gating.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")),
        "gating.logit_scale", "gating.temperature", "reward_transform_matrix",
    }  # fmt: skip
    again = Gating.load(tmp_path / GATING_FILE)
    rewards, prompts = torch.randn(5, 3), torch.randn(5, 8)
    torch.testing.assert_close(again(rewards, prompts), gate(rewards, prompts))
    save_file({"x": torch.zeros(1)}, tmp_path / GATING_FILE)
    with pytest.raises(ModelLoadError, match=r"gating\.layers"):
        Gating.load(tmp_path / GATING_FILE)


def test_the_gate_reads_the_same_position_packed_and_padded() -> None:
    generator = torch.Generator().manual_seed(0)
    comparisons = []
    for prefix, branches, positions in ((5, (3, 1), (2, 4)), (0, (4, 6), (1, 3)), (3, (2,), (4,))):
        ids = [torch.randint(3, 200, (n,), generator=generator, dtype=torch.int32).numpy() for n in (prefix, *branches)]
        comparisons.append(EncodedComparison("x", ids[0], tuple(ids[1:]), Labels(), positions))
    packed, padded = pack(comparisons), pack(comparisons, layout="padded")
    assert packed.gate_column is not None
    assert padded.gate_column is not None
    assert packed.input_ids[packed.end_row, packed.gate_column].tolist() == padded.input_ids[padded.end_row, padded.gate_column].tolist()
    assert pack([*comparisons, EncodedComparison("y", ids[0], tuple(ids[1:]), Labels())]).gate_column is None


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    base = make_export(root / "base", seed=3)
    weights = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    write_mixture(
        base,
        root / "mixed",
        weights,
        random_gate(32, 3),
        Contract.load(base),
        ("a", "b", "verbosity"),
        gate_ids=(),
        report={},
        settings="{}",
    )
    return root


@pytest.mark.parametrize("tokens_per_batch", [64, 8192])
def test_an_exported_mixture_scores_as_the_formula_says(mixture: Path, tokens_per_batch: int) -> None:
    contract = Contract.load(mixture / "mixed")
    assert contract.outputs == ("a", "b", "verbosity", SCORE)
    assert len(contract.golden[0].reward) == 4
    scorer = Scorer.load(mixture / "mixed", device="cpu", tokens_per_batch=tokens_per_batch)
    backbone = AutoModel.from_pretrained(mixture / "mixed").eval()
    weights = load_file(mixture / "mixed" / "model.safetensors")["score.weight"]
    gate = random_gate(32, 3)
    encoder = Encoder(contract, load_tokenizer(str(mixture / "mixed")))
    for item, result in zip(ITEMS, scorer.score(ITEMS), strict=True):
        assert result.outputs is not None
        assert result.rewards == tuple(row[-1] for row in result.outputs)
        for completion, row in zip(item.completions, result.outputs, strict=True):
            encoding = encoder.encode_parts(item.prompt, completion)  # type: ignore[arg-type]
            ids, prompt = encoding.ids, encoding.text_start
            with torch.no_grad():
                hidden = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
                expected = gate((hidden[-1] @ weights.T)[None], hidden[prompt - 1][None])[0].tolist()
            assert row == pytest.approx(expected, abs=1e-5)


def test_features_are_the_hidden_states_that_the_head_reads(mixture: Path) -> None:
    scorer = Scorer.load(mixture / "base", device="cpu")
    too_long = ScoreItem(ITEMS[0].prompt, ("word " * 200,))
    first, failed = scorer.features([ITEMS[0], too_long])
    assert isinstance(first, torch.Tensor)
    assert first.shape == (3, 2, 32)
    assert torch.allclose(first[0, 1], first[1, 1], atol=1e-5), "one prompt has one gate state"
    assert not isinstance(failed, torch.Tensor)
    assert failed.code == "too_long"
    model = load_reward_model(mixture / "base", device=torch.device("cpu"), dtype=torch.float32, max_tokens=192)
    rewards = torch.nn.functional.linear(first[:, 0], model.model.score.weight)[:, 0]
    assert scorer.score([ITEMS[0]])[0].rewards == pytest.approx(rewards.tolist(), abs=1e-5)


def test_a_changed_gate_is_found(mixture: Path) -> None:
    from rayward.errors import ContractMismatchError

    path = mixture / "mixed" / GATING_FILE
    original = path.read_bytes()
    tensors = load_file(path)
    tensors["gating.logit_scale"] += 0.1
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ContractMismatchError, match=r"gating\.safetensors"):
            Scorer.load(mixture / "mixed", device="cpu")
    finally:
        path.write_bytes(original)


def test_a_checkpoint_in_the_published_layout_is_imported(tmp_path: Path) -> None:
    source = tmp_path / "armo"
    source.mkdir()
    tokenizer = make_tokenizer(source)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id, num_labels=3,
    )  # fmt: skip
    backbone = LlamaModel(config).eval()
    config.save_pretrained(source)
    gate = random_gate(32, 3, seed=5)
    gate.save(source)
    tensors = load_file(source / GATING_FILE)
    (source / GATING_FILE).unlink()
    del tensors["gating.temperature"]
    weights = torch.randn(3, 32)
    tensors |= {f"model.{name}": value.contiguous() for name, value in backbone.state_dict().items()}
    save_file({**tensors, "regression_layer.weight": weights}, source / "model.safetensors", metadata={"format": "pt"})
    header = tokenizer("<|im_start|>assistant", add_special_tokens=False)["input_ids"]

    import_armo(source, tmp_path / "out", attributes=("a", "b", "c"), gate_ids=tuple(header), max_tokens=192)
    contract = Contract.load(tmp_path / "out")
    scorer = Scorer.load(tmp_path / "out", device="cpu")
    encoder = Encoder(contract, load_tokenizer(str(tmp_path / "out")))
    gate.temperature.fill_(10.0)
    prompt: tuple[Message, ...] = ITEMS[1].prompt  # type: ignore[assignment]
    encoding = encoder.encode_parts(prompt, "4")
    ids, length = encoding.ids, encoding.text_start
    position = gate_position(contract, ids, length)
    assert ids[position : position + len(header)] == header
    assert ids[position + 1 : length].count(header[0]) == 0, "the last occurrence"
    with torch.no_grad():
        hidden = backbone(input_ids=torch.tensor([ids])).last_hidden_state[0]
        expected = gate((hidden[-1] @ weights.T)[None], hidden[position][None])[0].tolist()
    (result,) = scorer.score([ITEMS[1]])
    assert result.outputs is not None
    assert result.outputs[0] == pytest.approx(expected, abs=1e-5)
    assert not math.isclose(result.outputs[0][-1], sum(expected[:3]) / 3)
    with pytest.raises(ContractError, match="where the gate reads"):
        gate_position(contract.model_copy(update={"gate": (9, 9, 9, 9)}), ids, length)
    with pytest.raises(ModelLoadError, match="regression_layer"):
        import_armo(tmp_path / "out", tmp_path / "no", attributes=("a",), gate_ids=(), max_tokens=192)
