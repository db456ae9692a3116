"""Each cell of the matrix trains, or is refused with the nearest one that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raytune_ft import cli
from raytune_ft.core.errors import ConfigError
from raytune_ft.training.bank.bank import AdapterBank
from raytune_ft.training.bank.base import load_frozen_base
from raytune_ft.training.batches import TokenRows
from raytune_ft.training.config import FineTuningConfig, FineTuningMethod
from raytune_ft.training.matrix import METHODS, OPTIONS, Cell, cells, lines, markdown, nearest, refusal
from raytune_ft.training.session import Seat, train_in_process

Settings = Callable[..., FineTuningConfig]


def as_settings(cell: Cell) -> dict[str, Any]:
    options = {f"use_{option}": option == cell.option for option in OPTIONS if option != "plain"}
    return {
        "method": cell.method,
        "bits": cell.bits,
        "zero_stage": cell.zero_stage,
        "gradient_checkpointing": cell.gradient_checkpointing,
        "offload": cell.offload,
        **options,
    }


def allowed() -> Iterator[Cell]:
    """Each combination that trains in one process; the stage of ZeRO and its offload are no part of that."""
    for cell in cells():
        if refusal(cell) is None and cell.zero_stage == 2 and cell.offload == "none" and not cell.packed:
            yield cell


def test_the_matrix_knows_every_method() -> None:
    assert tuple(method.value for method in FineTuningMethod) == METHODS


@pytest.mark.parametrize("cell", allowed(), ids=str)
def test_an_allowed_cell_trains_two_steps(cell: Cell, settings: Settings, splits) -> None:
    config = settings(**as_settings(cell), max_steps=2, num_virtual_tokens=4, lora_r=4, warmup_steps=0)
    assert config.cell == cell
    norms: list[float] = []
    summary = train_in_process(
        config, splits, Seat(), output=None, report=lambda step, metrics: norms.append(metrics["grad_norm"])
    )
    assert summary.steps == 2
    assert min(norms) > 0
    assert summary.best is not None


def test_a_refused_cell_names_the_nearest_that_goes(settings: Settings) -> None:
    seen = 0
    for cell in cells():
        reason = refusal(cell)
        if cell.packed:
            continue
        if reason is None:
            assert settings(**as_settings(cell)).cell == cell
            continue
        if cell.method == "qlora" and cell.bits is None:  # settings take no bits as QLoRA's default of 4
            assert settings(**as_settings(replace(cell, zero_stage=2, option="plain", offload="none"))).base_bits == 4
            continue
        with pytest.raises(ConfigError) as caught:
            settings(**as_settings(cell))
        assert f"{reason}; the nearest that goes: {nearest(cell)}" in str(caught.value)
        seen += 1
    # 5 methods x 3 options x 3 bases x 2 x 4 stages x 3 offloads. 15 of the first 45 go: stage 0 without offload, 1 and
    # 2 with that of the optimizer or none. 3 of them (full, LoRA, rsLoRA) go at stage 3, with any. 72 are QLoRA's
    # default.
    assert seen == 1080 - 2 * (15 * 5 + 3 * 3) - 72


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Cell("full", bits=4), Cell("qlora", bits=4)),
        (Cell("lora", "dora", bits=4), Cell("qlora", "dora", bits=4)),
        (Cell("qlora", bits=4, zero_stage=3), Cell("qlora", bits=4, zero_stage=2)),
        (Cell("prefix_tuning", zero_stage=3), Cell("prefix_tuning", zero_stage=2)),
        (Cell("lora", "dora", zero_stage=3), Cell("lora", "dora", zero_stage=2)),
        (Cell("lora", offload="all"), Cell("lora", offload="optimizer")),
        (Cell("full", zero_stage=0, offload="optimizer"), Cell("full", zero_stage=0)),
        (Cell("prompt_tuning", "rslora", bits=4), Cell("prompt_tuning", bits=4)),
        (Cell("lora", "dora", packed=True), Cell("lora", "dora")),
        (Cell("prefix_tuning", packed=True), Cell("prefix_tuning")),
        (Cell("qlora"), Cell("lora")),
        (Cell("qlora", "dora", bits=8), Cell("qlora", bits=8)),
    ],
)
def test_the_nearest_cell_changes_least_of_what_was_wanted(wanted: Cell, found: Cell) -> None:
    assert refusal(wanted) is not None
    assert nearest(wanted) == found


def test_the_nearest_of_every_refused_cell_is_allowed() -> None:
    assert all(refusal(nearest(cell)) is None for cell in cells() if refusal(cell) is not None)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_packed_cells_share_a_bank_and_the_others_are_refused_by_it(bits, settings: Settings, splits, tmp_path) -> None:
    packed = [cell for cell in cells() if cell.packed and cell.bits == bits]
    common = {"max_steps": 2, "eval_strategy": "no", "lora_r": 4}
    base = load_frozen_base(settings(method="qlora" if bits else "lora", bits=bits), "cpu")
    bank = AdapterBank(base, TokenRows(splits["train"], str(tmp_path / "cache")), None)
    for cell in packed:
        reason = refusal(cell)
        if reason is None:
            bank.admit(str(cell), settings(**as_settings(cell), **common))
        elif refusal(replace(cell, packed=False)) is None:
            with pytest.raises(ConfigError, match="share a base"):
                bank.admit(str(cell), settings(**as_settings(cell), **common))
    made = bank.step()
    assert len(made) == 2
    assert all(progress.metrics["grad_norm"] > 0 for progress in made)


def test_the_printed_matrix_has_a_row_for_each_method_and_base() -> None:
    table = lines()
    assert len(table) == 27
    found = {(line.method, line.base): line for line in table}
    assert found["qlora + dora", "4 bits"].packed == "no"
    assert found["qlora", "4 bits"].packed == "yes"
    assert found["full", "full precision"].stages == "0, 1, 2, 3"
    assert found["full", "full precision"].offload == "optimizer (1, 2, 3), all (3)"
    assert found["qlora", "4 bits"].stages == "0, 1, 2"
    assert found["full", "4 bits"].stages.startswith("no: method full trains")
    assert markdown().count("\n") == 29


def test_the_readmes_table_is_the_codes() -> None:
    assert markdown() in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_doctor_prints_the_matrix_as_a_table_and_as_markdown() -> None:
    table, text = (CliRunner().invoke(cli.app, ["doctor", "--matrix", *more]) for more in ([], ["--markdown"]))
    assert table.exit_code == text.exit_code == 0
    assert text.stdout == markdown()
    for line in lines():
        assert any(shown.split()[:1] == line.method.split()[:1] for shown in table.stdout.splitlines())
        assert line.stages in " ".join(table.stdout.split())
