"""Every documented format reads a row with all the columns that its publisher gives it; texts and figures are made up."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rayward.config.data import DataConfig
from rayward.data.formats.table import FORMATS, SourceOptions, adapt, choose_format, columns_of
from rayward.data.record import BadRow, Comparison, RowRejected, validate
from rayward.errors import DataFormatError

ASK = {"role": "user", "content": "Name a prime."}
SEVEN = {"role": "assistant", "content": "Seven."}
EIGHT = {"role": "assistant", "content": "Eight."}
NOTE = {"system": "Be brief."}
CALL = {"name": "divide", "arguments": {"a": 7, "b": 2}}
CALLED = {"type": "function", "function": CALL}


def _parts(turn: dict[str, str]) -> dict[str, Any]:
    return turn | {"content": [{"type": "text", "text": turn["content"], "image": None, "mimeType": None}]}


PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl, explicit, with tools and margin": (
        "trl",
        {"prompt": [ASK], "chosen": [SEVEN], "rejected": [EIGHT], "margin": 1.0, "chat_template_kwargs": None, "tools": None},
    ),
    "reward-bench": (
        "trl",
        {
            "prompt": "Name a prime.", "chosen": "Seven.", "chosen_model": "m", "rejected": "Eight.", "rejected_model": "n",
            "subset": "alpacaeval-easy", "id": 30,
        },
    ),
    "skywork, implicit turns": (
        "trl",
        {"chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT], "source": "magpie"},
    ),
    "hh-rlhf": (
        "hh_rlhf",
        {"chosen": "\n\nHuman: Name a prime.\n\nAssistant: Seven.", "rejected": "\n\nHuman: Name a prime.\n\nAssistant: Eight."},
    ),
    "ultrafeedback_binarized": (
        "ultrafeedback_binarized",
        {
            "prompt": "Name a prime.", "prompt_id": "ab12", "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT], "messages": [ASK, SEVEN],
            "score_chosen": 8.5, "score_rejected": 6.5,
        },
    ),
    "argilla's cleaned ultrafeedback": (
        "ultrafeedback_binarized",
        {
            "source": "sharegpt", "prompt": "Name a prime.", "chosen": [ASK, SEVEN], "chosen-rating": 4.75, "chosen-model": "m",
            "rejected": [ASK, EIGHT], "rejected-rating": 2.75, "rejected-model": "n",
        },
    ),
    "argilla's ultrafeedback with plain answers": (
        "alpaca",
        {
            "source": "sharegpt", "instruction": "Name a prime.", "chosen_response": "Seven.", "rejected_response": "Eight.",
            "chosen_avg_rating": 4.75, "rejected_avg_rating": 2.75, "chosen_model": "m",
        },
    ),
    "distilabel's dpo mix": (
        "trl",
        {
            "dataset": "capybara", "chosen": [ASK, SEVEN], "chosen_rating": 5.0, "rejected": [ASK, EIGHT], "rejected_rating": 3,
        },
    ),
    "helpsteer2 preference": (
        "helpsteer2_preference",
        {
            "split": "train", "prompt": "Name a prime.", "response_1": "Seven.", "response_2": "Eight.", "preference_strength": -2,
            "preference_statement": "Response 1 is right.", "preference_elaboration": "Eight is even.",
            "three_most_similar_preferences": [{"statement": "1", "elaboration": "x", "strength": -2}],
            "all_preferences_unprocessed": [{"strength": -2, "justification": "x"}],
        },
    ),
    "helpsteer3 preference": (
        "helpsteer3_preference",
        {
            "domain": "general", "language": "english", "context": [ASK], "response1": "Seven.", "response2": "Eight.",
            "overall_preference": -2, "individual_preference": [{"score": -2, "reasoning": "x", "feedback1": "x", "feedback2": "y"}],
        },
    ),
    "LLaMA-Factory alpaca": ("alpaca", {"instruction": "Name a prime.", "input": "", "chosen": "Seven.", "rejected": "Eight."}),
    "LLaMA-Factory sharegpt": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Name a prime."}],
            "chosen": {"from": "gpt", "value": "Seven."},
            "rejected": {"from": "gpt", "value": "Eight."},
        },
    ),
    "ShareGPT turns on both sides": (
        "trl",
        {
            "chosen": [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}],
            "rejected": [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Eight."}],
        },
    ),
    "axolotl bradley_terry": ("axolotl", {"input": "Name a prime.", "chosen": "Seven.", "rejected": "Eight."}),
    "axolotl chatml.intel": ("axolotl", {"question": "Name a prime.", "chosen": "Seven.", "rejected": "Eight."}),
    "axolotl chat_template.default": ("axolotl", {"messages": [ASK], "chosen": SEVEN, "rejected": EIGHT}),
    "distilabel's orca pairs": (
        "axolotl",
        {
            "system": "", "input": "Name a prime.", "chosen": "Seven.", "rejected": "Eight.", "generations": ["Eight.", "Seven."],
            "order": ["rejected", "chosen"], "labelling_model": "m", "labelling_prompt": [ASK], "raw_labelling_response": "7\n9",
            "rating": [7.0, 9.0], "rationale": "x", "status": "unchanged", "original_chosen": "Seven.", "original_rejected": "Eight.",
            "chosen_score": 9.0, "in_gsm8k_train": False,
        },
    ),
    "ms-swift": ("ms_swift", {"messages": [ASK, SEVEN], "rejected_response": "Eight.", "margin": 0.5}),
    "ms-swift, two conversations": ("ms_swift", {"messages": [ASK, SEVEN], "rejected_messages": [ASK, EIGHT], "images": []}),
    "ms-swift, rounds": (
        "ms_swift",
        {"conversation": [{"human": "Name a prime.", "assistant": "Seven."}], "rejected_response": "Eight."},
    ),
    "ms-swift, query and response": ("ms_swift", {"query": "Name a prime.", "response": "Seven.", "rejected_response": "Eight."}),
    "NeMo-RL": (
        "nemo_rl",
        {
            "context": [ASK], "completions": [{"rank": 0, "completion": [SEVEN]}, {"rank": 1, "completion": [EIGHT]}],
            "task_name": "preference",
        },
    ),
    "Chatbot Arena conversations": (
        "arena",
        {
            "question_id": "58210e39", "model_a": "m", "model_b": "n", "winner": "model_a", "judge": "arena_user_1",
            "conversation_a": [ASK, SEVEN], "conversation_b": [ASK, EIGHT], "turn": 1, "anony": True, "language": "English",
            "tstamp": 1682351591.13, "openai_moderation": {"flagged": False}, "toxic_chat_tag": {"roberta-large": {"flagged": False}},
        },
    ),
    "lmarena human preference": (
        "arena",
        {
            "id": "aa", "model_a": "m", "model_b": "n", "winner": "model_a", "evaluation_session_id": "s", "evaluation_order": 1,
            "conversation_a": [_parts(ASK), _parts(SEVEN)],
            "conversation_b": [_parts(ASK), _parts(EIGHT)],
            "full_conversation": [], "conv_metadata": {"sum_user_tokens": 3}, "category_tag": {}, "language": "en", "is_code": False,
            "timestamp": "2025-06-01",
        },
    ),
    "lmarena human preference, conversations as JSON text": (
        "arena",
        {
            "question_id": "bb", "model_a": "m", "model_b": "n", "winner": "model_a", "conversation_a": json.dumps([ASK, SEVEN]),
            "conversation_b": json.dumps([ASK, EIGHT]), "turn": 1, "anony": True, "language": "English", "tstamp": 1.0,
            "conv_metadata": "{}", "is_code": False, "is_refusal": False, "dedup_tag": "{}", "category_tag": "{}", "judge_hash": "h",
        },
    ),
    "the competition's table": (
        "arena",
        {
            "id": 30192, "model_a": "m", "model_b": "n", "prompt": '["Name a prime."]', "response_a": '["Seven."]',
            "response_b": '["Eight."]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0,
        },
    ),
    "PPE human preference": (
        "arena",
        {
            "question_id": "cc", "model_a": "m", "model_b": "n", "winner": "model_a", "prompt": "Name a prime.", "response_1": "Seven.",
            "response_2": "Eight.", "language": "English", "hard_prompt": False, "easy_prompt": True, "if_prompt": False,
            "math_prompt": True,
        },
    ),
    "SHP": (
        "shp",
        {
            "post_id": "qt3nxl", "domain": "askmath_train", "upvote_ratio": 0.98, "history": "Name a prime.", "c_root_id_A": "h1",
            "c_root_id_B": "h2", "created_at_utc_A": 1636822112, "created_at_utc_B": 1636822110, "score_A": 340, "score_B": 170,
            "human_ref_A": "Seven.", "human_ref_B": "Eight.", "labels": 1, "seconds_difference": 2.0, "score_ratio": 2.0,
        },
    ),
    "RMB pairs": (
        "rmb",
        {
            "pair_uid": "1", "conversation_input": [{**ASK, "language": "English"}], "chosen": {"llm_name": "m", "answer": "Seven."},
            "reject": {"llm_name": "n", "answer": "Eight."}, "category_path": "Pairwise_set/Helpfulness/Math",
        },
    ),
    "RMB best of n": (
        "rmb",
        {
            "conversation_input": [{**ASK, "language": "English"}], "bon_best": {"llm_name": "m", "answer": "Seven."},
            "loser_list": [{"llm_name": "n", "answer": "Eight."}], "bon_uid": "3294", "category_path": "BoN_set/Helpfulness/Math",
        },
    ),
    "PKU-SafeRLHF": (
        "safe_rlhf",
        {
            "prompt": "Name a prime.", "response_0": "Seven.", "response_1": "Eight.", "prompt_source": "a", "response_0_source": "b",
            "response_1_source": "c", "is_response_0_safe": True, "is_response_1_safe": False,
            "response_0_harm_category": {"Insulting Behavior": False}, "response_1_harm_category": {"Insulting Behavior": True},
            "response_0_severity_level": 0, "response_1_severity_level": 1, "better_response_id": 0, "safer_response_id": 0,
            "response_0_sha256": "aa", "response_1_sha256": "bb",
        },
    ),
    "Nectar": (
        "nectar",
        {
            "prompt": "\n\nHuman: Name a prime.\n\nAssistant: ", "num_responses": 2, "turns": 1, "source": ["lmsys-chat-1m"],
            "answers": [{"answer": "Seven.", "model": "m", "rank": 1.0}, {"answer": "Eight.", "model": "n", "rank": 2.0}],
            "good_natured": True,
        },
    ),
    "distilabel's ratings": (
        "distilabel",
        {
            "instruction": "Name a prime.", "generations": ["Seven.", "Eight."], "ratings": [5, 3], "rationales": ["x", "y"],
            "generation_models": ["m", "n"], "model_name": "j", "distilabel_metadata": {"raw_output": "x"},
        },
    ),
    "scored": ("scored", {"prompt": "Name a prime.", "responses": ["Seven.", "Eight."], "scores": [3.0, 1.0]}),
    "ranking": ("ranking", {"prompt": "Name a prime.", "completions": ["Seven.", "Eight."], "ranks": [0, 1]}),
}  # fmt: skip
STRENGTHS = {
    "ultrafeedback_binarized": 2.0, "argilla's cleaned ultrafeedback": 2.0, "argilla's ultrafeedback with plain answers": 2.0,
    "distilabel's dpo mix": 2.0, "helpsteer2 preference": 2.0, "helpsteer3 preference": 2.0, "SHP": 2.0,
    "distilabel's orca pairs": 2.0, "distilabel's ratings": 2.0, "scored": 2.0,
}  # fmt: skip


def read(row: dict[str, Any], **settings: Any) -> tuple[str, Comparison]:
    """The comparison of a row whose format is detected, and the format."""
    name, options = choose_format([row], DataConfig(**settings), where="f", source="file")
    assert columns_of(name, options).unused(row) == [], "a published schema is known whole"
    comparison = adapt(name, columns_of(name, options), row, options)
    validate(comparison, ties="keep")
    return name, comparison


@pytest.mark.parametrize("case", PAIRS)
def test_a_published_pair_is_found_and_read(case: str) -> None:
    expected, row = PAIRS[case]
    name, comparison = read(row)
    assert name == expected
    assert [dict(turn) for turn in comparison.prompt] == [ASK]
    assert comparison.completions == ("Seven.", "Eight.")
    assert comparison.ranks is not None
    assert comparison.ranks[0] < comparison.ranks[1]
    assert comparison.strength == STRENGTHS.get(case)


def test_every_format_has_a_published_row() -> None:
    covered = {name for name, _ in PAIRS.values()} | {name for name, _ in SINGLES.values()}
    assert covered | {"openrlhf", "critique"} == FORMATS.keys(), "the two names are Rayward's own columns, tested in test_formats"


SINGLES: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL unpaired": ("pointwise", {"prompt": "Name a prime.", "completion": "Seven.", "label": True}),
    "LLaMA-Factory sharegpt KTO": ("kto", {"messages": [ASK, SEVEN], "label": True}),
    "LLaMA-Factory alpaca KTO": ("kto", {"instruction": "Name a prime.", "input": "", "output": "Seven.", "kto_tag": True}),
    "LLaMA-Factory KTO with conversations": (
        "kto",
        {"conversations": [{"from": "human", "value": "Name a prime."}, {"from": "gpt", "value": "Seven."}], "kto_tag": True},
    ),
    "axolotl chatml.intel KTO": ("kto", {"question": "Name a prime.", "completion": "Seven.", "label": "true"}),
    "TRL stepwise": ("stepwise", {"prompt": "Name a prime.", "completions": ["Seven is odd.", "Seven."], "labels": [True, True]}),
    "PRM800K": (
        "prm800k",
        {
            "labeler": "l", "timestamp": "2023-01-22T04:34:27", "generation": 9, "is_quality_control_question": False,
            "is_initial_screening_question": False,
            "question": {"problem": "Name a prime.", "ground_truth_solution": "x", "ground_truth_answer": "7", "pre_generated_steps": []},
            "label": {
                "steps": [
                    {
                        "completions": [{"text": "Seven is odd.", "rating": 0, "flagged": None}], "human_completion": None,
                        "chosen_completion": 0,
                    },
                    {"completions": [{"text": "Seven.\n\n# Answer\n\n7", "rating": 1}], "human_completion": None, "chosen_completion": 0},
                ],
                "total_time": 1, "finish_reason": "solution",
            },
        },
    ),
    "ultrafeedback": (
        "ultrafeedback",
        {
            "source": "evol_instruct", "instruction": "Name a prime.", "models": ["m"], "correct_answers": ["None"],
            "incorrect_answers": ["None"],
            "completions": [
                {
                    "annotations": {"helpfulness": {"Type": ["1"], "Rating": "4", "Rationale": "x", "Rationale For Rating": "y"}},
                    "custom_system_prompt": "x", "model": "m", "principle": "helpfulness", "response": "Seven.", "critique": "Fine.",
                    "fine-grained_score": 4.25, "overall_score": 8.5,
                },
            ],
        },
    ),
    "helpsteer2": (
        "helpsteer2",
        {
            "prompt": "Name a prime.", "response": "Seven.", "helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 1,
            "verbosity": 0,
        },
    ),
    "RewardBench 2": (
        "rm_bench",
        {
            "id": "7", "prompt": "Name a prime.", "chosen": ["Seven."], "rejected": ["Eight.", "Nine.", "Ten."], "num_correct": 1,
            "num_incorrect": 3, "total_completions": 4, "models": ["m", "n", "o", "p"], "subset": "Math",
            "additional_metadata": {"category": None, "correct": "7"},
        },
    ),
    "RM-Bench": (
        "rm_bench",
        {
            "id": 8, "prompt": "Name a prime.", "chosen": ["Seven.", "It is seven.", "**7**"], "rejected": ["8", "It is 8.", "**8**"],
            "domain": "chat",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SINGLES)
def test_other_published_rows_are_found_and_read(case: str) -> None:
    expected, row = SINGLES[case]
    name, _ = choose_format([row], DataConfig(), where="f", source="file")
    assert name == expected
    options = SourceOptions("file", attributes={"ultrafeedback": ("overall_score",), "helpsteer2": ("helpfulness",)}.get(name, ("label",)))
    assert set(columns_of(name, options).unused(row)) <= {key for key in row if key in FORMATS[name].settings}
    comparison = FORMATS[name].adapt(row, options)
    validate(comparison, ties="keep")
    assert [dict(turn) for turn in comparison.prompt] == [ASK]
    if name in ("kto", "pointwise"):
        assert (comparison.completions, comparison.attributes, comparison.ranks) == (("Seven.",), ((1.0,),), None)


def test_two_prompts_of_kto_are_refused() -> None:
    row = SINGLES["LLaMA-Factory alpaca KTO"][1] | {"question": "Another."}
    with pytest.raises(RowRejected, match="instruction and question"):
        FORMATS["kto"].adapt(row, SourceOptions("f", attributes=("label",)))


def test_a_rejected_completion_of_kto_has_the_label_zero() -> None:
    comparison = FORMATS["kto"].adapt({"messages": [ASK, EIGHT], "label": False}, SourceOptions("f", attributes=("label",)))
    assert comparison.attributes == ((0.0,),)


def test_rm_bench_ranks_every_chosen_style_above_every_rejected_one() -> None:
    _, comparison = read(SINGLES["RM-Bench"][1])
    assert comparison.ranks == (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    assert (comparison.id, comparison.source) == ("8", "chat")


# ---- judgements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("winner", "ranks"),
    [("model_b", (1.0, 0.0)), ("tie", (0.0, 0.0)), ("tie (bothbad)", (0.0, 0.0)), ("both_bad", (0.0, 0.0))],
)
def test_arena_winners(winner: str, ranks: tuple[float, float]) -> None:
    assert read(PAIRS["Chatbot Arena conversations"][1] | {"winner": winner})[1].ranks == ranks


@pytest.mark.parametrize(("flags", "ranks"), [((0, 1, 0), (1.0, 0.0)), (("0", "0", "1"), (0.0, 0.0))])
def test_flags_of_the_competitions_table(flags: tuple[Any, ...], ranks: tuple[float, float]) -> None:
    given = dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), flags, strict=True))
    assert read(PAIRS["the competition's table"][1] | given)[1].ranks == ranks


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        ("Chatbot Arena conversations", {"winner": "claude"}, BadRow.BAD_RANKING),
        ("the competition's table", {"winner_tie": 1}, BadRow.BAD_RANKING),
        ("the competition's table", {"response_a": "Seven."}, BadRow.WRONG_TYPE),
        ("the competition's table", {"response_a": "[]"}, BadRow.NO_SHARED_PROMPT),
        ("SHP", {"labels": 2}, BadRow.BAD_RANKING),
        ("SHP", {"labels": 0}, BadRow.BAD_RANKING),
        ("argilla's cleaned ultrafeedback", {"chosen-rating": 1.0}, BadRow.BAD_RANKING),
        ("argilla's cleaned ultrafeedback", {"chosen_score": 1.0, "rejected_score": 1.0}, BadRow.BAD_RANKING),
        ("distilabel's orca pairs", {"rating": [9.0, 7.0]}, BadRow.BAD_RANKING),
        ("distilabel's ratings", {"ratings": [5, None]}, BadRow.BAD_RANKING),
        ("distilabel's ratings", {"ratings": [5]}, BadRow.BAD_RANKING),
        ("NeMo-RL", {"completions": [{"completion": [SEVEN]}, {"completion": [EIGHT]}]}, BadRow.BAD_RANKING),
        ("ms-swift, two conversations", {"images": ["a.png"]}, BadRow.UNSUPPORTED_MESSAGE),
        ("ms-swift", {"rejected_response": None}, BadRow.MISSING_FIELD),
        ("LLaMA-Factory sharegpt", {"conversations": [{"from": "wizard", "value": "a"}]}, BadRow.UNKNOWN_ROLE),
        ("LLaMA-Factory sharegpt", {"conversations": [{"from": "function_call", "value": "divide"}]}, BadRow.UNPARSABLE),
        ("LLaMA-Factory sharegpt", {"conversations": [{"from": "function_call", "value": "[]"}]}, BadRow.WRONG_TYPE),
        ("RMB best of n", {"loser_list": []}, BadRow.BAD_RANKING),
        ("LLaMA-Factory alpaca", {"instruction": None}, BadRow.MISSING_FIELD),
        ("axolotl chatml.intel", {"query": "Another."}, BadRow.WRONG_TYPE),
        ("axolotl chat_template.default", {"question": "Another."}, BadRow.WRONG_TYPE),
        ("ms-swift", {"query": "Another."}, BadRow.WRONG_TYPE),
        ("ms-swift", {"rejected_messages": [ASK, EIGHT]}, BadRow.WRONG_TYPE),
        ("distilabel's ratings", {"prompt": "Another."}, BadRow.WRONG_TYPE),
        ("Chatbot Arena conversations", {"prompt": "Another."}, BadRow.NO_SHARED_PROMPT),
    ],
)
def test_a_published_row_that_is_broken_is_rejected(case: str, change: dict[str, Any], reason: BadRow) -> None:
    name, row = PAIRS[case]
    options = choose_format([row], DataConfig(), where="f", source="file")[1]
    with pytest.raises(RowRejected) as caught:
        validate(FORMATS[name].adapt(row | change, options), ties="quarantine")
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("argilla's cleaned ultrafeedback", {"chosen-rating": 2.75}),
        ("distilabel's dpo mix", {"chosen_rating": 3}),
        ("argilla's ultrafeedback with plain answers", {"chosen_avg_rating": "2.75"}),
        ("distilabel's orca pairs", {"rating": [7.0, 7.0], "status": "tie"}),
        ("skywork, implicit turns", {"score_chosen": 5.0, "score_rejected": 5.0}),
        ("distilabel's ratings", {"ratings": [4, 4]}),
    ],
)
def test_equal_scores_are_a_tie_of_strength_zero(case: str, change: dict[str, Any]) -> None:
    name, row = PAIRS[case]
    found, comparison = read(row | change)
    assert found == name
    assert len(set(comparison.ranks or ())) == 1
    assert comparison.strength == 0.0


def test_a_score_that_only_one_completion_has_judges_nothing() -> None:
    row = PAIRS["skywork, implicit turns"][1] | {"chosen_score": 9.0}
    comparison = read(row | {"rejected_score": None})[1]
    assert (comparison.ranks, comparison.strength) == ((0.0, 1.0), None)
    with pytest.raises(RowRejected, match="chosen_score is given and rejected_score is not"):
        read(row)
    assert read(row, ignore=["chosen_score"])[1].ranks == (0.0, 1.0)


def test_capybara_keeps_the_prompt_a_second_time() -> None:
    row = {
        "source": "Dove", "conversation": [{"input": "Name a prime.", "output": "Seven."}], "original_response": "Seven.",
        "chosen": [ASK, SEVEN], "rejected": [ASK, EIGHT], "rating_chosen": 5, "rating_rejected": 3, "chosen_model": "m",
        "rejected_model": "n",
    }  # fmt: skip
    with pytest.raises(DataFormatError, match="conversation"):
        read(row)
    name, comparison = read(row, ignore=["conversation", "original_response"])
    assert (name, comparison.strength) == ("trl", 2.0)


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["LLaMA-Factory alpaca", "LLaMA-Factory sharegpt", "axolotl bradley_terry", "axolotl chatml.intel", "ms-swift", "reward-bench"]
)
def test_a_system_column_is_a_system_turn(case: str) -> None:
    comparison = read(PAIRS[case][1] | NOTE)[1]
    assert [dict(turn) for turn in comparison.prompt] == [{"role": "system", "content": "Be brief."}, ASK]


def test_a_system_column_that_contradicts_the_system_turn_is_refused() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, ASK, SEVEN], "rejected_response": "Eight."}
    assert len(read(row | NOTE)[1].prompt) == 2
    with pytest.raises(RowRejected, match="own system turn differ"):
        read(row | {"system": "Be long."})


def test_instruction_and_input_are_one_turn_after_the_history() -> None:
    row = {
        "instruction": "Translate to French", "input": "hello", "chosen": "bonjour", "rejected": "hallo",
        "history": [["Can you translate?", "Yes."]],
    }  # fmt: skip
    assert [dict(turn) for turn in read(row)[1].prompt] == [
        {"role": "user", "content": "Can you translate?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Translate to French\nhello"},
    ]


def test_an_instruction_alone_is_the_prompt() -> None:
    row = {"instruction": "What is 0*12?", "chosen": "Step 1: multiply. 0", "rejected": "Step 1: add. 12"}
    comparison = read(row)[1]
    assert comparison.prompt[0]["content"] == "What is 0*12?"
    assert comparison.completions == ("Step 1: multiply. 0", "Step 1: add. 12")


def test_a_tie_of_ranks_and_more_than_two_answers_of_nemo_rl() -> None:
    answers = [{"rank": rank, "completion": [{"role": "assistant", "content": text}]} for rank, text in [(1, "8"), (0, "7"), ("1", "9")]]
    assert read({"context": [ASK], "completions": answers})[1].ranks == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("call", [json.dumps(CALL), json.dumps([CALL]), CALL])
def test_calls_of_sharegpt_are_tool_calls_and_tools_may_be_json_text(call: Any) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Is seven a prime?"}, {"from": "function_call", "value": call},
            {"from": "observation", "value": "3.5"},
        ],
        "chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"from": "gpt", "value": "No."},
        "tools": json.dumps([{"name": "divide", "description": "Divides.", "parameters": {}}]),
    }  # fmt: skip
    comparison = read(row)[1]
    assert comparison.prompt[1:] == (
        {"role": "assistant", "content": "", "tool_calls": [CALLED]},
        {"role": "tool", "content": "3.5"},
    )
    assert comparison.tools == ({"type": "function", "function": {"name": "divide", "description": "Divides.", "parameters": {}}},)


def test_a_call_of_sharegpt_may_be_the_answer() -> None:
    row = {
        "conversations": [{"from": "human", "value": "Is seven a prime?"}], "chosen": {"from": "function_call", "value": json.dumps(CALL)},
        "rejected": {"from": "gpt", "value": "No."}, "tools": "[]",
    }  # fmt: skip
    assert read(row)[1].completions == (({"role": "assistant", "content": "", "tool_calls": [CALLED]},), "No.")


def test_calls_in_a_row_of_ms_swift_are_one_turn() -> None:
    turns = [
        ASK, {"role": "tool_call", "content": json.dumps(CALL)}, {"role": "tool_call", "content": json.dumps(CALL)},
        {"role": "tool_response", "content": "3.5"}, {"role": "tool_response", "content": "3.5"}, SEVEN,
    ]  # fmt: skip
    comparison = read({"messages": turns, "rejected_response": "Eight.", "tools": [{"type": "function", "function": {"name": "divide"}}]})[
        1
    ]
    assert [turn["role"] for turn in comparison.prompt] == ["user", "assistant", "tool", "tool"]
    assert comparison.prompt[1]["tool_calls"] == [CALLED, CALLED]
    assert comparison.completions == ("Seven.", "Eight.")


def test_the_older_form_of_a_call_is_a_tool_call() -> None:
    turns = [
        ASK, {"role": "assistant", "content": None, "function_call": {"name": "divide", "arguments": '{"a": 7, "b": 2}'}},
        {"role": "function", "name": "divide", "content": "3.5"}, SEVEN,
    ]  # fmt: skip
    assert read({"messages": turns, "rejected_response": "Eight."})[1].prompt[1:] == (
        {"role": "assistant", "content": "", "tool_calls": [CALLED]},
        {"role": "tool", "content": "3.5", "name": "divide"},
    )


def test_arena_conversations_of_several_rounds_are_branches() -> None:
    more = {"role": "user", "content": "Another."}
    row = PAIRS["Chatbot Arena conversations"][1] | {
        "conversation_a": [ASK, SEVEN, more, {"role": "assistant", "content": "Eleven."}],
        "conversation_b": [ASK, EIGHT, more, {"role": "assistant", "content": "Ten."}],
        "turn": 2,
    }
    comparison = read(row)[1]
    assert [dict(turn) for turn in comparison.prompt] == [ASK]
    assert [[turn["content"] for turn in branch] for branch in comparison.completions] == [  # type: ignore[index]
        ["Seven.", "Another.", "Eleven."],
        ["Eight.", "Another.", "Ten."],
    ]


def test_judgements_of_the_first_round_of_two_leave_the_second_out() -> None:
    more = {"role": "user", "content": "Another."}
    row = PAIRS["Chatbot Arena conversations"][1] | {
        "question_id": 81, "conversation_a": [ASK, SEVEN, more, EIGHT], "conversation_b": [ASK, EIGHT, more, EIGHT], "turn": 1,
    }  # fmt: skip
    assert read(row)[1].completions == ("Seven.", "Eight.")
    assert len(read(row | {"turn": 2})[1].completions[0]) == 3


def test_what_turns_say_about_themselves_does_not_decide() -> None:
    about = {"num_tokens": 4, "language": "English", "toxic": False, "country": "x", "turn_identifier": 7, "timestamp": "t", "id": 3}
    assert [dict(turn) for turn in read({"prompt": [ASK | about], "chosen": [SEVEN | about], "rejected": [EIGHT]})[1].prompt] == [ASK]
    for lost in ({"images": ["a.png"]}, {"refusal": "No."}, {"function_call": CALL}):
        with pytest.raises(RowRejected) as caught:
            FORMATS["trl"].adapt({"chosen": [ASK | lost, SEVEN], "rejected": [ASK | lost, EIGHT]}, SourceOptions("f"))
        assert caught.value.reason is BadRow.UNSUPPORTED_MESSAGE


# ---- PRM800K ---------------------------------------------------------------------------------------------------------


def _prm800k(*steps: dict[str, Any], **label: Any) -> dict[str, Any]:
    return {"question": {"problem": "Name a prime."}, "label": {"steps": list(steps), **label}}


def _step(*rated: tuple[str, int | None], chosen: int | None = 0, **more: Any) -> dict[str, Any]:
    return {"completions": [{"text": text, "rating": rating} for text, rating in rated], "chosen_completion": chosen, **more}


def test_prm800k_follows_the_chosen_steps_to_every_candidate_of_the_last() -> None:
    row = _prm800k(_step(("a", 1), ("b", -1)), _step(("c", -1), ("d", 0), ("c", -1), chosen=None), finish_reason="found_error")
    comparison = FORMATS["prm800k"].adapt(row, SourceOptions("f"))
    validate(comparison, ties="quarantine")
    assert comparison.completions == ("a\n\nc", "a\n\nd")
    assert comparison.step_labels is not None
    assert comparison.step_labels[0] == (1.0, 0.0)
    assert math.isnan(comparison.step_labels[1][0])
    assert comparison.step_labels[1][1] == 1.0


def test_prm800k_takes_the_labelers_own_step_and_unknown_ratings() -> None:
    human = {"text": "h\n\n# Answer\n\n7", "rating": None}
    row = _prm800k(_step(("a", None)), _step(("b", -1), chosen=None, human_completion=human))
    comparison = FORMATS["prm800k"].adapt(row, SourceOptions("f"))
    assert comparison.completions == ("a\n\nh\n# Answer\n7",)
    assert comparison.step_labels is not None
    assert math.isnan(comparison.step_labels[0][0])
    assert comparison.step_labels[0][1] == 1.0


@pytest.mark.parametrize(
    "row",
    [
        _prm800k(),
        _prm800k(_step(("a", 2))),
        _prm800k(_step(("a", 1), chosen=4)),
        _prm800k(_step(("a", 1), chosen=None), _step(("b", 1))),
        _prm800k(_step(("a", 1)), finish_reason="bad_problem"),
        _prm800k(_step((" ", 1))),
    ],
)
def test_prm800k_rows_without_labelled_steps_are_bad_steps(row: dict[str, Any]) -> None:
    with pytest.raises(RowRejected) as caught:
        FORMATS["prm800k"].adapt(row, SourceOptions("f"))
    assert caught.value.reason is BadRow.BAD_STEPS


# ---- values ----------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Eight."}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (1, "1"), (1.0, "1"), (1.5, "1.5"), ("x", "x"), (True, "true"), (["x", "y"], "x, y"), ([3.0], "3"), ({"name": "x"}, "x"),
        ({"id": "y", "n": 1}, "y"), ({"b": 1, "a": None}, '{"a": null, "b": 1}'), ([{"a": 1}], '[{"a": 1}]'),
    ],
)  # fmt: skip
def test_id_and_source_become_text(given: Any, text: str) -> None:
    comparison = read(PAIR | {"id": given, "source": given})[1]
    assert (comparison.id, comparison.source) == (text, text)


@pytest.mark.parametrize("given", [None, "", [], {}, math.nan])
def test_no_id_and_no_source_are_the_content_and_the_file(given: Any) -> None:
    comparison = read(PAIR | {"id": given, "source": given})[1]
    assert (len(comparison.id), comparison.source) == (32, "file")
    assert comparison.id == read(PAIR)[1].id


@pytest.mark.parametrize(("given", "number"), [("1.5", 1.5), (" 2 ", 2.0), ("-3e-1", -0.3), (".5", 0.5), ("", None), (None, None)])
def test_numbers_may_be_written_as_text(given: Any, number: float | None) -> None:
    assert read(PAIR | {"margin": given})[1].margin == number


@pytest.mark.parametrize("given", ["nan", "NaN", "inf", "1,5", "1_000", "0x10", "one", "1.5 points", "true", True, "٣"])
def test_what_may_be_no_number_is_refused(given: Any) -> None:
    with pytest.raises(RowRejected) as caught:
        read(PAIR | {"margin": given})
    assert caught.value.reason is BadRow.WRONG_TYPE


@pytest.mark.parametrize(("given", "label"), [(True, 1.0), ("true", 1.0), ("False", 0.0), ("1", 1.0), ("0.25", 0.25), (0, 0.0)])
def test_labels_may_be_written_as_truth_number_or_text(given: Any, label: float) -> None:
    row = {"prompt": "Name a prime.", "completion": "Seven.", "label": given}
    assert FORMATS["pointwise"].adapt(row, SourceOptions("f", attributes=("label",))).attributes == ((label,),)


def test_scores_and_ratings_may_be_true_and_false() -> None:
    row = {"prompt": "Name a prime.", "responses": ["Seven.", "Eight."], "scores": [True, False]}
    assert FORMATS["scored"].adapt(row, SourceOptions("f")).ranks == (-1.0, -0.0)
    rated = {"prompt": "Name a prime.", "completions": ["Seven."], "attributes": [{"right": True}]}
    assert FORMATS["ranking"].adapt(rated, SourceOptions("f", attributes=("right",))).attributes == ((1.0,),)


def test_turns_kept_as_json_text_are_parsed() -> None:
    row = {"prompt": "Name a prime.", "chosen": json.dumps([ASK, SEVEN]), "rejected": json.dumps([ASK, EIGHT])}
    assert read(row)[1].completions == ("Seven.", "Eight.")
    row = {"chosen": json.dumps([ASK, SEVEN]), "rejected": json.dumps([ASK, EIGHT])}
    assert [dict(turn) for turn in read(row)[1].prompt] == [ASK]
    row = {"prompt": json.dumps([ASK]), "chosen": json.dumps([SEVEN]), "rejected": json.dumps([EIGHT])}
    assert [dict(turn) for turn in read(row)[1].prompt] == [ASK]


def test_turns_as_python_prints_them_are_parsed_and_what_cannot_be_is_refused() -> None:
    row = {"prompt": "Name a prime.", "chosen": str([ASK, SEVEN]), "rejected": str([ASK, EIGHT])}
    assert read(row)[1].completions == ("Seven.", "Eight.")
    table = f"[{ASK}\n {SEVEN}]"  # an array of objects, printed without commas
    with pytest.raises(RowRejected, match="looks like messages") as caught:
        FORMATS["trl"].adapt(PAIR | {"chosen": table}, SourceOptions("f", prompt_key="prompt"))
    assert caught.value.reason is BadRow.WRONG_TYPE


def test_one_turn_may_stand_without_a_list() -> None:
    assert read({"prompt": ASK, "chosen": SEVEN, "rejected": EIGHT})[1].completions == ("Seven.", "Eight.")
    assert read({"prompt": "Name a prime.", "chosen": json.dumps(SEVEN), "rejected": "Eight."})[1].completions == ("Seven.", "Eight.")


@pytest.mark.parametrize("text", ["{'answer': 7}", "[1, 2]", '{"answer": 7}', "[not json]", "[]", '[{"role": "user"}]'])
def test_other_json_text_stays_an_answer(text: str) -> None:
    assert read(PAIR | {"chosen": text})[1].completions[0] == text
