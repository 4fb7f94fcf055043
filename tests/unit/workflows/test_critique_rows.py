"""A row with critiques is the row that it was made of, whatever that one gave its template."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from rayward.contract.conversation import Message, TemplateInputs
from rayward.data.formats.table import FORMATS, SourceOptions
from rayward.data.prepared import label_columns
from rayward.data.record import Comparison
from rayward.workflows.critique import _keyed, _line

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
COMPARISON = Comparison(
    id="x",
    source="s",
    prompt=(Message(role="user", content="q"), Message(role="assistant", content="It ", prefix=True)),
    completions=("is.", (Message(role="assistant", content="", tool_calls=[CALL]),)),
    ranks=(0.0, 1.0),
    weight=2.0,
    vote_shares=(0.75,),
    tools=({"name": "f"},),
    chat_template_kwargs={"enable_thinking": False},
)


def row(comparison: Comparison) -> dict[str, Any]:
    return {
        "id": comparison.id,
        "source": comparison.source,
        **label_columns(comparison),
        "prompt_json": json.dumps(comparison.prompt),
        "completions_json": json.dumps(comparison.completions),
        "inputs_json": comparison.inputs.to_json(),
    }


def test_a_row_with_critiques_reads_as_its_comparison() -> None:
    keyed = _keyed(row(COMPARISON), ("model", "sampling"))
    line = _line(keyed, {keyed["key"]: ["Good.", "Bad."]}, ())
    assert line is not None
    read = FORMATS["ranking"].adapt(json.loads(line), SourceOptions("f", critiques=True))
    assert read == replace(COMPARISON, critiques=("Good.", "Bad."))


def test_what_the_template_is_given_is_part_of_the_cache_key_where_there_is_some() -> None:
    bare = row(replace(COMPARISON, tools=None, chat_template_kwargs=None))
    others = [bare, row(COMPARISON), {**bare, "inputs_json": TemplateInputs(({"name": "g"},)).to_json()}]
    assert len({_keyed(each, ("m", "s"))["key"] for each in others}) == 3
    older = {name: value for name, value in bare.items() if name != "inputs_json"}
    assert _keyed(older, ("m", "s"))["key"] == _keyed(bare, ("m", "s"))["key"]
