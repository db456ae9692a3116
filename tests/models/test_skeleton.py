"""A skeleton gives what the template gives, and templates that look into texts have none."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from raytune_ft.core.records import Message
from raytune_ft.models.config import TrainOn
from raytune_ft.models.layout import Conversation, LayoutMaker
from raytune_ft.models.skeleton import skeleton_of
from raytune_ft.models.templates import INSTRUCTION_TEMPLATE

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
PIECES = ["a", " ", "\n", "«", "🎉", "{{ x }}", "</s>", "<s>", "\ue000", "0:lr", "\ue001", "\ue002", "assistant", "\t"]


def conversations(count: int, *, system: bool) -> list[Conversation]:
    """Random texts, whitespace at their ends and markup in them included."""
    chance = random.Random(0)
    found = []
    for _ in range(count):
        texts = ["x" + "".join(chance.choices(PIECES, k=chance.randrange(6))) + chance.choice("x \n") for _ in range(5)]
        texts = [chance.choice(["", " ", "\n"]) + text for text in texts]
        roles = ["user", "assistant"] * chance.randint(1, 2)
        messages = [Message(role, text) for role, text in zip(roles, texts, strict=False)]
        if system and chance.random() < 0.5:
            messages.insert(0, Message("system", texts[-1]))
        found.append(Conversation(tuple(messages)))
    return found


@pytest.mark.parametrize("name", ["chatml", "llama", "mistral", "gemma", "instruction"])
@pytest.mark.parametrize("train_on", list(TrainOn))
def test_text_and_places_are_those_of_the_template(build: SimpleNamespace, name: str, train_on: TrainOn) -> None:
    template = build.templates.get(name, INSTRUCTION_TEMPLATE)
    quick, slow = LayoutMaker(template, SPECIAL), LayoutMaker(template, SPECIAL)
    slow._skeleton = lambda conversation: None  # renders every prefix
    for conversation in conversations(60, system=name in {"chatml", "llama", "instruction"}):
        ours, theirs = quick.lay_out(conversation, train_on), slow.lay_out(conversation, train_on)
        assert ours.text == theirs.text == quick.render(conversation.messages)
        assert [(span.start, span.end) for span in ours.spans] == [(span.start, span.end) for span in theirs.spans]
        for span, other in zip(ours.spans, theirs.spans, strict=True):
            assert ours.text[: span.content_end].rstrip() == ours.text[: other.content_end].rstrip()
    assert len(quick._skeletons) >= 2
    assert None not in quick._skeletons.values()


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.content if 'x' in m.content else '' }}",
        "{{ m.content.split('x')[-1] }}",
        "{{ m.content | replace('x', 'y') }}",
        "{{ m.content | upper }}",
        "{{ m.content | tojson }}",
        "{{ m.content | length }}",
        "{{ m.content[1:] }}",
        "{{ m.content.strip('x') }}",
        "{{ '%s' % m.content }}",
        "{{ '{}'.format(m.content) }}",
        "{{ ['a', m.content] | join }}",
        "{{ '-'.join([m.content]) }}",
        "{{ 'yes' if m.content == 'x' }}",
        "{{ 'yes' if m.content in ['x'] }}",
        "{{ 'yes' if m.content > 'x' }}",
        "{{ {'x': 1}[m.content] }}",
        "{% set c = 'a' ~ m.content %}{{ 'yes' if 'x' in c }}",
        "{% set c %}{{ m.content }}{% endset %}{{ 'yes' if 'x' in c }}",
        "{% macro f(c) %}{{ c }}{% endmacro %}{{ 'yes' if 'x' in f(m.content) }}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{{ m.content | int }}",
    ],
)
def test_a_template_that_looks_into_texts_has_no_skeleton(written: str) -> None:
    template = "{% for m in messages %}" + written + "{% endfor %}"
    assert skeleton_of(template, ["user"], [True], SPECIAL) is None
    harmless = "{% for m in messages %}{% if m.content and m.content != '' %}{{ m.content }}{% endif %}{% endfor %}"
    assert skeleton_of(harmless, ["user"], [True], SPECIAL).pieces == ("", "")


def test_a_turn_that_the_template_leaves_out_has_no_skeleton() -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    assert skeleton_of(template, ["user", "assistant"], [True, True], SPECIAL) is None


def test_stripping_reaches_the_texts_at_the_ends_of_what_is_stripped() -> None:
    template = "{{ (' a ' + messages[0].content).strip() + '|' + (messages[1].content + '\n').rstrip() }}"
    skeleton = skeleton_of(template, ["system", "user"], [True, True], SPECIAL)
    assert skeleton.fill(["  b  ", " c "])[0] == "a   b| c"
