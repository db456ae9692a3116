"""How much of a device a run uses: floating-point operations a second against the device's peak, and memory.

Operations of a step, by the usual count (Kaplan et al., 2020, section 2.1; Chowdhery et al., 2022, appendix B), without
attention's scores: a token costs 2 a weight forwards and, of a trained weight, 4 backwards: 6 in all; of a frozen
weight 2 backwards (only the activations' gradient): 4 in all. The head is applied to supervised tokens only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raytune_ft.core.grammar import number_of
from raytune_ft.training.memory import GIB

_NAMED = (  # dense bf16 tensor-core peaks of the makers' data sheets, in 1e12 operations a second
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
)


@dataclass(frozen=True)
class Work:
    """Operations that a token costs in the layers, and a supervised one on top of it in the head."""

    per_token: float
    per_supervised: float

    def of(self, tokens: float, supervised: float) -> float:
        """Operations of a step."""
        return self.per_token * tokens + self.per_supervised * supervised

    @classmethod
    def count(cls, model: Any) -> Work:
        """Counts the weights of all linear layers (their declared sizes: quantized weights are packed)."""
        head = model.get_output_embeddings()
        body = last = 0.0
        for module in model.modules():
            if not isinstance(module, nn.Linear):
                continue
            operations = module.in_features * module.out_features * (6 if module.weight.requires_grad else 4)
            if module is head:
                last += operations
            else:
                body += operations
        return cls(body, last)


@dataclass(frozen=True)
class DevicePeak:
    """Operations a second that a device can do at best, and where the number is from."""

    flops: float
    source: str


def device_peak(device: str, dtype: torch.dtype) -> DevicePeak:
    """The data sheet's peak of a known GPU in two-byte formats, else the speed of a matrix product, measured here."""
    if device.startswith("cuda") and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, peak in _NAMED:
            if known in name:
                return DevicePeak(peak * 1e12, f"data sheet of {name}, dense bf16")
    return _measured(device, dtype)


def _measured(device: str, dtype: torch.dtype) -> DevicePeak:
    size = 4096 if device.startswith("cuda") else 768
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (left @ right).sum().item()  # reading the sum waits for the device
        best = min(best, time.perf_counter() - began)
    threads = "" if device.startswith("cuda") else f", {number_of(torch.get_num_threads(), 'thread')}"
    return DevicePeak(2 * size**3 / best, f"measured: a {size} x {size} matrix product in {dtype}{threads}")


def memory_in_use(device: str) -> dict[str, float]:
    """``memory_gib`` of this process, and on CUDA ``cuda_peak_gib`` of its tensors since the start."""
    import psutil

    found = {"memory_gib": psutil.Process().memory_info().rss / GIB}
    if device.startswith("cuda"):
        found["cuda_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return found
