"""What is scored and what became of it, past all rules of any wire. Light: no pydantic schema of a protocol here."""

from __future__ import annotations

from dataclasses import dataclass

from rayward.contract.contract import Normalise


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One prompt and its completions, past all rules of the wire.

    Attributes:
        prompt: turns as {"role", "content"} mappings, ending with a user or tool turn.
        completions: K >= 1 texts of the assistant turn that follows.
        weights: name of the weight set that makes the reward of several outputs; None: the model's own.
        normalise: raw, centred or standardised.
        n_critiques: of a model that writes critiques: the reward is the mean over so many.
        temperature: of their sampling; 0: the likeliest text.
        seed: of their sampling; critiques: given critiques of each completion, which are then not written. Neither is on the wire.
    """

    prompt: tuple[dict[str, str], ...]
    completions: tuple[str, ...]
    weights: str | None = None
    normalise: Normalise = "raw"
    n_critiques: int = 1
    temperature: float = 0.0
    critiques: tuple[tuple[str, ...], ...] | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ItemError:
    """Why one item has no rewards. Codes: `too_long`, `template`, `token_out_of_range`, `non_finite`, `unknown_weights`, `no_normaliser`,
    `no_critiques`."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What became of one item: K finite rewards, or an error; never both.

    Attributes:
        outputs: for a head with several outputs, their values for each completion.
        steps: of a process reward model, the probability that each step is right, for each completion.
        critiques: of a model that writes them, the critiques of each completion.
        reward_std: population standard deviation of the rewards over several critiques, for each completion.
        tokens: tokens of the K conversations; tokens_computed: of these, after sharing prefixes.
    """

    rewards: tuple[float, ...] | None = None
    error: ItemError | None = None
    outputs: tuple[tuple[float, ...], ...] | None = None
    steps: tuple[tuple[float, ...], ...] | None = None
    critiques: tuple[tuple[str, ...], ...] | None = None
    reward_std: tuple[float, ...] | None = None
    tokens: int = 0
    tokens_computed: int = 0
