"""One replica without HTTP and without Ray: requests to the engine, its progress to answers, figures and records."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from raytune_ft.core.errors import ModelError
from raytune_ft.models.chat import Chat
from raytune_ft.serving.answers import DONE, Answer, Choice, event
from raytune_ft.serving.board import Bulletin
from raytune_ft.serving.catalogue import Catalogue
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.engines import TransformersEngine
from raytune_ft.serving.experiment import Experiment, Exposure
from raytune_ft.serving.faults import GONE, ApiError
from raytune_ft.serving.feedback import Feedback, Journal, timestamp
from raytune_ft.serving.metrics import Metrics
from raytune_ft.serving.prompts import Prompts
from raytune_ft.serving.protocol import ChatRequest, CompletionRequest
from raytune_ft.serving.rates import Rates
from raytune_ft.serving.tickets import Events, GenerationRequest, Progress, Ticket, merged

logger = logging.getLogger("raytune_ft")


@dataclass
class Job:
    """What one HTTP request asks of the engine: the requests, how they are answered, and how they are logged."""

    requests: list[GenerationRequest]
    answer: Answer
    choices: list[Choice]
    include_usage: bool
    prompts: Sequence[dict[str, Any]]
    """What the request log keeps of each choice's prompt."""
    state: Any
    """The request's; a stream puts the status that it ends with there, as ``ended``, before its last event."""
    exposure: Exposure | None = None
    """Of a request that an A/B test has given a variant."""
    tickets: dict[int, int] = field(default_factory=dict)
    """The index of the choice that a ticket (by its identity) belongs to."""

    def choice_of(self, ticket: Ticket) -> Choice:
        """The choice that a ticket answers."""
        return self.choices[self.tickets[id(ticket)]]


