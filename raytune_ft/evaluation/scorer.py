"""What answers for targets: one loaded base with its adapters, or an endpoint; records in, measured rows out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from raytune_ft.core.cluster import usable_cpus
from raytune_ft.core.errors import DataError, RaytuneError
from raytune_ft.core.records import Message, Record
from raytune_ft.evaluation.endpoint import EndpointClient, Reply, Request
from raytune_ft.evaluation.kept import Row
from raytune_ft.evaluation.workload import Target, Workload
from raytune_ft.models.chat import Chat, Encoded, encode_record
from raytune_ft.models.config import TrainOn

OnRows = Callable[[list[Row]], None]
"""Told measured rows as they are done; a row with ``error`` has no answer."""

_RECORDS_AT_ONCE = 128
"""Records whose likelihoods are computed between two times that rows are kept."""


class Scorer(Protocol):
    """Measures records for its targets."""

    def measure(self, label: str, records: Sequence[Record], on_rows: OnRows) -> None:
        """Measures records for one of the targets."""


def load_scorer(targets: Sequence[Target], work: Workload, *, threads: int = 1, concurrency: int = 1) -> Scorer:
    """The scorer of targets that `workload.grouped` put together.

    Raises:
        ModelError: if a model cannot be loaded.
    """
    if targets[0].is_endpoint:
        return EndpointScorer(targets[0], work, concurrency=concurrency)
    return ModelScorer(targets, work, threads)


class ModelScorer:
    """A base loaded once, with the adapters of its targets upon it."""

    def __init__(self, targets: Sequence[Target], work: Workload, threads: int) -> None:
        import torch

        from raytune_ft.models.probe import check_computation
        from raytune_ft.models.scoring import check_vocabulary

        # An actor that holds one CPU starts with one thread.
        torch.set_num_threads(max(1, min(threads, usable_cpus())))
        # bitsandbytes' int8 layers warn at each call that they cast their input to fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        self.work = work
        self._adapters: dict[str, str | None] = {}
        self.loaded, self._chats = self._load(targets)
        check_vocabulary(self.loaded)
        check_computation(self.loaded.model)

    def _load(self, targets: Sequence[Target]) -> tuple[Any, dict[str, Chat]]:
        from raytune_ft.models.combination import load_adapters
        from raytune_ft.models.loading import load_model, load_tokenizer
        from raytune_ft.models.references import resolve_model

        if len(targets) == 1:
            loaded = load_model(targets[0].path, precision=self.work.precision)
            return loaded, {targets[0].label: loaded.chat}
        paths = {}
        for number, target in enumerate(targets):
            name = f"target{number}" if resolve_model(target.path).adapter else None
            self._adapters[target.label] = name
            if name is not None:
                paths[name] = target.path
        chats = {target.label: Chat(load_tokenizer(target.path)) for target in targets}
        return load_adapters(paths, precision=self.work.precision), chats

    @contextmanager
    def chosen(self, label: str) -> Iterator[Any]:
        """The loaded model as this target is: its adapter, or none, upon the base, and its own chat template."""
        chat = self._chats[label]
        loaded = replace(self.loaded, tokenizer=chat.tokenizer, chat=chat)
        if label not in self._adapters:
            yield loaded
        elif (name := self._adapters[label]) is not None:
            self.loaded.model.set_adapter(name)
            yield loaded
        else:
            with self.loaded.model.disable_adapter():
                yield loaded

    def measure(self, label: str, records: Sequence[Record], on_rows: OnRows) -> None:
        """Measures records; likelihoods first, then each answer as it ends."""
        with self.chosen(label) as loaded:
            ready: list[tuple[Record, Row, list[int]]] = []
            for start in range(0, len(records), _RECORDS_AT_ONCE):
                part = _Part(loaded, self.work, records[start : start + _RECORDS_AT_ONCE])
                if part.failed:
                    on_rows(part.failed)
                done = [row for _, row, prompt in part.ready if not prompt]
                if done:
                    on_rows(done)
                ready += [waiting for waiting in part.ready if waiting[2]]
            if ready:
                self._answer(loaded, ready, on_rows)

    def _answer(self, loaded: Any, ready: list[tuple[Record, Row, list[int]]], on_rows: OnRows) -> None:
        from raytune_ft.models.generation import Completion, generate, row_seed

        def told(found: Any) -> None:
            done = []
            for number, completion in found.items():
                assert isinstance(completion, Completion)
                answered = Reply(completion.text, completion.finish_reason, len(completion.token_ids))
                done.append(_answered(ready[number][0], ready[number][1], answered, self.work))
            on_rows(done)

        seeds = [row_seed(self.work.decoding.seed, record.id) for record, _, _ in ready]
        generate(loaded, [prompt for _, _, prompt in ready], self.work.decoding, seeds=seeds, on_answers=told)


class _Part:
    """Some records with their likelihoods and prompts (raw text has none); those that do not fit the model apart."""

    def __init__(self, loaded: Any, work: Workload, records: Sequence[Record]) -> None:
        self.ready: list[tuple[Record, Row, list[int]]] = []
        self.failed: list[Row] = []
        scored: list[Encoded] = []
        for record in records:
            row = _blank(record)
            try:
                prompt = _prompt_ids(loaded, record) if work.answers and record.messages else []
                scored += _rows_to_score(loaded.chat, record, work)
            except DataError as error:
                self.failed.append({**row, **_asked(record, work), "error": str(error), "fault": type(error).__name__})
            else:
                self.ready.append((record, row, prompt))
        if scored:
            self._score(loaded, work, scored)

    def _score(self, loaded: Any, work: Workload, scored: list[Encoded]) -> None:
        from raytune_ft.models.scoring import sequence_scores

        scores = iter(sequence_scores(loaded, scored))
        for record, row, _ in self.ready:
            if work.likelihoods:
                score = next(scores)
                row |= {"nll": score.nll, "tokens": score.tokens, "windows": score.windows}
                row["bytes"] = supervised_bytes(record)
            if work.choices:
                found = [(choice, next(scores)) for choice in choices_of(record)]
                row["choices"] = [
                    {"text": choice, "nll": score.nll, "bytes": len(choice.encode())} for choice, score in found
                ]


class EndpointScorer:
    """A served model: its answers, and where its tokenizer is known, the likelihoods of given texts."""

    def __init__(self, target: Target, work: Workload, *, concurrency: int) -> None:
        self.work = work
        self.client = EndpointClient(target.path, work.endpoint, work.decoding, concurrency=concurrency)
        self._chat: Chat | None = None
        if work.endpoint.tokenizer is not None and (work.likelihoods or work.choices):
            from raytune_ft.models.loading import load_tokenizer

            self._chat = Chat(load_tokenizer(work.endpoint.tokenizer))

    def measure(self, label: str, records: Sequence[Record], on_rows: OnRows) -> None:
        """Asks for every record's likelihoods, then for its answer."""
        for start in range(0, len(records), _RECORDS_AT_ONCE):
            part = records[start : start + _RECORDS_AT_ONCE]
            rows = {number: _blank(record) for number, record in enumerate(part)}
            if self._chat is not None:
                failed = self._likelihoods(self._chat, part, rows)
                if failed:
                    on_rows([rows.pop(number) for number in failed])
            if self.work.answers:
                self._answers({number: part[number] for number in rows}, rows, on_rows)
            elif rows:
                on_rows(list(rows.values()))

    def _answers(self, records: dict[int, Record], rows: dict[int, Row], on_rows: OnRows) -> None:
        from raytune_ft.models.generation import row_seed

        seed, numbers = self.work.decoding.seed, list(records)
        requests = [Request(r.prompt, r.tools, row_seed(seed, r.id)) for r in records.values()]

        def told(place: int, reply: Reply) -> None:
            number = numbers[place]
            on_rows([_answered(records[number], rows[number], reply, self.work)])

        self.client.ask(requests, told)

    def _likelihoods(self, chat: Chat, records: Sequence[Record], rows: dict[int, Row]) -> list[int]:
        """Adds the likelihoods to the rows; the numbers of those that have none, with the reason in the row."""
        texts: list[tuple[int, Encoded]] = []
        faults: dict[int, tuple[str, str]] = {}
        for number, record in enumerate(records):
            try:
                texts += [(number, text) for text in _rows_to_score(chat, record, self.work)]
            except DataError as error:
                faults[number] = str(error), type(error).__name__
        replies: dict[int, Reply] = {}
        self.client.score([text.input_ids for _, text in texts], replies.__setitem__)
        scores: dict[int, list[tuple[float, int]]] = {}
        for place, (number, text) in enumerate(texts):
            reply = replies[place]
            if reply.error is not None:
                faults.setdefault(number, (reply.error, RaytuneError.__name__))
                continue
            pairs = zip(text.supervised[1:], reply.logprobs, strict=True)
            counted = [-value for supervised, value in pairs if supervised]
            scores.setdefault(number, []).append((sum(counted), len(counted)))
        for number, row in rows.items():
            if number in faults:
                row |= {"error": faults[number][0], "fault": faults[number][1]}
                continue
            found = iter(scores[number])
            if self.work.likelihoods:
                nll, tokens = next(found)
                row |= {"nll": nll, "tokens": tokens, "windows": 1, "bytes": supervised_bytes(records[number])}
            if self.work.choices:
                row["choices"] = [
                    {"text": choice, "nll": next(found)[0], "bytes": len(choice.encode())}
                    for choice in choices_of(records[number])
                ]
        return sorted(faults)


