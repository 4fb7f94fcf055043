"""The tokenizer of the generated world: a small byte-level BPE trained on its texts, with a chat template of our own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + ' ' + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
"""Like ChatML, but with a space instead of a line feed after the role: the first word of a turn is the same token as elsewhere."""


def train_tokenizer(texts: Iterable[str], directory: Path, vocab_size: int = 1000) -> None:
    """Train a byte-level BPE on texts and save it as a fast Transformers tokenizer with `CHAT_TEMPLATE`.

    Digits are tokens of their own. The end token is `<|im_end|>`, the pad token `<|pad|>`; both differ.

    Args:
        texts: the corpus: a role, a space and a turn's content each, without special tokens.
        directory: where `tokenizer.json` and its siblings go; created.
        vocab_size: upper bound on the number of tokens; at least 259 (bytes and special tokens).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=IM_START, eos_token=IM_END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
