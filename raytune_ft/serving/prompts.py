"""Prompts to token ids: short ones at once, long ones beside the event loop, hopeless ones not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Message
from raytune_ft.serving.engines import TransformersEngine
from raytune_ft.serving.faults import ApiError

_SHORT = 4096
"""Characters that are tokenized in the event loop; longer texts would hold up the others' tokens."""


class Prompts:
    """Tokenizes what requests send, with the errors that they are answered with."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine

    async def of_chat(self, messages: Sequence[Message]) -> Sequence[int]:
        """The conversation through the chat template.

        Raises:
            ApiError: 400, if the template refuses it, or it is beyond the context for certain.
        """
        characters = sum(len(message.content) for message in messages)
        try:
            return await self._tokenized(characters, lambda: self._engine.prompt_ids(messages), "messages")
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None

    async def of_completion(self, prompt: str | list[int]) -> Sequence[int]:
        """A text as the tokenizer begins texts, or token ids as they are.

        Raises:
            ApiError: 400, for an empty text, unknown tokens, or a text beyond the context for certain.
        """
        tokenizer = self._engine.loaded.tokenizer
        if isinstance(prompt, str):
            ids = await self._tokenized(len(prompt), lambda: tokenizer(prompt)["input_ids"], "prompt")
            if not ids:
                raise ApiError(400, "prompt: is empty", param="prompt")
            return ids
        vocabulary = self._engine.loaded.model.get_input_embeddings().weight.shape[0]
        beyond = next((token for token in prompt if token >= vocabulary), None)
        if beyond is not None:
            raise ApiError(400, f"prompt: {beyond} is no token of this model's {vocabulary}", param="prompt")
        return prompt

    async def _tokenized(self, characters: int, tokenize: Callable[[], Sequence[int]], param: str) -> Sequence[int]:
        limit, longest = self._engine.context_tokens, self._longest_token
        if limit is not None and longest is not None and characters > limit * longest:
            raise ApiError(
                400,
                f"the prompt's {characters} characters are at least {characters // longest} tokens, beyond this "
                f"model's context of {limit}; shorten the {param}",
                param=param,
                code="context_length_exceeded",
            )
        return tokenize() if characters <= _SHORT else await asyncio.to_thread(tokenize)

    @cached_property
    def _longest_token(self) -> int | None:
        """Most characters that one token stands for; None where a normalizer may drop some before."""
        backend = self._engine.loaded.tokenizer.backend_tokenizer
        kind = type(backend.normalizer).__name__
        if backend.normalizer is not None and kind != "NFC":
            return None
        composed = 3 if kind == "NFC" else 1  # NFC makes one character of at most three
        return composed * max(map(len, backend.get_vocab(with_added_tokens=True)))
