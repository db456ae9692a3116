"""The engine: whatever shares a batch, each request gets the answer that it would get alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.errors import DataError, ModelError
from raytune_ft.core.records import Message
from raytune_ft.models.adapters import add_virtual_tokens, save_adapter
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import Completion
from raytune_ft.models.loading import load_model
from raytune_ft.serving.engines import GenerationRequest, TransformersEngine, batches


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model), device="cpu")


def ask(engine: TransformersEngine, text: str, *, seeded: bool = False, **decoding: object) -> GenerationRequest:
    return GenerationRequest(engine.prompt_ids([Message("user", text)]), DecodingConfig(**decoding), seeded)


def test_mixed_lengths_and_limits_answer_as_they_would_alone(engine: TransformersEngine):
    asked = [
        ask(engine, "What is the capital of France?", max_new_tokens=12),
        ask(engine, "1", max_new_tokens=5),
        ask(engine, "The quick brown fox jumps over the lazy dog. " * 5, max_new_tokens=30),
        ask(engine, "yes", max_new_tokens=1),
    ]
    assert batches(asked) == [[0, 1, 2, 3]]
    alone = [engine.answer([request])[0] for request in asked]
    assert engine.answer(asked) == alone
    for request, answer in zip(asked, alone, strict=True):
        limit = request.decoding.max_new_tokens
        assert len(answer.token_ids) == limit if answer.finish_reason == "length" else len(answer.token_ids) < limit


@pytest.mark.parametrize(
    ("limit", "stop", "text", "reason"),
    [
        (2, (), "red blue", "length"),
        (2, ("green",), "red blue", "length"),
        (2, ("blue",), "red ", "stop"),
        (3, ("green",), "red blue ", "stop"),
    ],
)
def test_an_answer_is_cut_at_its_own_limit_as_if_it_had_ended_there(
    engine: TransformersEngine, limit: int, stop: tuple[str, ...], text: str, reason: str
):
    ids = engine.loaded.tokenizer("red blue green")["input_ids"]
    words = [len(engine.loaded.tokenizer(start)["input_ids"]) for start in ("red", "red blue", "red blue green")]
    decoding = DecodingConfig(max_new_tokens=words[limit - 1], stop=stop)
    cut = engine._shortened(Completion("red blue green", ids, "length"), decoding)
    assert (cut.text, cut.finish_reason, len(cut.token_ids)) == (text, reason, words[limit - 1])


def test_a_seeded_request_has_the_same_answer_in_any_company(engine: TransformersEngine):
    seeded = ask(engine, "red", seeded=True, max_new_tokens=16, temperature=1.0, seed=7)
    others = [ask(engine, text, max_new_tokens=9, temperature=1.0, seed=1) for text in ("blue", "green")]
    alone = engine.answer([seeded])[0]
    assert engine.answer([others[0], seeded, others[1]])[1] == alone
    assert engine.answer([others[0]])[0].token_ids != alone.token_ids


def test_requests_that_decode_differently_form_batches_of_their_own():
    def one(seeded: bool = False, **decoding: object) -> GenerationRequest:
        return GenerationRequest((1, 2), DecodingConfig(**decoding), seeded)

    asked = [
        one(),
        one(temperature=1.0, seed=1),
        one(stop=("x",)),
        one(seed=9, max_new_tokens=3),
        one(temperature=1.0, seed=2),
        one(temperature=1.0, seed=3, seeded=True),
        one(temperature=1.0, seed=3, seeded=True),
        one(temperature=1.0, top_p=0.5),
    ]
    assert batches(asked) == [[0, 3], [1, 4], [2], [5], [6], [7]]


def test_the_prompt_is_the_chat_templates(engine: TransformersEngine):
    ids = engine.prompt_ids([Message("user", "hi")])
    assert engine.loaded.tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert engine.context_tokens == 512


def test_virtual_tokens_count_towards_the_context(tiny_model: Path, tmp_path: Path):
    loaded = load_model(str(tiny_model))
    model = add_virtual_tokens(loaded.model, kind="prompt_tuning", count=12, seed=0, base=str(tiny_model))
    save_adapter(model, loaded.tokenizer, tmp_path / "prompt")
    assert TransformersEngine.load(str(tmp_path / "prompt"), device="cpu").context_tokens == 500


def test_a_conversation_that_the_template_refuses_is_the_callers_mistake(tiny_model: Path):
    engine = TransformersEngine.load(str(tiny_model), device="cpu")
    engine.loaded.tokenizer.chat_template = "{{ raise_exception('two user turns in a row') }}"
    with pytest.raises(DataError, match="two user turns in a row"):
        engine.prompt_ids([Message("user", "hi")])


def test_a_folder_without_weights_is_a_model_error(tiny_model: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded"):
        TransformersEngine.load(str(tmp_path), device="cpu")
