"""`data.sources`: what the settings of a source make of rows of any shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from rayward.config.data import DataConfig
from rayward.config.load import parse_config
from rayward.contract.conversation import text_of
from rayward.data.formats.cells import find
from rayward.data.formats.mapped import MAPPED
from rayward.data.formats.table import adapt, choose_format, columns_of
from rayward.data.record import BadRow, Comparison, RowRejected, validate
from rayward.errors import ConfigError, DataFormatError

USER = {"role": "user", "content": "2+2?"}


def config_of(source: dict[str, Any], **data: Any) -> DataConfig:
    return parse_config({"sources": [{"path": "f.jsonl", **source}], **data}, DataConfig)


def read(source: dict[str, Any], row: dict[str, Any], **data: Any) -> Comparison:
    config = config_of(source, **data)
    name, options = choose_format([row], config, where="f.jsonl", source="f", mapping=config.sources[0])
    comparison = adapt(name, columns_of(name, options), row, options)
    validate(comparison, ties="keep")
    return comparison


def outcome(source: dict[str, Any], row: dict[str, Any], **data: Any) -> tuple[str, BadRow]:
    with pytest.raises(RowRejected) as caught:
        read(source, row, **data)
    return caught.value.detail, caught.value.reason


PAIR = {"prompt": "q", "first": "a", "second": "b"}
ROW: dict[str, Any] = {"q": "2+2?", "a": "4", "b": "5"}


# ---- where a value stands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a", 1),
        ("b.c", 2),
        ("b.d.0.e", 3),
        ("b.d.-1.e", 4),
        ("b.d.*.e", [3, 4]),
        ("x.y", 5),
        ("x.y.z", None),
        ("o.p.q", 6),
        ("j.k", 7),
        ("b.d.2.e", None),
        ("nothing", None),
    ],
)
def test_a_path_is_an_exact_name_first_and_then_dots(path: str, value: object) -> None:
    row = {"a": 1, "b": {"c": 2, "d": [{"e": 3}, {"e": 4}]}, "x.y": 5, "x": {"y": 0}, "o.p": {"q": 6}, "j": '{"k": 7}'}
    assert find(row, path) == value


def test_any_column_name_can_be_mapped() -> None:
    row = {"the question?": "2+2?", "antwort.gut": "4", "Ärgerlich": {"text": "5"}}
    found = read({"columns": {"prompt": "the question?", "chosen": "antwort.gut", "rejected": "Ärgerlich.text"}}, row)
    assert (found.prompt, found.completions, found.ranks) == ((USER,), ("4", "5"), (0.0, 1.0))


# ---- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "row", "prompt"),
    [
        ("{instruction}\n\n{input}", {"instruction": "Translate", "input": "hello"}, "Translate\n\nhello"),
        ("{instruction}\n\n{input}", {"instruction": "Translate", "input": ""}, "Translate"),
        ("{instruction}\n\n{input}", {"instruction": "Translate", "input": None}, "Translate"),
        ("{instruction}\nInput: {input}", {"instruction": "Translate", "input": "  "}, "Translate"),
        ("{instruction}\n\n{input}", {"instruction": "", "input": "hello"}, "hello"),
        ("Say {{{input}}}", {"input": "x"}, "Say {x}"),
        ("{meta.title}: {meta.parts}", {"meta": {"title": "T", "parts": [["a", "b"], "c"]}}, "T: a\nb\nc"),
        ("Describe something.", {}, "Describe something."),
        ("{n}", {"n": 3.0}, "3"),
        ("{input.__class__}", {"input": "x", "instruction": "y"}, None),
    ],
)
def test_a_prompt_template_joins_columns(template: str, row: dict[str, Any], prompt: str | None) -> None:
    source = {"prompt_template": template, "columns": {"chosen": "good", "rejected": "bad"}}
    row = {**row, "good": "4", "bad": "5"}
    if prompt is None:  # no attribute of a value is ever looked at
        assert outcome({**source, "ignore": ["*"]}, row)[1] is BadRow.EMPTY_PROMPT
    else:
        assert read(source, row).prompt == ({"role": "user", "content": prompt},)


@pytest.mark.parametrize("template", ["{", "}", "{}", "a {b} }", "{a{b}"])
def test_a_template_with_a_lonely_brace_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="brace"):
        config_of({"prompt_template": template, "columns": {"chosen": "a", "rejected": "b"}})


def test_system_turns_are_constant_or_from_a_column() -> None:
    mapping = {"columns": {"prompt": "q", "chosen": "a", "rejected": "b"}, "system": "Be brief."}
    assert read(mapping, ROW).prompt == ({"role": "system", "content": "Be brief."}, USER)
    named = {**mapping, "columns": {**mapping["columns"], "system": "rule"}}  # type: ignore[dict-item]
    assert read(named, {**ROW, "rule": "Be long."}).prompt[0]["content"] == "Be long."
    assert read(named, {**ROW, "rule": ""}).prompt[0]["content"] == "Be brief."
    turned = {**ROW, "q": [{"role": "system", "content": "Own."}, USER]}
    assert [turn["content"] for turn in read(mapping, turned).prompt] == ["Own.", "2+2?"]


def test_history_stands_before_the_prompt() -> None:
    mapping = {"columns": {"prompt": "q", "history": "past", "chosen": "a", "rejected": "b"}}
    found = read(mapping, {**ROW, "past": [["1+1?", "2"]]})
    assert [(turn["role"], turn["content"]) for turn in found.prompt] == [("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")]
    assert read(mapping, {**ROW, "past": []}).prompt == (USER,)


def test_whole_conversations_bring_their_prompt() -> None:
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    found = read({"columns": {"chosen": "m", "rejected": "r"}}, {"m": turns, "r": "5"})
    assert (found.prompt, [text_of(each) for each in found.completions]) == ((USER,), ["4", "5"])
    other = [turns[0], {"from": "gpt", "value": "5"}]
    label = {"columns": {"first": "m", "second": "n", "label": "l"}, "judgement": {"first": "m", "second": "n"}}
    assert read(label, {"m": turns, "n": other, "l": "n"}).ranks == (1.0, 0.0)
    assert outcome({"columns": {"chosen": "a", "rejected": "b"}}, {"a": "4", "b": "5"})[1] is BadRow.NO_SHARED_PROMPT


def test_named_groups_of_an_expression_are_columns() -> None:
    source = {"extract": {"all": r"Q: (?P<q>.*)\nA: (?P<a>.*)"}, "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}}
    assert read(source, {"all": "Q: 2+2?\nA: 4", "b": "5"}).completions == ("4", "5")
    detail, reason = outcome(source, {"all": "nothing", "b": "5"})
    assert (reason, "finds nothing" in detail) == (BadRow.UNPARSABLE, True)


# ---- judgements --------------------------------------------------------------------------------------------------

LABEL = {
    "columns": {**PAIR, "label": "l"},
    "judgement": {"first": ["model_a", "A>B", 1], "second": ["model_b", 2], "tie": ["tie", "=", False]},
}


@pytest.mark.parametrize(
    ("label", "ranks"),
    [
        ("model_a", (0.0, 1.0)),
        (" Model_A ", (0.0, 1.0)),
        ("A>B", (0.0, 1.0)),
        (1, (0.0, 1.0)),
        (1.0, (0.0, 1.0)),
        ("1", (0.0, 1.0)),
        (2, (1.0, 0.0)),
        ("tie", (0.0, 0.0)),
        (False, (0.0, 0.0)),
    ],
)
def test_two_answers_and_a_label(label: object, ranks: tuple[float, float]) -> None:
    assert read(LABEL, {**ROW, "l": label}).ranks == ranks


@pytest.mark.parametrize("label", ["both", "", None, 3, True, ["model_a"]])
def test_any_other_label_is_quarantined(label: object) -> None:
    detail, reason = outcome(LABEL, {**ROW, "l": label})
    assert reason is BadRow.BAD_RANKING
    assert "'l'" in detail


def test_words_that_yaml_reads_as_booleans() -> None:
    mapping = yaml.safe_load(
        "{columns: {prompt: q, first: a, second: b, label: l}, judgement: {first: yes, second: no, strengths: {yes: 2}}}"
    )
    found = [read(mapping, {**ROW, "l": label}) for label in ("yes", "Yes", True, "no", False)]
    assert [each.ranks for each in found] == [(0.0, 1.0)] * 3 + [(1.0, 0.0)] * 2
    assert found[0].strength == 2.0


def test_labels_of_other_kinds() -> None:
    flags = {"columns": {**PAIR, "label": ["wa", "wb", "wt"]}}
    assert read(flags, {**ROW, "wa": 0, "wb": 1, "wt": 0}).ranks == (1.0, 0.0)
    assert outcome(flags, {**ROW, "wa": 1, "wb": 1, "wt": 0})[1] is BadRow.BAD_RANKING
    names = {"columns": {**PAIR, "label": "win", "first_name": "ma", "second_name": "mb"}, "judgement": {"tie": "tie"}}
    assert read(names, {**ROW, "win": "gpt", "ma": "llama", "mb": "gpt"}).ranks == (1.0, 0.0)
    scale = {"columns": {**PAIR, "label": "l"}, "judgement": {"middle": 4, "above": "second"}}
    assert [read(scale, {**ROW, "l": value}).ranks for value in (1, 4, 7)] == [(0.0, 1.0), (0.0, 0.0), (1.0, 0.0)]
    assert read(scale, {**ROW, "l": 1}).strength == 3.0
    words = {"columns": {**PAIR, "label": "l"}, "judgement": {"first": ["much", "bit"], "second": "no", "strengths": {"much": 2, "bit": 1}}}
    assert [read(words, {**ROW, "l": value}).strength for value in ("much", "bit")] == [2.0, 1.0]


def test_scores_and_ranks_of_several() -> None:
    columns = {"prompt": "q", "completions": "c.*.text", "scores": "c.*.s"}
    row = {"q": "2+2?", "c": [{"text": "4", "s": 0.9}, {"text": "5", "s": "0.1"}, {"text": "6", "s": 0.1}]}
    assert read({"columns": columns}, row).ranks == (-0.9, -0.1, -0.1)
    assert read({"columns": columns, "judgement": {"lower_is_better": True}}, row).ranks == (0.9, 0.1, 0.1)
    pair = {"columns": {**PAIR, "scores": ["sa", "sb"]}}
    found = read(pair, {**ROW, "sa": 5, "sb": 5}, attributes=["score"])
    assert (found.ranks, found.strength, found.attributes) == ((-5.0, -5.0), 0.0, ((5.0,), (5.0,)))
    ranked = {"columns": {"prompt": "q", "completions": ["a", "b"], "ranks": "r"}}
    assert read(ranked, {**ROW, "r": [2, 1]}).ranks == (2.0, 1.0)
    assert outcome(ranked, {**ROW, "r": [1]})[1] is BadRow.BAD_RANKING
    assert outcome(ranked, {**ROW, "r": [1, None]})[1] is BadRow.BAD_RANKING


def test_one_best_and_its_losers() -> None:
    mapping = {"columns": {"prompt": "q", "best": "w.text", "losers": "l.*.text"}}
    found = read(mapping, {"q": "2+2?", "w": {"text": "4"}, "l": [{"text": "5"}, {"text": "6"}]})
    assert (found.completions, found.ranks) == (("4", "5", "6"), (0.0, 1.0, 1.0))
    many = {"columns": {"prompt": "q", "best": "good.*", "losers": "bad.*"}}
    assert read(many, {"q": "2+2?", "good": ["4", "four"], "bad": ["5"]}).ranks == (0.0, 0.0, 1.0)


def test_a_label_is_the_place_of_the_best() -> None:
    mapping: dict[str, Any] = {"columns": {"prompt": "q", "completions": ["a", "b", "c"], "label": "best"}}
    row = {**ROW, "c": "6"}
    assert [read(mapping, {**row, "best": place}).ranks for place in (0, 2.0, "1")] == [(0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0)]
    from_one = {**mapping, "judgement": {"counted_from": 1}}
    assert read(from_one, {**row, "best": 3}).ranks == (1.0, 1.0, 0.0)
    letters = {**mapping, "judgement": {"values": {"A": 0, "B": 1, "C": 2}}}
    assert read(letters, {**row, "best": "b"}).ranks == (1.0, 0.0, 1.0)
    for settings, place in ((mapping, 3), (mapping, -1), (mapping, 0.5), (mapping, None), (from_one, 0)):
        assert outcome(settings, {**row, "best": place})[1] is BadRow.BAD_RANKING


COMPARED: dict[str, Any] = {
    "columns": {"prompt": "q", "completions": ["a", "b", "c"], "comparisons": "p"},
    "judgement": {"first": 1, "second": 2, "tie": 0},
}


@pytest.mark.parametrize(
    ("given", "best_first"),
    [([1, 1, 1], [0, 1, 2]), ([2, 2, 2], [2, 1, 0]), ([0, 1, 1], [0, 0, 1]), ([2, 1, 1], [1, 0, 2])],
)
def test_pairwise_comparisons_become_an_order(given: list[int], best_first: list[int]) -> None:
    found = read(COMPARED, {**ROW, "c": "6", "p": given})
    assert found.ranks is not None
    order = sorted(set(found.ranks))
    if len(order) == 3:
        assert sorted(range(3), key=lambda index: found.ranks[index]) == best_first  # type: ignore[index]
    else:
        assert [order.index(rank) for rank in found.ranks] == best_first


def test_comparisons_that_no_order_agrees_with() -> None:
    row = {**ROW, "c": "6", "p": [1, 2, 1]}  # a > b, c > a, b > c
    assert outcome(COMPARED, row)[1] is BadRow.BAD_RANKING
    wins = {**COMPARED, "judgement": {**COMPARED["judgement"], "contradictions": "wins"}}
    assert len(set(read(wins, row).ranks or ())) == 1
    other = {**COMPARED, "judgement": {**COMPARED["judgement"], "pairs": [[1, 3], [3, 2]]}}
    assert outcome(other, row)[1] is BadRow.BAD_RANKING
    found = read(other, {**row, "p": [1, 1]})
    assert found.ranks == (-1.0, -0.0, -0.5)


@pytest.mark.parametrize(
    ("columns", "judgement", "votes", "share"),
    [
        ("votes", {"first": "x", "second": "y", "tie": "="}, ["x", "x", "y", "="], 0.625),
        ("votes.*.v", {"first": "x", "second": "y"}, [{"v": "x"}, {"v": "x"}, {"v": "y"}], 2 / 3),
        ("votes", {"first": "x", "second": "y"}, {"x": 3, "y": 1}, 0.75),
        (["votes.0", "votes.1"], {}, [3, 1], 0.75),
        (["votes.0", "votes.1", "votes.2"], {}, [2, 1, 1], 0.625),
        ("votes", {}, 0.8, 0.8),
    ],
)
def test_votes_are_a_majority_or_a_share(columns: Any, judgement: dict[str, Any], votes: Any, share: float) -> None:
    mapping = {"columns": {**PAIR, "votes": columns}, "judgement": judgement}
    whole = read(mapping, {**ROW, "votes": votes})
    assert whole.ranks is not None
    assert (whole.ranks[0] < whole.ranks[1], whole.vote_shares) == (True, None)
    assert read(mapping, {**ROW, "votes": votes}, votes="soft").vote_shares == pytest.approx((share,))


def test_answers_with_ratings_and_critiques_alone() -> None:
    mapping = {
        "columns": {"prompt": "q", "completion": "a", "critiques": "note"},
        "ratings": {"clear": "s.clear", "right": "ok"},
        "judgement": {"values": {"yes": 1, "no": 0}},
    }
    row = {"q": "2+2?", "a": "4", "note": "Right.", "s": {"clear": "4.5"}, "ok": "Yes"}
    found = read(mapping, row, attributes=["clear", "right"], critique_lead_in="Judge it.")
    assert (found.ranks, found.attributes, found.critiques) == (None, ((4.5, 1.0),), ("Right.",))
    nested = {"columns": {"prompt": "q", "completion": "a"}, "ratings": "s"}
    assert read(nested, {"q": "2+2?", "a": "4", "s": {"clear": 4}}, attributes=["clear"]).attributes == ((4.0,),)
    missing = read(mapping, {**row, "ok": None}, attributes=["clear", "right"], critique_lead_in="Judge it.").attributes
    assert missing is not None
    assert math.isnan(missing[0][1])
    labelled = {"columns": {"prompt": "q", "completion": "a", "label": "good"}}
    assert read(labelled, {"q": "2+2?", "a": "4", "good": True}, attributes=["label"]).attributes == ((1.0,),)


def test_numbers_and_names_of_the_row() -> None:
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "id": "k", "source": "set", "strength": "g", "margin": "m", "weight": "w"}
    mapping = {"columns": columns, "judgement": {"values": {"strong": 3}}}
    found = read(mapping, {**ROW, "k": 7, "set": "s", "g": "strong", "m": 0.5, "w": 2, "source": "text"}, ignore=["source"])
    assert (found.id, found.source, found.strength, found.margin, found.weight) == ("7", "s", 3.0, 0.5, 2.0)
    assert read({**mapping, "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}, "source": "mine"}, ROW).source == "mine"


# ---- with a format -----------------------------------------------------------------------------------------------


def test_columns_of_a_named_format_are_renamed() -> None:
    mapping = {
        "format": "helpsteer2_preference",
        "columns": {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": "d"},
    }
    found = read(mapping, {**ROW, "d": 2})
    assert (found.completions, found.ranks, found.strength) == (("4", "5"), (1.0, 0.0), 2.0)


def test_a_template_alone_leaves_the_format_to_detection() -> None:
    found = read({"prompt_template": "{task}: {topic}", "system": "S"}, {"task": "Add", "topic": "2+2", "chosen": "4", "rejected": "5"})
    assert [turn["content"] for turn in found.prompt] == ["S", "Add: 2+2"]


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_column_that_the_mapping_leaves_out_is_an_error() -> None:
    mapping = {"columns": {"prompt": "q", "chosen": "a", "rejected": "b"}}
    with pytest.raises(DataFormatError, match=r"mapped does not read images"):
        read(mapping, {**ROW, "images": ["x.png"]})
    assert read({**mapping, "ignore": ["images"]}, {**ROW, "images": ["x.png"]}).completions == ("4", "5")
    with pytest.raises(DataFormatError, match=r"(?s)columns\.prompt names the column 'frage'.*the columns are: a, b, q"):
        read({"columns": {"prompt": "frage", "chosen": "a", "rejected": "b"}}, ROW)
    config = config_of(mapping)
    name, options = choose_format([ROW], config, where="f", source="f", mapping=config.sources[0])
    assert (name, columns_of(name, options).unused({**ROW, "magnitude": 3, "lang": ""})) == (MAPPED, ["magnitude"])


def test_answers_without_a_judgement_are_for_scoring_alone() -> None:
    columns = {"prompt": "q", "completions": ["a", "b"]}
    with pytest.raises(ConfigError, match="no judgement"):
        config_of({"columns": columns})
    config = config_of({"columns": columns, "judged": False})
    name, options = choose_format([ROW], config, where="f", source="f", mapping=config.sources[0])
    found = adapt(name, columns_of(name, options), ROW, options)
    assert (found.prompt, found.completions, found.ranks) == ((USER,), ("4", "5"), None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"columns": {"chosen": "a"}}, "no judgement"),
        ({"columns": {"first": "a", "second": "b", "scores": "s", "ranks": "r"}}, "no judgement"),
        ({"columns": {"first": "a", "second": "b", "label": "l"}}, "which values of the label"),
        ({"columns": {"chosen": "a", "rejected": "b", "promt": "q"}}, "promt is no standard name"),
        ({"columns": {"prompt": "a", "chosen": "a", "rejected": "b"}, "prompt_template": "x"}, "both set"),
        ({"judgement": {"first": "a"}}, "without columns"),
        ({"adapter": "m:f", "columns": {"prompt": "q"}}, "adapter is set beside columns"),
        ({"adapter": "m"}, "module:function"),
        ({"repeat": 2, "share": 0.5}, "repeat and share"),
        ({"role": "validation", "repeat": 2}, "training sources only"),
        ({"share": 0.5}, "1 together"),
        ({"extract": {"a": "(x)"}}, "names no group"),
        ({"judgement": {"first": ["a", "A "], "second": "b"}, "columns": {**PAIR, "label": "l"}}, "stands twice"),
        ({"colums": {}}, "unknown key; known here: adapter, columns"),
    ],
)
def test_settings_that_make_no_sense_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(source)
