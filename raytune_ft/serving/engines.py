"""What answers requests: one loop over one model, which requests join and leave between two tokens.

The loop has a thread of its own. Whatever changes the model (an adapter loaded or dropped) happens in it, between
two steps; what comes of a request goes to its listener, in the listener's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Self

from raytune_ft.core.errors import ModelError, RaytuneError
from raytune_ft.core.records import Message
from raytune_ft.models.chat import Chat
from raytune_ft.models.config import Precision
from raytune_ft.models.decoding import Decoder, Row
from raytune_ft.models.loading import LoadedModel, load_model
from raytune_ft.models.scoring import context_tokens
from raytune_ft.serving.adapters import Adapter, AdapterSet
from raytune_ft.serving.rows import CheckedSampler, has_failed
from raytune_ft.serving.tickets import Events, GenerationRequest, Progress, Ticket

logger = logging.getLogger("raytune_ft")

_READ_AT_ONCE = 2048
"""Prompt tokens of those who join together that are read between two steps."""


class TransformersEngine:
    """Anything that `transformers` and `peft` load: full precision, bitsandbytes, adapters, pruned folders.

    Its int8 layers may let neighbours change an answer by rounding (bitsandbytes, where a batch has outliers).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_threads: int = 1,
        max_batch_size: int = 8,
        max_adapters: int = 8,
        max_lora_rank: int = 64,
        prefill_tokens: int = 512,
    ) -> None:
        import torch

        torch.set_num_threads(num_threads)
        # bitsandbytes' int8 layers warn at each call that they cast their input to fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        self.loaded = loaded
        self.adapters = AdapterSet(loaded, most=max_adapters, max_rank=max_lora_rank)
        self._decoder = Decoder(loaded, self.adapters.slots)
        self._num_threads, self._max_batch_size = num_threads, max_batch_size
        self._prefill_tokens = prefill_tokens
        self._inbox: queue.SimpleQueue[Ticket | Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        self._reading: deque[Ticket] = deque()
        """Of the running ones, those whose long prompts are read in pieces, one between two steps."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        reference: str,
        *,
        precision: Precision = Precision.AUTO,
        device: str | None = None,
        adapters: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Self:
        """The engine for a model reference, with adapters by their names.

        Raises:
            ModelError: if the model, or an adapter, cannot be loaded.
        """
        engine = cls(load_model(reference, precision=precision, device=device), **settings)
        try:
            for name, where in (adapters or {}).items():
                engine.add_adapter(name, where)
        except RaytuneError:
            engine.close()
            raise
        return engine

    @property
    def context_tokens(self) -> int | None:
        """Most tokens of prompt and answer together; None where the model names no limit."""
        return context_tokens(self.loaded.model)

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    @property
    def load_now(self) -> tuple[int, int]:
        """Requests that are being decoded, and that wait."""
        return len(self._running), self._inbox.qsize() + len(self._waiting)

    def chat(self, adapter: str | None = None) -> Chat:
        """The tokenizer and chat template that an adapter's requests are read and answered with.

        Raises:
            ModelError: if the adapter is not loaded.
        """
        return self.adapters.chat(adapter)

    def prompt_ids(self, messages: Sequence[Message], adapter: str | None = None) -> tuple[int, ...]:
        """The conversation through the chat template, as in training.

        Raises:
            DataError: if the template refuses the conversation.
            ModelError: if the adapter is not loaded.
        """
        return tuple(self.chat(adapter).prompt_ids(messages))

    def submit(self, request: GenerationRequest, events: Events | None = None) -> Ticket:
        """Enters a request whose progress goes to `events`; to be called in the event loop that listens there.

        Raises:
            ModelError: if the adapter is not loaded.
        """
        if not self.alive:
            raise ModelError("the engine's loop has ended")
        adapter = self.adapters.take(request.adapter) if request.adapter is not None else None
        ticket = Ticket(request, adapter, asyncio.Queue() if events is None else events, asyncio.get_running_loop())
        self._inbox.put(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Takes a request out before the next token; nothing happens if it is answered."""
        ticket.cancelled = True

    def add_adapter(self, name: str, reference: str) -> None:
        """Loads an adapter beside the running requests, and returns when it can be asked for.

        Raises:
            ModelError: if it belongs to another base, is of a kind that cannot be mixed, is beyond the limits, or
                holds no numbers.
        """
        found = self.adapters.find(name, reference)
        self._in_loop(lambda: self.adapters.add(name, found))

    def drop_adapter(self, name: str) -> None:
        """Drops an adapter: requests that have it are answered, further ones are refused.

        Raises:
            ModelError: if it is not loaded.
        """
        self._in_loop(lambda: self.adapters.drop(name))

    async def answer(self, request: GenerationRequest) -> list[Progress]:
        """Everything that comes of a request."""
        ticket = self.submit(request)
        found: list[Progress] = []
        try:
            while not found or (found[-1].finish_reason is None and found[-1].error is None):
                found.append((await ticket.events.get())[1])
        finally:
            self.cancel(ticket)
        return found

    def close(self) -> None:
        """Ends the loop; requests in it get an error."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
            self._thread.join(30)

    def _in_loop(self, action: Callable[[], None]) -> None:
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
                done.set_result(None)
            except Exception as error:  # noqa: BLE001 - it belongs to the caller, who waits for it
                done.set_exception(error)

        self._inbox.put(run)
        done.result(timeout=600)

    def _run(self) -> None:
        import torch

        torch.set_num_threads(self._num_threads)  # a thread's own setting, where OpenMP keeps one
        while not self._closed:
            self._receive(block=not self._running and not self._waiting)
            self._forget_cancelled()
            told = self._admitted() + self._read_on() + self._stepped()
            self._tell(told)
        for ticket in [*self._running.values(), *self._waiting]:
            self._tell([(ticket, Progress("", 0, error=ModelError("the engine was closed")))])

    def _receive(self, *, block: bool) -> None:
        while True:
            try:
                entry = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            if isinstance(entry, Ticket):
                self._waiting.append(entry)
            elif entry is not None:
                entry()

    def _forget_cancelled(self) -> None:
        gone = [ticket for ticket in self._running.values() if ticket.cancelled]
        if gone:
            self._decoder.leave([ticket.row for ticket in gone if ticket.row is not None])
            for ticket in gone:
                self._forget(ticket)
            self._reading = deque(ticket for ticket in self._reading if not ticket.cancelled)
        if any(ticket.cancelled for ticket in self._waiting):
            for ticket in [ticket for ticket in self._waiting if ticket.cancelled]:
                self._release(ticket)
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)

    def _admitted(self) -> list[tuple[Ticket, Progress]]:
        """Lets waiting requests join, as far as there is room; many long prompts take several steps of the others."""
        joining: list[Ticket] = []
        tokens = 0
        while self._waiting and len(self._running) < self._max_batch_size:
            length = len(self._waiting[0].request.prompt_ids)
            in_pieces = length > self._prefill_tokens
            tokens += 0 if in_pieces else length
            if joining and tokens > _READ_AT_ONCE:
                break
            ticket = self._waiting.popleft()
            ticket.row = self._row(ticket.request, ticket.adapter)
            self._running[id(ticket.row)] = ticket
            (self._reading if in_pieces else joining).append(ticket)
        if not joining:
            return []
        rows = [ticket.row for ticket in joining if ticket.row is not None]
        try:
            self._decoder.join(rows)
        except Exception as error:
            logger.exception("requests could not be read")
            self._decoder.leave(rows)
            return [self._failed(ticket, error) for ticket in joining]
        return self._progress(joining)

    def _read_on(self) -> list[tuple[Ticket, Progress]]:
        """Reads a piece of the first long prompt; behind its last one the request joins."""
        if not self._reading:
            return []
        ticket = self._reading[0]
        assert ticket.row is not None
        try:
            if not self._decoder.read(ticket.row, self._prefill_tokens):
                return []
        except Exception as error:
            logger.exception("a request could not be read")
            self._reading.popleft()
            self._decoder.leave([ticket.row])
            return [self._failed(ticket, error)]
        self._reading.popleft()
        return self._progress([ticket])

    def _stepped(self) -> list[tuple[Ticket, Progress]]:
        if not self._decoder.rows:
            return []
        try:
            rows = self._decoder.step()
        except Exception as error:
            logger.exception("a step failed")
            failed = [self._running[id(row)] for row in self._decoder.rows]
            self._decoder.leave(list(self._decoder.rows))
            return [self._failed(ticket, error) for ticket in failed]
        return self._progress([self._running[id(row)] for row in rows])

    def _row(self, request: GenerationRequest, adapter: Adapter | None) -> Row:
        asked = {"slot": adapter.slot, "prefix": adapter.prefix} if adapter else {}
        chat = adapter.chat if adapter else self.loaded.chat
        loaded = replace(self.loaded, tokenizer=chat.tokenizer, chat=chat)
        return self._decoder.new_row(
            loaded,
            request.prompt_ids,
            request.decoding,
            top_logprobs=request.top_logprobs,
            echo=request.echo,
            whole=not request.streamed,
            sampler=CheckedSampler(request.decoding, self.loaded.device),
            stop_ids=frozenset(loaded.stop_ids),
            **asked,
        )

    def _progress(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Progress]]:
        told = []
        for ticket in tickets:
            row = ticket.row
            assert row is not None
            if has_failed(row):
                logger.error(
                    "the model's logits for a request are no numbers: %s", ticket.request.adapter or "no adapter"
                )
                self._decoder.leave([row])
                told.append(self._failed(ticket, ModelError("the model gave no numbers for this request")))
                continue
            ended = row.finish_reason is not None
            ticket.began = ticket.began or time.monotonic()
            if ended:
                self._forget(ticket)
            if not ended and not ticket.request.streamed:
                continue
            text = row.delta if ticket.request.streamed else row.stream.text
            echoed = row.prompt_logprobs if ticket.told == 0 else ()
            told.append((ticket, Progress(
                text, len(row.token_ids), row.logprobs[ticket.told :], echoed, row.finish_reason
            )))  # fmt: skip
            ticket.told = len(row.logprobs)
        return told

    def _failed(self, ticket: Ticket, error: Exception) -> tuple[Ticket, Progress]:
        self._forget(ticket)
        return ticket, Progress("", 0, error=error)

    def _forget(self, ticket: Ticket) -> None:
        self._running.pop(id(ticket.row), None)
        self._release(ticket)

    def _release(self, ticket: Ticket) -> None:
        if ticket.adapter is not None:
            self.adapters.give_back(ticket.adapter)

    @staticmethod
    def _tell(told: Sequence[tuple[Ticket, Progress]]) -> None:
        """One wake-up of each event loop for all that a step brought."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Progress]]] = {}
        for ticket, progress in told:
            by_loop.setdefault(ticket.loop, []).append((ticket, progress))
        for loop, events in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, events)


def _deliver(events: Sequence[tuple[Ticket, Progress]]) -> None:
    for ticket, progress in events:
        ticket.events.put_nowait((ticket, progress))
