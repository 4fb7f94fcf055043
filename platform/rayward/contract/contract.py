"""The scoring contract: what turns a conversation into a number, written down once.

Training, evaluation, export and serving all encode through `encoder.Encoder`, so the text, the token ids and the pooled position
cannot drift apart. The rules:

- *Template.* The chat template's text is frozen into the contract. A tokenizer without one gets `PLAIN_TEMPLATE`.
- *Special tokens.* The rendered text is tokenized with `add_special_tokens=False`: the template alone decides about BOS.
- *Control tokens.* Only the template writes them. A control token inside the text of a message is tokenized as plain text, so that no
  text can end a turn or begin one (`control.ControlTokens`). Text that went through a template before is refused, or taken as it is.
- *Nothing is lost.* A part of a conversation that the template does not show (a call, thoughts, tools) or a completion that it changes
  is an error, unless the contract accepts that.
- *Clock.* A template that reads the date gets a fixed one.
- *End token.* Whatever white space a template prints after the last end token is cut; a template that prints no end
  token gets one appended. Hence the last id is always `end_token_id`, and the reward is read at that last position.
- *Pad token.* Always another id than the end token, because plain Transformers pools at the right-most non-pad id.
- *Length.* A conversation over `max_tokens` loses its oldest turns (never the system turn, never the last user turn, never a
  part of the completion). If that does not suffice it is an error. The rule looks at one completion at a time: a
  score never depends on the other completions of the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, JsonValue, model_validator

from rayward.contract.conversation import Message
from rayward.contract.reading import RewardReadout
from rayward.contract.tokenizer import FROZEN_DATE, bos_for_plain, pick_pad, pick_template, without_clock
from rayward.contract.weight_sets import WEIGHT_SETS
from rayward.errors import ContractError, ContractMismatchError, UnverifiedError
from rayward.schema import Frozen, Versioned, file_sha256, identity, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CONTRACT_FILE = "contract.json"
CONTRACT_VERSION = 1
TemplatedText: TypeAlias = Literal["refuse", "as_rendered"]
"""What becomes of text that went through a chat template before: an error, or it is taken as it is and not templated again."""
UnshownText: TypeAlias = Literal["refuse", "accept"]
"""What becomes of a conversation of which the template does not show all: an error, or it is used as the template shows it."""
Normalise: TypeAlias = Literal["raw", "centred", "standardised"]
"""What a request may ask for: the reward as it is, minus the reference mean, or that divided by the reference deviation."""


NO_RULES_OF_TEXT = frozenset(
    {
        "template_source", "pad_token", "pad_token_id", "outputs", "reward_weights", "weight_sets", "gate", "reading", "normaliser",
        "dtype", "golden", "golden_tolerance", "files", "head_sha256",
    }
)  # fmt: skip
"""Fields of a contract that do not decide the token ids of a text and the position that is read; a field that is added does, until it is
named here."""


class GoldenScore(Frozen):
    """One conversation with the ids and the reward it had in the training forward."""

    prompt: tuple[Message, ...]
    completion: str
    critique: str | None = None
    token_ids: tuple[int, ...]
    reward: tuple[float, ...]


class Normaliser(Frozen):
    """Mean and population standard deviation of the rewards of a reference set; Bradley-Terry rewards have no zero of their own.

    Attributes:
        reference: what the rewards are of, in words.
    """

    mean: float
    std: float
    num_rewards: int
    reference: str

    def apply(self, reward: float, scale: Normalise) -> float:
        """The reward minus the mean, divided by the deviation when `standardised` (arXiv 2203.02155 section 3.5, 2406.08673)."""
        centred = reward - self.mean
        return centred / self.std if scale == "standardised" else centred


class Contract(Versioned):
    """Everything that decides a score besides the weights themselves; saved as `contract.json`.

    Attributes:
        template: Jinja text of the chat template; template_kwargs are passed to it.
        templated_text: what becomes of a prompt or completion that went through a chat template before.
        unshown_text: what becomes of a conversation of which the template does not show a part, or changes the completion; contracts
            from before this rule accept it.
        end_token: text and id of the token whose hidden state is scored.
        pad_token: text and id; never equal to the end token.
        max_tokens: longest conversation, prompt and completion together.
        outputs: names of the head's outputs, in order.
        reward_weights: the reward is the sum of the outputs times these.
        weight_sets: other published weights for the same outputs, by name; a request may choose one.
        gate: of a mixture of objectives, the token ids whose last occurrence in the prompt begins where the gate reads; empty: the prompt's
            last token. None: the head has no gate.
        reading: of outcome and process rewards, where the output is read instead of the end, and how the readings become one.
        critique_lead_in: of a model that writes a critique first: text of the user turn that follows the completion, before the critique;
            the reward is read at the end of that turn.
        normaliser: statistics of a reference set, applied on request only; not part of the version.
        dtype: parameter type of the backbone that the golden scores were computed with; the head is always fp32.
        golden_tolerance: largest accepted |difference| to a golden reward, relative to max(1, |reward|).
        files: sha256 of each file of the export, by name; head_sha256 is that of the head's own tensors.
    """

    kind: ClassVar[str] = "contract"
    remedy: ClassVar[str] = "export the model again"
    version: int = CONTRACT_VERSION
    template: str
    template_source: str
    template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    templated_text: TemplatedText = "refuse"
    unshown_text: UnshownText = "accept"
    bos_token: str | None = None
    end_token: str
    end_token_id: int
    pad_token: str
    pad_token_id: int
    max_tokens: int
    outputs: tuple[str, ...] = ("reward",)
    reward_weights: tuple[float, ...] = (1.0,)
    weight_sets: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    gate: tuple[int, ...] | None = None
    reading: RewardReadout | None = None
    critique_lead_in: str | None = None
    normaliser: Normaliser | None = None
    dtype: str = "float32"
    golden: tuple[GoldenScore, ...] = ()
    golden_tolerance: float = 1e-4
    files: dict[str, str] = Field(default_factory=dict)
    head_sha256: str | None = None

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        template_kwargs: Mapping[str, Any] | None = None,
        critique_lead_in: str | None = None,
        templated_text: TemplatedText = "refuse",
        unshown_text: UnshownText = "refuse",
    ) -> Self:
        """Decide template, end token and pad token for a tokenizer; may add a pad token to it.

        Raises:
            ContractError: the tokenizer has no end token, or its template reads the date in a way that cannot be fixed.
        """
        if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
            raise ContractError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so no position can be scored",
                remedy="set eos_token in its tokenizer_config.json",
            )
        template, source = pick_template(tokenizer)
        kwargs = dict(template_kwargs or {})
        if "strftime_now" in template and "date_string" in template:
            kwargs.setdefault("date_string", FROZEN_DATE)
        template = without_clock(template)
        pad_token, pad_token_id = pick_pad(tokenizer)
        return cls(
            template=template,
            template_source=source,
            template_kwargs=kwargs,
            bos_token=bos_for_plain(tokenizer) if source == "plain" else None,
            end_token=tokenizer.eos_token,
            end_token_id=tokenizer.eos_token_id,
            pad_token=pad_token,
            pad_token_id=pad_token_id,
            max_tokens=max_tokens,
            critique_lead_in=critique_lead_in,
            templated_text=templated_text,
            unshown_text=unshown_text,
        )

    @model_validator(mode="after")
    def _one_weight_per_output(self) -> Self:
        for name, weights in {"reward_weights": self.reward_weights, **self.weight_sets}.items():
            if len(weights) != len(self.outputs):
                raise ValueError(f"{name} has {len(weights)} weights for {len(self.outputs)} outputs")
        return self

    def for_head(self, outputs: tuple[str, ...], reward_weights: tuple[float, ...], reading: RewardReadout | None = None) -> Self:
        """The same rules for a head with these outputs, with the published weight sets that fit them."""
        sets = {
            name: tuple(weights.get(output, 0.0) for output in outputs)
            for name, weights in WEIGHT_SETS.items()
            if set(weights) <= set(outputs)
        }
        return self.model_copy(update={"outputs": outputs, "reward_weights": reward_weights, "weight_sets": sets, "reading": reading})

    def require_golden(self, where: object) -> None:
        """Refuse a contract that holds nothing to verify the scores by.

        Args:
            where: the model, for the message.

        Raises:
            UnverifiedError: there are no golden scores.
        """
        if not self.golden:
            raise UnverifiedError(
                f"the contract of {where} holds no golden scores, so nothing says that it scores as it did",
                remedy="export the model again, or ask for it unverified: --no-verify (commands), verify_golden: false (server)",
            )

    def model_version(self) -> str:
        """Twelve hex digits that identify the exported model: everything here but the normaliser (see `schema.identity`)."""
        return identity(self, exclude={"normaliser"})[:12]

    def save(self, directory: Path) -> None:
        """Write `contract.json`; a reader sees the old one or the new one."""
        write_atomically(directory / CONTRACT_FILE, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `contract.json`.

        Raises:
            ContractError: the file is missing, damaged, or of a version that is not read here.
        """
        path = directory / CONTRACT_FILE
        try:
            text = path.read_bytes()
        except OSError as exc:
            raise ContractError(
                f"{path} cannot be read ({exc.strerror})", remedy="point at a directory that `rayward export` wrote"
            ) from exc
        return cls.parse(text, where=str(path), error=ContractError)

    def fingerprint(self) -> str:
        """Hash of the rules that turn text into ids and a position (not of weights, files or golden scores)."""
        return identity(self, exclude=NO_RULES_OF_TEXT)


def verify_files(contract: Contract, directory: Path) -> None:
    """Check that the artifacts beside a contract are the ones it was written for (the head is checked where it is loaded).

    Raises:
        ContractMismatchError: saying which part was changed.
    """
    for name, expected in contract.files.items():
        path = directory / name
        part = _part_of(name)
        if not path.is_file():
            raise ContractMismatchError(f"{part}: {path} is missing", remedy="export the model again")
        if file_sha256(path) != expected:
            raise ContractMismatchError(
                f"{part}: {path} is not the file that the contract was written for", remedy="restore it or export the model again"
            )


def _part_of(name: str) -> str:
    if "template" in name:
        return "template"
    if "token" in name or name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        return "tokenizer"
    return "weights" if "safetensors" in name else "model config"
