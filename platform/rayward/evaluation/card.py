"""`README.md` of an exported model: what its number means, how good it is, how to load it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rayward.artifacts.writer import CARD_FILE
from rayward.contract.contract import Contract
from rayward.data.page import render
from rayward.errors import ConfigError
from rayward.evaluation.records import Evaluation
from rayward.evaluation.report import accuracy_rows, how_computed, more_numbers, number, verdict

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
PLOT_FOLDER = "plots"

_MEANINGS = {
    "bradley_terry": (
        "The model was trained on comparisons with the Bradley-Terry objective: for two answers A and B to **the same prompt**, "
        "`sigmoid(reward(A) - reward(B))` is the model's probability that a judge of the training data prefers A. Only differences within "
        "a prompt carry meaning. The absolute value, its sign and comparisons across prompts do not: any constant per prompt leaves the "
        "objective unchanged."
    ),
    "plackett_luce": (
        "The model was trained on rankings with the Plackett-Luce objective: among answers to **the same prompt**, `softmax(rewards)` is "
        "the model's probability that a judge of the training data puts each of them first. Only differences within a prompt carry meaning."
    ),
    "outcome": (
        "The model was trained to say whether an answer is right: where its one output is read, `sigmoid(output)` is the model's "
        "probability that a judge of the training data calls it right."
    ),
    "process": (
        "The model was trained to say of each step of an answer whether it is right; the reward is one probability for the whole answer."
    ),
    "language": "The model was trained on text alone, to write critiques; its rewards are those of a head that was not trained.",
    "imported": (
        "The model was trained elsewhere and imported: its golden scores are those that its own checkpoint gave. Compare its rewards "
        "within one prompt only, unless its authors say more."
    ),
    "mixture": (
        "A mixture of objectives on a frozen reward model: each output but the last is the predicted rating of one objective, `score` is "
        "their sum with weights that a gate reads off the prompt. Scores compare answers to **the same prompt** only."
    ),
    "regression": (
        "The model was trained by regression to ratings: each output is the predicted rating of one attribute, on the scale of the "
        "training data. The reward is their weighted sum (`reward_weights` in `contract.json`)."
    ),
}


def write_model_card(
    export_dir: Path,
    *,
    contract: Contract,
    config_json: str,
    manifest: Mapping[str, Any] | None,
    evaluation: Evaluation | None,
    plots: Sequence[Path] = (),
) -> Path:
    """Write `README.md` into the export and copy the plots beside it.

    Args:
        export_dir: the exported model.
        contract: its scoring contract.
        config_json: the resolved configuration of the run as JSON (`dump_config`).
        manifest: `manifest.json` of the prepared data; None when it is not known.
        evaluation: on held-out data; None when there was none, which the card then says.
        plots: PNG files to show, from `write_plots`.

    Returns:
        The card's path.

    Raises:
        ConfigError: `config_json` is not a JSON object.
    """
    config = _parse_config(config_json)
    name = str(_get(config, "run", "name") or export_dir.resolve().name)
    base = _get(config, "model", "path")
    document = render(
        "rayward.evaluation",
        "card.md.j2",
        name=name,
        title=_name(name),
        base_model=base if _is_hub_name(base) else None,
        contract=contract,
        meaning=_meaning(config, contract),
        quality=None if evaluation is None else _quality(evaluation, _copy_plots(plots, export_dir)),
        training=_training(config, manifest),
        data_is_known=manifest is not None,
        contract_rows=_contract(contract),
    )
    path = export_dir / CARD_FILE
    path.write_text(document, encoding="utf-8")
    return path


def _parse_config(config_json: str) -> dict[str, Any]:
    try:
        config = json.loads(config_json)
    except ValueError as exc:
        raise ConfigError(f"the resolved configuration is not JSON: {exc}", remedy="pass what `dump_config` returns") from exc
    if not isinstance(config, dict):
        raise ConfigError("the resolved configuration is not a JSON object", remedy="pass what `dump_config` returns")
    return config


def _get(tree: Mapping[str, Any], *keys: str) -> Any:
    node: Any = tree
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _copy_plots(plots: Sequence[Path], export_dir: Path) -> list[str]:
    folder = export_dir / PLOT_FOLDER
    names = []
    for plot in plots:
        folder.mkdir(exist_ok=True)
        target = folder / plot.name
        if plot.resolve() != target.resolve():
            shutil.copyfile(plot, target)
        names.append(f"{PLOT_FOLDER}/{plot.name}")
    return names


def _is_hub_name(base: object) -> bool:
    return isinstance(base, str) and _HUB_NAME.fullmatch(base) is not None and not Path(base).exists()


def _meaning(config: Mapping[str, Any], contract: Contract) -> Markup:
    objective = str(_get(config, "objective", "type") or "unknown")
    fallback = "The model was trained with the objective {}. Compare its rewards within one prompt only."
    meaning = Markup(_MEANINGS[objective]) if objective in _MEANINGS else Markup(fallback).format(_code(objective))
    outputs = [Markup("{} ({:g})").format(_code(n), weight) for n, weight in zip(contract.outputs, contract.reward_weights, strict=True)]
    meaning += Markup(" Outputs of the head, fp32, with their weights in the reward: {}.").format(Markup(", ").join(outputs))
    if contract.critique_lead_in is not None:
        meaning += " The model writes a critique of the answer, and the reward is read after it."
    if (reading := contract.reading) is not None:
        meaning += Markup(" The output is read at all {} of the answer and combined ({}).").format(reading.at, _code(reading.aggregate))
    if (found := contract.normaliser) is not None:
        numbers = f"mean {found.mean:.4g}, standard deviation {found.std:.4g}"
        meaning += Markup(" Rewards of {:,} {}: {}.").format(found.num_rewards, _name(found.reference), numbers)
    return meaning


def _quality(evaluation: Evaluation, plots: Sequence[str]) -> dict[str, Any]:
    """What the card shows of an evaluation."""
    sources = [
        (_name(group.name), f"{group.num_pairs:,}", f"{group.num_ties:,}", str(group.accuracy), str(group.longer_wins))
        for group in evaluation.by_source
    ]
    rows = f"{evaluation.num_rows:,} comparisons were given: {evaluation.num_scored:,} scored, {evaluation.num_errors:,} without a score"
    codes = ", ".join(f"{code}: {count:,}" for code, count in evaluation.errors.items())
    return {
        "value": evaluation.overall.accuracy.value,
        "verdict": verdict(evaluation)[1],
        "accuracy": _rows(accuracy_rows(evaluation)),
        "how_computed": how_computed(evaluation),
        "row_counts": rows + (f" ({codes})" if codes else ""),
        "by_source": _rows(sources),
        "more_numbers": _rows(more_numbers(evaluation)),
        "plots": [(Path(plot).stem.replace("_", " "), plot) for plot in plots],
        "length_correlation": number(evaluation.spearman_length_within),
        "length_unit": evaluation.length_unit,
        "calibration_error": number(evaluation.calibration.ece),
    }


def _training(config: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> list[list[Markup]]:
    rows: list[tuple[str, str]] = []
    start = _get(config, "model", "path")
    # Of a local directory only its name: a card is published, the author's paths are not.
    rows.append(("started from", _code(start if _is_hub_name(start) else Path(start).name) if start else "random weights"))
    for label, keys in (
        ("objective", ("objective", "type")),
        ("learning rate", ("training", "learning_rate")),
        ("comparisons per step", ("training", "comparisons_per_step")),
        ("epochs", ("training", "num_epochs")),
        ("seed", ("run", "seed")),
    ):
        value = _get(config, *keys)
        if value is not None:
            rows.append((label, _code(value)))
    if manifest is None:
        return _rows(rows)
    rows.append(("data fingerprint", _code(manifest.get("fingerprint", "unknown"))))
    counts = (("num_input_rows", "rows read"), ("num_train", "trained on"), ("num_validation", "held out"))
    rows += [(label, f"{manifest[key]:,}") for key, label in counts if isinstance(manifest.get(key), int)]
    quarantined = manifest.get("num_quarantined") or {}
    detail = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(quarantined.items()) if count)
    rows.append(("quarantined", f"{sum(quarantined.values()):,}" + (f" ({detail})" if detail else "")))
    sources = sorted((manifest.get("sources") or {}).items())
    return _rows([*rows, *((Markup("source {}").format(_code(name)), f"{count:,}") for name, count in sources)])


def _contract(contract: Contract) -> list[list[Markup]]:
    template = f"frozen, from the {contract.template_source}" if contract.template_source != "plain" else Markup("plain `Role: text`")
    return _rows(
        [
            ("fingerprint of the rules", _code(contract.fingerprint()[:16])),
            ("chat template", template),
            ("scored token", _code(contract.end_token)),
            ("longest conversation", f"{contract.max_tokens:,} tokens"),
            ("backbone dtype; head and rewards are fp32", _code(contract.dtype)),
            ("golden scores", f"{len(contract.golden)}, tolerance {contract.golden_tolerance:g}"),
        ]
    )


def _rows(rows: Iterable[Sequence[str]]) -> list[list[Markup]]:
    return [[_cell(cell) for cell in row] for row in rows]


def _cell(text: str) -> Markup:
    """Text as a cell: a bar or a line break would end it, `<` would start HTML. What is escaped already keeps its form."""
    safe = text if isinstance(text, Markup) else _no_html(text).replace("|", "\\|")
    return Markup(" ".join(safe.split()))


def _name(text: str) -> Markup:
    """A text that someone else wrote, as itself: neither HTML nor a link nor code."""
    return Markup(" ".join(re.sub(r"[\\`\[\]|]", r"\\\g<0>", _no_html(text)).split()))


def _code(value: object) -> Markup:
    text = " ".join(str(value).split())
    if any(character in text for character in "`<&|"):
        return Markup(f"<code>{_name(text)}</code>")  # between backticks entities mean nothing
    return Markup(f"`{text}`")


def _no_html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
