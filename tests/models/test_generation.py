"""Batched answers equal the answers that each prompt gets alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raytune_ft.core.errors import RunError
from raytune_ft.core.records import Message
from raytune_ft.models.adapters import add_virtual_tokens
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import generate, row_seed, waves
from raytune_ft.models.loading import load_model
from raytune_ft.models.memory import TokenBudget

GREEDY = DecodingConfig(max_new_tokens=12)


def prompts(loaded):
    words = ["red", "What is the capital of France?", "0 1 2 3 4 5 6 7 8 9 order"]
    return [loaded.chat.prompt_ids([Message("user", word)]) for word in words]


def test_a_batch_of_mixed_lengths_answers_as_each_prompt_alone(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    together = generate(loaded, prompts(loaded), GREEDY)
    alone = [generate(loaded, [prompt], GREEDY)[0] for prompt in prompts(loaded)]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_a_small_budget_splits_the_batch_and_changes_nothing(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    batches: list[int] = []
    split = generate(
        loaded, prompts(loaded), GREEDY, token_budget=40, on_answers=lambda found: batches.append(len(found))
    )
    assert len(batches) > 1
    assert sum(batches) == 3
    assert split == generate(loaded, prompts(loaded), GREEDY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_memory_runs_out_the_rest_is_answered_in_smaller_batches(
    temperature: float, tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args, **kwargs):
        raise MemoryError

    loaded = load_model(str(tiny_model))
    settings = DecodingConfig(max_new_tokens=12, temperature=temperature)
    asked = prompts(loaded) * 3
    expected = generate(loaded, asked, settings)
    budget, told = TokenBudget(512), []
    with memory_for(loaded.model, rows=2):
        answers = generate(loaded, asked, settings, token_budget=budget, on_answers=told.extend)
        assert answers == expected
        assert sorted(told) == list(range(9))
        assert "out of memory; the 9 that are left are begun again with at most 256 tokens at a time" in caplog.text
        assert budget.tokens < 128
        caplog.clear()
        assert generate(loaded, asked, settings, token_budget=budget) == expected
        assert "out of memory" not in caplog.text
    with memory_for(loaded.model, rows=0), pytest.raises(RunError, match=r"one prompt with its answer.*allocate"):
        generate(loaded, asked, settings)
    monkeypatch.setattr(loaded.model, "forward", refuse)
    with pytest.raises(RunError, match=r"its answer \(MemoryError\)"):
        generate(loaded, asked, settings)


@contextlib.contextmanager
def memory_for(model, *, rows: int) -> Iterator[None]:
    """Within it the model asks for more memory than there is, where it gets more rows than so many."""

    def look(module, args, kwargs):
        if len(kwargs["input_ids"]) > rows:
            torch.empty(1 << 60)

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    yield
    hook.remove()


def test_an_answer_that_reaches_the_limit_says_so(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    answers = generate(loaded, prompts(loaded), DecodingConfig(max_new_tokens=3))
    for answer in answers:
        assert (answer.finish_reason == "length") == (len(answer.token_ids) == 3)


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    [free] = generate(loaded, prompts(loaded)[:1], GREEDY)
    stop = free.text[3:5]
    [stopped] = generate(loaded, prompts(loaded)[:1], DecodingConfig(max_new_tokens=12, stop=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]


def test_sampling_repeats_under_the_same_seed_and_changes_with_another(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    hot = [DecodingConfig(max_new_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (generate(loaded, prompts(loaded), settings) for settings in hot)
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning"])
def test_virtual_tokens_lead_mixed_lengths_to_the_answers_that_plain_peft_gives_each_alone(
    kind: str, tiny_model: Path
) -> None:
    loaded = load_model(str(tiny_model))
    with torch.no_grad():
        for parameter in loaded.model.parameters():  # random weights this small would hardly look at positions
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model = add_virtual_tokens(loaded.model, kind=kind, count=6, seed=0, base=str(tiny_model)).eval()
    tuned = replace(loaded, model=model)
    texts = prompts(loaded)
    together = generate(tuned, texts, DecodingConfig(max_new_tokens=5))
    for prompt, answer in zip(texts, together, strict=True):
        ids = list(prompt)
        for token in answer.token_ids:
            with torch.no_grad():
                logits = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, -1]
            assert token == int(logits.argmax())
            ids.append(token)
        assert len(ids) > len(prompt)


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_slots_that_are_filled_again_answer_as_each_prompt_alone(temperature: float, tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    texts = ["order " * (1 + n % 7) + str(n) for n in range(11)]
    ids = [loaded.chat.prompt_ids([Message("user", text)]) for text in texts]
    settings = DecodingConfig(max_new_tokens=90, temperature=temperature, top_p=0.9)
    seeds = [row_seed(0, text) for text in texts]
    seen: list[int] = []
    few = generate(loaded, ids, settings, token_budget=3 * 150, seeds=seeds, on_answers=seen.extend)
    assert sorted(seen) == list(range(11))
    alone = [generate(loaded, [ids[n]], settings, seeds=[seeds[n]])[0] for n in range(11)]
    assert [answer.token_ids for answer in few] == [answer.token_ids for answer in alone]
    assert len({len(answer.token_ids) for answer in few}) > 1  # else no slot was filled while others went on


def test_greedy_answers_equal_those_of_transformers_own_generate(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    for prompt, answer in zip(prompts(loaded), generate(loaded, prompts(loaded), GREEDY), strict=True):
        ids = torch.tensor([prompt])
        stops = list(loaded.chat.stop_ids)
        out = loaded.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=stops[0])
        expected = [token for token in out[0, len(prompt) :].tolist() if token not in stops]
        assert answer.token_ids == expected


def test_a_prompt_near_the_end_of_the_context_gets_the_room_that_is_left(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    prompt = (loaded.chat.prompt_ids([Message("user", "fox")]) * 100)[:505]
    [answer] = generate(loaded, [prompt], DecodingConfig(max_new_tokens=50))
    assert len(answer.token_ids) <= 7


def test_waves_widen_where_rows_get_shorter() -> None:
    # 100 tokens: one row of 90 alone; rows of 40 two at a time, those of 30 with them (3 < 4); rows of 20 five.
    assert waves([20, 90, 40, 30, 20], 100) == [([1], 1), ([2, 3], 2), ([0, 4], 5)]


def test_without_stop_tokens_every_answer_reaches_its_limit(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    answers = generate(loaded, prompts(loaded), DecodingConfig(max_new_tokens=40), stop_ids=())
    assert [len(answer.token_ids) for answer in answers] == [40] * 3


@pytest.mark.parametrize("alone", [False, True])
def test_an_answer_ends_at_each_token_that_the_model_names_as_its_end(
    alone: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(tiny_model))
    if alone:
        monkeypatch.setattr("raytune_ft.models.generation.why_answered_alone", lambda model: "for the test")
    prompt, greedy = [5, 9, 14, 20], DecodingConfig(max_new_tokens=12)
    (free,) = generate(loaded, [prompt], greedy)
    assert len(free.token_ids) > 4
    end = free.token_ids[4]
    loaded.model.generation_config.eos_token_id = [loaded.tokenizer.eos_token_id, end]
    (ended,) = generate(loaded, [prompt], greedy)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end)]
    assert (ended.finish_reason, ended.stop_token) == ("stop", end)
    plain = loaded.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert plain[0, len(prompt) :].tolist() == [*ended.token_ids, end]
