"""Public preference formats: one adapter per format turns a row into a `Comparison`; detection picks the format.

Every format may carry the columns `id` (text or integer), `source` (text) and `weight` (number >= 0). A row that does not fit is
quarantined; only a file whose format cannot be decided is an error. No Ray and no tokenizer here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rayward.config.data import DataConfig
from rayward.data.formats import conversations, pairs, process, rated, verdicts
from rayward.data.formats.fields import Row, SourceOptions
from rayward.data.formats.pairs import TRANSCRIPT
from rayward.data.record import Comparison
from rayward.errors import DataFormatError

__all__ = ["FORMATS", "Format", "SourceOptions", "choose_format"]


@dataclass(frozen=True, slots=True)
class Format:
    """One row of `FORMATS`.

    Attributes:
        columns: the columns, in words, for error messages.
        fits: whether a row looks like this format.
        adapt: row to comparison; raises `RowRejected`.
    """

    columns: str
    fits: Callable[[Row, SourceOptions], bool]
    adapt: Callable[[Row, SourceOptions], Comparison]


def _fits_trl(row: Row, options: SourceOptions) -> bool:
    if (options.chosen_key, options.rejected_key) != ("chosen", "rejected") or options.prompt_key not in (None, "prompt"):
        return False
    kinds = {type(row.get(key)) for key in ("chosen", "rejected")}
    if len(kinds) != 1 or not kinds <= {str, list} or _fits_hh_rlhf(row, options) or _fits_rm_bench(row, options):
        return False
    if row.get("prompt") is None and any(key in row for key in ("instruction", "conversations", *conversations.QUESTIONS)):
        return False
    return row.get("prompt") is None or type(row["prompt"]) in kinds


def _fits_openrlhf(row: Row, options: SourceOptions) -> bool:
    keys = (options.chosen_key, options.rejected_key, *([options.prompt_key] if options.prompt_key else []))
    named = options.prompt_key is not None or keys != ("chosen", "rejected")
    return named and all(isinstance(row.get(key), str | list) for key in keys) and not _fits_trl(row, options)


def _fits_hh_rlhf(row: Row, options: SourceOptions) -> bool:
    texts = [row.get(key) for key in ("chosen", "rejected")]
    return "prompt" not in row and all(isinstance(text, str) and TRANSCRIPT.match(text) for text in texts)


def _fits_ultrafeedback(row: Row, options: SourceOptions) -> bool:
    return isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list)


def _fits_alpaca(row: Row, options: SourceOptions) -> bool:
    return "instruction" in row and "prompt" not in row and any(a in row and b in row for a, b in conversations.ANSWERS)


def _fits_axolotl(row: Row, options: SourceOptions) -> bool:
    if "instruction" in row or "prompt" in row or not any(a in row and b in row for a, b in conversations.ANSWERS):
        return False
    turns = isinstance(row.get("messages"), list) and isinstance(row.get("chosen"), dict)
    return turns or any(key in row for key in conversations.QUESTIONS)


def _fits_ms_swift(row: Row, options: SourceOptions) -> bool:
    return ("messages" in row or {"query", "response"} <= row.keys()) and ("rejected_response" in row or "rejected_messages" in row)


def _fits_kto(row: Row, options: SourceOptions) -> bool:
    if not ("label" in row or "kto_tag" in row) or {"prompt", "completion", "label"} <= row.keys():
        return False
    asked = any(key in row for key in ("instruction", "prompt", *conversations.QUESTIONS))
    answered = any(isinstance(row.get(key), str | list) for key in ("completion", "output", "response"))
    return any(isinstance(row.get(key), list) for key in ("messages", "conversations")) or (asked and answered)


def _fits_arena(row: Row, options: SourceOptions) -> bool:
    judged = "winner" in row or all(key in row for key in verdicts.FLAGS)
    return judged and any(a in row and b in row for a, b in verdicts.ARENA_ANSWERS)


def _fits_rm_bench(row: Row, options: SourceOptions) -> bool:
    sides = [row.get(key) for key in ("chosen", "rejected")]
    return "prompt" in row and all(isinstance(side, list) and side and all(isinstance(text, str) for text in side) for side in sides)


def _fits_rmb(row: Row, options: SourceOptions) -> bool:
    return "conversation_input" in row and ({"bon_best", "loser_list"} <= row.keys() or {"chosen", "reject"} <= row.keys())


def _fits_prm800k(row: Row, options: SourceOptions) -> bool:
    return isinstance(row.get("question"), dict) and isinstance(row.get("label"), dict)


def _fits_distilabel(row: Row, options: SourceOptions) -> bool:
    return "generations" in row and ("ratings" in row or "rating" in row) and "chosen" not in row


def _has(*keys: str) -> Callable[[Row, SourceOptions], bool]:
    return lambda row, options: all(key in row for key in keys)


FORMATS: dict[str, Format] = {
    "trl": Format("chosen, rejected[, prompt][, margin][, strength]: texts, or lists of messages", _fits_trl, pairs.pair),
    "openrlhf": Format("data.chosen_key, data.rejected_key[, data.prompt_key][, margin]", _fits_openrlhf, pairs.pair),
    "hh_rlhf": Format("chosen, rejected: transcripts 'Human: … Assistant: …'", _fits_hh_rlhf, pairs.hh_rlhf),
    "ultrafeedback_binarized": Format(
        "prompt (text), chosen, rejected (messages)[, score_chosen, score_rejected]", _fits_ultrafeedback, pairs.ultrafeedback_binarized
    ),
    "helpsteer2_preference": Format(
        "prompt, response_1, response_2, preference_strength",
        _has("response_1", "response_2", "preference_strength"),
        pairs.helpsteer_preference("prompt", "response_1", "response_2", "preference_strength"),
    ),
    "helpsteer3_preference": Format(
        "context, response1, response2, overall_preference",
        _has("response1", "response2", "overall_preference"),
        pairs.helpsteer_preference("context", "response1", "response2", "overall_preference"),
    ),
    "ranking": Format(
        "prompt, completions, ranks[, attributes]",
        lambda row, options: isinstance(row.get("completions"), list) and ("ranks" in row or "attributes" in row),
        rated.ranking,
    ),
    "nectar": Format("prompt, answers: [{answer, rank}]", _has("prompt", "answers"), rated.nectar),
    "ultrafeedback": Format(
        "instruction, completions: [{response, annotations, overall_score}]", _has("instruction", "completions"), rated.ultrafeedback
    ),
    "helpsteer2": Format(
        "prompt, response, helpfulness, correctness, coherence, complexity, verbosity",
        _has("prompt", "response", *rated.HELPSTEER2_ATTRIBUTES),
        rated.helpsteer2,
    ),
    "safe_rlhf": Format(
        "prompt, response_0, response_1, better_response_id, safer_response_id[, is_response_0_safe, is_response_1_safe]",
        _has("response_0", "response_1", "better_response_id", "safer_response_id"),
        rated.safe_rlhf,
    ),
    "scored": Format("prompt, responses, scores (higher is better)", _has("prompt", "responses", "scores"), rated.scored),
    "pointwise": Format("prompt, completion, label", _has("prompt", "completion", "label"), rated.pointwise),
    "stepwise": Format("prompt, completions (the steps of one), labels", _has("prompt", "completions", "labels"), rated.stepwise),
    "critique": Format(
        "prompt, completion, critique",
        lambda row, options: _has("prompt", "completion", "critique")(row, options) and "label" not in row,
        rated.critique,
    ),
    "alpaca": Format("instruction[, input], chosen, rejected[, system, history]", _fits_alpaca, conversations.alpaca),
    "sharegpt": Format(
        "conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}[, system, tools]",
        _has("conversations", "chosen", "rejected"),
        conversations.sharegpt,
    ),
    "axolotl": Format(
        "[system, ]input (or question, query), chosen, rejected; or messages, chosen, rejected",
        _fits_axolotl,
        conversations.axolotl,
    ),
    "ms_swift": Format("messages, rejected_response or rejected_messages[, margin, tools]", _fits_ms_swift, conversations.ms_swift),
    "nemo_rl": Format("context, completions: [{rank, completion}]", _has("context", "completions"), conversations.nemo_rl),
    "kto": Format("messages or conversations, label or kto_tag; or instruction, output, kto_tag", _fits_kto, conversations.kto),
    "arena": Format("winner, conversation_a, conversation_b (or prompt, response_a, response_b)", _fits_arena, verdicts.arena),
    "shp": Format("history, human_ref_A, human_ref_B, labels[, score_ratio]", _has("history", "human_ref_A", "human_ref_B"), verdicts.shp),
    "distilabel": Format("instruction, generations, ratings", _fits_distilabel, verdicts.distilabel),
    "prm800k": Format("question: {problem}, label: {steps}", _fits_prm800k, process.prm800k),
    "rm_bench": Format("prompt, chosen: [texts], rejected: [texts]", _fits_rm_bench, verdicts.rm_bench),
    "rmb": Format("conversation_input, bon_best, loser_list (or chosen, reject)", _fits_rmb, verdicts.rmb),
}
"""Name of the format (`data.format`) to its detection and adapter."""


def choose_format(rows: Sequence[Row], config: DataConfig, *, where: str, source: str) -> tuple[str, SourceOptions]:
    """Decide the format of one file from its first rows, and whether the prompt has a column of its own.

    Args:
        rows: the first parsable rows of the file; at least one.
        config: `format` other than `auto` is taken as given.
        where: the file, for messages.
        source: default value of `Comparison.source`.

    Raises:
        DataFormatError: no format fits, or more than one fits equally well.
    """
    options = SourceOptions(
        source,
        config.prompt_key,
        config.chosen_key,
        config.rejected_key,
        attributes=config.attributes,
        attribute_range=config.attribute_range,
        rank_by=config.rank_by,
        preference=config.preference,
        step_separator=config.step_separator,
        critiques=config.critique_lead_in is not None,
    )
    name: str = config.format
    if name == "auto":
        votes = {key: sum(entry.fits(row, options) for row in rows) for key, entry in FORMATS.items()}
        most = max(votes.values())
        # A few odd rows do not decide: a second format that fits half as many rows still makes the file ambiguous.
        candidates = [key for key, count in votes.items() if 2 * count >= most] if most else []
        if len(candidates) != 1:
            raise _undecided(rows, candidates, where)
        name = candidates[0]
    # For the whole file: a row that lost its prompt must not be read as one whose prompt is implied.
    if name == "trl" and options.prompt_key is None and any("prompt" in row for row in rows):
        options = replace(options, prompt_key="prompt")
    return name, options


def _undecided(rows: Sequence[Row], candidates: list[str], where: str) -> DataFormatError:
    columns = ", ".join(sorted({str(key) for row in rows for key in row}))[:500]
    columns = columns.encode("utf-8", "backslashreplace").decode()
    listed = "\n    ".join(f"{key}: {FORMATS[key].columns}" for key in (candidates or FORMATS))
    problem = f"fits {len(candidates)} formats" if candidates else "fits no known format"
    return DataFormatError(
        f"{where} {problem}; its columns are: {columns}\n  candidates:\n    {listed}",
        remedy="choose one with data.format=<name>; set data.prompt_key, data.chosen_key and data.rejected_key for other column names",
    )
