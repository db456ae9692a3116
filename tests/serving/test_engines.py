"""The engine: whatever shares a batch, each request gets the answer that the bare model gives it alone."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import DataError, ModelError
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.core.records import Message
from raytune_ft.models.adapters import add_lora, add_virtual_tokens, save_adapter
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.decoding import Decoder
from raytune_ft.models.generation import Completion, generate
from raytune_ft.models.loading import load_model
from raytune_ft.models.references import model_parent
from raytune_ft.serving.engines import TransformersEngine
from raytune_ft.serving.tickets import GenerationRequest, Progress

TEXTS = ["What is the capital of France?", "1", "The quick brown fox jumps over the lazy dog. " * 5, "yes", "red blue"]


@pytest.fixture(scope="module")
def engine(tiny_model: Path, adapters: Path) -> Iterator[TransformersEngine]:
    names = ("a", "b", "prefix", "prompt")
    loaded = TransformersEngine.load(
        str(tiny_model), device="cpu", max_batch_size=3, adapters={name: str(adapters / name) for name in names}
    )
    yield loaded
    loaded.close()


def ask(engine: TransformersEngine, text: str, *, adapter: str | None = None, streamed: bool = False,
        top: int | None = None, **decoding: object) -> GenerationRequest:  # fmt: skip
    ids = engine.prompt_ids([Message("user", text)])
    return GenerationRequest(ids, DecodingConfig(**decoding), adapter, top, streamed=streamed)


def answers(engine: TransformersEngine, requests: Sequence[GenerationRequest], *, apart_s: float = 0.0) -> list:
    """Everything that came of each; request n enters n * `apart_s` seconds after the first."""

    async def one(place: int, request: GenerationRequest) -> list[Progress]:
        await asyncio.sleep(place * apart_s)
        return await engine.answer(request)

    async def together() -> list[list[Progress]]:
        return await asyncio.gather(*(one(place, request) for place, request in enumerate(requests)))

    return asyncio.run(together())


def told(progress: Sequence[Progress]) -> tuple[str, int, str | None]:
    return "".join(part.text for part in progress), progress[-1].tokens, progress[-1].finish_reason


def said(completion: Completion) -> tuple[str, int, str]:
    return completion.text, len(completion.token_ids), completion.finish_reason


@pytest.mark.parametrize("streamed", [False, True])
def test_requests_that_join_and_leave_get_the_answers_of_generate_alone(engine: TransformersEngine, streamed: bool):
    limits = [12, 5, 30, 1, 20]
    requests = [
        ask(engine, text, max_new_tokens=limit, streamed=streamed) for text, limit in zip(TEXTS, limits, strict=True)
    ]
    wanted = [said(generate(engine.loaded, [r.prompt_ids], r.decoding)[0]) for r in requests]
    assert [told(progress) for progress in answers(engine, requests, apart_s=0.004)] == wanted
    assert [told(progress) for progress in answers(engine, requests)] == wanted


@pytest.fixture(scope="module")
def in_pieces(tiny_model: Path, adapters: Path) -> Iterator[TransformersEngine]:
    """As `engine`, but no more than 16 prompt tokens are read at once."""
    loaded = TransformersEngine.load(
        str(tiny_model), device="cpu", max_batch_size=3, prefill_tokens=16,
        adapters={name: str(adapters / name) for name in ("a", "prefix", "prompt")},
    )  # fmt: skip
    yield loaded
    loaded.close()


def test_prompts_read_in_pieces_get_the_answers_of_whole_ones(
    engine: TransformersEngine, in_pieces: TransformersEngine
):
    requests = [
        ask(engine, text, adapter=adapter, max_new_tokens=10, top=0)
        for text in (TEXTS[2], TEXTS[2] * 2, "yes")
        for adapter in (None, "a", "prefix", "prompt")
    ]
    assert max(len(request.prompt_ids) for request in requests) > 100
    whole, pieces = answers(engine, requests), answers(in_pieces, requests, apart_s=0.002)
    assert [told(progress) for progress in pieces] == [told(progress) for progress in whole]
    for one, other in zip(pieces, whole, strict=True):
        logprobs = [[entry.logprob for part in progress for entry in part.logprobs] for progress in (one, other)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_an_echo_in_pieces_has_every_tokens_probability(engine: TransformersEngine, in_pieces: TransformersEngine):
    asked = dataclasses.replace(ask(engine, TEXTS[2], max_new_tokens=2, top=0), echo=True)
    (whole,), (pieces,) = answers(engine, [asked]), answers(in_pieces, [asked])
    assert len(pieces[0].prompt_logprobs) == len(asked.prompt_ids) - 1 > 64
    found = [[entry.logprob for entry in progress[0].prompt_logprobs] for progress in (pieces, whole)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_long_prompt_lets_the_running_answers_go_on_between_its_pieces(tiny_model: Path):
    """100 tokens in pieces of 16 are seven pieces: the other answer has six tokens more before the long one begins."""
    loaded = load_model(str(tiny_model), device="cpu")
    decoder = Decoder(loaded)
    short, long = ([1] * 4, [2] * 100)
    running = decoder.new_row(loaded, short, DecodingConfig(max_new_tokens=50))
    decoder.join([running])
    joining = decoder.new_row(loaded, long, DecodingConfig(max_new_tokens=50))
    before = len(running.token_ids)
    while not decoder.read(joining, 16):
        decoder.step()
    assert (len(running.token_ids) - before, len(joining.token_ids)) == (6, 1)
    assert decoder.rows == [running, joining]


def test_a_request_that_is_cancelled_while_it_is_read_leaves_nothing_behind(in_pieces: TransformersEngine):
    async def cancel_it() -> None:
        ticket = in_pieces.submit(ask(in_pieces, TEXTS[2] * 4, adapter="a", max_new_tokens=5))
        await asyncio.sleep(0.003)
        in_pieces.cancel(ticket)
        while in_pieces.load_now != (0, 0):
            await asyncio.sleep(0.005)

    asyncio.run(cancel_it())
    assert told(answers(in_pieces, [ask(in_pieces, "yes", max_new_tokens=3)])[0])[1] > 0


def test_a_stream_brings_its_tokens_one_by_one(engine: TransformersEngine):
    request = ask(engine, TEXTS[0], max_new_tokens=12, streamed=True, top=0)
    (progress,) = answers(engine, [request])
    assert [part.tokens for part in progress] == list(range(1, 13))
    assert all(len(part.logprobs) == 1 for part in progress)


@pytest.mark.parametrize("adapter", ["a", "b", "prefix", "prompt"])
def test_mixed_adapters_answer_as_peft_does_with_one(
    engine: TransformersEngine, tiny_model: Path, adapters: Path, adapter: str
):
    alone = load_model(str(adapters / adapter), device="cpu")
    decoding = DecodingConfig(max_new_tokens=14)
    mixed = [
        ask(engine, text, adapter=name, max_new_tokens=14)
        for text in TEXTS[:3]
        for name in (None, adapter, "a", "prefix", "b", "prompt")
    ]
    found = answers(engine, mixed)
    for request, progress in zip(mixed, found, strict=True):
        if request.adapter == adapter:
            assert told(progress) == said(generate(alone, [request.prompt_ids], decoding)[0])
        if request.adapter is None:
            assert told(progress) == said(generate(engine.loaded, [request.prompt_ids], decoding)[0])


def test_a_seeded_request_has_the_same_answer_in_any_company(engine: TransformersEngine):
    seeded = ask(engine, "red", max_new_tokens=16, temperature=1.0, seed=7, top_p=0.9)
    others = [ask(engine, text, max_new_tokens=9, temperature=1.5, seed=1) for text in ("blue", "green")]
    alone = told(answers(engine, [seeded])[0])
    assert told(answers(engine, [others[0], seeded, others[1]])[1]) == alone
    other = ask(engine, "red", max_new_tokens=16, temperature=1.0, seed=8, top_p=0.9)
    assert told(answers(engine, [other])[0])[0] != alone[0]


def test_a_stop_text_ends_the_answer_in_front_of_it(engine: TransformersEngine):
    whole = told(answers(engine, [ask(engine, TEXTS[0], max_new_tokens=20)])[0])[0]
    stop = whole[7:10]
    cut = whole[: whole.index(stop)]
    for streamed in (False, True):
        request = ask(engine, TEXTS[0], max_new_tokens=20, stop=(stop, "never said"), streamed=streamed)
        text, tokens, reason = told(answers(engine, [request])[0])
        assert (text, reason) == (cut, "stop")
        assert tokens < 20


def test_log_probabilities_are_those_of_one_forward_pass(engine: TransformersEngine):
    import torch

    request = ask(engine, TEXTS[0], max_new_tokens=6)
    ids = list(request.prompt_ids)
    echoed = GenerationRequest(ids, request.decoding, None, 2, echo=True)
    ((progress,),) = answers(engine, [echoed])
    assert len(progress.prompt_logprobs) == len(ids) - 1
    generated = [entry.token for entry in progress.logprobs]
    with torch.no_grad():
        scores = torch.log_softmax(engine.loaded.model(torch.tensor([ids + generated])).logits[0], -1)
    entries = [*progress.prompt_logprobs, *progress.logprobs]
    for place, (entry, token) in enumerate(zip(entries, (ids + generated)[1:], strict=True)):
        assert entry.token == token
        assert entry.logprob == pytest.approx(float(scores[place, token]), abs=1e-4)
        best = scores[place].topk(2)
        assert [token for token, _ in entry.top] == best.indices.tolist()


def test_a_cancelled_request_makes_room_for_the_next(engine: TransformersEngine):
    async def run() -> Progress:
        tickets = [engine.submit(ask(engine, "red", max_new_tokens=450)) for _ in range(3)]
        waiting = engine.submit(ask(engine, "blue", max_new_tokens=2))
        for ticket in tickets:
            engine.cancel(ticket)
        progress = (await asyncio.wait_for(waiting.events.get(), 20))[1]
        assert all(ticket.events.empty() for ticket in tickets)
        return progress

    assert asyncio.run(run()).finish_reason is not None
    assert engine.load_now == (0, 0)


def test_an_adapter_dropped_under_a_request_serves_it_to_its_end(engine: TransformersEngine, adapters: Path):
    engine.add_adapter("again", str(adapters / "a"))
    request = ask(engine, TEXTS[0], adapter="again", max_new_tokens=40)
    wanted = told(answers(engine, [request])[0])

    async def run() -> tuple[str, int, str | None]:
        ticket = engine.submit(request)
        await asyncio.to_thread(engine.drop_adapter, "again")
        with pytest.raises(ModelError, match="'again' is not loaded"):
            engine.submit(request)
        return told([(await ticket.events.get())[1]])

    assert asyncio.run(run()) == wanted
    assert "again" not in engine.adapters.names


def test_an_adapter_that_does_not_fit_is_refused_by_what_is_wrong(
    engine: TransformersEngine, tiny_model: Path, adapters: Path, tmp_path: Path, new_adapter: Callable[..., Path]
):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "max_length": 7}))
    new_adapter(other, tmp_path / "foreign")
    new_adapter(tiny_model, tmp_path / "wide", rank=65)
    for reference, message in [
        (tmp_path / "foreign", "belongs to the base .*other, but what is served is .*upon its own base"),
        (tmp_path / "wide", "rank 65 is above the limit of 64; raise max_lora_rank"),
        (tiny_model, "is a whole model, not an adapter"),
    ]:
        with pytest.raises(ModelError, match=message):
            engine.add_adapter("new", str(reference))
    with pytest.raises(ModelError, match="this name is taken"):
        engine.add_adapter("a", str(adapters / "b"))
    assert engine.adapters.names == ["a", "b", "prefix", "prompt"]


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_fit_what_was_made_of_their_base_without_training(
    trained: bool, tiny_model: Path, adapters: Path, tmp_path: Path
):
    parents = [model_parent(str(tiny_model))]
    if trained:
        parents.append(Parent(role="dataset", where="rows", digest="0" * 16))
    with begin(tmp_path / "made", ArtifactKind.MODEL, settings={}, parents=parents) as draft:
        shutil.copytree(tiny_model, draft.folder, dirs_exist_ok=True)
    made = TransformersEngine.load(str(tmp_path / "made"), device="cpu", max_batch_size=1)
    try:
        if not trained:
            made.add_adapter("a", str(adapters / "a"))
            return
        with pytest.raises(ModelError, match=r"belongs to the base .*upon its own base"):
            made.add_adapter("a", str(adapters / "a"))
    finally:
        made.close()


def test_an_adapter_whose_weights_are_no_numbers_is_refused(engine: TransformersEngine, adapters: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    for name in ("b", "prompt"):
        folder = Path(shutil.copytree(adapters / name, tmp_path / name))
        weights = load_file(folder / "adapter_model.safetensors")
        first = min(weights)
        weights[first].view(-1)[3] = float("inf")
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"{name}: {first} holds values that are no finite numbers"):
            engine.add_adapter("new", str(folder))
    assert engine.adapters.names == ["a", "b", "prefix", "prompt"]


def test_an_adapter_upon_layers_that_do_not_see_rows_apart_is_refused(
    tiny_model: Path, tmp_path: Path, new_adapter: Callable[..., Path]
):
    """OPT's feed-forward layers take the tokens of all rows as one list; its attention does not."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "opt")
    OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(tmp_path / "opt")  # fmt: skip
    new_adapter(tmp_path / "opt", tmp_path / "all")
    loaded = load_model(str(tmp_path / "opt"), device="cpu")
    attention = add_lora(
        loaded.model, rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"], seed=0, base=str(tmp_path / "opt")
    )
    save_adapter(attention, tokenizer, tmp_path / "attention")
    engine = TransformersEngine.load(str(tmp_path / "opt"), device="cpu")
    with pytest.raises(
        ModelError, match=r"all: .*layers\.0\.fc1 does not see rows apart .*merge it .*or serve it alone"
    ):
        engine.add_adapter("all", str(tmp_path / "all"))
    engine.add_adapter("attention", str(tmp_path / "attention"))
    both = [ask(engine, "red", adapter=name, max_new_tokens=4) for name in ("attention", None)]
    assert all(progress[-1].error is None for progress in answers(engine, both))
    engine.close()


