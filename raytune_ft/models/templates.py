"""Chat templates as text: the guide's own, a user's file, and what is wrong with a broken one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.core.words import whole

INSTRUCTION_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<response>\n{{ message['content'] }}\n</response>{{ eos_token }}\n"
    "{% else %}<instruction>\n{{ message['content'] }}\n</instruction>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<response>\n{% endif %}"
)
"""The guide's ``<instruction>/<response>`` format; also for models that bring no chat template."""

RENDERED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""What every rendering gives a template, beside the tokenizer's special tokens; other variables are its own."""

MODEL_TEMPLATE = "model"
"""The setting that keeps the template which the model brings."""

_BOS = "{{ bos_token }}"


def template_text(setting: str) -> str | None:
    """The template that a setting means: ``model`` (None), ``instruction``, Jinja text, or a file (path or URI).

    Raises:
        ConfigError: if the file is not there, or the template is no valid Jinja (with the line).
    """
    if setting == MODEL_TEMPLATE:
        return None
    if setting == "instruction":
        return INSTRUCTION_TEMPLATE
    if "{{" in setting or "{%" in setting:
        return _checked(setting, "template")
    location = Location.at(setting)
    if not location.is_file():
        raise ConfigError(
            f"template: {setting!r} is neither 'model', 'instruction', a Jinja text nor a file "
            f"({location} is not there)"
        )
    try:
        return _checked(location.read().decode("utf-8"), str(location))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{location}: is not UTF-8 text ({error}); a template is a text file") from None


def for_tokenizer(template: str, *, adds_bos: bool) -> str:
    """The template as one tokenizer wants it: the guide's format begins with BOS where the tokenizer itself puts one.

    Chat templates write their special tokens themselves, since rendered text is tokenized without adding any.
    """
    if template.removeprefix(_BOS) != INSTRUCTION_TEMPLATE:
        return template
    return _BOS + INSTRUCTION_TEMPLATE if adds_bos else INSTRUCTION_TEMPLATE


def render(
    template: str,
    turns: Sequence[Mapping[str, Any]],
    *,
    tools: Any = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, str],
    variables: Mapping[str, Any] | None = None,
) -> str:
    """What the template writes, in transformers' sandbox, as `apply_chat_template` gives it.

    Args:
        template: Jinja text.
        turns: the messages.
        tools: function schemas, if any.
        add_generation_prompt: whether it ends with what an answer goes on from.
        special_tokens: of the tokenizer.
        variables: of this template's own (``enable_thinking``).

    Raises:
        Exception: whatever the template raises: it is a program.
    """
    text = compiled(template).render(
        messages=turns,
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **{**(variables or {}), **special_tokens},
    )
    return whole(str(text))  # calls and tools are JSON, which may escape half a character


@functools.lru_cache(maxsize=32)
def compiled(template: str) -> Any:
    """The template compiled in transformers' sandbox (immutable, with its filters and globals)."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def _checked(text: str, origin: str) -> str:
    from jinja2 import TemplateSyntaxError

    if not text.strip():
        raise ConfigError(f"{origin}: the chat template is empty")
    try:
        compiled(text)
    except TemplateSyntaxError as error:
        lines = text.splitlines()
        shown = lines[error.lineno - 1].strip() if 0 < error.lineno <= len(lines) else ""
        raise ConfigError(f"{origin}:{error.lineno}: not a valid Jinja template: {error.message}: {shown}") from None
    return text
