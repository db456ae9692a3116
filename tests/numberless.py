"""In place of a GPU: torch's meta device, whose tensors have no numbers, so that a host which reads one fails at once.

What is computed there goes the way that GPUs go, in the same calls; what it comes to, nobody knows.
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytune_ft.models import attention

READ = r"meta tensor"
"""What torch says where a number is read that is not there."""


class Calls(TorchDispatchMode):
    """Counts the calls that take or give tensors of the device, views aside; refuses copies that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs, found))):
            if not func.is_view:
                self.counts[str(func)] += 1
            copied = func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu"
            checked = func is torch.ops.aten.segment_reduce.default
            assert not copied or (kwargs or {}).get("non_blocking"), "the host waits for a copy to the device"
            assert not checked or (kwargs or {}).get("unsafe"), "the host waits for a check of the lengths"
        return found


def takes_gpus_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has attention over segments be the one kernel that it is on GPUs."""

    def fused(query: Any, key: Any, value: Any, starts: Any, longest: int, **others: Any) -> Any:
        assert not others.pop("bend")
        return attention._varlen(query, key, value, starts, longest, **others)

    monkeypatch.setattr(attention, "_attended", fused)


def where_read(raised: pytest.ExceptionInfo[BaseException]) -> str:
    """The function of the package in which a number was read."""
    return [frame.name for frame in traceback.extract_tb(raised.tb) if "raytune_ft" in frame.filename][-1]