class Service:
    """The engine behind an endpoint, with its catalogue of models, limits, figures and records."""

    def __init__(self, config: ServingConfig, engine: TransformersEngine, *, replica: str, board: Bulletin) -> None:
        self.config, self.engine, self.replica = config, engine, replica
        self.created = int(time.time())
        self.metrics = Metrics(replica)
        self.rates = Rates(config.requests_per_minute, replicas=config.num_replicas)
        self.prompts = Prompts(engine)
        self.catalogue = Catalogue(config, engine, self.metrics, board, self.rates)
        self.feedback = Journal(config.feedback_path, f"feedback-{replica}") if config.feedback_path else None
        self.experiment = Experiment(config, self.metrics)
        self.log = Journal(config.request_log_path, f"requests-{replica}") if config.request_log_path else None

    async def chat_job(self, request: ChatRequest, state: Any, exposure: Exposure | None = None) -> Job:
        """What a chat request asks for, of the variant that `exposure` gives it, where it is in an A/B test.

        Raises:
            ApiError: for an unknown model, an unsupported option, or a prompt beyond the limits.
        """
        model = exposure.model if exposure else request.model
        adapter = await self._adapter(model, state)
        request.refuse_unsupported()
        self._refuse_too_many(request.choices)
        messages = [message.to_message() for message in request.messages]
        chat = self._chat(adapter, model)
        ids = await self.prompts.of_chat(messages, chat, request.chat_template_kwargs)
        answer = Answer(model, chat.tokenizer, True, len(ids), request.top is not None)
        logged = {"messages": [{"role": message.role, "content": message.content} for message in messages]}
        requests = self._spread(request, ids, adapter, request.top)
        choices = [Choice(index) for index in range(len(requests))]
        return Job(requests, answer, choices, request.include_usage, [logged] * len(requests), state, exposure)

    async def completion_job(self, request: CompletionRequest, state: Any, exposure: Exposure | None = None) -> Job:
        """What a completion request asks for; every prompt has its choices, in order.

        Raises:
            ApiError: as `chat_job`.
        """
        model = exposure.model if exposure else request.model
        adapter = await self._adapter(model, state)
        request.refuse_unsupported()
        self._refuse_too_many(len(request.prompts) * request.choices)
        chat, echo = self._chat(adapter, model), bool(request.echo)
        requests: list[GenerationRequest] = []
        choices: list[Choice] = []
        prompts: list[dict[str, Any]] = []
        total = 0
        for prompt in request.prompts:
            ids = await self.prompts.of_completion(prompt, chat)
            total += len(ids)
            text = prompt if isinstance(prompt, str) else chat.tokenizer.decode(ids)
            for one in self._spread(request, ids, adapter, request.logprobs, echo=echo):
                given = (text, ids[0], ()) if echo else ("", None, ids)
                choices.append(Choice(len(choices), *given))
                requests.append(one)
                prompts.append({"prompt": text})
        answer = Answer(
            model, chat.tokenizer, False, total, request.logprobs is not None, without_text=request.max_tokens == 0
        )
        return Job(requests, answer, choices, request.include_usage, prompts, state, exposure)

    async def whole(self, job: Job) -> dict[str, Any]:
        """The finished body.

        Raises:
            ApiError: 429 if too many wait, 504 at the deadline, 404 if the adapter went.
        """
        async with aclosing(self._progress(job)) as found:
            async for _ in found:
                pass
        await self._logged(job)
        await self.experiment.answered(job.exposure, job.answer, job.choices)
        return job.answer.body(job.choices)

    async def streamed(self, job: Job, entered: tuple[Events, list[Ticket]]) -> AsyncGenerator[str, None]:
        """The answer as server-sent events; an error comes as an event, since the status has gone out."""
        try:
            with self.experiment.watched(job.exposure):
                async with aclosing(self._progress(job, entered)) as found:
                    async for choice, progress in found:
                        told = job.answer.event(choice, progress)
                        if told:
                            yield told
                await self._logged(job)
                await self.experiment.answered(job.exposure, job.answer, job.choices)
        except ApiError as error:
            job.state.ended = error.status
            yield event(error.body)
            return
        if job.include_usage:
            yield job.answer.usage_event(job.answer.completion_tokens(job.choices))
        job.state.ended = 200
        yield DONE

    def enter(self, job: Job) -> tuple[Events, list[Ticket]]:
        """Puts a job's requests into the engine.

        Raises:
            ApiError: 429 if too many wait, 404 if the adapter went, 503 if the engine ended.
        """
        running, waiting = self.engine.load_now
        if running + waiting + len(job.requests) > self._most_answers:
            raise ApiError(429, "too many requests are waiting; try again later", kind="rate_limit_error")
        events: Events = asyncio.Queue()
        tickets: list[Ticket] = []
        try:
            for index, request in enumerate(job.requests):
                tickets.append(self.engine.submit(request, events))
                job.tickets[id(tickets[-1])] = index
        except ModelError as error:
            for ticket in tickets:
                self.engine.cancel(ticket)
            if not self.engine.alive:
                raise ApiError(503, str(error), kind="server_error") from None
            raise ApiError(404, str(error), param="model", code="model_not_found") from None
        return events, tickets

    def left(self, job: Job, tickets: Sequence[Ticket]) -> None:
        """Takes the tickets of a stream out that ended, or whose client went before it began."""
        for ticket in tickets:
            self.engine.cancel(ticket)
        self.experiment.failed(job.exposure, GONE)

    async def keep_feedback(self, feedback: Feedback) -> None:
        """Puts a judgement on the disk.

        Raises:
            ApiError: if feedback is not kept here, or cannot be written.
        """
        if self.feedback is None:
            raise ApiError(404, "feedback is not kept here: feedback_path is not set", code="feedback_disabled")
        record = feedback.record()
        try:
            await asyncio.to_thread(self.feedback.append, record)
        except OSError as error:
            raise ApiError(503, f"the feedback could not be written: {error.strerror}", kind="server_error") from None
        self.metrics.feedback.labels(self.replica).inc()
        self.experiment.judged(feedback)

    def close(self) -> None:
        """Ends the engine and closes the files."""
        self.engine.close()
        self.experiment.close()
        for journal in (self.feedback, self.log):
            if journal is not None:
                journal.close()

    async def _progress(
        self, job: Job, entered: tuple[Events, list[Ticket]] | None = None
    ) -> AsyncGenerator[tuple[Choice, Progress], None]:
        events, tickets = entered or self.enter(job)
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout_s
        open_ones = len(tickets)
        try:
            while open_ones:
                async with asyncio.timeout_at(deadline):
                    found = [await events.get()]
                while not events.empty():
                    found.append(events.get_nowait())
                for ticket, progress in merged(found):
                    if progress.error is not None:
                        raise ApiError(
                            500, "the engine failed on this request", kind="server_error"
                        ) from progress.error
                    choice = job.choice_of(ticket)
                    choice.take(progress)
                    if progress.finish_reason is not None:
                        open_ones -= 1
                        self._measure(ticket, choice)
                        if job.exposure is not None and ticket.began is not None:
                            job.exposure.began_at(ticket.began)
                    yield choice, progress
        except TimeoutError:
            limit = self.config.request_timeout_s
            raise ApiError(504, f"no answer within {limit:g} seconds", kind="timeout_error") from None
        finally:
            for ticket in tickets:
                self.engine.cancel(ticket)

    def _measure(self, ticket: Ticket, choice: Choice) -> None:
        labels = (self.replica, self.config.served_name, ticket.request.adapter or "")
        now = time.monotonic()
        began = ticket.began or now
        self.metrics.duration.labels(*labels).observe(now - ticket.entered)
        self.metrics.first_token.labels(*labels).observe(began - ticket.entered)
        if choice.tokens > 1:
            self.metrics.per_token.labels(*labels).observe((now - began) / (choice.tokens - 1))
        self.metrics.prompt_tokens.labels(*labels).inc(len(ticket.request.prompt_ids))
        self.metrics.completion_tokens.labels(*labels).inc(choice.tokens)

    @property
    def _most_answers(self) -> int:
        """Of all requests together, answered or waiting."""
        return self.config.max_queued_requests + self.config.max_batch_size

    def _refuse_too_many(self, answers: int) -> None:
        """Before its prompts are read, which may be many."""
        if answers > self._most_answers:
            raise ApiError(400, f"{answers} answers in one request: at most {self._most_answers} here", param="n")

    async def _adapter(self, model: str, state: Any) -> str | None:
        adapter = await self.catalogue.adapter_of(model)
        state.model, state.adapter = self.config.served_name, adapter or ""
        return adapter

    def _chat(self, adapter: str | None, model: str) -> Chat:
        try:
            return self.engine.chat(adapter)
        except ModelError:  # dropped a moment ago
            message = f"the model {model[:200]!r} is not served here any more"
            raise ApiError(404, message, param="model", code="model_not_found") from None

    def _spread(
        self,
        request: ChatRequest | CompletionRequest,
        ids: Sequence[int],
        adapter: str | None,
        top: int | None,
        *,
        echo: bool = False,
    ) -> list[GenerationRequest]:
        """One engine request for each of the n choices of a prompt; their seeds follow one another."""
        decoding = request.decoding(
            len(ids), context_tokens=self.context_tokens(adapter), max_new_tokens=self.config.max_new_tokens
        )
        return [
            GenerationRequest(
                ids,
                decoding.with_overrides(seed=decoding.seed + number) if number else decoding,
                adapter,
                top,
                echo=echo and top is not None,
                streamed=bool(request.stream),
            )
            for number in range(request.choices)
        ]

    def context_tokens(self, adapter: str | None) -> int | None:
        """Most tokens of prompt and answer, an adapter's virtual tokens left out."""
        limit = self.engine.context_tokens
        return None if limit is None else limit - self.engine.adapters.virtual_tokens(adapter)

    async def _logged(self, job: Job) -> None:
        """Writes a finished job to the request log, if there is one; a line that cannot be written is lost and told."""
        if self.log is None:
            return
        for choice, prompt in zip(job.choices, job.prompts, strict=True):
            text = "" if job.answer.without_text else choice.text
            record = {**_exchange(prompt, text), "model": job.answer.model, "id": job.answer.sent_id,
                      "finish_reason": choice.finish_reason, "time": timestamp()}  # fmt: skip
            if not await asyncio.to_thread(self.log.keep, record):
                self.metrics.log_lost.labels(self.replica).inc()


def _exchange(prompt: dict[str, Any], text: str) -> dict[str, Any]:
    """A prompt with its answer, in a format that `prepare` reads."""
    if "messages" in prompt:
        return {"messages": [*prompt["messages"], {"role": "assistant", "content": text}]}
    return {"prompt": prompt["prompt"], "completion": text}
