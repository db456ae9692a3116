"""Log-probabilities and losses of supervised tokens, padding-free and without a [tokens, vocabulary] tensor.

The head is applied to the hidden states that predict a supervised token only, in chunks; where it is trained, too, the
backward pass computes each chunk's logits again instead of keeping them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.utils.checkpoint import checkpoint

from raytune_ft.core.errors import ModelError
from raytune_ft.models.attention import SEGMENTS, attention, takes_segments, without_adapter
from raytune_ft.models.chat import Encoded
from raytune_ft.models.chunks import CHUNK
from raytune_ft.models.collate import PackedBatch, group_by_budget, pack
from raytune_ft.models.frozen_head import can_be_summed, summed_loss
from raytune_ft.models.loading import LoadedModel
from raytune_ft.models.neighbours import dynamic_rotaries, factors_by_row, long_from, why_alone
from raytune_ft.models.virtual import Extended, VirtualTokens

_TOKENS_ON_CPU, _TOKENS_ON_GPU = 512, 8192
_TIMES = ("logit_scale", "lm_head_multiplier")
_DIVIDED = ("logits_scaling", "logits_mup_width_multiplier")
_CAPPED = ("final_logit_softcapping", "logits_soft_cap")
"""Settings by which models change their logits behind the head."""


@dataclass(frozen=True)
class Score:
    """Sum of the negative log-likelihoods (nats) of a row's supervised tokens, and how many there are.

    `windows` is more than 1 for a row that is longer than the model's context.
    """

    nll: float
    tokens: int
    windows: int = 1


@dataclass(frozen=True)
class CausalParts:
    """The two halves of a causal language model: tokens to hidden states, and hidden states to logits.

    `virtual` are the learned tokens before every row, under prompt and prefix tuning. `scale` is what the hidden states
    are multiplied by before the head, where the model multiplies its logits.
    """

    decoder: nn.Module
    head: nn.Module
    virtual: VirtualTokens | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: Any) -> CausalParts:
        """The halves of a transformers model, or of the one inside a PEFT model.

        Raises:
            ModelError: if the model has no such halves.
        """
        causal = without_adapter(model)
        decoder = causal.get_decoder() if hasattr(causal, "get_decoder") else None
        head = causal.get_output_embeddings()
        name = type(causal).__name__
        if decoder is None or head is None or decoder is causal:
            raise ModelError(f"{name}: has no separate decoder and output head; only causal language models are taken")
        settings = causal.config.get_text_config()
        scale = math.prod(getattr(settings, key, None) or 1.0 for key in _TIMES)
        scale /= math.prod(getattr(settings, key, None) or 1.0 for key in _DIVIDED)
        if scale != 1.0 and getattr(head, "bias", None) is not None:
            raise ModelError(f"{name}: multiplies the logits of a head with a bias, which is not supported")
        caps = [cap for key in _CAPPED if (cap := getattr(settings, key, None))]
        return cls(decoder, CappedHead(head, float(caps[0])) if caps else head, VirtualTokens.of(model), scale)


class CappedHead(nn.Module):
    """An output head whose logits a tangent bends towards a bound (Gemma 2: arXiv:2408.00118)."""

    def __init__(self, head: Any, cap: float) -> None:
        super().__init__()
        self.head, self.cap = head, cap
        self.out_features: int = head.weight.shape[0]

    def forward(self, states: Tensor) -> Tensor:
        """[..., vocabulary] float32 logits of [..., width] states."""
        logits: Tensor = self.head(states).float()
        return self.cap * torch.tanh(logits / self.cap)


class SummedLoss(nn.Module):
    """A causal language model as a module from a padding-free batch to its summed loss (nats).

    Subclasses are other objectives. One that measures more than its loss gives all sums at once, as `measures` says.
    """

    measures: ClassVar[tuple[str, ...]] = ("loss",)
    """What the sums are of, the loss first; divided by the batches' items they are means."""
    is_likelihood: ClassVar[bool] = True
    """Whether an evaluation's loss is the mean negative log-likelihood of tokens, which has a perplexity."""
    writes_text: ClassVar[bool] = True
    """Whether the model can be asked for answers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self._parts = (CausalParts.of(model),)  # in a tuple, so that the halves are not registered twice

    @property
    def parts(self) -> CausalParts:
        """The model's halves."""
        return self._parts[0]

    def forward(self, batch: PackedBatch) -> Tensor:
        """The sum of the batch's target losses; 0, still depending on the model, if it has no targets."""
        states = target_states(self.parts, batch)
        if can_be_summed(self.parts.head, states):
            return summed_loss(self.parts.head, states, batch.targets)
        return _losses(self.parts.head, states, batch.targets).sum()


