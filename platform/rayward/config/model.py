"""The `model:` block."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from rayward.errors import ConfigError
from rayward.schema import Frozen


class ModelConfig(Frozen):
    path: str | None = None
    """Local directory or hub name of a pretrained model; its weights initialise the backbone."""
    revision: str | None = None
    """Hub revision of `path`."""
    architecture: dict[str, Any] | None = None
    """A Transformers config as a mapping (with `model_type`) to start from random weights instead of `path`."""
    tokenizer: str | None = None
    """Local directory or hub name; default: `path`."""
    max_tokens: int = Field(2048, ge=8)
    """Longest conversation in tokens, prompt and completion together; part of the scoring contract."""
    head: Literal["auto", "fresh"] = "auto"
    """`auto` takes the reward head of `path` (its outputs must be the run's) and starts one where there is none; `fresh` starts anew."""
    head_output: str | None = None
    """Start the one output of the run from this output of an exported `path` (arXiv 2410.01257: Bradley-Terry from regression)."""
    template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Extra variables for the chat template (any JSON value), frozen into the contract."""
    templated_text: Literal["refuse", "as_rendered"] = "refuse"
    """Prompts and completions that went through a chat template before: refused, or taken as they are and not templated again; the prompt
    must then end where the assistant begins. Part of the contract: the same in scoring."""
    unshown_text: Literal["refuse", "accept"] = "refuse"
    """Conversations of which the chat template leaves a part out (calls of tools, thoughts), or changes the completion: refused, or used as
    the template shows them. Part of the contract: the same in scoring."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path and self.architecture:
            raise ValueError("model.path and model.architecture are both set; the rule is one of them; remove the one you do not mean")
        if self.architecture is not None:
            if "model_type" not in self.architecture:
                raise ValueError("model.architecture has no model_type; add for example model_type: llama")
            if self.tokenizer is None:
                raise ValueError("model.architecture needs model.tokenizer; set a directory or a hub name")
        if self.head_output is not None and (self.path is None or self.head == "fresh"):
            raise ValueError(
                f"model.head_output is {self.head_output!r} without model.path, or with model.head=fresh; it names an output of "
                "model.path; set the path, or remove it"
            )
        return self

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer comes from."""
        name = self.tokenizer or self.path
        if name is None:
            raise ConfigError(
                "model.path, model.architecture and model.tokenizer are all unset; a model is needed",
                remedy="set model.path to a directory or a hub name",
            )
        return name
