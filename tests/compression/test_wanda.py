"""Weights weighed by their inputs: by hand, and against a loop that runs the whole model for each block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from raytune_ft.compression.calibration import calibration_rows
from raytune_ft.compression.config import PruningConfig, PruningMethod
from raytune_ft.compression.prune import prunable, write_pruned
from raytune_ft.compression.wanda import decoder_blocks, prune_by_inputs, zero_least
from raytune_ft.core.errors import ConfigError, DataError, ModelError
from raytune_ft.models.chat import Chat
from raytune_ft.models.loading import load_tokenizer


def test_a_small_weight_of_a_large_input_stays_and_a_large_one_of_a_small_input_goes():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [5.0, 0.1, 0.1, 0.1]])
    zero_least(weight, torch.tensor([10.0, 1.0, 1.0, 2.0]), 1, sparsity=0.5)
    # scores 10 4 2 6 and 50 .1 .1 .2: half of each output's weights go, of equal ones the first
    assert weight.tolist() == [[1.0, 0.0, 0.0, 3.0], [5.0, 0.0, 0.0, pytest.approx(0.1)]]


def test_of_two_neighbours_one_stays():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
    zero_least(weight, torch.tensor([10.0, 1.0, 1.0, 2.0]), 1, sparsity=0.5, pattern=(1, 2))
    assert weight.tolist() == [[1.0, 0.0, 0.0, 3.0]]
    stored_by_input = torch.tensor([[1.0], [-4.0], [2.0], [3.0]])
    zero_least(stored_by_input, torch.tensor([1.0, 1.0, 9.0, 1.0]), 0, sparsity=0.5, pattern=(1, 2))
    assert stored_by_input.flatten().tolist() == [0.0, -4.0, 2.0, 0.0]


@torch.no_grad()
def pruned_by_whole_passes(model: nn.Module, rows: list[list[int]], sparsity: float) -> None:
    """The same by the book: before each block is pruned, all rows go through the whole model again."""
    for block in model.model.layers:
        sums: dict[nn.Module, torch.Tensor] = {}
        linear = [module for module in block.modules() if isinstance(module, nn.Linear)]

        def hear(module: nn.Module, args: tuple[torch.Tensor, ...], sums=sums) -> None:
            sums[module] = sums.get(module, 0) + args[0].flatten(0, -2).pow(2).sum(0)

        hooks = [module.register_forward_pre_hook(hear) for module in linear]
        for row in rows:
            model(torch.tensor([row]))
        for hook in hooks:
            hook.remove()
        for module in linear:
            scores = module.weight.abs() * sums[module].sqrt()
            count = round(sparsity * scores.shape[1])
            for output in range(len(scores)):
                module.weight[output, scores[output].argsort(stable=True)[:count]] = 0


def test_blocks_are_pruned_on_what_the_pruned_ones_before_them_give(tiny_model: Path):
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (5, 17, 30)]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    layers = [(layer.name, layer.weight, layer.input_dim) for layer in prunable(ours)]
    prune_by_inputs(ours, rows, layers, sparsity=0.4)
    pruned_by_whole_passes(theirs, rows, 0.4)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_layer_outside_the_blocks_is_named(tiny_model: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert len(decoder_blocks(model)) == 2
    with pytest.raises(ModelError, match="lm_head lies outside the blocks"):
        prune_by_inputs(model, [[1, 2]], [("lm_head", model.lm_head.weight, 1)], sparsity=0.5)


@pytest.mark.parametrize(("pattern", "expected"), [(None, 0.3), ("2:4", 0.5)])
def test_a_folder_pruned_by_calibration_rows_is_as_sparse_as_asked(
    tiny_model: Path, tmp_path: Path, pattern: str | None, expected: float
):
    turns = [{"role": "user", "content": "what is 7 x 12?"}, {"role": "assistant", "content": "84"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": turns}, {"text": "a text"})))
    settings = {} if pattern is None else {"pattern": pattern}
    config = PruningConfig(method=PruningMethod.WANDA, calibration_path=str(rows), **settings)
    made = write_pruned(str(tiny_model), tmp_path / "out", config)
    assert made.sparsity == pytest.approx(expected, abs=0.01)
    assert made.calibration_tokens > 10
    assert json.loads((tmp_path / "out/pruning.json").read_text())["method"] == "wanda"


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no rows to calibrate with"), ("{\n", ":1: is not valid JSON"), ('{"a": 1}\n', ":1: has neither")],
)
def test_calibration_rows_that_are_none_are_named(tiny_model: Path, tmp_path: Path, text: str, message: str):
    (tmp_path / "rows.jsonl").write_text(text)
    config = PruningConfig(method=PruningMethod.WANDA, calibration_path=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=message):
        write_pruned(str(tiny_model), tmp_path / "out", config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "wanda"}, "calibration_path: wanda weighs weights by their inputs"),
        ({"method": "magnitude", "calibration_path": "x"}, "calibration_path: magnitude looks at weights alone"),
        ({"method": "magnitude", "pattern": "2:4"}, "pattern: magnitude zeroes weights wherever"),
        ({"method": "wanda", "calibration_path": "x", "pattern": "4:2"}, "pattern: expected N:M"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**settings)


def test_a_line_separator_inside_a_text_ends_no_row(tiny_model: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "one\u2028two"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    config = PruningConfig(method=PruningMethod.WANDA, calibration_path=str(rows))
    chat = Chat(load_tokenizer(str(tiny_model)))
    assert len(calibration_rows(config, chat, context_tokens=None)) == 1


def test_no_more_rows_are_read_than_are_asked_for(tiny_model: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one and two"}\n' * 2 + "no JSON\n")
    config = PruningConfig(method=PruningMethod.WANDA, calibration_path=str(rows), calibration_rows=2)
    assert len(calibration_rows(config, Chat(load_tokenizer(str(tiny_model))), context_tokens=None)) == 2
