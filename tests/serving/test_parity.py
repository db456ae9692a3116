"""Golden answers: a model that answers as it was trained is served, any other is refused."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.core.records import Message
from raytune_ft.models import templates
from raytune_ft.models.golden import GOLDEN, golden_answers, inherit_golden, read_golden, write_golden
from raytune_ft.models.loading import load_model
from raytune_ft.serving.board import Board
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.parity import check_parity
from raytune_ft.serving.start import start_service

PROMPTS = [
    [Message("user", "What is the capital of France?")],
    [Message("system", "Be brief."), Message("user", "red")],
]


@pytest.fixture
def trained(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with its golden answers."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "trained"))
    write_golden(golden_answers(load_model(str(folder), device="cpu"), PROMPTS, max_new_tokens=8), folder)
    return folder


def start(folder: Path, **settings: object) -> None:
    config = ServingConfig(model_path=str(folder), **settings)
    start_service(config, str(folder), "cpu", replica="r1", board=Board(config.adapters)).close()


def test_the_answers_are_greedy_with_their_log_probabilities(trained: Path):
    golden = read_golden(trained)
    assert golden is not None
    loaded = load_model(str(trained), device="cpu")
    for answer in golden.answers:
        ids = torch.tensor([answer.prompt_ids + answer.token_ids])
        with torch.no_grad():
            scores = torch.log_softmax(loaded.model(ids).logits[0, len(answer.prompt_ids) - 1 : -1], -1)
        assert scores.argmax(-1).tolist() == answer.token_ids
        assert answer.logprobs == pytest.approx(scores.max(-1).values.tolist(), abs=1e-4)
    assert golden.answers[1].messages[0].role == "system"


def test_the_trained_model_is_served_and_differs_by_nothing(trained: Path):
    config = ServingConfig(model_path=str(trained))
    service = start_service(config, str(trained), "cpu", replica="r1", board=Board({}))
    assert check_parity(service.engine, trained, 1e-3) < 1e-4
    service.close()


def test_another_chat_template_is_refused(trained: Path):
    template = (trained / "chat_template.jinja").read_text()
    (trained / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(ModelError, match=r"other tokens than in training .*another chat template or tokenizer"):
        start(trained)


DATED = (
    "{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{ '<|im_start|>system\nToday: ' + today + '\nYear: ' + strftime_now('%Y') + '<|im_end|>' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Writes today's date, as Llama 3.2's does."""


def test_a_template_that_writes_the_date_is_served_on_other_days_too(trained: Path, monkeypatch: pytest.MonkeyPatch):
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2031, 5, 6, tzinfo=tz)

    (trained / "chat_template.jinja").write_text(DATED)
    write_golden(golden_answers(load_model(str(trained), device="cpu"), PROMPTS, max_new_tokens=8), trained)
    start(trained)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    templates.compiled.cache_clear()
    loaded = load_model(str(trained), device="cpu")
    assert "06 May 2031" in loaded.chat.render(PROMPTS[0])
    start(trained)
    for other in (DATED.replace("Today: ", "Now: "), DATED.replace("%d %b %Y", "%d/%m/%Y")):
        (trained / "chat_template.jinja").write_text(other)
        with pytest.raises(ModelError, match="other tokens than in training"):
            start(trained)


def test_broken_weights_are_refused_and_a_small_change_is_not(trained: Path):
    loaded = load_model(str(trained), device="cpu")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.001)
    loaded.model.save_pretrained(trained)
    start(trained)
    with torch.no_grad():
        loaded.model.lm_head.weight.copy_(torch.randn_like(loaded.model.lm_head.weight))
    loaded.model.save_pretrained(trained)
    with pytest.raises(ModelError, match=r"differ by \d+\.\d\d nats on average, and golden_tolerance is 0\.5"):
        start(trained)


def test_an_adapters_golden_answers_are_replayed_with_it(tiny_model: Path, adapters: Path, tmp_path: Path):
    folder = Path(shutil.copytree(adapters / "a", tmp_path / "a"))
    golden = golden_answers(load_model(str(folder), device="cpu"), PROMPTS, max_new_tokens=8)
    write_golden(golden, folder)
    start(tiny_model, adapters={"a": str(folder)})
    other = Path(shutil.copytree(adapters / "b", tmp_path / "b"))
    write_golden(golden, other)
    with pytest.raises(ModelError, match=r"b/golden\.json: .*differ by"):
        start(tiny_model, adapters={"a": str(folder), "b": str(other)})


def test_a_damaged_file_is_refused(trained: Path):
    (trained / GOLDEN).write_text(json.dumps({"answers": []}))
    with pytest.raises(ModelError, match=r"golden\.json: is no file of golden answers"):
        start(trained)


def test_what_is_made_from_a_model_inherits_its_golden_answers(trained: Path, tiny_model: Path, tmp_path: Path):
    made = tmp_path / "made"
    made.mkdir()
    inherit_golden(str(tiny_model), made)
    assert read_golden(made) is None
    inherit_golden(str(trained), made)
    assert read_golden(made) == read_golden(trained)
