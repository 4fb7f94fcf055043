"""Formats of public tools and data sets, declared: how a row is recognised, which columns are read, and which are known to be harmless."""

from __future__ import annotations

from collections.abc import Callable

from rayward.data.formats import conversations, process, verdicts
from rayward.data.formats.detect import Format
from rayward.data.formats.fields import Row, SourceOptions
from rayward.data.formats.scores import SCORE_COLUMNS

_ANSWERS = frozenset(name for names in conversations.ANSWERS for name in names)
_QUESTIONS = frozenset(conversations.QUESTIONS)
_JUDGED = frozenset({"margin", "strength"})
_FEEDBACK = {"chosen_feedback": "data.critique_lead_in", "rejected_feedback": "data.critique_lead_in"}
_DISTILABEL = frozenset(
    {
        "order", "labelling_model", "labelling_prompt", "raw_labelling_response", "rationale", "rationales", "status", "original_chosen",
        "original_rejected", "in_gsm8k_train", "chosen_model", "rejected_model", "model_name", "generation_model", "generation_models",
        "distilabel_metadata", "original_response", "ratings_model",
    }
)  # fmt: skip

_ARENA = frozenset(
    {
        "model_a", "model_b", "judge", "anony", "language", "tstamp", "timestamp", "openai_moderation", "toxic_chat_tag",
        "evaluation_session_id", "evaluation_order", "full_conversation", "conv_metadata", "category_tag", "is_code", "is_refusal",
        "dedup_tag", "judge_hash", "hard_prompt", "easy_prompt", "if_prompt", "math_prompt",
    }
)  # fmt: skip


def _has(*keys: str) -> Callable[[Row, SourceOptions], bool]:
    return lambda row, options: all(key in row for key in keys)


def _has_answers(row: Row) -> bool:
    return any(better in row and worse in row for better, worse in conversations.ANSWERS)


def _fits_alpaca(row: Row, options: SourceOptions) -> bool:
    return "instruction" in row and "prompt" not in row and _has_answers(row)


def _fits_axolotl(row: Row, options: SourceOptions) -> bool:
    if "instruction" in row or "prompt" in row or not _has_answers(row):
        return False
    turns = isinstance(row.get("messages"), list) and isinstance(row.get("chosen"), dict | str)
    return turns or any(key in row for key in conversations.QUESTIONS)


def _fits_ms_swift(row: Row, options: SourceOptions) -> bool:
    chosen = any(key in row for key in conversations.MESSAGES) or {"query", "response"} <= row.keys()
    return chosen and ("rejected_response" in row or "rejected_messages" in row)


def _fits_kto(row: Row, options: SourceOptions) -> bool:
    if not ("label" in row or "kto_tag" in row) or {"prompt", "completion", "label"} <= row.keys():
        return False
    asked = any(key in row for key in ("instruction", "prompt", *conversations.QUESTIONS))
    answered = any(isinstance(row.get(key), str | list) for key in ("completion", "output", "response"))
    return any(isinstance(row.get(key), str | list) for key in conversations.MESSAGES) or (asked and answered)


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


PUBLISHED: dict[str, Format] = {
    "alpaca": Format(
        "instruction[, input], chosen, rejected[, system, history]",
        _fits_alpaca,
        conversations.alpaca,
        consumed=_ANSWERS | _JUDGED | SCORE_COLUMNS | {"instruction", "input", "history"},
        metadata=_DISTILABEL,
        settings=_FEEDBACK,
    ),
    "sharegpt": Format(
        "conversations: [{from, value}], chosen: {from, value}, rejected: {from, value}[, system, tools]",
        _has("conversations", "chosen", "rejected"),
        conversations.sharegpt,
        consumed=_ANSWERS | _JUDGED | SCORE_COLUMNS | {"conversations"},
        settings=_FEEDBACK,
    ),
    "axolotl": Format(
        "[system, ]input (or question, query), chosen, rejected; or messages, chosen, rejected",
        _fits_axolotl,
        conversations.axolotl,
        consumed=_ANSWERS | _JUDGED | SCORE_COLUMNS | _QUESTIONS | {"messages", "history", "generations", "rating", "ratings"},
        metadata=_DISTILABEL,
        settings=_FEEDBACK,
    ),
    "ms_swift": Format(
        "messages (or query, response), rejected_response or rejected_messages[, margin, tools]",
        _fits_ms_swift,
        conversations.ms_swift,
        consumed=_JUDGED
        | set(conversations.MEDIA)
        | set(conversations.MESSAGES)
        | {"rejected_response", "rejected_messages", "rejected_tools", "query", "response", "history"},
    ),
    "nemo_rl": Format(
        "context, completions: [{rank, completion}]",
        _has("context", "completions"),
        conversations.nemo_rl,
        consumed=_JUDGED | {"context", "completions"},
        metadata=frozenset({"task_name"}),
    ),
    "kto": Format(
        "messages or conversations, label or kto_tag; or instruction (or prompt, question), output (or completion), label or kto_tag",
        _fits_kto,
        conversations.kto,
        consumed=_QUESTIONS
        | set(conversations.MESSAGES)
        | {"label", "kto_tag", "instruction", "prompt", "history", "completion", "output", "response"},
    ),
    "arena": Format(
        "winner, conversation_a, conversation_b (or prompt, response_a, response_b)",
        _fits_arena,
        verdicts.arena,
        consumed=frozenset({"question_id", "winner", "prompt", "turn", *verdicts.FLAGS})
        | {name for names in verdicts.ARENA_ANSWERS for name in names},
        metadata=_ARENA,
    ),
    "shp": Format(
        "history, human_ref_A, human_ref_B, labels[, score_ratio]",
        _has("history", "human_ref_A", "human_ref_B"),
        verdicts.shp,
        consumed=frozenset({"history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B", "score_ratio", "domain"}),
        metadata=frozenset(
            {"post_id", "upvote_ratio", "c_root_id_A", "c_root_id_B", "created_at_utc_A", "created_at_utc_B", "seconds_difference"}
        ),
    ),
    "distilabel": Format(
        "instruction (or prompt, input), generations, ratings",
        _fits_distilabel,
        verdicts.distilabel,
        consumed=frozenset({"instruction", "prompt", "input", "generations", "ratings", "rating"}),
        metadata=_DISTILABEL,
    ),
    "prm800k": Format(
        "question: {problem}, label: {steps}",
        _fits_prm800k,
        process.prm800k,
        consumed=frozenset({"question", "label"}),
        metadata=frozenset({"labeler", "timestamp", "generation", "is_quality_control_question", "is_initial_screening_question"}),
    ),
    "rm_bench": Format(
        "prompt, chosen: [texts], rejected: [texts]",
        _fits_rm_bench,
        verdicts.rm_bench,
        consumed=frozenset({"prompt", "chosen", "rejected", "domain", "subset"}),
        metadata=frozenset(
            {"error", "error_key", "file", "language", "task_id", "num_correct", "num_incorrect", "total_completions", "models"}
            | {"additional_metadata"}
        ),
    ),
    "rmb": Format(
        "conversation_input, bon_best, loser_list (or chosen, reject)",
        _fits_rmb,
        verdicts.rmb,
        consumed=frozenset({"conversation_input", "bon_best", "loser_list", "chosen", "reject", "bon_uid", "pair_uid", "category_path"}),
        metadata=frozenset({"file"}),
    ),
}
"""Rows of `FORMATS`."""
