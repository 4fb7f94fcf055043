"""`README.md` of an exported model: what its number means, how good it is, how to load it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayward.artifacts.writer import CARD_FILE
from rayward.contract.contract import Contract
from rayward.errors import ConfigError
from rayward.evaluation.records import Evaluation
from rayward.evaluation.report import how_computed, more_numbers, number, verdict

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

_TRANSFORMERS_CODE = """```python
import json
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path = "."  # this directory
with open(f"{path}/contract.json", encoding="utf-8") as file:
    contract = json.load(file)
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path, dtype=getattr(torch, contract["dtype"])).eval()

messages = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]
names = {"end_token": contract["end_token"], "bos_token": contract["bos_token"]} if contract["template_source"] == "plain" else {}
text = tokenizer.apply_chat_template(
    messages, chat_template=contract["template"], tokenize=False, **contract["template_kwargs"], **names
)
stripped = text.rstrip()
text = stripped if stripped.endswith(contract["end_token"]) else text + contract["end_token"]
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
with torch.inference_mode():
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
reward = outputs @ torch.tensor(contract["reward_weights"])
print(reward.item())
```"""

_RAYWARD_CODE = """```python
from rayward.scoring.scorer import ScoreItem, Scorer

scorer = Scorer.load(".")  # checks files and golden scores against contract.json
prompt = ({"role": "user", "content": "What is the capital of France?"},)
[result] = scorer.score([ScoreItem(prompt=prompt, completions=("Paris.", "Lyon."))])
print(result.rewards or result.error)
```"""


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
    name = _get(config, "run", "name") or export_dir.resolve().name
    shown = _copy_plots(plots, export_dir) if evaluation is not None else []
    sections = [
        _front_matter(config, str(name), evaluation),
        f"# {name}\n\nA reward model trained with Rayward: a conversation goes in, one number per completion comes out.",
        "## What the number means\n\n" + _meaning(config, contract),
        "## How good it is\n\n" + _quality(evaluation, shown),
        "## Training\n\n" + _training(config, manifest),
        "## Load it in plain Transformers\n\n" + _plain(contract),
        "## Load it through Rayward\n\n" + _RAYWARD_CODE,
        "## Scoring contract\n\n" + _contract(contract),
        "## Limitations\n\n" + _limitations(evaluation),
    ]
    path = export_dir / CARD_FILE
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _plain(contract: Contract) -> str:
    if contract.gate is not None:
        return "Plain Transformers loads the objectives' outputs only; the gate that makes a score of them needs Rayward."
    if contract.reading is not None or contract.critique_lead_in is not None:
        return "Plain Transformers loads backbone and reward head; where the head is read, and critiques, need Rayward."
    return (
        f"{_TRANSFORMERS_CODE}\n\nConversations over {contract.max_tokens:,} tokens must be shortened first; Rayward drops their oldest "
        "turns and never a part of the completion."
    )


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


def _front_matter(config: Mapping[str, Any], name: str, evaluation: Evaluation | None) -> str:
    # JSON strings are YAML strings, whatever a run or model is called.
    lines = ["---", "library_name: transformers", "pipeline_tag: text-classification", "tags:", "- reward-model", "- rlhf", "- rayward"]
    base = _get(config, "model", "path")
    if _is_hub_name(base):
        lines.append(f"base_model: {json.dumps(base)}")
    if evaluation is not None and evaluation.overall.accuracy.value is not None:
        lines += [
            "model-index:",
            f"- name: {json.dumps(name)}",
            "  results:",
            "  - task:",
            "      type: text-classification",
            "      name: pairwise preference",
            "    dataset:",
            "      type: held-out",
            "      name: held-out comparisons",
            "    metrics:",
            "    - type: accuracy",
            f"      value: {evaluation.overall.accuracy.value:.4f}",
        ]
    return "\n".join([*lines, "---"])


def _is_hub_name(base: object) -> bool:
    return isinstance(base, str) and _HUB_NAME.fullmatch(base) is not None and not Path(base).exists()


def _meaning(config: Mapping[str, Any], contract: Contract) -> str:
    objective = str(_get(config, "objective", "type") or "unknown")
    fallback = f"The model was trained with the objective `{objective}`. Compare its rewards within one prompt only."
    outputs = ", ".join(f"`{name}` ({weight:g})" for name, weight in zip(contract.outputs, contract.reward_weights, strict=True))
    statistics = "" if contract.critique_lead_in is None else " The model writes a critique of the answer, and the reward is read after it."
    if contract.reading is not None:
        statistics += f" The output is read at all {contract.reading.at} of the answer and combined (`{contract.reading.aggregate}`)."
    if contract.normaliser is not None:
        found = contract.normaliser
        statistics += f" Rewards of {found.num_rewards:,} {found.reference}: mean {found.mean:.4g}, standard deviation {found.std:.4g}."
    return f"{_MEANINGS.get(objective, fallback)} Outputs of the head, fp32, with their weights in the reward: {outputs}.{statistics}"


def _quality(evaluation: Evaluation | None, plots: Sequence[str]) -> str:
    if evaluation is None:
        return "This export was not evaluated on held-out data. Run `rayward evaluate` before relying on it."
    accuracy = [
        (row.name, f"{row.num_pairs:,}", f"{row.num_ties:,}", str(row.accuracy), number(row.accuracy_ties_half)) for row in evaluation.rows
    ]
    sources = [
        (group.name, f"{group.num_pairs:,}", f"{group.num_ties:,}", str(group.accuracy), str(group.longer_wins))
        for group in evaluation.by_source
    ]
    rows = f"{evaluation.num_rows:,} comparisons were given: {evaluation.num_scored:,} scored, {evaluation.num_errors:,} without a score"
    codes = ", ".join(f"{code}: {count:,}" for code, count in evaluation.errors.items())
    parts = [
        verdict(evaluation)[1],
        _table(("", "pairs (n)", "ties", "accuracy [95 %]", "ties half"), accuracy),
        f"{how_computed(evaluation)} {rows}{f' ({codes})' if codes else ''}.",
        _table(("source", "pairs (n)", "ties", "accuracy [95 %]", "longer one wins [95 %]"), sources),
        _table(("metric", "value"), more_numbers(evaluation)),
        *(f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots),
    ]
    return "\n\n".join(parts)


def _training(config: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> str:
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
        return _table(("", ""), rows) + "\n\nThe training data is not recorded."
    rows.append(("data fingerprint", _code(manifest.get("fingerprint", "unknown"))))
    counts = (("num_input_rows", "rows read"), ("num_train", "trained on"), ("num_validation", "held out"))
    rows += [(label, f"{manifest[key]:,}") for key, label in counts if isinstance(manifest.get(key), int)]
    quarantined = manifest.get("num_quarantined") or {}
    detail = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(quarantined.items()) if count)
    rows.append(("quarantined", f"{sum(quarantined.values()):,}" + (f" ({detail})" if detail else "")))
    rows += [(f"source {_code(name)}", f"{count:,}") for name, count in sorted((manifest.get("sources") or {}).items())]
    return _table(("", ""), rows)


def _contract(contract: Contract) -> str:
    rows = [
        ("fingerprint of the rules", _code(contract.fingerprint()[:16])),
        ("chat template", f"frozen, from the {contract.template_source}" if contract.template_source != "plain" else "plain `Role: text`"),
        ("scored token", _code(contract.end_token)),
        ("longest conversation", f"{contract.max_tokens:,} tokens"),
        ("backbone dtype; head and rewards are fp32", _code(contract.dtype)),
        ("golden scores", f"{len(contract.golden)}, tolerance {contract.golden_tolerance:g}"),
    ]
    note = "`contract.json` says it exactly; Rayward refuses to serve this directory when a file beside it was changed."
    return f"{_table(('', ''), rows)}\n\n{note}"


def _limitations(evaluation: Evaluation | None) -> str:
    points = [
        "It learned the judgements in its training data, with their errors and biases; it does not check facts.",
        "Rewards of different prompts, or of different models, are not on one scale.",
        "A policy optimised against it for long will exploit it: watch real quality, and penalise the distance to the start policy.",
        "Outside the languages, tasks and lengths of the training data its ranking is untested.",
    ]
    if evaluation is not None:
        within, calibration = evaluation.spearman_length_within, evaluation.calibration
        points.append(
            f"Length: within comparisons reward and length correlate with {number(within)} (Spearman, {evaluation.length_unit}); see the "
            "accuracy by length difference."
        )
        points.append(f"Confidence: sigma(|margin|) is off by {number(calibration.ece)} on average (expected calibration error).")
    return "\n".join(f"- {point}" for point in points)


def _code(value: object) -> str:
    return f"`{str(value).replace('`', chr(39))}`"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    # A bar or a line break would end the cell; a bare `<` would start HTML.
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;" if "`" not in text else "<").split())
