"""Settings of compression: how weights are quantized or pruned, and the jobs that the command line reads."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from raytune_ft.core.config import Config, Place
from raytune_ft.models.config import Precision

_PATTERN = re.compile(r"(\d+):(\d+)")
_OF_CALIBRATION = ("calibration_rows", "calibration_tokens")
_OF_4_BITS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
_OF_8_BITS = "llm_int8_threshold"


class QuantizationMethod(StrEnum):
    """A format that quantized weights are stored in."""

    BITSANDBYTES = "bitsandbytes"
    COMPRESSED_TENSORS = "compressed_tensors"


class PruningMethod(StrEnum):
    """How the weights that become zero are chosen."""

    MAGNITUDE = "magnitude"
    STRUCTURED = "structured"
    WANDA = "wanda"


class PruningScope(StrEnum):
    """Within what the smallest weights are looked for."""

    LAYER = "layer"
    GLOBAL = "global"


class CalibrationConfig(Config):
    """Which rows show a method what the model's layers usually see, where it looks at more than the weights."""

    calibration_path: Place | None = None
    """``compressed_tensors`` and ``wanda``: a dataset artifact, or a JSONL or Parquet file of records, whose rows go
    through the model."""
    calibration_rows: int = Field(256, ge=1)
    """The first so many training rows."""
    calibration_tokens: int = Field(512, ge=2)
    """A row is cut behind so many tokens."""


class QuantizationConfig(CalibrationConfig):
    """How the linear layers of a model are quantized; embeddings, norms and ``lm_head`` keep the source's precision."""

    method: QuantizationMethod = QuantizationMethod.BITSANDBYTES
    """The format: `transformers` loads ``bitsandbytes`` on CPU and GPU. ``compressed_tensors`` is what vLLM serves on
    both: integers found by GPTQ (Frantar et al., 2023) from calibration rows, with llm-compressor in an environment of
    its own, which is made at the first run."""
    bits: Literal[4, 8] = 4
    """Bits a weight: 4 (bitsandbytes: nf4 or fp4, in blocks of 64 weights; compressed tensors: W4A16, groups of up to
    128) or 8 (int8, one scale a row; compressed tensors: W8A8, inputs in 8 bits, too)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The sixteen values of a 4-bit weight: ``nf4`` (quantiles of a normal distribution) or ``fp4`` (a tiny float)."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the 4-bit blocks' scales too, which saves 0.4 bits a weight."""
    bnb_4bit_compute_dtype: Precision = Precision.AUTO
    """Precision that 4-bit weights are multiplied in; ``auto`` is the precision that the source is stored in."""
    llm_int8_threshold: float = Field(6.0, ge=0)
    """8 bits: input columns with a value above this are multiplied unquantized (Dettmers et al. 2022,
    arXiv:2208.07339), which keeps much of the quality. The columns are found over the whole batch, so a neighbour's row
    can change the last digits of a result; 0 turns it off and makes rows independent of each other."""

    @model_validator(mode="after")
    def _calibrates_what_it_must(self) -> QuantizationConfig:
        wanted = self.method is QuantizationMethod.COMPRESSED_TENSORS
        if wanted and self.calibration_path is None:
            raise ValueError("calibration_path: compressed_tensors rounds weights by what rows show; name a dataset")
        if not wanted and self.calibration_path is not None:
            raise ValueError("calibration_path: bitsandbytes looks at weights alone; leave it out")
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> QuantizationConfig:
        if self.method is QuantizationMethod.COMPRESSED_TENSORS:
            why = "is of bitsandbytes' weights; leave it out, or set method: bitsandbytes"
            self.refuse_idle([*_OF_4_BITS, _OF_8_BITS], why)
            return self
        self.refuse_idle(_OF_CALIBRATION, "bitsandbytes looks at no rows; leave it out, or use compressed_tensors")
        if self.bits == 8:
            self.refuse_idle(_OF_4_BITS, "is of 4-bit weights (bits is 8); leave it out, or set bits: 4")
        else:
            self.refuse_idle([_OF_8_BITS], "is of 8-bit weights (bits is 4); leave it out, or set bits: 8")
        return self


