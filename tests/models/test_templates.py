from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.core.records import Message
from raytune_ft.models.chat import Chat
from raytune_ft.models.templates import INSTRUCTION_TEMPLATE, render, template_text


def test_a_setting_is_a_name_a_text_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}é", encoding="utf-8")
    assert template_text("model") is None
    assert template_text("instruction") == INSTRUCTION_TEMPLATE
    assert template_text("{{ messages }}") == "{{ messages }}"
    assert template_text(str(tmp_path / "mine.jinja")) == "{{ messages[0].content }}é"


def test_a_broken_template_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(ConfigError, match=r"mine.jinja:2: not a valid Jinja template: .*: \{\{ m.content \}"):
        template_text(str(path))
    with pytest.raises(ConfigError, match="template:1: not a valid Jinja template"):
        template_text("{% if %}")
    path.write_bytes(b"\xff\xfe{{")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        template_text(str(path))
    path.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        template_text(str(path))
    with pytest.raises(ConfigError, match="'chatml' is neither 'model', 'instruction', a Jinja text nor a file"):
        template_text("chatml")


def test_a_template_cannot_leave_the_sandbox(build: SimpleNamespace) -> None:
    chat = Chat(build.chatml("{{ messages.__class__.__mro__ }}"))
    with pytest.raises(DataError, match="refuses this conversation"):
        chat.render([Message("user", "a")])


@pytest.mark.parametrize("name", ["chatml", "llama", "mistral", "gemma"])
def test_rendering_is_that_of_transformers(build: SimpleNamespace, name: str) -> None:
    tokenizer = getattr(build, name)()
    turns = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "<b> & "}]
    for prompting in (False, True):
        ours = render(
            tokenizer.chat_template,
            turns,
            add_generation_prompt=prompting,
            special_tokens=tokenizer.special_tokens_map,
        )
        assert ours == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompting)


def test_the_call_that_a_tool_answers_reaches_the_template(build: SimpleNamespace) -> None:
    chat = Chat(build.chatml("{% for m in messages %}{{ m.tool_call_id }}|{{ m.name }}|{{ m.content }};{% endfor %}"))
    assert chat.render([Message("user", "a"), Message("tool", "b", tool_call_id="c1", name="f")]).endswith("c1|f|b;")
