"""Every error Rayward raises on purpose, in one tree.

    RaywardError
    ├── ConfigError            a setting is unknown, of the wrong type, or contradicts another        (exit 2, 400)
    ├── DataError              the input data cannot be used                                          (exit 2, 400)
    │   ├── DataFormatError    no format, or more than one, fits the columns
    │   └── TooManyBadRowsError  more rows are bad than the configured share allows
    ├── ContractError          text, tokenizer, template or pooled position cannot be made certain    (exit 2, 422)
    │   ├── TooLongError       one conversation does not fit the contract's token limit
    │   ├── UnsupportedMessageError  the chat template does not show a part of one conversation
    │   ├── AlreadyTemplatedError  a text of one conversation has gone through a chat template before
    │   ├── ChangedTextError   the chat template changes the completion of one conversation
    │   ├── TemplateFailedError  the chat template of a model fails for one conversation, without a word of its own
    │   ├── TokenRangeError    one conversation has a token id that the model has no embedding for
    │   ├── ContractMismatchError  an artifact beside the contract is not the one it was written for
    │   └── UnverifiedError    the contract holds no golden score, so nothing says that this model scores as it did
    ├── ModelLoadError         weights or architecture cannot be loaded or used                       (exit 2, 500)
    ├── TrainingError          training stopped                                                       (exit 1, 500)
    │   ├── NonFiniteError     NaN or Inf in a loss, a reward or a gradient
    │   ├── StreamOrderError   a worker received another step than the one it expected
    │   ├── WorkerError        a library raised in a worker, and a restart would not help
    │   └── CheckpointError    a checkpoint could not be written or read
    │       ├── CheckpointDamagedError  a file of a checkpoint is not what was committed
    │       └── CheckpointVersionError  a checkpoint was written by another Rayward
    └── ScoringError           a score could not be produced
        ├── RequestError       the request breaks a rule of the wire schema or a limit                (400)
        │   ├── RuleError      the same, with the code of the rule on the wire                        (by its code)
        │   ├── VersionError   the version that a request pins is not served; nothing was scored      (409)
        │   └── AccessError    no key, an unknown one, or one without the right that is needed        (401, 403)
        ├── OverloadedError    the backlog, or what one key may send, is full; retry later            (429, retryable)
        ├── UnavailableError   no replica can take the request now                                    (503, retryable)
        ├── DeadlineError      no answer within the caller's deadline                                 (504, retryable)
        ├── ServerError        the server failed or answered something that is not a reward           (502, retryable)
        └── PartialError       some items have rewards and some have none; it holds both

Each message says what was given, which rule it broke and what to do.

An error crosses a process in one of two forms, and keeps its type and fields in both: pickled, where Ray carries the exception
itself, and as JSON (`to_json`, `from_json`), where only text survives: in files, in the status of a deployment, in the traceback of
an actor. What leaves an actor or a task is `marked`, and `carried_by` finds it again on the other side.
"""

from __future__ import annotations

import json
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any, ClassVar, Self

MARK = "rayward-error: "
"""Stands before the JSON of an error in a longer text."""


class RaywardError(Exception):
    """Base of the tree.

    Args:
        problem: what was given and which rule it broke.
        remedy: what the user can do about it.
    """

    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(self, problem: str, *, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n  remedy: {self.remedy}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.__dict__))

    def to_json(self) -> str:
        """Type and fields on one line; the base types are named too, for a reader that does not know this type yet."""
        types = [kind.__name__ for kind in type(self).__mro__ if issubclass(kind, RaywardError)]
        fields = {name: value for name, value in self.__dict__.items() if not name.startswith("__")}
        # An error must never fail to be reported: a value that JSON does not know becomes its text.
        return json.dumps({"types": types, "fields": fields}, default=str)

    @staticmethod
    def from_json(text: str) -> RaywardError:
        """The error that `to_json` wrote, as the nearest type that this version knows; all its fields are kept (lists as tuples).

        Raises:
            ValueError: the text is not such an error.
        """
        return _from_record(json.loads(text))

    def marked(self) -> Self:
        """The same error with its JSON noted on it, so that it survives where only the text of the traceback does."""
        note = MARK + self.to_json()
        if note not in getattr(self, "__notes__", ()):
            self.add_note(note)
        return self


