"""Answers decoded together though they begin and end at different times: rows join and leave between two steps.

Each row has its own sampling, limits and adapter, and gets the answer that it would get alone. Prompt and prefix
tuning are one more kind of prompt here: after the first step they are keys and values like any others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from raytune_ft.core.errors import ModelError
from raytune_ft.models.adapter_slots import AdapterSlots
from raytune_ft.models.attention import without_adapter
from raytune_ft.models.collate import group_by_budget
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.loading import LoadedModel
from raytune_ft.models.neighbours import factors_by_row, long_from, why_answered_alone
from raytune_ft.models.row_cache import RowCache
from raytune_ft.models.sampling import Sampler, TokenLogprob, logprobs_of
from raytune_ft.models.text_stream import TextStream
from raytune_ft.models.virtual import KNOWN_METHODS, VirtualTokens

_CHUNK = 512
"""Prompt tokens whose logits are held at once where their log-probabilities are asked for."""


@dataclass(frozen=True)
class Prefix:
    """What prompt or prefix tuning puts before a prompt, once: embeddings [virtual tokens, width], or each layer's
    keys and values [1, heads, virtual tokens, head size]."""

    count: int
    embeddings: Tensor | None = None
    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def of(cls, virtual: VirtualTokens) -> Prefix:
        """Those of a PEFT model's active adapter."""
        if virtual.kind == KNOWN_METHODS[0]:
            return cls(virtual.count, embeddings=virtual.embeddings()[0].detach())
        found = virtual.model.get_prompt(batch_size=1).layers
        return cls(virtual.count, layers=tuple((layer.keys.detach(), layer.values.detach()) for layer in found))


@dataclass
class Row:
    """One answer: what was asked, and what came of it so far.

    `top_logprobs` None asks for no log-probabilities; `echo` for those of the prompt's tokens, too. `logprobs` has one
    more than `token_ids` where a token ended the answer.
    """

    prompt_ids: Sequence[int]
    decoding: DecodingConfig
    sampler: Sampler
    stream: TextStream
    slot: int = 0
    prefix: Prefix | None = None
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end it."""
    top_logprobs: int | None = None
    echo: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    delta: str = ""
    """Text that the last step made showable."""
    finish_reason: Literal["stop", "length"] | None = None
    stop_token: int | None = None
    """The token that ended the answer, if one did."""

    @property
    def tokens(self) -> int:
        """Tokens that its keys and values hold, virtual ones included."""
        return (self.prefix.count if self.prefix else 0) + len(self.prompt_ids) + max(len(self.token_ids) - 1, 0)

    def push(self, token: int) -> None:
        """Takes the next token, and says whether the answer ends with it."""
        if token in self.stop_ids:
            self.stop_token = token
            return self._end("stop")
        self.token_ids.append(token)
        self.delta = self.stream.push(token)
        if self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.decoding.max_new_tokens:
            self._end("length")
        return None

    def _end(self, reason: Literal["stop", "length"]) -> None:
        held = self.stream.finish()
        self.delta = (self.delta if reason == "length" else "") + held
        # A stop text may end only with what was held back.
        self.finish_reason = "stop" if self.stream.stopped else reason


@dataclass
class _Reading:
    """A prompt that is read alone, in pieces: what is read of it so far."""

    row: Row
    cache: RowCache
    place: int = 0

    @property
    def done(self) -> bool:
        """Whether all of it is read."""
        return self.place >= len(self.row.prompt_ids)


def _cache_argument(model: Any) -> str:
    """How a model's forward calls its keys and values: ``cache``, or ``past_key_values`` in older transformers."""
    causal = without_adapter(model)
    return "cache" if "cache" in inspect.signature(type(causal).forward).parameters else "past_key_values"


