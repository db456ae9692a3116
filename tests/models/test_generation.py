"""Batched answers equal the answers that each prompt gets alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raytune_ft.core.records import Message
from raytune_ft.models.adapters import add_virtual_tokens
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import generate
from raytune_ft.models.loading import load_model

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
    split = generate(loaded, prompts(loaded), GREEDY, token_budget=40, on_batch=batches.append)
    assert len(batches) > 1
    assert sum(batches) == 3
    assert split == generate(loaded, prompts(loaded), GREEDY)


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