def _rebuild(cls: type[RaywardError], fields: dict[str, Any]) -> RaywardError:
    error = cls.__new__(cls)
    error.__dict__.update(fields)
    error.args = (fields["problem"], fields["remedy"])
    return error


def _from_record(record: Any) -> RaywardError:
    fields = record.get("fields") if isinstance(record, dict) else None
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in ("problem", "remedy")):
        raise ValueError("this JSON is not an error of Rayward")
    known = _known_types()
    kind = next((known[name] for name in record.get("types", ()) if name in known), RaywardError)
    return _rebuild(kind, {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def _known_types() -> dict[str, type[RaywardError]]:
    found, waiting = {}, [RaywardError]
    while waiting:
        kind = waiting.pop()
        found[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return found


def find_in(text: str) -> RaywardError | None:
    """The last error that is marked in a text, or None."""
    start = text.rfind(MARK)
    while start >= 0:
        try:
            return _from_record(json.JSONDecoder().raw_decode(text, start + len(MARK))[0])
        except ValueError:
            # Cut off, or somebody's prose.
            start = text.rfind(MARK, 0, start)
    return None


class _Marking(ContextDecorator):
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(exc, RaywardError):
            exc.marked()


marking = _Marking()
"""Around what a Ray actor or task does (`with marking:` or `@marking`): an error that leaves is marked."""


def carried_by(exc: BaseException) -> RaywardError | None:
    """The error that an exception is, was caused by, or has marked in its text; None when there is none."""
    seen: BaseException | None = exc
    while seen is not None:
        # Ray's error of a task holds the original as `cause`, and is of its type too, without its fields.
        inner = getattr(seen, "cause", None)
        if isinstance(seen, RaywardError) and not isinstance(inner, BaseException):
            return seen
        seen = inner if isinstance(inner, BaseException) else seen.__cause__
    return find_in(str(exc))


class ConfigError(RaywardError):
    """Example: `training.lr: fast` in the YAML file."""

    http_status = 400
    exit_code = 2


class DataError(RaywardError):
    """Example: a path that does not exist, or a file in which every row is unusable."""

    http_status = 400
    exit_code = 2


class DataFormatError(DataError):
    """Example: columns `a, b`, which no known format has, or columns that fit two formats."""


class TooManyBadRowsError(DataError):
    """Example: 30 % of the rows have identical completions and `data.max_bad_fraction` is 0.05."""


class ContractError(RaywardError):
    """Example: a chat template that prints today's date, so that the same text scores differently tomorrow."""

    http_status = 422
    exit_code = 2


class TooLongError(ContractError):
    """Example: the last user turn and the completion alone exceed the token limit."""


class UnsupportedMessageError(ContractError):
    """Example: a call of a tool, and a chat template that knows no calls."""


class AlreadyTemplatedError(ContractError):
    """Example: the prompt `<|im_start|>user …<|im_end|>`, given as a text to be templated."""


class ChangedTextError(ContractError):
    """Example: a completion that thinks aloud, and a chat template that cuts everything before `</think>`."""


class TemplateFailedError(ContractError):
    """Example: a template that adds a number to a text."""


class TokenRangeError(ContractError):
    """Example: a special token that was added to the tokenizer of somebody's model, but not to the model."""


class ContractMismatchError(ContractError):
    """Example: somebody edited `tokenizer.json` beside a `contract.json` that was written for another one."""


class UnverifiedError(ContractError):
    """Example: `"golden": []` in `contract.json`, and nobody said that the model may be used unverified."""


class ModelLoadError(RaywardError):
    """Example: a checkpoint directory without safetensors files."""

    exit_code = 2


class TrainingError(RaywardError):
    """Example: the worker group failed more often than `training.max_failures` allows."""


class NonFiniteError(TrainingError):
    """Example: a learning rate of 10 drives the loss to NaN at step 12.

    Args:
        step: the optimizer step (0-based) that was not applied or must not be kept.
        comparison_ids: ids of the comparisons in the offending micro-batches (or of the whole step).
    """

    def __init__(self, problem: str, *, remedy: str, step: int, comparison_ids: tuple[str, ...]) -> None:
        super().__init__(problem, remedy=remedy)
        self.step = step
        self.comparison_ids = comparison_ids


class WorkerError(TrainingError):
    """Example: the model's own code raises `NotImplementedError` in the forward.

    Args:
        error_type: module and name of what was raised.
        traceback: where, as Python prints it.
    """

    def __init__(self, problem: str, *, remedy: str, error_type: str, traceback: str) -> None:
        super().__init__(problem, remedy=remedy)
        self.error_type = error_type
        self.traceback = traceback


class StreamOrderError(TrainingError):
    """Example: a worker waits for step 40 and receives the share of step 41."""

    retryable = True


class CheckpointError(TrainingError):
    """Example: the storage fails twice in a row while a checkpoint is written."""


class CheckpointDamagedError(CheckpointError):
    """Example: a byte of the newest checkpoint has changed on disk; the next start takes the one before it."""

    retryable = True


class CheckpointVersionError(CheckpointError):
    """Example: the newest checkpoint of the run was written by a newer Rayward."""

    exit_code = 2


class ScoringError(RaywardError):
    """Base of what can go wrong between a request and its rewards."""


class RequestError(ScoringError):
    """Example: an item without completions, or a lone surrogate in a text.

    Args:
        item: index of the offending item in the request, or None when the request as a whole is at fault.
    """

    http_status = 400

    def __init__(self, problem: str, *, remedy: str, item: int | None = None) -> None:
        super().__init__(problem, remedy=remedy)
        self.item = item


class VersionError(RequestError):
    """Example: a group of samples pins version 3f2a9c01b7de, which was retired while it was sampled."""

    http_status = 409


class AccessError(RequestError):
    """Example: a key whose scope is `score`, and a request that promotes a version.

    Args:
        status: 401 where no known key was given, 403 where the key has not the scope.
    """

    http_status = 401

    def __init__(self, problem: str, *, remedy: str, status: int = 401) -> None:
        super().__init__(problem, remedy=remedy)
        self.status = status


class OverloadedError(ScoringError):
    """Example: the items that wait on a replica are three minutes of its work, and the bound is one.

    Args:
        retry_after_s: when the backlog will have room, at the rate measured now.
    """

    retryable = True
    http_status = 429

    def __init__(self, problem: str, *, remedy: str, retry_after_s: float = 1.0) -> None:
        super().__init__(problem, remedy=remedy)
        self.retry_after_s = retry_after_s


class UnavailableError(ScoringError):
    """Example: the only replica was killed, and the next one is loading the model."""

    retryable = True
    http_status = 503


class DeadlineError(ScoringError):
    """Example: `RewardClient(deadline_s=5)` and a server that needs 8 s."""

    retryable = True
    http_status = 504


class ServerError(ScoringError):
    """Example: the replica died, or the reply held a reward that is not a finite number."""

    retryable = True
    http_status = 502


class PartialError(ScoringError):
    """Example: of 64 items, two are longer than the contract allows.

    Args:
        failed, codes: indices of the items without rewards, and the codes of their errors.
        rewards: of every item, None where there are none.
    """

    def __init__(self, problem: str, *, remedy: str, failed: tuple[int, ...], codes: tuple[str, ...], rewards: tuple[Any, ...]) -> None:
        super().__init__(problem, remedy=remedy)
        self.failed, self.codes, self.rewards = failed, codes, rewards


STATUS_BY_CODE: dict[str, int] = {
    "invalid_json": 400,
    "invalid_encoding": 400,
    "not_found": 404,
    "unknown_model": 404,
    "unknown_version": 404,
    "body_timeout": 408,
    "body_too_large": 413,
    "too_many_items": 413,
    "too_many_completions": 413,
    "text_too_long": 413,
    "unsupported_media_type": 415,
    "unsupported_encoding": 415,
}
"""HTTP status of a broken rule; every other rule is 422."""


class RuleError(RequestError):
    """A request that breaks a rule of this schema; knows its wire code and HTTP status."""

    def __init__(self, code: str, problem: str, *, remedy: str, item: int | None = None) -> None:
        super().__init__(problem, remedy=remedy, item=item)
        self.code = code

    @property
    def status(self) -> int:
        """HTTP status for the code."""
        return STATUS_BY_CODE.get(self.code, 422)
