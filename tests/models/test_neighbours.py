"""Rows of models that carry state, or choose rotary factors by a batch's longest row, are what they would be alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)

from raytune_ft.core.errors import ModelError
from raytune_ft.models.attention import SEGMENTS, attention
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.decoding import Decoder
from raytune_ft.models.generation import generate
from raytune_ft.models.golden import golden_continuations
from raytune_ft.models.loading import LoadedModel, load_model
from raytune_ft.models.neighbours import why_alone
from raytune_ft.models.scoring import SummedLoss, sequence_scores

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "hidden_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
LAYERS = {"num_hidden_layers": 3}
GREEDY = DecodingConfig(max_new_tokens=6)


def lfm2(vocabulary: int) -> PreTrainedConfig:
    kinds = ["conv", "conv", "full_attention"]
    return Lfm2Config(vocab_size=vocabulary, **HEADS, **SPECIAL, **LAYERS, layer_types=kinds)


def granite(vocabulary: int) -> PreTrainedConfig:
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
    experts = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 64}
    kinds = ["mamba", "mamba", "attention"]
    shape = {**HEADS, **SPECIAL, **LAYERS, **mamba, **experts}
    return GraniteMoeHybridConfig(vocab_size=vocabulary, layer_types=kinds, **shape)


def qwen3_next(vocabulary: int) -> PreTrainedConfig:
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    shape = {**HEADS, **SPECIAL, **LAYERS, **linear, **sizes, **experts}
    return Qwen3NextConfig(vocab_size=vocabulary, layer_types=kinds, shared_expert_intermediate_size=16, **shape)


def longrope(vocabulary: int) -> PreTrainedConfig:
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0, 20.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    shape = {**HEADS, **SPECIAL, **LAYERS, "original_max_position_embeddings": 32, "rope_parameters": rope}
    return Phi3Config(vocab_size=vocabulary, **shape)


def phimoe(vocabulary: int) -> PreTrainedConfig:
    shape = {**HEADS, **SPECIAL, **LAYERS, "num_local_experts": 2, "num_experts_per_tok": 1}
    return PhimoeConfig(vocab_size=vocabulary, sliding_window=8, **shape)


def qwen2_moe(vocabulary: int) -> PreTrainedConfig:
    """Windows in the first and the third layer."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    shape = {**HEADS, **SPECIAL, **LAYERS, **experts, **window}
    return Qwen2MoeConfig(vocab_size=vocabulary, shared_expert_intermediate_size=16, **shape)


def made(make: Any, tokenizer: Path, folder: Path) -> LoadedModel:
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    config = make(len(tokens))
    config.initializer_range = 0.15
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return load_model(str(folder))


def some_rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (length,), generator=generator).tolist() for length in lengths]


def encoded(rows: Sequence[Sequence[int]]) -> list[Encoded]:
    return [Encoded(list(row), [True] * len(row)) for row in rows]


def plain_losses(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> list[float]:
    with torch.no_grad():
        return [
            loaded.model(input_ids=torch.tensor([row]), labels=torch.tensor([row]), use_cache=False).loss.item()
            * (len(row) - 1)
            for row in rows
        ]


def plain_answers(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Without any cache."""
    answers = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(GREEDY.max_new_tokens):
            with torch.no_grad():
                tokens.append(int(loaded.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


@pytest.mark.parametrize("make", [lfm2, granite, qwen3_next, longrope, phimoe, qwen2_moe])
def test_rows_score_together_as_transformers_scores_each_alone(make: Any, tiny_model: Path, tmp_path: Path) -> None:
    loaded = made(make, tiny_model, tmp_path)
    rows = some_rows(20, 5, 40, 33)
    together = [score.nll for score in sequence_scores(loaded, encoded(rows))]
    assert together == pytest.approx(plain_losses(loaded, rows), rel=1e-5)


@pytest.mark.parametrize("make", [lfm2, granite, longrope])
def test_packed_rows_have_the_gradient_of_the_rows_alone(make: Any, tiny_model: Path, tmp_path: Path) -> None:
    loaded = made(make, tiny_model, tmp_path)
    loss, rows = SummedLoss(loaded.model), encoded(some_rows(20, 40, 9))

    def gradient(batches: list[list[Encoded]]) -> torch.Tensor:
        loaded.model.zero_grad()
        with attention(loaded.model, SEGMENTS):
            for batch in batches:
                loss(pack(batch)).backward()
        return torch.cat([p.grad.flatten() for p in loaded.model.parameters() if p.grad is not None])

    packed, alone = gradient([rows]), gradient([[row] for row in rows])
    assert (packed - alone).norm() < 1e-4 * alone.norm()


@pytest.mark.parametrize("make", [lfm2, granite, longrope])
def test_prompts_are_answered_together_as_each_is_alone(make: Any, tiny_model: Path, tmp_path: Path) -> None:
    loaded = made(make, tiny_model, tmp_path)
    prompts = some_rows(20, 28, 31, 32, 33, 40)  # with longrope some get beyond 32 tokens while they are answered
    answers = generate(loaded, prompts, GREEDY, stop_ids=())
    assert [answer.token_ids for answer in answers] == plain_answers(loaded, prompts)


def test_a_long_prompt_that_is_read_in_pieces_has_the_long_factors_from_the_first(
    tiny_model: Path, tmp_path: Path
) -> None:
    loaded = made(longrope, tiny_model, tmp_path)
    (prompt,) = some_rows(50)
    decoder = Decoder(loaded, stop_ids=())
    row = decoder.new_row(loaded, prompt, GREEDY)
    while not decoder.read(row, 8):
        pass
    while decoder.step():
        pass
    assert [row.token_ids] == plain_answers(loaded, [prompt])


def test_golden_answers_of_a_model_that_carries_state_are_its_greedy_ones(tiny_model: Path, tmp_path: Path) -> None:
    loaded = made(lfm2, tiny_model, tmp_path)
    (prompt,) = some_rows(12)
    (golden,) = golden_continuations(loaded, [prompt], max_new_tokens=6)
    assert golden.token_ids == plain_answers(loaded, [prompt])[0][: len(golden.token_ids)]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    assert golden.logprobs[0] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


def test_a_model_that_carries_state_is_told_once_and_not_decoded_in_batches(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = made(lfm2, tiny_model, tmp_path)
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        assert "conv layers" in str(why_alone(loaded.model))
        sequence_scores(loaded, encoded(some_rows(5, 6)))
        with pytest.raises(ModelError, match=r"Lfm2ForCausalLM has conv layers.*keep keys and values only"):
            Decoder(loaded)
    assert caplog.text.count("computed one at a time") == 1


def test_a_model_of_attention_alone_is_packed(tiny_model: Path) -> None:
    assert why_alone(load_model(str(tiny_model)).model) is None


def test_a_model_with_longrope_is_left_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    loaded = made(longrope, tiny_model, tmp_path)
    sequence_scores(loaded, encoded(some_rows(5, 40)))
    assert "forward" not in vars(loaded.model.model.rotary_emb)


def test_a_name_that_holds_ssm_is_no_state() -> None:
    from transformers import SeedOssConfig

    plain = AutoModelForCausalLM.from_config(SeedOssConfig(vocab_size=64, head_dim=16, **HEADS, **SPECIAL, **LAYERS))
    assert why_alone(plain) is None