@pytest.fixture
def templated(adapters: Path, tmp_path: Path) -> Path:
    """Adapter a with a chat template of its own, whose turns end with <|pad|>."""
    folder = Path(shutil.copytree(adapters / "a", tmp_path / "templated"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|pad|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return folder


def test_an_adapter_is_asked_and_ended_by_its_own_template(engine: TransformersEngine, templated: Path):
    alone = load_model(str(templated), device="cpu")
    engine.add_adapter("own", str(templated))
    try:
        ids = engine.prompt_ids([Message("user", "red")], "own")
        assert engine.loaded.tokenizer.decode(ids) == "[user] red<|pad|>[assistant] "
        assert engine.prompt_ids([Message("user", "red")], "b") == engine.prompt_ids([Message("user", "red")])
        pad = alone.tokenizer.pad_token_id
        assert pad in engine.chat("own").stop_ids and pad not in engine.chat("b").stop_ids
        decoding = DecodingConfig(max_new_tokens=40)
        requests = [GenerationRequest(ids, decoding, "own"), ask(engine, "red", adapter="b", max_new_tokens=9)]
        (own, _) = answers(engine, requests)
        assert told(own) == said(generate(alone, [ids], decoding)[0])
    finally:
        engine.drop_adapter("own")
    with pytest.raises(ModelError, match="'own' is not loaded"):
        engine.chat("own")


def test_a_row_ends_by_its_own_stop_tokens(engine: TransformersEngine):
    row = engine._row(ask(engine, "red", max_new_tokens=9), None)
    row.stop_ids = frozenset({5})
    row.push(7)
    assert row.finish_reason is None
    row.push(5)
    assert (row.finish_reason, row.token_ids) == ("stop", [7])


def test_a_tokenizer_with_tokens_that_the_model_has_not_is_refused(engine: TransformersEngine, templated: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(templated)
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(templated)
    with pytest.raises(
        ModelError, match=r"has the token '<\|tool\|>', which the served model .* has not; serve it alone"
    ):
        engine.add_adapter("own", str(templated))


@pytest.mark.parametrize("asked", [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"top": 1}])
def test_a_request_that_gets_no_numbers_fails_without_its_neighbours(
    tiny_model: Path, adapters: Path, asked: dict[str, object]
):
    engine = TransformersEngine.load(str(tiny_model), device="cpu", adapters={"a": str(adapters / "a")})
    slot = engine.adapters._by_name["a"].slot
    layer = next(iter(engine.adapters.slots._layers.values()))
    neighbours = [ask(engine, text, max_new_tokens=12, temperature=1.0, seed=1) for text in ("red", "blue")]
    wanted = [told(progress) for progress in answers(engine, neighbours)]
    layer.up[slot] = float("nan")
    found = answers(engine, [neighbours[0], ask(engine, "red", adapter="a", max_new_tokens=12, **asked), neighbours[1]])
    assert [told(progress) for progress in found[::2]] == wanted
    assert isinstance(found[1][-1].error, ModelError)
    assert engine.load_now == (0, 0)
    engine.close()


def test_more_adapters_than_there_is_room_for_are_refused(tiny_model: Path, adapters: Path):
    engine = TransformersEngine.load(str(tiny_model), device="cpu", max_adapters=1, adapters={"a": str(adapters / "a")})
    with pytest.raises(ModelError, match="1 LoRA adapters are loaded, which is the limit; drop one, or raise max_ad"):
        engine.add_adapter("b", str(adapters / "b"))
    engine.drop_adapter("a")
    engine.add_adapter("b", str(adapters / "b"))
    engine.close()


def test_the_prompt_is_the_chat_templates(engine: TransformersEngine):
    ids = engine.prompt_ids([Message("user", "hi")])
    assert engine.loaded.tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert engine.context_tokens == 512


def test_virtual_tokens_count_towards_the_context(tiny_model: Path, tmp_path: Path):
    loaded = load_model(str(tiny_model))
    model = add_virtual_tokens(loaded.model, kind="prompt_tuning", count=12, seed=0, base=str(tiny_model))
    save_adapter(model, loaded.tokenizer, tmp_path / "prompt")
    engine = TransformersEngine.load(str(tmp_path / "prompt"), device="cpu")
    assert engine.context_tokens == 500
    engine.close()


@pytest.mark.parametrize("name", ["a", "prefix", "prompt"])
def test_an_adapter_served_alone_answers_as_generate(adapters: Path, name: str):
    engine = TransformersEngine.load(str(adapters / name), device="cpu")
    requests = [ask(engine, text, max_new_tokens=10) for text in TEXTS]
    wanted = [said(generate(engine.loaded, [r.prompt_ids], r.decoding)[0]) for r in requests]
    assert [told(progress) for progress in answers(engine, requests)] == wanted
    engine.close()


def test_a_conversation_that_the_template_refuses_is_the_callers_mistake(tiny_model: Path):
    engine = TransformersEngine.load(str(tiny_model), device="cpu")
    engine.loaded.tokenizer.chat_template = "{{ raise_exception('two user turns in a row') }}"
    with pytest.raises(DataError, match="two user turns in a row"):
        engine.prompt_ids([Message("user", "hi")])
    engine.close()


def test_a_folder_without_weights_is_a_model_error(tiny_model: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded"):
        TransformersEngine.load(str(tmp_path), device="cpu")
