"""Golden answers: what a trained model says to a few prompts, kept beside it, so that a server can prove itself.

A wrong chat template, another tokenizer or broken weights change the prompt's tokens or the probabilities of the
answers, which is seen before the first request.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.core.records import Message
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.loading import LoadedModel
from raytune_ft.models.references import resolve_model

GOLDEN = "golden.json"


class GoldenTurn(BaseModel, extra="forbid"):
    """A turn of a golden prompt."""

    role: str
    content: str


class GoldenAnswer(BaseModel, extra="forbid"):
    """A prompt, its tokens, and the greedy answer with each token's log-probability.

    The prompt is a conversation, or (`messages` empty) text whose tokens are known; `text` is empty where the tokens
    do not follow from it.
    """

    messages: list[GoldenTurn] = []
    text: str = ""
    prompt_ids: list[int] = Field(min_length=1)
    answer: str
    token_ids: list[int] = Field(min_length=1)
    logprobs: list[float] = Field(min_length=1)


class Golden(BaseModel, extra="forbid"):
    """The file ``golden.json`` of a model's folder."""

    schema_version: Literal[1] = 1
    answers: list[GoldenAnswer] = Field(min_length=1)


def golden_answers(loaded: LoadedModel, prompts: Sequence[Sequence[Message]], *, max_new_tokens: int) -> Golden:
    """What `loaded` answers greedily to `prompts` (each ends with a user's turn).

    Raises:
        DataError: if the chat template refuses a prompt.
    """
    answers = _answered(loaded, [loaded.chat.prompt_ids(prompt) for prompt in prompts], max_new_tokens)
    turns = [[GoldenTurn(role=message.role, content=message.content) for message in prompt] for prompt in prompts]
    return Golden(answers=[one.model_copy(update={"messages": t}) for one, t in zip(answers, turns, strict=True)])


def golden_continuations(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[GoldenAnswer]:
    """As `golden_answers`, to token ids."""
    texts = [str(loaded.tokenizer.decode(list(ids), skip_special_tokens=False)) for ids in prompts]
    known = [
        text if list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) == list(ids) else ""
        for text, ids in zip(texts, prompts, strict=True)
    ]
    answers = _answered(loaded, prompts, max_new_tokens)
    return [one.model_copy(update={"text": text}) for one, text in zip(answers, known, strict=True)]


def _answered(loaded: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[GoldenAnswer]:
    from raytune_ft.models.decoding import Decoder
    from raytune_ft.models.neighbours import why_answered_alone

    if why_answered_alone(loaded.model) is not None:
        return [_answered_alone(loaded, list(prompt), max_new_tokens) for prompt in prompts]
    decoder = Decoder(loaded)
    decoding = DecodingConfig(max_new_tokens=max_new_tokens)
    rows = [decoder.new_row(loaded, list(prompt), decoding, top_logprobs=0) for prompt in prompts]
    decoder.join(rows)
    while decoder.step():
        pass
    return [
        GoldenAnswer(
            prompt_ids=list(row.prompt_ids),
            answer=row.stream.text,
            token_ids=[entry.token for entry in row.logprobs],
            logprobs=[entry.logprob for entry in row.logprobs],
        )
        for row in rows
    ]


def _answered_alone(loaded: LoadedModel, prompt: list[int], max_new_tokens: int) -> GoldenAnswer:
    """By transformers' own loop, for models that keep more than keys and values."""
    from raytune_ft.models.neighbours import generate_alone

    stops = loaded.stop_ids
    found = generate_alone(loaded, prompt, stops, max_new_tokens, output_logits=True, return_dict_in_generate=True)
    said = found.sequences[0, len(prompt) :].tolist()
    kept = said[:-1] if said[-1] in stops else said
    return GoldenAnswer(
        prompt_ids=prompt,
        answer=str(loaded.tokenizer.decode(kept, skip_special_tokens=True)),
        token_ids=said,
        logprobs=[
            float(step[0].float().log_softmax(-1)[token]) for step, token in zip(found.logits, said, strict=True)
        ],
    )


def write_golden(golden: Golden, folder: Path) -> None:
    """Puts the file into a model's folder."""
    (folder / GOLDEN).write_text(golden.model_dump_json(indent=1) + "\n", encoding="utf-8")


def inherit_golden(reference: str, folder: Path) -> None:
    """Copies a model's golden answers, if it has any, to what is made from it and should answer alike."""
    resolved = resolve_model(reference)
    source = (resolved.adapter or Path(resolved.base)) / GOLDEN
    if source.is_file():
        shutil.copyfile(source, folder / GOLDEN)


def read_golden(folder: Path) -> Golden | None:
    """The golden answers of a model's folder; None if it has none.

    Raises:
        ModelError: if the file is damaged.
    """
    path = folder / GOLDEN
    if not path.exists():
        return None
    try:
        return Golden.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path}: is no file of golden answers ({first_line(error)}); take it away to serve without"
        ) from None
