"""Public preference formats: one adapter per format turns a row into a `Comparison`; detection picks the format.

Every format may carry the columns `id` (text or integer), `source` (text), `system` (text) and `weight` (number >= 0). A row that does
not fit is quarantined; a file whose format cannot be decided, or whose rows hold columns that would change them and are not read, is an
error. No Ray and no tokenizer here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rayward.config.data import DataConfig
from rayward.config.sources import SourceConfig
from rayward.data.formats import pairs, rated
from rayward.data.formats.cells import reads, renamed, require_known
from rayward.data.formats.columns import COMMON_COLUMNS, Columns
from rayward.data.formats.detect import Format, adapt_row, detect, require_read
from rayward.data.formats.fields import Row, SourceOptions
from rayward.data.formats.hook import FORMAT_KEY, Adapter, read_adapter, run_adapter
from rayward.data.formats.mapped import MAPPED, mapped
from rayward.data.formats.pairs import TRANSCRIPT
from rayward.data.formats.published import PUBLISHED
from rayward.data.formats.scores import SCORE_COLUMNS
from rayward.data.record import BadRow, Comparison, RowRejected
from rayward.errors import DataFormatError

__all__ = ["FORMATS", "Format", "SourceOptions", "adapt", "choose_format", "columns_of"]


_PAIR = frozenset({"chosen", "rejected", "prompt"})
_JUDGED = frozenset({"margin", "strength"}) | SCORE_COLUMNS
_PAIR_METADATA = frozenset({"prompt_id", "subset", "split", "dataset", "chosen_model", "rejected_model", "chosen-model", "rejected-model"})
_FEEDBACK = {"chosen_feedback": "data.critique_lead_in", "rejected_feedback": "data.critique_lead_in"}


def _fits_trl(row: Row, options: SourceOptions) -> bool:
    if (options.chosen_key, options.rejected_key) != ("chosen", "rejected") or options.prompt_key not in (None, "prompt"):
        return False
    answers = [row.get(key) for key in ("chosen", "rejected")]
    if not all(isinstance(answer, str | list | dict) for answer in answers) or _fits_hh_rlhf(row, options):
        return False
    if isinstance(row.get("prompt"), str | list | dict):
        return True
    # Without a prompt it stands in both; in two texts only where no other text column may hold it.
    if type(answers[0]) is not type(answers[1]) or isinstance(answers[0], dict):
        return False
    return not (isinstance(answers[0], str) and _READS_PAIR.other_texts(row))


def _fits_openrlhf(row: Row, options: SourceOptions) -> bool:
    keys = (options.chosen_key, options.rejected_key, *([options.prompt_key] if options.prompt_key else []))
    named = options.prompt_key is not None or keys != ("chosen", "rejected")
    if not named or not all(isinstance(row.get(key), str | list) for key in keys) or _fits_trl(row, options):
        return False
    implied = options.prompt_key is None and isinstance(row[options.chosen_key], str)
    return not (implied and FORMATS["openrlhf"].reads(options).other_texts(row))


def _fits_hh_rlhf(row: Row, options: SourceOptions) -> bool:
    texts = [row.get(key) for key in ("chosen", "rejected")]
    return "prompt" not in row and all(isinstance(text, str) and TRANSCRIPT.match(text) for text in texts)


def _fits_ultrafeedback(row: Row, options: SourceOptions) -> bool:
    return isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list)


def _has(*keys: str) -> Callable[[Row, SourceOptions], bool]:
    return lambda row, options: all(key in row for key in keys)


_READS_PAIR = Columns(COMMON_COLUMNS | _PAIR | _JUDGED | frozenset(_FEEDBACK), _PAIR_METADATA)

FORMATS: dict[str, Format] = {
    "trl": Format(
        "chosen, rejected[, prompt][, margin][, strength]: texts, or lists of messages",
        _fits_trl,
        pairs.pair,
        consumed=_JUDGED,
        metadata=_PAIR_METADATA,
        named_by=("prompt_key", "chosen_key", "rejected_key"),
        settings=_FEEDBACK,
    ),
    "openrlhf": Format(
        "data.chosen_key, data.rejected_key[, data.prompt_key][, margin]",
        _fits_openrlhf,
        pairs.pair,
        consumed=_JUDGED,
        metadata=_PAIR_METADATA,
        named_by=("prompt_key", "chosen_key", "rejected_key"),
        settings=_FEEDBACK,
    ),
    "hh_rlhf": Format(
        "chosen, rejected: transcripts 'Human: … Assistant: …'",
        _fits_hh_rlhf,
        pairs.hh_rlhf,
        consumed=frozenset({"chosen", "rejected"}) | _JUDGED,
    ),
    "ultrafeedback_binarized": Format(
        "prompt (text), chosen, rejected (messages)[, score_chosen, score_rejected]",
        _fits_ultrafeedback,
        pairs.ultrafeedback_binarized,
        consumed=_PAIR | _JUDGED,
        metadata=_PAIR_METADATA | {"messages"},
    ),
    "helpsteer2_preference": Format(
        "prompt, response_1, response_2, preference_strength",
        _has("response_1", "response_2", "preference_strength"),
        pairs.helpsteer_preference("prompt", "response_1", "response_2", "preference_strength"),
        consumed=frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        metadata=frozenset(
            {
                "split",
                "preference_statement",
                "preference_elaboration",
                "three_most_similar_preferences",
                "all_preferences_unprocessed",
            }
        ),
    ),
    "helpsteer3_preference": Format(
        "context, response1, response2, overall_preference",
        _has("response1", "response2", "overall_preference"),
        pairs.helpsteer_preference("context", "response1", "response2", "overall_preference"),
        consumed=frozenset({"context", "response1", "response2", "overall_preference"}),
        metadata=frozenset({"domain", "language", "individual_preference"}),
    ),
    "ranking": Format(
        "prompt, completions, ranks[, attributes]",
        lambda row, options: isinstance(row.get("completions"), list) and ("ranks" in row or "attributes" in row),
        rated.ranking,
        consumed=frozenset({"prompt", "completions", "ranks", "margin", "strength", "vote_shares"}),
        settings={"attributes": "data.attributes", "step_labels": "data.step_separator", "critiques": "data.critique_lead_in"},
    ),
    "nectar": Format(
        "prompt, answers: [{answer, rank}]",
        _has("prompt", "answers"),
        rated.nectar,
        consumed=frozenset({"prompt", "answers"}),
        metadata=frozenset({"turns", "num_responses", "good_natured"}),
    ),
    "ultrafeedback": Format(
        "instruction, completions: [{response, annotations, overall_score}]",
        _has("instruction", "completions"),
        rated.ultrafeedback,
        consumed=frozenset({"instruction", "completions"}),
        metadata=frozenset({"models", "correct_answers", "incorrect_answers"}),
    ),
    "helpsteer2": Format(
        "prompt, response, helpfulness, correctness, coherence, complexity, verbosity",
        _has("prompt", "response", *rated.HELPSTEER2_ATTRIBUTES),
        rated.helpsteer2,
        consumed=frozenset({"prompt", "response"}),
        named_by=("attributes",),
        settings=dict.fromkeys(rated.HELPSTEER2_ATTRIBUTES, "data.attributes"),
    ),
    "safe_rlhf": Format(
        "prompt, response_0, response_1, better_response_id, safer_response_id[, is_response_0_safe, is_response_1_safe]",
        _has("response_0", "response_1", "better_response_id", "safer_response_id"),
        rated.safe_rlhf,
        consumed=frozenset({"prompt", "response_0", "response_1", "better_response_id", "safer_response_id"}),
        metadata=frozenset(
            {"prompt_source"}
            | {f"response_{i}_{name}" for i in (0, 1) for name in ("source", "harm_category", "severity_level", "sha256")}
            | {f"is_response_{i}_safe" for i in (0, 1)}
        ),
    ),
    "scored": Format(
        "prompt, responses, scores (higher is better)",
        _has("prompt", "responses", "scores"),
        rated.scored,
        consumed=frozenset({"prompt", "responses", "scores"}),
    ),
    "pointwise": Format(
        "prompt, completion, label",
        _has("prompt", "completion", "label"),
        rated.pointwise,
        consumed=frozenset({"prompt", "completion", "label"}),
    ),
    "stepwise": Format(
        "prompt, completions (the steps of one), labels",
        _has("prompt", "completions", "labels"),
        rated.stepwise,
        consumed=frozenset({"prompt", "completions", "labels"}),
    ),
    "critique": Format(
        "prompt, completion, critique",
        lambda row, options: _has("prompt", "completion", "critique")(row, options) and "label" not in row,
        rated.critique,
        consumed=frozenset({"prompt", "completion", "critique"}),
    ),
    **PUBLISHED,
}
"""Name of the format (`data.format`) to its detection and adapter."""


def choose_format(
    rows: Sequence[Row], config: DataConfig, *, where: str, source: str, mapping: SourceConfig | None = None
) -> tuple[str, SourceOptions]:
    """Decide the format of one file from its first rows, and whether the prompt has a column of its own.

    Args:
        rows: the first parsable rows of the file; at least one.
        config: `format` other than `auto` is taken as given.
        where: the file, for messages.
        source: default value of `Comparison.source`.
        mapping: the source that the file belongs to; None: one without settings of its own.

    Returns:
        A name in `FORMATS`, or `MAPPED`, and what the adapter needs to know.

    Raises:
        DataFormatError: no format fits, more than one fits equally well, or a column that would change the rows is not read.
        ConfigError: `data.adapter` cannot be imported.
    """
    options = _options(config, source, mapping)
    rows = [_kept(row, options) for row in rows]
    chosen = options.mapping
    if chosen is not None:
        require_known(chosen, rows, where)
        if chosen.is_mapped:
            require_read(columns_of(MAPPED, options), rows, lambda row: mapped(row, options), name=MAPPED, where=where)
            return MAPPED, options
    read = _prepared(rows, options, where)
    # For the whole file: a row that lost its prompt must not be read as one whose prompt is implied.
    prompted = options
    if options.prompt_key is None and any("prompt" in row for _, row in read):
        prompted = replace(options, prompt_key="prompt")
    by_name = {name: prompted if name == "trl" else options for name in FORMATS}
    name: str = config.format if mapping is None or mapping.format is None else mapping.format
    told = {own for own, _ in read} - {None}
    if name == "auto" and told:
        name = sorted(str(own) for own in told)[0]
    elif name == "auto":
        name = detect(FORMATS, [row for _, row in read], by_name, where=where)
    options = by_name[name]
    columns = columns_of(name, options)
    if options.adapter is None:
        require_read(columns, rows, lambda row: _given(FORMATS[name], row, options), name=name, where=where)
    return name, options


def _options(config: DataConfig, source: str, mapping: SourceConfig | None) -> SourceOptions:
    named = config.adapter if mapping is None or mapping.adapter is None else mapping.adapter
    return SourceOptions(
        source if mapping is None or mapping.source is None else mapping.source,
        config.prompt_key,
        config.chosen_key,
        config.rejected_key,
        attributes=config.attributes,
        attribute_range=config.attribute_range,
        rank_by=config.rank_by,
        preference=config.preference,
        step_separator=config.step_separator,
        critiques=config.critique_lead_in is not None,
        ignore=config.ignore if mapping is None else (*config.ignore, *mapping.ignore),
        votes="soft" if config.votes == "soft" else "majority",
        mapping=None if mapping is None or mapping.plain else mapping,
        adapter=None if named is None else read_adapter(named),
    )


def _prepared(rows: Sequence[Row], options: SourceOptions, where: str) -> list[tuple[str | None, Row]]:
    """The sample as a format's adapter gets it, with the format that the user's function names."""
    read: list[tuple[str | None, Row]] = []
    refused = ""
    for row in rows:
        try:
            if options.adapter is not None:
                read.append(_hooked(options.adapter, row))
            else:
                read.append((None, row if options.mapping is None else renamed(row, options.mapping)))
        except RowRejected as exc:
            refused = refused or exc.detail
    if not read:
        raise DataFormatError(
            f"{where}: none of the first {len(rows)} rows gets through the mapping, the first because: {refused}",
            remedy="correct data.adapter or data.sources[].extract",
        )
    return read


def _hooked(adapter: Adapter, row: Row) -> tuple[str | None, Row]:
    made = run_adapter(adapter, row)
    name = made.pop(FORMAT_KEY, None)
    if name is not None and name not in FORMATS:
        raise RowRejected(
            BadRow.ADAPTER_FAILED, f"{adapter.name} returned a row of format {name!r}; the rule is one of {', '.join(FORMATS)}"
        )
    return name, made


def _given(entry: Format, row: Row, options: SourceOptions) -> Comparison:
    return entry.adapt(row if options.mapping is None else renamed(row, options.mapping), options)


def _kept(row: Row, options: SourceOptions) -> Row:
    # A column that every format reads is not read where it is ignored by its name.
    left_out = COMMON_COLUMNS.intersection(options.ignore)
    return {name: value for name, value in row.items() if name not in left_out} if left_out else row


def columns_of(name: str, options: SourceOptions) -> Columns:
    """What becomes of the columns of a source. What a user's own function reads is its own affair."""
    if options.adapter is not None:
        return Columns(frozenset(), ignore=("*",))
    of_format = None if name == MAPPED else FORMATS[name].reads(options)
    if options.mapping is None:
        assert of_format is not None
        return of_format
    found = reads(options.mapping, options, of_format)
    return found if options.mapping.judged else replace(found, texts_only=True)


def adapt(name: str, columns: Columns, row: Row, options: SourceOptions) -> Comparison:
    """The comparison of a row.

    Args:
        columns: of `columns_of`, once per source.

    Raises:
        RowRejected: the row does not fit, or a column that would change its meaning is not read.
    """
    row = _kept(row, options)
    if options.adapter is not None:
        own, made = _hooked(options.adapter, row)
        entry = FORMATS[own or name]
        key = "prompt" if "prompt" in made and (own or name) == "trl" else options.prompt_key
        options = replace(options, prompt_key=key)
        return adapt_row(lambda given: entry.adapt(given, options), entry.reads(options), made)
    if name == MAPPED:
        return adapt_row(lambda given: mapped(given, options), columns, row)
    return adapt_row(lambda given: _given(FORMATS[name], given, options), columns, row)
