"""What an architecture can do, asked before it is used."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig

from rayward.errors import ModelLoadError

UNSUITABLE = (
    ValueError, KeyError, TypeError, AttributeError, AssertionError, ArithmeticError, NotImplementedError, ImportError,
    StrictDataclassError,
)  # fmt: skip
"""What the configurations and constructors of Transformers raise about values that they cannot work with."""


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text model: the config itself, or the one inside a wrapper (vision and language).

    Raises:
        ModelLoadError: the model is an encoder-decoder, or the text model inside has no sequence-classification class.
    """
    if config.is_encoder_decoder:
        raise ModelLoadError(
            f"model type {config.model_type!r} is an encoder-decoder; a reward is read from one sequence of prompt and completion",
            remedy="use a decoder or an encoder",
        )
    text = config.get_text_config()
    if text is not config and type(text) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelLoadError(
            f"model type {config.model_type!r} wraps a text model of type {text.model_type!r}, for which Transformers has no "
            "…ForSequenceClassification class",
            remedy="use the text-only model of the family, or another architecture",
        )
    return text


def context_length(config: PretrainedConfig) -> int | None:
    """Longest input in tokens; None where the config knows no limit."""
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def position_limit(model: nn.Module) -> int | None:
    """Longest input that the table of learned positions holds; None without such a table.

    RoBERTa and its relatives begin to count behind the pad id, so that `max_position_embeddings` says more than fits.
    """
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)]
    return min((table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1) for table in tables), default=None)
