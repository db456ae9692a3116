"""On a GPU: what the CPU computes, in other kernels."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from raytune_ft.core.errors import ModelError
from raytune_ft.core.records import Message
from raytune_ft.models import kernels
from raytune_ft.models.attention import SEGMENTS, attention, segment_attention
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.config import DecodingConfig, Precision
from raytune_ft.models.frozen_head import losses_and_gradient, summed_loss
from raytune_ft.models.generation import generate
from raytune_ft.models.loading import LoadedModel, load_model
from raytune_ft.models.scoring import CausalParts, sequence_scores, target_losses

pytestmark = pytest.mark.gpu

ROWS = [Encoded(list(range(10, 10 + n)), [False] * (n // 2) + [True] * (n - n // 2)) for n in (4, 9, 30, 17, 1, 2)]
LENGTHS = [5, 64, 1, 130, 17]


def on_gpu(tiny_model: Path, precision: Precision = Precision.FP32) -> LoadedModel:
    torch.backends.cuda.matmul.allow_tf32 = False
    return load_model(str(tiny_model), device="cuda", precision=precision)


@pytest.mark.parametrize("window", [None, 2, 7, 500])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_attention_over_segments_equals_the_loop_in_fp32_there_and_back(
    kv_heads: int, window: int | None
) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    shapes = [(1, heads, sum(LENGTHS), 64) for heads in (8, kv_heads, kv_heads)]
    wide = [torch.randn(shape, generator=generator, device="cuda").requires_grad_(True) for shape in shapes]
    narrow = [x.detach().bfloat16().requires_grad_(True) for x in wide]
    upstream = torch.randn((1, sum(LENGTHS), 8, 64), generator=generator, device="cuda")
    found = []
    for tensors in (wide, narrow):
        out, _ = segment_attention(
            torch.nn.Module(), *tensors, None, cu_seq_lens_q=starts, max_length_q=max(LENGTHS), sliding_window=window
        )
        (out.float() * upstream).sum().backward()
        found.append([out, *(x.grad for x in tensors)])
    for expected, mine in zip(*found, strict=True):
        error = (mine.float() - expected.float()).norm() / expected.float().norm()
        assert float(error.detach()) < 1e-2


def test_scores_are_those_of_the_cpu(tiny_model: Path) -> None:
    here = sequence_scores(load_model(str(tiny_model), device="cpu"), ROWS)
    there = sequence_scores(on_gpu(tiny_model), ROWS)
    narrow = sequence_scores(on_gpu(tiny_model, Precision.BF16), ROWS)
    for expected, exact, rounded in zip(here, there, narrow, strict=True):
        assert exact.nll == pytest.approx(expected.nll, rel=1e-4, abs=1e-5)
        assert rounded.nll == pytest.approx(expected.nll, rel=2e-2)


def test_greedy_answers_are_those_of_the_cpu(tiny_model: Path) -> None:
    answers = []
    for loaded in (load_model(str(tiny_model), device="cpu"), on_gpu(tiny_model)):
        words = ["red", "What is the capital of France?", "0 1 2 3 4 5 6 7 8 9 order"]
        prompts = [loaded.chat.prompt_ids([Message("user", word)]) for word in words]
        answers.append([found.token_ids for found in generate(loaded, prompts, DecodingConfig(max_new_tokens=12))])
    assert answers[0] == answers[1]


def test_ligers_kernels_give_transformers_losses_and_gradients(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="raytune_ft")
    found = []
    for liger in (False, True):
        loaded = on_gpu(tiny_model)
        if liger:
            assert kernels.use_liger(loaded.model, "cuda", wanted=True)
        with attention(loaded.model, SEGMENTS):
            loss = target_losses(CausalParts.of(loaded.model), pack(ROWS).to("cuda")).sum()
        loss.backward()
        found.append((loss.detach(), loaded.model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)
    assert "kernels: Liger" in caplog.text
    # Models that are made afterwards, and those on a CPU, are not touched.
    fresh = load_model(str(tiny_model), device="cpu")
    assert "Liger" not in type(fresh.model.model.norm).__name__
    before = sequence_scores(fresh, ROWS)
    assert before[2].nll == pytest.approx(sequence_scores(on_gpu(tiny_model), ROWS)[2].nll, rel=1e-4)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_ligers_losses_under_a_frozen_head_are_those_in_plain_steps(tiny_model: Path, precision: Precision) -> None:
    found = []
    states = torch.randn(70, 64, device="cuda")
    targets, weights = torch.randint(0, 300, (70,), device="cuda"), torch.rand(70, device="cuda")
    for liger in (False, True):
        model = on_gpu(tiny_model, precision).model.requires_grad_(False)
        if liger:
            assert kernels.use_liger(model, "cuda", wanted=True)
        head = model.get_output_embeddings()
        found.append(losses_and_gradient(head, states.to(head.weight.dtype), targets, weights))
        scored, none = losses_and_gradient(head, states.to(head.weight.dtype), targets, None)
        assert none is None
        torch.testing.assert_close(scored, found[-1][0])
    rough = 2e-2 if precision is Precision.BF16 else 1e-5
    torch.testing.assert_close(found[1][0], found[0][0], rtol=rough, atol=rough)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=rough, atol=rough)


def test_a_model_that_liger_does_not_know_keeps_its_own_kernels_or_is_refused(tiny_model: Path) -> None:
    model = on_gpu(tiny_model).model
    model.config.model_type = "unheard_of"
    assert not kernels.use_liger(model, "cuda", wanted=None)
    with pytest.raises(ModelError, match="has none for models of type unheard_of"):
        kernels.use_liger(model, "cuda", wanted=True)


def test_a_summed_loss_in_bf16_is_that_of_fp32_to_its_rounding() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1000, bias=False, device="cuda").requires_grad_(False)
    states, targets = torch.randn(50, 64, device="cuda"), torch.randint(0, 1000, (50,), device="cuda")
    wide = states.clone().requires_grad_(True)
    summed_loss(head, wide, targets).backward()
    narrow = states.bfloat16().requires_grad_(True)
    summed_loss(head.bfloat16(), narrow, targets).backward()
    assert float((narrow.grad.float() - wide.grad).norm() / wide.grad.norm()) < 1e-2
