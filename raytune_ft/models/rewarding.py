"""Reward models: causal decoders with one output, which scores a conversation by the state of its last token.

The head, and which token it reads, are those of transformers' ``...ForSequenceClassification`` with one label, so that
plain transformers and PEFT load what is trained here and give the same scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.core.errors import ModelError
from raytune_ft.models.attention import SEGMENTS, attention, without_adapter
from raytune_ft.models.chat import Chat, Encoded
from raytune_ft.models.collate import PackedBatch, group_by_budget, pack
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import UNREADABLE, LoadedModel, load_tokenizer, model_problem, put_adapter, torch_dtype
from raytune_ft.models.references import refuse_writer, resolve_model
from raytune_ft.models.scoring import hidden_states


@dataclass(frozen=True)
class RewardParts:
    """The two halves of a reward model: tokens to hidden states, and the last one's state to a reward."""

    decoder: nn.Module
    head: Any
    pad: int | None
    """Token that is passed over when a row's last one is looked for, as transformers does."""

    @classmethod
    def of(cls, model: Any) -> RewardParts:
        """The halves of a transformers model, or of the one inside a PEFT model.

        Raises:
            ModelError: if it has no such halves, or more outputs than one.
        """
        scorer = without_adapter(model)
        head = getattr(scorer, "score", None)
        if head is None or scorer.get_decoder() is scorer or scorer.config.num_labels != 1:
            raise ModelError(
                f"{type(scorer).__name__}: is no reward model, which has a decoder and a head 'score' of one label"
            )
        return cls(scorer.get_decoder(), head, scorer.config.pad_token_id)


def row_rewards(parts: RewardParts, batch: PackedBatch) -> Tensor:
    """[rows] float32, the reward of each row.

    Args:
        parts: of a model whose attention is ``segments``.
        batch: on the model's device.
    """
    hidden = hidden_states(
        parts.decoder, batch.cu_seq_lens, batch.longest, input_ids=batch.input_ids, position_ids=batch.position_ids
    )
    states = hidden.index_select(0, _last_tokens(batch, parts.pad))
    found: Tensor = parts.head(states.to(parts.head.weight.dtype)).float()[:, 0]
    return found


def _last_tokens(batch: PackedBatch, pad: int | None) -> Tensor:
    """[rows] places of the last token of each row that is no padding; of a row that is nothing else, its first."""
    starts = batch.cu_seq_lens[:-1].long()
    if pad is None:
        return batch.cu_seq_lens[1:].long() - 1
    places = torch.arange(batch.tokens, device=starts.device)
    rows = torch.searchsorted(batch.cu_seq_lens[1:].long(), places, right=True)
    return starts.scatter_reduce(0, rows, torch.where(batch.input_ids[0] != pad, places, starts[rows]), "amax")


def load_reward_model(reference: str, *, precision: Precision = Precision.AUTO, device: str = "cpu") -> LoadedModel:
    """A reward model ready to score.

    Args:
        reference: folder, artifact, URI or hub id of a model with one label, or of an adapter for one.
        precision: of the weights, as in `load_model`.
        device: where it is put.

    Raises:
        ModelError: if it cannot be loaded, or is no reward model.
    """
    resolved = resolve_model(reference)
    refuse_writer(resolved)
    tokenizer = load_tokenizer(reference)
    model = load_scorer(resolved.base, tokenizer, {"dtype": torch_dtype(precision, device), "device_map": {"": device}})
    if resolved.adapter is not None:
        model = put_adapter(model, resolved.adapter, device)
    return LoadedModel(model.eval(), tokenizer, Chat(tokenizer), resolved, device)


def load_scorer(base: str, tokenizer: Any, options: dict[str, Any]) -> Any:
    """A model with one label; where its files have no head, one of random values by torch's random state.

    Args:
        base: folder or hub id.
        tokenizer: the model's, whose padding transformers passes over.
        options: further arguments of ``from_pretrained``.

    Raises:
        ModelError: if it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            num_labels=1,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except UNREADABLE as error:
        raise ModelError(model_problem(base, error)) from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def rewards(loaded: LoadedModel, rows: Sequence[Sequence[int]], *, token_budget: int = 8192) -> list[float]:
    """Rewards of token ids, in their order; each is what it would be alone.

    Args:
        loaded: a reward model.
        rows: whole conversations, as the chat template writes them.
        token_budget: most tokens that are computed at the same time.
    """
    parts = RewardParts.of(loaded.model)
    found = [0.0] * len(rows)
    with attention(loaded.model, SEGMENTS):
        for group in group_by_budget([len(row) for row in rows], token_budget):
            batch = pack([Encoded(list(rows[number]), [False] * len(rows[number])) for number in group])
            for number, reward in zip(group, row_rewards(parts, batch.to(loaded.device)).tolist(), strict=True):
                found[number] = reward
    return found
