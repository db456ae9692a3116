"""Small tokenizers with the chat templates that models in use have; their masks can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

CORPUS = """What is the capital of France? Paris. Rome. user assistant model system
(bottom (bottom (bottom (bottom (bottom
<instruction> </instruction> <response> </response> [INST] [/INST] Be brief. red blue green yes no 0 1 2 3 4 5"""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' ~ role ~ '\n' ~ (m['content'] | trim) ~ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<|call|>' + (call.function | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_with(
    template: str | None, *, special: tuple[str, ...], eos: str, bos: str | None = None, pad: str | None = None
) -> Any:
    """A byte-level tokenizer; with `bos` it puts one before whatever it encodes, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=440, special_tokens=list(special), initial_alphabet=alphabet)
    )
    level = processors.ByteLevel(trim_offsets=True)
    if bos is not None:
        start = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, special.index(bos))]
        )
        bare.post_processor = processors.Sequence([level, start])
    else:
        bare.post_processor = level
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=eos, bos_token=bos, pad_token=pad)
    tokenizer.chat_template = template
    return tokenizer


def chatml(template: str = CHATML) -> Any:
    """Like SmolLM2: no BOS of its own, padding is the end of the turn."""
    return tokenizer_with(
        template, special=("<|im_start|>", "<|im_end|>", "<|call|>"), eos="<|im_end|>", pad="<|im_end|>"
    )


def llama() -> Any:
    """Like Llama 3: the template writes BOS and the tokenizer adds one; turns end with another token than texts."""
    special = ("<|begin|>", "<|head|>", "<|/head|>", "<|eot_id|>", "<|end|>")
    return tokenizer_with(LLAMA, special=special, eos="<|end|>", bos="<|begin|>")


def mistral() -> Any:
    """Like Mistral: no generation prompt, contents stripped."""
    return tokenizer_with(MISTRAL, special=("<s>", "</s>"), eos="</s>", bos="<s>")


def gemma() -> Any:
    """Like Gemma: the assistant is called model, and there is no system turn."""
    special = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    return tokenizer_with(GEMMA, special=special, eos="<eos>", bos="<bos>")


def plain() -> Any:
    """A tokenizer without a chat template that begins texts with BOS."""
    return tokenizer_with(None, special=("<s>", "</s>"), eos="</s>", bos="<s>")


@pytest.fixture
def build() -> SimpleNamespace:
    """The builders and templates of this file."""
    return SimpleNamespace(
        chatml=chatml, llama=llama, mistral=mistral, gemma=gemma, plain=plain, thinking=THINKING, tools=TOOLS,
        templates={"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA},
    )  # fmt: skip
