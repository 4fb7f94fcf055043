"""How errors cross processes: as JSON, marked in a text, held by an actor."""

from __future__ import annotations

import json
import pickle
import traceback
from typing import Any

import pytest

from rayward import errors
from rayward.cluster import Deferred
from rayward.errors import (
    CheckpointError,
    ContractMismatchError,
    ModelLoadError,
    NonFiniteError,
    PartialError,
    RaywardError,
    RequestError,
    RuleError,
    TrainingError,
    WorkerError,
    carried_by,
    find_in,
    marking,
)

FIELDS: dict[type[RaywardError], dict[str, Any]] = {
    NonFiniteError: {"step": 12, "comparison_ids": ("a", 'b "quoted"\n\u2028')},
    PartialError: {"failed": (1,), "codes": ("too_long",), "rewards": (0.5, None)},
    RequestError: {"item": 3},
    RuleError: {"item": None, "code": "text_too_long"},
    WorkerError: {"error_type": "builtins.ValueError", "traceback": "Traceback …\n  line"},
}


def make(kind: type[RaywardError]) -> RaywardError:
    values: dict[str, Any] = dict(FIELDS.get(kind, {}))
    problem, remedy = "given: 'x'\nrule: {y}\ud800", "do\nthis"
    code: tuple[Any, ...] = (values.pop("code"),) if "code" in values else ()
    return kind(*code, problem, **{"remedy": remedy, **values})


KINDS = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RaywardError)), key=lambda kind: kind.__name__
)


@pytest.mark.parametrize("kind", KINDS)
def test_type_and_fields_survive_json_and_pickle(kind: type[RaywardError]) -> None:
    error = make(kind)
    for again in (RaywardError.from_json(error.to_json()), pickle.loads(pickle.dumps(error))):
        assert type(again) is kind
        assert vars(again) == vars(error)
        assert (str(again), again.args) == (str(error), error.args)
    assert 400 <= error.http_status < 600
    assert error.exit_code in (1, 2)


def test_what_may_be_retried() -> None:
    retryable = {kind.__name__ for kind in KINDS if kind.retryable}
    assert retryable == {
        "StreamOrderError",
        "CheckpointDamagedError",
        "OverloadedError",
        "UnavailableError",
        "DeadlineError",
        "ServerError",
    }


def test_a_type_of_a_newer_version_becomes_the_nearest_base_and_keeps_its_fields() -> None:
    record = json.loads(make(NonFiniteError).to_json())
    record["types"] = ["GradientSpikeError", *record["types"]]
    record["fields"]["norm"] = 1e9
    error = RaywardError.from_json(json.dumps(record))
    assert type(error) is NonFiniteError
    assert (error.step, vars(error)["norm"]) == (12, 1e9)
    record["types"] = ["NewError", "NewBaseError", "RaywardError"]
    assert type(RaywardError.from_json(json.dumps(record))) is RaywardError


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"types": ["DataError"], "fields": {"problem": 1, "remedy": "x"}}', "not json"])
def test_what_is_no_error_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is Python's for half of them
        RaywardError.from_json(text)


def as_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("kind", [ContractMismatchError, NonFiniteError, RuleError])
def test_a_marked_error_is_found_in_the_text_of_a_chain_of_tracebacks(kind: type[RaywardError]) -> None:
    def fail() -> None:
        with marking:
            raise make(kind)

    try:
        try:
            fail()
        except RaywardError as exc:
            raise RuntimeError("The constructor failed") from exc
    except RuntimeError as exc:
        text = f"The deployment failed to start 1 times in a row.\n{as_text(exc)}\nsee the log"
    found = find_in(text)
    assert type(found) is kind
    assert found.problem == make(kind).problem
    assert {name: vars(found)[name] for name in FIELDS.get(kind, {})} == FIELDS.get(kind, {})


def test_the_last_whole_mark_of_a_text_counts() -> None:
    one, two = make(ModelLoadError).marked(), TrainingError("second", remedy="r").marked()
    text = as_text(one) + as_text(two)
    assert type(find_in(text)) is TrainingError
    assert type(find_in(text[: text.rindex('"second"')])) is ModelLoadError, "a mark that was cut off is skipped"
    assert find_in("rayward-error: what a user may write") is None
    assert find_in("rayward.errors.ModelLoadError: no such file\n  remedy: none") is None


def test_a_mark_is_made_once_and_changes_no_message() -> None:
    error = make(ModelLoadError)
    before = str(error)
    error.marked().marked()
    assert str(error) == before
    assert as_text(error).count(errors.MARK) == 1
    assert "__notes__" not in error.to_json()


def test_an_error_is_found_wherever_an_exception_carries_it() -> None:
    from ray.exceptions import RayTaskError

    original = make(NonFiniteError)
    task = RayTaskError("f", "Traceback …", original, proctitle="p", pid=1, ip="0.0.0.0")
    assert carried_by(original) is original
    assert carried_by(task) is original
    assert carried_by(task.as_instanceof_cause()) is original, "Ray's class is of both types and has not the fields"
    wrapped = RuntimeError("worker group")
    wrapped.__cause__ = task
    assert carried_by(wrapped) is original
    assert type(carried_by(RuntimeError(as_text(make(CheckpointError).marked())))) is CheckpointError
    assert carried_by(RuntimeError("nothing of ours")) is None


def test_an_error_survives_what_ray_data_makes_of_it() -> None:
    # Ray Data raises an error of its own over ours, and pickling drops the chain: only the text of the traceback is left.
    from ray.exceptions import RayTaskError, UserCodeException

    def refuse() -> int:
        raise make(ContractMismatchError)

    try:
        try:
            Deferred(refuse).get()
        except RaywardError as exc:
            raise UserCodeException("UDF failed to process a data block.") from exc
    except UserCodeException as exc:
        task = RayTaskError("map", traceback.format_exc(), exc, proctitle="p", pid=1, ip="0.0.0.0")
    arrived = pickle.loads(pickle.dumps(task)).as_instanceof_cause()
    assert arrived.cause.__cause__ is None
    found = carried_by(arrived)
    assert type(found) is ContractMismatchError
    assert vars(found) == vars(make(ContractMismatchError))


def test_an_actor_gives_the_error_of_its_constructor_at_every_call() -> None:
    def refuse() -> int:
        raise make(ModelLoadError)

    held = Deferred(refuse)
    for _ in range(2):
        with pytest.raises(ModelLoadError) as caught:
            held.get()
        assert type(find_in(as_text(caught.value))) is ModelLoadError
    assert Deferred(lambda: 7).get() == 7
    with pytest.raises(ZeroDivisionError):
        Deferred(lambda: 1 // 0).get()


def test_what_marks_is_pickled_with_the_class_that_uses_it() -> None:
    # Ray Serve pickles a deployment's class by value.
    from ray import cloudpickle

    class Actor:
        @marking
        def fail(self) -> None:
            raise make(ModelLoadError)

    with pytest.raises(ModelLoadError) as caught:
        cloudpickle.loads(cloudpickle.dumps(Actor))().fail()
    assert find_in(as_text(caught.value)) is not None
