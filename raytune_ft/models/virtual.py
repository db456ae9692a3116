"""Virtual tokens of prompt and prefix tuning in padding-free batches: each row gets its own, in front.

Prompt tuning (Lester et al., 2021) puts learned embeddings before a row; prefix tuning (Li and Liang, 2021) puts
learned keys and values before those of each layer. Both shift a row's positions by the number of virtual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raytune_ft.core.errors import ModelError
from raytune_ft.models.collate import PackedBatch

KeysAndValues = tuple[Tensor, Tensor]
KNOWN_METHODS = ("PROMPT_TUNING", "PREFIX_TUNING")


@dataclass(frozen=True)
class Extended:
    """Where rows laid end to end lie once `count` virtual tokens stand before each of them."""

    count: int
    source: Tensor
    """[longer] int64: which of (virtual tokens, then tokens) lies at each place."""
    tokens: Tensor
    """[tokens] int64: the place of each token."""
    cu_seq_lens: Tensor
    """[rows + 1] int32: where each row's virtual tokens start, and the number of places."""
    position_ids: Tensor
    """[1, longer] int64: from 0 in each row, virtual tokens included."""
    longest: int
    """Tokens of the longest row, virtual ones included."""

    @classmethod
    def of(cls, batch: PackedBatch, count: int) -> Extended:
        """The layout of the rows of `batch`."""
        device = batch.cu_seq_lens.device
        starts, rows = batch.cu_seq_lens.long(), batch.rows
        lengths = starts.diff()
        longer = starts + count * torch.arange(rows + 1, device=device)
        row_of_token = torch.repeat_interleave(torch.arange(rows, device=device), lengths, output_size=batch.tokens)
        tokens = torch.arange(len(row_of_token), device=device) + count * (row_of_token + 1)
        source = torch.empty(len(tokens) + rows * count, dtype=torch.long, device=device)
        virtual = longer[:-1, None] + torch.arange(count, device=device)
        source[virtual] = torch.arange(count, device=device).expand(rows, count)
        source[tokens] = count + torch.arange(len(tokens), device=device)
        first = torch.repeat_interleave(longer[:-1], lengths + count, output_size=len(source))
        positions = torch.arange(len(source), device=device) - first
        starts_in_longer = longer.to(torch.int32)
        return cls(count, source, tokens, starts_in_longer, positions.unsqueeze(0), batch.longest + count)

    def join(self, virtual: Tensor, tokens: Tensor, dim: int) -> Tensor:
        """Virtual tokens (once) and tokens laid out along `dim`."""
        return torch.cat([virtual.to(tokens.dtype), tokens], dim=dim).index_select(dim, self.source)


@dataclass(frozen=True)
class Prefixes:
    """Keys and values [1, heads, virtual tokens, head size] of each layer, with where they go."""

    layers: Sequence[KeysAndValues]
    extended: Extended
    _asked: set[int] = field(default_factory=set)

    def before(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer with the prefix before each row.

        Causal attention inside the longer rows is then what every token sees: the prefix, and its row up to itself.
        The prefix asks nothing: its queries are zero, and what they get is dropped.
        """
        self._asked.add(layer)
        keys, values = self.layers[layer]
        zeros = query.new_zeros(1, query.shape[1], self.extended.count, query.shape[3])
        join = self.extended.join
        return join(zeros, query, 2), join(keys, key, 2), join(values, value, 2)

    def check(self) -> None:
        """Checks that every layer took its prefix.

        Raises:
            ModelError: naming those that did not, since the model's attention does not pass it on.
        """
        left = sorted(set(range(len(self.layers))) - self._asked)
        if left:
            raise ModelError(f"prefix tuning: layers {left} of this model took no prefix; take prompt_tuning or lora")


@dataclass(frozen=True)
class VirtualTokens:
    """The virtual tokens of a PEFT model's active adapter."""

    model: Any
    count: int
    kind: str
    """``PROMPT_TUNING`` or ``PREFIX_TUNING``."""

    @classmethod
    def of(cls, model: Any) -> VirtualTokens | None:
        """Those of `model`; None if it has none.

        Raises:
            ModelError: for prompt methods other than prompt and prefix tuning.
        """
        config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
        if config is None or not config.is_prompt_learning:
            return None
        kind = str(config.peft_type.value)
        if kind not in KNOWN_METHODS:
            raise ModelError(f"{kind}: this prompt method is not supported; those that are: {', '.join(KNOWN_METHODS)}")
        return cls(model, config.num_virtual_tokens, kind)

    def embeddings(self) -> Tensor:
        """Prompt tuning: [1, virtual tokens, width]."""
        found: Tensor = self._prompt()
        return found

    def prefixes(self, extended: Extended) -> Prefixes:
        """Prefix tuning: each layer's keys and values.

        Raises:
            ModelError: if PEFT gives some layer none, as it does where layers differ in shape.
        """
        found = [(layer.keys, layer.values) for layer in self._prompt().layers]
        if any(keys is None or values is None for keys, values in found):
            raise ModelError("prefix tuning: some layers of this model take no prefix; take prompt_tuning or lora")
        return Prefixes(found, extended)

    def _prompt(self) -> Any:
        name, tokens = self.model.active_adapter, self.model.prompt_tokens
        # PEFT copies their numbers to the device at each pass, and the host waits, unless they are there.
        tokens[name] = tokens[name].to(self.model.get_input_embeddings().weight.device, non_blocking=True)
        return self.model.get_prompt(batch_size=1)
