"""A tokenizer small enough to build in a test: every byte is a token, plus the special tokens of ChatML."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD = "<|pad|>"
START = "<|im_start|>"
END = "<|im_end|>"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
)


def make_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer without merges, save it to `path` and return it.

    Ids: 0 `<|pad|>`, 1 `<|im_start|>`, 2 `<|im_end|>` (end of sequence), 3..258 the bytes. A text of n ASCII
    characters takes n tokens, so a test can compute every length by hand.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [PAD, START, END]
    vocabulary = {token: index for index, token in enumerate([*specials, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(path))
    return tokenizer