def choices_of(record: Record) -> list[str]:
    """The answers that a record lets choose from: ``choices`` of its metadata; empty if it has none."""
    found = record.metadata.get("choices")
    return [str(choice) for choice in found] if isinstance(found, list | tuple) else []


def supervised_bytes(record: Record) -> int:
    """Bytes (UTF-8) of the text whose tokens `encode_record` supervises, calls of tools as JSON; tokens that end a turn
    have none."""
    if not record.messages:
        return len((record.text or "").encode())
    turns = [turn for turn in with_reference(record).messages if turn.role == "assistant"]
    answers = [turn.content + (turn.tool_calls or "") for turn in turns if turn.weight != 0]
    spans = record.metadata.get("supervised_spans")
    if spans is not None and turns:
        answers = [turns[-1].content[start:end] for start, end in spans]
    return sum(len(answer.encode()) for answer in answers)


def with_reference(record: Record) -> Record:
    """The record with its reference as the last assistant turn, where it has none."""
    if record.messages and record.messages[-1].role != "assistant" and record.reference is not None:
        return replace(record, messages=(*record.messages, Message("assistant", record.reference)))
    return record


def _rows_to_score(chat: Chat, record: Record, work: Workload) -> list[Encoded]:
    """Tokens with supervised marks of the reference, then of each choice in its place."""
    rows = [encode_record(chat, with_reference(record))] if work.likelihoods else []
    if work.choices:
        for choice in choices_of(record):
            chosen = Record(messages=(*record.prompt, Message("assistant", choice)), tools=record.tools)
            rows.append(encode_record(chat, chosen, TrainOn.LAST_ASSISTANT_TURN))
    return rows