def target_losses(parts: CausalParts, batch: PackedBatch) -> Tensor:
    """Negative log-likelihood of every target.

    Args:
        parts: of a model whose attention is ``segments``.
        batch: on the model's device.

    Returns:
        [targets] float32, in nats, differentiable.
    """
    return _losses(parts.head, target_states(parts, batch), batch.targets)


def target_states(parts: CausalParts, batch: PackedBatch) -> Tensor:
    """[targets, width] what the head predicts the targets from; of a batch without targets none, yet with a gradient.

    An empty batch still depends on the model, so that every rank has a gradient to reduce.
    """
    states = _target_states(parts, batch)
    return states if parts.scale == 1.0 else states * parts.scale


def _target_states(parts: CausalParts, batch: PackedBatch) -> Tensor:
    virtual = parts.virtual
    if virtual is None:
        hidden = hidden_states(
            parts.decoder,
            batch.cu_seq_lens,
            batch.longest,
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
        )
        return hidden.index_select(0, batch.predictors)
    extended = Extended.of(batch, virtual.count)
    if virtual.kind == "PREFIX_TUNING":
        prefixes = virtual.prefixes(extended)
        more = {"position_ids": batch.position_ids + virtual.count, "prefixes": prefixes}
        hidden = hidden_states(parts.decoder, batch.cu_seq_lens, batch.longest, input_ids=batch.input_ids, **more)
        prefixes.check()
        return hidden.index_select(0, batch.predictors)
    decoder: Any = parts.decoder
    tokens = decoder.get_input_embeddings()(batch.input_ids)
    embeddings = extended.join(virtual.embeddings(), tokens, 1)
    hidden = hidden_states(
        parts.decoder,
        extended.cu_seq_lens,
        extended.longest,
        inputs_embeds=embeddings,
        position_ids=extended.position_ids,
    )
    return hidden.index_select(0, extended.tokens[batch.predictors])


def hidden_states(decoder: nn.Module, starts: Tensor, longest: int, **inputs: Any) -> Tensor:
    """[tokens, width] hidden states of rows that start at `starts`; each row's are what they would be alone.

    The host does not wait for the device, but where rows are computed one at a time.

    Args:
        decoder: its attention is ``segments``.
        starts: [rows + 1] int32, where each row starts, and the number of tokens.
        longest: tokens of the longest row.
        inputs: of the decoder.

    Raises:
        ModelError: for a prefix before rows that have to be computed one at a time.
    """
    if why_alone(decoder) is not None:
        return _one_by_one(decoder, starts, **inputs)
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    if long_from(decoder) is None:
        return _computed(decoder, **inputs, **lengths)
    positions = inputs["position_ids"]
    ends = positions[0, starts[1:].long() - 1] + 1
    of_place = torch.repeat_interleave(ends, starts[1:] - starts[:-1], output_size=positions.shape[1])
    with factors_by_row(decoder, of_place[None]):
        return _computed(decoder, **inputs, **lengths)


def _one_by_one(decoder: nn.Module, starts: Tensor, **inputs: Any) -> Tensor:
    if inputs.pop("prefixes", None) is not None:
        raise ModelError(
            f"prefix tuning: {type(decoder).__name__} {why_alone(decoder)}, and such layers take no prefix; take "
            "prompt_tuning or lora"
        )
    lengths = (starts[1:] - starts[:-1]).tolist()
    # Without starts: some layers refuse packed rows that they could not keep apart, even a single one.
    more = {"one_segment": True} if takes_segments(decoder) else {}
    taken = inspect.signature(decoder.forward).parameters
    names = [name for name in inputs if name in taken or more]
    rows = zip(*(torch.split(inputs[name], lengths, dim=1) for name in names), strict=True)
    found, rotaries = [], dynamic_rotaries(decoder)
    for row in rows:
        for rotary in rotaries:
            rotary.max_seq_len_cached = 0
        found.append(_computed(decoder, **dict(zip(names, row, strict=True)), **more))
    return torch.cat(found)


def _computed(decoder: nn.Module, **inputs: Any) -> Tensor:
    found: Tensor = decoder(**inputs, use_cache=False).last_hidden_state[0]
    return found