class QuantizationJob(QuantizationConfig):
    """A model to quantize, and where the result goes: what ``raytune-ft quantize`` reads."""

    not_identity: ClassVar[frozenset[str]] = Config.not_identity | {"model_path"}

    model_path: str = Field(min_length=1)
    """The source: a Hugging Face folder, hub id, adapter, or model artifact; it is only read."""
    output_dir: str = Field(min_length=1)
    """New folder of the quantized model; a local path or a URI."""


class PruningConfig(CalibrationConfig):
    """Which weights of a model's linear layers become zero; embeddings, norms and ``lm_head`` are left alone."""

    method: PruningMethod = PruningMethod.MAGNITUDE
    """``magnitude`` zeroes the smallest weights; ``structured`` the smallest of each group along the input (N:M);
    ``wanda`` those whose size times their input's is smallest, as calibration rows show it."""
    target_sparsity: float = Field(0.3, gt=0, lt=1)
    """Share of the linear layers' weights that becomes zero; with a pattern it follows from that."""
    scope: PruningScope = PruningScope.LAYER
    """``magnitude``: the same share in every layer, or the smallest weights of all layers together (``global``)."""
    pattern: str | None = None
    """N:M, of every M neighbouring weights along the input the N that matter most stay; ``structured`` takes 2:4 where
    nothing else is said, ``wanda`` can have one."""
    calibration_rows: int = Field(128, ge=1)
    """As many as Wanda's authors take."""
    storage: Literal["dense", "compact"] = "dense"
    """``dense`` is an ordinary Hugging Face folder, zeros and all; ``compact`` leaves the zeros out, and is expanded
    when it is loaded (by this package alone)."""

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("method") == PruningMethod.STRUCTURED and data.get("pattern") is None:
            data = {**data, "pattern": "2:4"}
        match = _PATTERN.fullmatch(str(data.get("pattern")))
        if match and 0 < int(match[1]) < int(match[2]) and data.get("target_sparsity") is None:
            return {**data, "target_sparsity": 1 - int(match[1]) / int(match[2])}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> PruningConfig:
        if self.pattern is not None:
            self._check_pattern(self.pattern)
        if self.method is PruningMethod.WANDA and self.calibration_path is None:
            raise ValueError("calibration_path: wanda weighs weights by their inputs; name a dataset that shows them")
        if self.method is not PruningMethod.WANDA and self.calibration_path is not None:
            raise ValueError(f"calibration_path: {self.method} looks at weights alone; leave it out, or use wanda")
        if self.method is not PruningMethod.WANDA:
            self.refuse_idle(_OF_CALIBRATION, f"{self.method} looks at no rows; leave it out, or use wanda")
        if self.method is not PruningMethod.MAGNITUDE:
            self.refuse_idle(["scope"], f"{self.method} compares weights of one output only; use magnitude, or layer")
        return self

    def _check_pattern(self, pattern: str) -> None:
        match = _PATTERN.fullmatch(pattern)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f"pattern: expected N:M with 0 < N < M, for example 2:4 (got {pattern!r})")
        if self.method is PruningMethod.MAGNITUDE:
            raise ValueError("pattern: magnitude zeroes weights wherever they lie; use method structured or wanda")
        share = 1 - int(match[1]) / int(match[2])
        if abs(self.target_sparsity - share) > 1e-6:
            raise ValueError(
                f"target_sparsity: the pattern {pattern} zeroes {share:g} of the weights "
                f"(got {self.target_sparsity:g}); leave target_sparsity out, or the pattern"
            )

    @property
    def kept_of_group(self) -> tuple[int, int] | None:
        """N and M of the pattern, if there is one."""
        if self.pattern is None:
            return None
        kept, group = self.pattern.split(":")
        return int(kept), int(group)


class PruningJob(PruningConfig):
    """A model to prune, and where the result goes: what ``raytune-ft prune`` reads."""

    not_identity: ClassVar[frozenset[str]] = Config.not_identity | {"model_path"}

    model_path: str = Field(min_length=1)
    """The source: a Hugging Face folder, hub id, adapter, or model artifact; it is only read."""
    output_dir: str = Field(min_length=1)
    """New folder of the pruned model; a local path or a URI."""