def _prompt_ids(loaded: Any, record: Record) -> list[int]:
    from raytune_ft.models.scoring import context_tokens

    ids: list[int] = loaded.chat.prompt_ids(record.prompt, tools=record.tools)
    context = context_tokens(loaded.model)
    if context is not None and len(ids) >= context:
        raise DataError(
            f"its prompt has {len(ids)} tokens, and the model takes {context} together with the answer; shorten it, or "
            "leave the row out"
        )
    return ids


def _blank(record: Record) -> Row:
    return {"position": record.position, "id": record.id}


def _asked(record: Record, work: Workload) -> Row:
    """What a row keeps of its record."""
    if not work.keeps_prompt:
        return {}
    turns = [{key: value for key, value in vars(turn).items() if value is not None} for turn in record.prompt]
    return {"messages": turns, "metadata": dict(record.metadata)}


def _answered(record: Record, row: Row, reply: Reply, work: Workload) -> Row:
    kept = _asked(record, work)
    if reply.error is not None:
        return {**row, **kept, "error": reply.error, "fault": RaytuneError.__name__, "attempts": reply.attempts}
    if work.keeps_prompt:
        kept["messages"].append({"role": "assistant", "content": reply.answer})
    return {
        **row,
        **kept,
        "answer": reply.answer,
        "finish_reason": reply.finish_reason,
        "answer_tokens": reply.answer_tokens,
    }