def _losses(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    if len(targets) <= CHUNK:  # computing the only chunk again would save nothing
        return _chunk_losses(head, states, targets)
    chunks = zip(torch.split(states, CHUNK), torch.split(targets, CHUNK), strict=True)
    return torch.cat([checkpoint(_chunk_losses, head, *chunk, use_reentrant=False) for chunk in chunks])


def _chunk_losses(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float(), targets, reduction="none")


@torch.no_grad()
def sequence_scores(loaded: LoadedModel, rows: Sequence[Encoded], *, token_budget: int | None = None) -> list[Score]:
    """Scores of `rows`, in their order; each is what it would be alone.

    A row that is longer than the model's context is scored in overlapping windows (`windows_of`).

    Args:
        loaded: the model.
        rows: token ids with their supervised marks.
        token_budget: most tokens that are computed at the same time; by default few on a CPU, whose caches hold a
            layer's activations of no more, and many on a GPU.
    """
    parts = CausalParts.of(loaded.model)
    budget = token_budget or (_TOKENS_ON_CPU if loaded.device == "cpu" else _TOKENS_ON_GPU)
    context = context_tokens(loaded.model)
    pieces = [(number, piece) for number, row in enumerate(rows) for piece in windows_of(row, context)]
    nll, tokens, windows = [0.0] * len(rows), [0] * len(rows), [0] * len(rows)
    with attention(loaded.model, SEGMENTS):
        for group in group_by_budget([len(piece.input_ids) for _, piece in pieces], budget):
            batch = pack([pieces[place][1] for place in group])
            losses = target_losses(parts, batch.to(loaded.device)).double().cpu()
            sums = torch.zeros(len(group), dtype=torch.float64).index_add_(0, batch.row_of_target, losses).tolist()
            counts = torch.bincount(batch.row_of_target, minlength=len(group)).tolist()
            for place, total, count in zip(group, sums, counts, strict=True):
                number = pieces[place][0]
                nll[number] += total
                tokens[number] += count
                windows[number] += 1
    return [Score(*found) for found in zip(nll, tokens, windows, strict=True)]


def windows_of(row: Encoded, context: int | None) -> list[Encoded]:
    """The row in windows of at most `context` tokens, each half new; every supervised token counts in just one.

    A token beyond the first window sees half a context at least (as in transformers' perplexity guide, with a stride
    of half the context). Windows that score nothing are left out.
    """
    length = len(row.input_ids)
    if context is None or length <= context:
        return [row]
    stride = max(1, context // 2)
    found: list[Encoded] = []
    scored = 0
    while scored < length:
        end = min(length, scored + stride if scored else context)
        start = max(0, end - context)
        supervised = [False] * (scored - start) + list(row.supervised[scored:end])
        if any(supervised) or (end == length and not found):
            found.append(Encoded(list(row.input_ids[start:end]), supervised))
        scored = end
    return found


def context_tokens(model: Any) -> int | None:
    """Most tokens of a row, learned virtual ones aside; None where the model names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    virtual = VirtualTokens.of(model)
    return int(limit) - (virtual.count if virtual else 0) if limit else None


def check_vocabulary(loaded: LoadedModel) -> None:
    """Refuses a tokenizer with more tokens than the model has embeddings for.

    Raises:
        ModelError: with both numbers.
    """
    where = f"{loaded.reference.given}: its tokenizer ({loaded.reference.tokenizer_source})"
    check_embeddings(loaded.model, loaded.tokenizer, where)


def check_embeddings(model: Any, tokenizer: Any, tokenizer_name: str) -> None:
    """As `check_vocabulary`, of a model and a tokenizer by themselves.

    Special tokens that stand for pictures or sounds, which text and template do not hold, may lie beyond.

    Raises:
        ModelError: with both numbers.
    """
    weight = model.get_input_embeddings().weight
    held = getattr(weight, "ds_shape", weight.shape)[0]
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= held}
    if not all(_is_never_written(tokenizer, token, number) for token, number in beyond.items()):
        raise ModelError(
            f"{tokenizer_name} knows {max(beyond.values()) + 1} tokens, but "
            f"the model has embeddings for {held}: they do not belong together. Use the model's own tokenizer."
        )


def _is_never_written(tokenizer: Any, token: str, number: int) -> bool:
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(number)
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = added is not None and added.special
    return special and number not in used and token not in str(tokenizer.chat_template or "")
