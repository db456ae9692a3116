"""Families whose attention or logits differ from Llama's compute, learn and answer as plain transformers has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raytune_ft.core.errors import ModelError
from raytune_ft.models.attention import SEGMENTS, attention
from raytune_ft.models.collate import pack
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import generate
from raytune_ft.models.loading import LoadedModel, load_model
from raytune_ft.models.neighbours import dynamic_rotaries, why_alone
from raytune_ft.models.probe import check_computation
from raytune_ft.models.scoring import SummedLoss, sequence_scores

from .test_neighbours import encoded, some_rows

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 128}
HEADS = {**SHAPE, "head_dim": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GREEDY = DecodingConfig(max_new_tokens=6)


@dataclass(frozen=True)
class Family:
    """A family by its type and settings; `alone` says whether its rows are computed one at a time (None: in some
    versions of transformers)."""

    kind: str
    settings: dict[str, Any]
    alone: bool | None = False

    def __str__(self) -> str:
        return self.kind


CAPPED = Family("gemma2", {**HEADS, "sliding_window": 6, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0})
SINKS = Family("gpt_oss", {**HEADS, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2})
SCALED = Family("granite", {**SHAPE, "logits_scaling": 8.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5})
TIMES = Family("cohere2", {**HEADS, "logit_scale": 0.25, "sliding_window": 6})
FAMILIES = [
    CAPPED,
    SINKS,
    SCALED,
    TIMES,
    Family("stablelm", SHAPE, alone=True),
    Family("falcon", {**SIZE, "max_position_embeddings": 128}, alone=None),
    Family("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, alone=True),
    Family("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}, alone=True),
    Family("doge", {**SHAPE, "keep_window_size": 4}, alone=True),
]
BART = Family("bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}, True)
DYNAMIC = Family(
    "llama",
    {
        **SHAPE,
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    alone=True,
)


def made(family: Family, tokenizer: Path, folder: Path) -> LoadedModel:
    """A random model of the family, saved and loaded."""
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    config = AutoConfig.for_model(family.kind, vocab_size=len(tokens), **SPECIAL, **family.settings)
    config.initializer_range = 0.2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return load_model(str(folder))


def plain_loss(model: Any, row: Sequence[int]) -> torch.Tensor:
    """The summed loss as transformers has it, attention in plain steps."""
    model.set_attn_implementation("eager")
    for rotary in dynamic_rotaries(model):
        rotary.max_seq_len_cached = 0  # transformers keeps the factors of the longest row so far
    ids = torch.tensor([row])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")


@pytest.mark.parametrize("family", [*FAMILIES, BART, DYNAMIC], ids=str)
def test_rows_score_together_as_transformers_scores_each_alone(
    family: Family, tiny_model: Path, tmp_path: Path
) -> None:
    loaded, rows = made(family, tiny_model, tmp_path), some_rows(20, 5, 33, 12)
    check_computation(loaded.model)
    scores = [score.nll for score in sequence_scores(loaded, encoded(rows), token_budget=128)]
    assert family.alone in {None, why_alone(loaded.model) is not None}
    if family is DYNAMIC:  # beyond its context, scoring takes windows
        rows, scores = rows[1:2] + rows[3:], scores[1:2] + scores[3:]
    with torch.no_grad():
        assert scores == pytest.approx([float(plain_loss(loaded.model, row)) for row in rows], rel=1e-5)


@pytest.mark.parametrize("family", [CAPPED, SINKS, SCALED, TIMES, FAMILIES[6], DYNAMIC], ids=str)
@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_packed_rows_have_the_gradient_that_transformers_gives_each_alone(
    head: str, family: Family, tiny_model: Path, tmp_path: Path
) -> None:
    loaded, rows = made(family, tiny_model, tmp_path), some_rows(20, 9, 24)
    model = loaded.model
    model.get_output_embeddings().weight.requires_grad_(head == "trained")

    def gradients() -> torch.Tensor:
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return torch.cat(found)

    with attention(model, SEGMENTS):
        SummedLoss(model)(pack(encoded(rows))).backward()
    packed = gradients()
    for row in rows:
        plain_loss(model, row).backward()
    alone = gradients()
    assert packed.shape == alone.shape
    assert (packed - alone).norm() < 1e-4 * alone.norm()


@pytest.mark.parametrize("family", FAMILIES[:-1], ids=str)  # Doge's masks differ with a cache
def test_prompts_are_answered_together_as_each_is_alone(family: Family, tiny_model: Path, tmp_path: Path) -> None:
    loaded, prompts = made(family, tiny_model, tmp_path), some_rows(20, 5, 31)
    answers = [answer.token_ids for answer in generate(loaded, prompts, GREEDY, stop_ids=())]
    loaded.model.set_attn_implementation("eager")
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(prompt)
        for _ in range(GREEDY.max_new_tokens):
            with torch.no_grad():
                tokens.append(int(loaded.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert answer == tokens[len(prompt) :]


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=64, **SIZE, initializer_range=0.2))
    with pytest.raises(ModelError, match=r"BertLMHeadModel: its tokens see those that come after them.*an encoder"):
        check_computation(model)


def test_a_model_whose_logits_are_not_those_of_its_head_is_refused(tmp_path: Path) -> None:
    kinds = {"layer_types": ["full_attention", "sliding_attention"]}
    config = transformers.ModernBertDecoderConfig(vocab_size=64, **SIZE, **SPECIAL, **kinds)
    with pytest.raises(ModelError, match="ModernBertDecoderForCausalLM: cannot be computed padding-free"):
        check_computation(transformers.ModernBertDecoderForCausalLM(config))

    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = found.logits * torch.linspace(0.5, 2, 64)
            return found

    llama = transformers.LlamaConfig(vocab_size=64, **SHAPE, initializer_range=0.2)
    with pytest.raises(ModelError, match=r"Shifted: padding-free rows come to other log-probabilities.*changes its"):
        check_computation(Shifted(llama))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_packed_whatever_its_noise(bits: int, tiny_model: Path, tmp_path: Path) -> None:
    settings = transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings, device_map={"": "cpu"})
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    with torch.no_grad():  # noise that a model in fp32 would be refused for
        for layer in loaded.model.model.layers:
            layer.register_forward_hook(lambda _, __, out: out + 0.1 * torch.rand_like(out))
    check_computation(loaded.model)
    assert why_alone(loaded.model) is None
