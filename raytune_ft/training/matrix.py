"""What goes with what: method, LoRA option, bits of the base, ZeRO stage, offload, checkpointing, packed sweep.

The only place that knows it: settings are refused by it, sweeps pack by it, and ``raytune-ft doctor --matrix`` and the
documentation print it. Batches are padding-free under every method, so that is no axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Literal

Option = Literal["plain", "dora", "rslora"]
Offload = Literal["none", "optimizer", "all"]
Reason = str

METHODS = ("full", "lora", "qlora", "prefix_tuning", "prompt_tuning")
OPTIONS: tuple[Option, ...] = ("plain", "dora", "rslora")
BITS = (None, 8, 4)
ZERO_STAGES = (0, 1, 2, 3)
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "all")

_COST_OF_CHANGE = {
    "packed": 1,
    "offload": 1,
    "gradient_checkpointing": 1,
    "zero_stage": 2,
    "option": 4,
    "method": 8,
    "bits": 16,
}
"""What a user would rather give up: first how it runs, last the memory that quantization saves."""


@dataclass(frozen=True)
class Cell:
    """One combination. `bits` of the frozen base (None: not quantized); `packed`: as a trial of a packed sweep."""

    method: str
    option: Option = "plain"
    bits: int | None = None
    zero_stage: int = 2
    gradient_checkpointing: bool = False
    packed: bool = False
    offload: Offload = "none"

    def __str__(self) -> str:
        words = [f"method {self.method}"]
        if self.option != "plain":
            words.append(f"use_{self.option}")
        words.append(f"bits {self.bits}" if self.bits else "a base in full precision")
        words.append("a packed sweep" if self.packed else f"zero_stage {self.zero_stage}")
        if self.offload != "none":
            words.append(f"offload {self.offload}")
        if self.gradient_checkpointing:
            words.append("gradient_checkpointing")
        return ", ".join(words)


def cells() -> Iterator[Cell]:
    """Every combination, refused ones included; a packed sweep runs without DeepSpeed, so it has one stage only."""
    for method, option, bits, checkpointing in product(METHODS, OPTIONS, BITS, (False, True)):
        for stage, offload in product(ZERO_STAGES, OFFLOADS):
            yield Cell(method, option, bits, stage, checkpointing, offload=offload)
        yield Cell(method, option, bits, 2, checkpointing, packed=True)


def refusal(cell: Cell) -> Reason | None:
    """Why a combination is not taken; None if it is."""
    lora = cell.method in {"lora", "qlora"}
    rules = (
        (
            cell.zero_stage not in ZERO_STAGES,
            f"zero_stage {cell.zero_stage} is not there (it has {', '.join(map(str, ZERO_STAGES))})",
        ),
        (
            cell.zero_stage == 3 and cell.bits is not None,
            "zero_stage 3 shards weights value by value, and those of a quantized base are packed",
        ),
        (
            cell.zero_stage == 3 and cell.method in {"prefix_tuning", "prompt_tuning"},
            f"zero_stage 3 gathers weights layer by layer, and method {cell.method} learns what belongs to no layer",
        ),
        (
            cell.zero_stage == 3 and cell.option == "dora",
            "zero_stage 3 has a layer's weights only while it computes, and use_dora reads them besides",
        ),
        (
            cell.offload != "none" and cell.zero_stage == 0,
            f"offload {cell.offload} moves what ZeRO shards, and zero_stage 0 shards nothing",
        ),
        (
            cell.offload == "all" and cell.zero_stage != 3,
            "offload all moves the weights, too, which only zero_stage 3 shards",
        ),
        (
            cell.method == "full" and cell.bits is not None,
            f"method full trains the base's weights, which {cell.bits} bits cannot take steps in",
        ),
        (cell.method == "lora" and cell.bits is not None, "LoRA upon a quantized base is called method qlora"),
        (cell.method == "qlora" and cell.bits is None, "method qlora is LoRA upon a quantized base"),
        (
            cell.option == "dora" and cell.bits == 8,
            "use_dora reads the base's weights back at every step, which bitsandbytes does not do with 8 bits",
        ),
        (
            not lora and cell.option != "plain",
            f"use_{cell.option} is an option of LoRA, and method {cell.method} has none",
        ),
        (
            cell.packed and cell.method == "full",
            "a packed sweep shares one frozen base, and method full trains the base itself",
        ),
        (cell.packed and not lora, f"a packed sweep holds LoRA adapters, not those of method {cell.method}"),
        (
            cell.packed and cell.option == "dora",
            "a packed sweep adds low-rank products, and use_dora rescales the weights, too",
        ),
        (
            cell.packed and cell.gradient_checkpointing,
            "the trials of a packed sweep share their activations, and gradient_checkpointing is not used there",
        ),
    )
    return next((reason for holds, reason in rules if holds), None)


def nearest(cell: Cell) -> Cell:
    """The allowed combination that changes least of what was wanted."""

    def distance(other: Cell) -> int:
        changed = zip(fields(Cell), astuple(cell), astuple(other), strict=True)
        cost = sum(_COST_OF_CHANGE[field.name] for field, mine, theirs in changed if mine != theirs)
        steps = abs(cell.zero_stage - other.zero_stage)
        steps += abs(OFFLOADS.index(cell.offload) - OFFLOADS.index(other.offload))
        return 10 * cost + steps + abs(METHODS.index(cell.method) - METHODS.index(other.method))

    return min(_allowed(), key=distance)


@cache
def _allowed() -> tuple[Cell, ...]:
    return tuple(cell for cell in cells() if refusal(cell) is None)


def verdict(cell: Cell) -> Reason | None:
    """As `refusal`, with the nearest combination that is taken."""
    reason = refusal(cell)
    if reason is None:
        return None
    return f"{reason}; the nearest that goes: {nearest(cell)}"


@dataclass(frozen=True)
class Line:
    """A row of the printed matrix: a method on a base, and what goes with it."""

    method: str
    base: str
    stages: str
    offload: str
    checkpointing: str
    packed: str


HEADINGS = ("method", "base", "ZeRO stage", "CPU offload", "gradient checkpointing", "packed sweep")
_BASES = {None: "full precision", 8: "8 bits", 4: "4 bits"}


def lines() -> list[Line]:
    """The matrix, a row for each method (with LoRA's options) and base; where nothing goes, why."""
    found = []
    for method, option, bits in product(METHODS, OPTIONS, BITS):
        cell = Cell(method, option, bits)
        if option != "plain" and method not in {"lora", "qlora"}:
            continue
        name = method if option == "plain" else f"{method} + {option}"
        reason = refusal(cell)
        if reason is not None:
            found.append(Line(name, _BASES[bits], f"no: {reason}", "no", "no", "no"))
            continue
        stages = [str(stage) for stage in ZERO_STAGES if refusal(replace(cell, zero_stage=stage)) is None]
        checkpointing = refusal(replace(cell, gradient_checkpointing=True)) is None
        packed = refusal(replace(cell, packed=True)) is None
        words = ("yes" if checkpointing else "no", "yes" if packed else "no")
        found.append(Line(name, _BASES[bits], ", ".join(stages), _offloads(cell), *words))
    return found


def _offloads(cell: Cell) -> str:
    """What can be offloaded, and under which stages."""
    words = []
    for offload in OFFLOADS[1:]:
        wanted = replace(cell, offload=offload)
        stages = [str(stage) for stage in ZERO_STAGES if refusal(replace(wanted, zero_stage=stage)) is None]
        if stages:
            words.append(f"{offload} ({', '.join(stages)})")
    return ", ".join(words) or "no"


def markdown() -> str:
    """The matrix as a Markdown table, for documentation."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS), *(astuple(line) for line in lines())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
