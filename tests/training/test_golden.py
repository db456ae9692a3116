"""A trained model brings answers by which a server finds out whether it serves that model."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.storage import Location
from raytune_ft.models.golden import GOLDEN, read_golden
from raytune_ft.models.loading import load_model
from raytune_ft.training.session import Seat, train_in_process


@pytest.mark.parametrize("method", ["lora", "full", "prompt_tuning", "prefix_tuning"])
def test_the_finished_model_has_golden_answers_that_it_gives_when_loaded(
    method: str, settings, splits, tmp_path: Path
) -> None:
    import torch

    config = settings(method=method, num_train_epochs=1)
    train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "model"))
    golden = read_golden(tmp_path / "model")
    assert golden is not None
    assert [bool(answer.messages) for answer in golden.answers] == [False, False, True]
    loaded = load_model(str(tmp_path / "model"), device="cpu")
    for answer in golden.answers:
        if answer.messages:
            assert loaded.chat.tokenizer.decode(answer.prompt_ids).endswith("assistant\n")
        else:
            assert loaded.tokenizer(answer.text, add_special_tokens=False)["input_ids"] == answer.prompt_ids
        ids = torch.tensor([answer.prompt_ids + answer.token_ids])
        with torch.no_grad():
            scores = torch.log_softmax(loaded.model(ids).logits[0, -len(answer.token_ids) - 1 : -1], -1)
        wanted = scores.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0].tolist()
        assert answer.logprobs == pytest.approx(wanted, abs=1e-3)
    assert (tmp_path / "model" / GOLDEN).stat().st_size < 20_000