class Decoder:
    """Rows in the midst of being answered by one model."""

    def __init__(
        self,
        loaded: LoadedModel,
        slots: AdapterSlots | None = None,
        *,
        prefill_tokens: int = 2048,
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        self._model, self._device = loaded.model, loaded.device
        virtual = VirtualTokens.of(loaded.model)
        self._own = Prefix.of(virtual) if virtual else None
        if virtual is not None:
            self._model = loaded.model.get_base_model()
        reason = why_answered_alone(self._model)
        if reason is not None:
            raise ModelError(
                f"{loaded.reference.given}: {type(self._model).__name__} {reason}; the transformers engine serves "
                "models that keep keys and values only"
            )
        self._long_from = long_from(self._model)
        self._cache_argument = _cache_argument(self._model)
        self._slots = slots
        self._stop_ids = frozenset(loaded.stop_ids if stop_ids is None else stop_ids)
        self._prefill_tokens = prefill_tokens
        self._cache: RowCache | None = None
        self._reading: dict[int, _Reading] = {}
        self.rows: list[Row] = []

    def new_row(self, loaded: LoadedModel, prompt_ids: Sequence[int], decoding: DecodingConfig, **asked: Any) -> Row:
        """A row that has not joined; `asked` are further fields of `Row`, and `whole` as `TextStream` takes it."""
        stream = TextStream(loaded.tokenizer, decoding.stop, whole=asked.pop("whole", False))
        own = {"sampler": Sampler(decoding, self._device), "prefix": self._own, "stop_ids": self._stop_ids}
        return Row(prompt_ids, decoding, stream=stream, **{**own, **asked})

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> None:
        """Reads the rows' prompts and chooses their first tokens; those that do not end with it stay."""
        lengths = [row.tokens for row in rows]
        together: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            together.setdefault(-1 - place if row.echo else id(row.prefix), []).append(place)
        for places in together.values():
            for group in group_by_budget([lengths[place] for place in places], self._prefill_tokens, padded=True):
                self._read([rows[places[number]] for number in group])

    @torch.inference_mode()
    def read(self, row: Row, tokens: int) -> bool:
        """Reads at most `tokens` more of a row's prompt; with the last of them it joins, which is what is returned.

        Between two calls the others can step: a long prompt need not hold them up as long as all of it takes.
        """
        with self._adapters([row]):
            reading = self._reading.pop(id(row), None) or self._begun(row)
            logits = self._piece(reading, tokens)
        if reading.done:
            self._enter([row], reading.cache, logits)
        else:
            self._reading[id(row)] = reading
        return reading.done

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Decodes one token of every row; returns the rows, the ended ones among them having left."""
        self._read_again()
        rows, cache = self.rows, self._cache
        if not rows or cache is None:
            return []
        for row in rows:
            row.delta = ""
        ids = torch.tensor([[row.token_ids[-1]] for row in rows], device=self._device)
        with self._adapters(rows):
            logits = self._forward(rows, cache, 1, input_ids=ids)[:, -1]
        self._choose(rows, logits)
        self._keep([row for row in rows if row.finish_reason is None])
        return rows

    @torch.inference_mode()
    def leave(self, rows: Iterable[Row]) -> None:
        """Takes rows out, finished or not."""
        gone = {id(row) for row in rows}
        self._reading = {number: reading for number, reading in self._reading.items() if number not in gone}
        self._keep([row for row in self.rows if id(row) not in gone])

    def _read(self, rows: list[Row]) -> None:
        with self._adapters(rows):
            if rows[0].echo:  # reads alone
                reading = self._begun(rows[0])
                while not reading.done:
                    logits = self._piece(reading, _CHUNK)
                cache = reading.cache
            else:
                cache = self._before(rows)
                logits = self._prompts(rows, cache)
        self._enter(rows, cache, logits)

    def _enter(self, rows: list[Row], cache: RowCache, logits: Tensor) -> None:
        """Chooses the first tokens of rows that are read; those that do not end with it join the others."""
        self._choose(rows, logits)
        staying = [place for place, row in enumerate(rows) if row.finish_reason is None]
        if not staying:
            return
        if len(staying) < len(rows):
            order = cache.keep(staying, max(rows[place].tokens for place in staying))
            rows = [rows[place] for place in order]
        self._add(rows, cache)

    def _add(self, rows: list[Row], cache: RowCache) -> None:
        if self._cache is not None and self.rows:
            self._cache.join(cache)
        else:
            self._cache = cache
        self.rows = [*self.rows, *rows]

    def _factors(self, rows: list[Row]) -> AbstractContextManager[None]:
        if self._long_from is None:
            return nullcontext()
        whole = torch.tensor([[row.tokens + bool(row.token_ids)] for row in rows], device=self._device)
        return factors_by_row(self._model, whole)

    def _read_again(self) -> None:
        """Under longrope: keys of rows that are about to get the long factors are made anew, with these."""
        again = [row for row in self.rows if row.tokens == self._long_from]
        if not again:
            return
        self.leave(again)
        for row in again:
            with self._adapters([row]):
                reading = self._begun(row)
                ids = torch.tensor([[*row.prompt_ids, *row.token_ids[:-1]]], device=self._device)
                self._forward([row], reading.cache, ids.shape[1], input_ids=ids)
            self._add([row], reading.cache)

    @staticmethod
    def _before(rows: list[Row]) -> RowCache:
        """The cache as prefix tuning leaves it for these rows; else an empty one."""
        prefix = rows[0].prefix
        if prefix is None or not prefix.layers:
            return RowCache()
        return RowCache.of(
            [tuple(part.expand(len(rows), -1, -1, -1) for part in pair) for pair in prefix.layers]  # type: ignore[misc]
        )

    def _prompts(self, rows: list[Row], cache: RowCache) -> Tensor:
        """Reads the prompts in one padded batch; [rows, vocabulary] logits behind their last tokens."""
        longest = max(len(row.prompt_ids) for row in rows)
        if cache.columns and min(len(row.prompt_ids) for row in rows) < longest:
            return self._one_by_one(rows, cache)
        ids = torch.tensor([[0] * (longest - len(row.prompt_ids)) + list(row.prompt_ids) for row in rows])
        ids = ids.to(self._device)
        learned = rows[0].prefix.embeddings if rows[0].prefix else None
        if learned is None:
            return self._forward(rows, cache, longest, input_ids=ids)[:, -1]
        tokens = self._model.get_input_embeddings()(ids)
        behind = [
            torch.cat([tokens[place, :pad], learned.to(tokens.dtype), tokens[place, pad:]])
            for place, pad in enumerate(longest - len(row.prompt_ids) for row in rows)
        ]
        return self._forward(rows, cache, longest + len(learned), inputs_embeds=torch.stack(behind))[:, -1]

    def _one_by_one(self, rows: list[Row], cache: RowCache) -> Tensor:
        """Prompts of several lengths behind a prefix of keys and values, which stands before the padding."""
        logits, joined = [], None
        for row in rows:
            alone = self._before([row])
            with self._adapters([row]):
                logits.append(self._prompts([row], alone))
            if joined is None:
                joined = alone
            else:
                joined.join(alone)
        assert joined is not None
        cache.layers = joined.layers
        return torch.cat(logits)

    def _begun(self, row: Row) -> _Reading:
        """A row of whose prompt nothing is read, behind what it has learned."""
        reading = _Reading(row, self._before([row]))
        learned = row.prefix.embeddings if row.prefix else None
        if learned is not None:
            like = self._model.get_input_embeddings().weight
            self._forward([row], reading.cache, len(learned), inputs_embeds=learned[None].to(like.dtype))
        return reading

    def _piece(self, reading: _Reading, tokens: int) -> Tensor:
        """Reads on; [1, vocabulary] logits behind the last token. For an echo keeps the log-probabilities of what
        follows each."""
        row, start = reading.row, reading.place
        ids = torch.tensor([list(row.prompt_ids[start : start + tokens])], device=self._device)
        reading.place += ids.shape[1]
        logits = self._forward([row], reading.cache, ids.shape[1], keep=0 if row.echo else 1, input_ids=ids)[0]
        if row.echo:
            following = torch.tensor(row.prompt_ids[start + 1 : reading.place + 1], device=self._device)
            row.prompt_logprobs += logprobs_of(logits[: len(following)], following, row.top_logprobs or 0)
        return logits[-1:]

    def _forward(self, rows: list[Row], cache: RowCache, width: int, *, keep: int = 1, **inputs: Tensor) -> Tensor:
        """[rows, kept, vocabulary] logits of `width` more columns, which all rows end at."""
        columns = cache.columns + width
        ends = [min(row.tokens + (width if row.token_ids else 0), columns) for row in rows]
        held = torch.tensor(ends, device=self._device)[:, None]
        columns_back = torch.arange(columns, 0, -1, device=self._device)  # 1 is the last one
        mask = None if min(ends) == columns else (columns_back <= held).long()
        positions = (held - columns_back[-width:]).clamp_min(0)
        with self._factors(rows):
            out = self._model(
                **inputs,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=keep,
                **{self._cache_argument: cache},
            )
        logits: Tensor = out.logits
        return logits

    def _choose(self, rows: list[Row], logits: Tensor) -> None:
        likeliest = logits.argmax(dim=-1).tolist()
        for place, row in enumerate(rows):
            token = likeliest[place] if row.sampler.greedy else row.sampler.draw(logits[place])
            row.push(token)
            if row.top_logprobs is not None:
                chosen = torch.tensor([token], device=logits.device)
                row.logprobs += logprobs_of(logits[place : place + 1], chosen, row.top_logprobs)

    def _keep(self, rows: list[Row]) -> None:
        if len(rows) == len(self.rows):
            return
        places = {id(row): place for place, row in enumerate(self.rows)}
        kept = [places[id(row)] for row in rows]
        if not rows:
            self.rows, self._cache = [], None
            return
        assert self._cache is not None
        order = self._cache.keep(kept, max(row.tokens for row in rows))
        self.rows = [self.rows[place] for place in order]

    def _adapters(self, rows: list[Row]) -> Any:
        return self._slots.rows([row.slot for row in rows]) if self._slots else nullcontext()
