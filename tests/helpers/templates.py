"""Small chat templates of this project's own that behave as five published ones do, each with a tokenizer that has its control tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A template and the control tokens it writes.

    Attributes:
        control: the end token first, then others; `bos` is one of them where there is one.
        user, assistant: what opens their turns.
    """

    template: str
    control: tuple[str, ...]
    user: str
    assistant: str
    bos: str | None = None

    @property
    def end(self) -> str:
        return self.control[0]


# A system turn of its own where none is given; tools among the system's text; calls and results between marks (as Qwen 2.5 writes them).
_CHATML = """
{%- set given = messages[0].role == 'system' -%}
{{- '<|im_start|>system\n' + (messages[0].content if given else 'You are helpful.') -}}
{%- if tools %}{{ '\n# Tools' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{% endif -%}
{{- '<|im_end|>\n' -}}
{%- for m in messages -%}
  {%- if m.role == 'user' or m.role == 'assistant' or (m.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '\n<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""

# A token that begins the text, every text trimmed, the date in the system's turn, tools in the first user turn, one call at most.
_LLAMA3 = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content | trim %}{% set rest = messages[1:] -%}
{%- else -%}
  {%- set system = '' %}{% set rest = messages -%}
{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + (date_string or '26 Jul 2024') + '\n\n' + system + '<|eot_id|>' -}}
{%- if tools -%}
  {%- if rest[0].role != 'user' %}{{ raise_exception('tools need a first user message') }}{% endif -%}
  {{- '<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n' -}}
  {%- for tool in tools %}{{ tool | tojson(indent=4) + '\n' }}{% endfor -%}
  {{- rest[0].content | trim + '<|eot_id|>' -}}
  {%- set rest = rest[1:] -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if m.role == 'tool' -%}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' -}}
  {%- elif m.tool_calls -%}
    {%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
    {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' -}}
  {%- else -%}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif -%}
"""

# Thoughts stand before the text, only in turns after the last question; results share one turn of the user.
_QWEN3 = """
{%- if tools -%}
  {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') + '# Tools' -}}
  {%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}
  {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- elif m.role == 'assistant' -%}
    {%- set content = m.content %}{% set thought = m.reasoning_content or '' -%}
    {%- if not thought and '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.last and (loop.last or thought) -%}
      {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
    {%- else %}{{ content }}{% endif -%}
    {%- for call in m.tool_calls or [] -%}
      {%- if content or not loop.first %}{{ '\n' }}{% endif -%}
      {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif -%}
{%- endif -%}
"""

# No line breaks between turns, and of an answer what stands before `</think>` is cut.
_DEEPSEEK_R1 = """
{{- bos_token -}}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{- '<｜User｜>' + m.content -}}
  {%- elif m.role == 'assistant' and m.tool_calls -%}
    {{- '<｜Assistant｜>' + m.content -}}
    {%- for call in m.tool_calls -%}
      {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\n' + (call.function.arguments | tojson) -}}
    {%- endfor -%}
    {{- '<｜end▁of▁sentence｜>' -}}
  {%- elif m.role == 'assistant' -%}
    {%- set content = m.content -%}
    {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif -%}
    {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif -%}
"""

# Questions and answers must alternate; the system's text stands in the first question; no tools.
_MISTRAL = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
  {%- set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] -%}
{%- else -%}
  {%- set system = '' %}{% set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('After the optional system message, roles must alternate user/assistant/user/assistant') -}}
  {%- endif -%}
  {%- if m.role == 'user' -%}
    {{- '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' -}}
  {%- elif m.role == 'assistant' -%}
    {{- ' ' + m.content + '</s>' -}}
  {%- else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif -%}
{%- endfor -%}
"""

_CHATML_CONTROL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")

FAMILIES = {
    "chatml": Family(_CHATML, _CHATML_CONTROL, "<|im_start|>user\n", "<|im_start|>assistant\n"),
    "llama3": Family(
        _LLAMA3,
        ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        bos="<|begin_of_text|>",
    ),
    "qwen3": Family(_QWEN3, _CHATML_CONTROL, "<|im_start|>user\n", "<|im_start|>assistant\n"),
    "deepseek_r1": Family(
        _DEEPSEEK_R1,
        (
            "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
            "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
        ),
        "<｜User｜>",
        "<｜Assistant｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "mistral": Family(_MISTRAL, ("</s>", "<s>", "[INST]", "[/INST]"), "[INST] ", " [/INST]", bos="<s>"),
}  # fmt: skip


def make_family_tokenizer(path: Path, name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges and with the family's control tokens; saved to `path` and returned.

    Ids: 0 the padding, from 1 on the control tokens in their order, then the bytes.
    """
    family = FAMILIES[name]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", *family.control]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*specials, *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    given: dict[str, Any] = {} if family.bos is None else {"bos_token": family.bos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=family.end, pad_token="<pad>", **given)
    tokenizer.chat_template = family.template.strip()
    tokenizer.save_pretrained(str(path))
    return tokenizer
