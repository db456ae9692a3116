"""The bank on a GPU: the losses that it has on a CPU, and work on the host that does not grow with the trials."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_ft.models.chat import Encoded
from raytune_ft.training.bank.bank import AdapterBank
from raytune_ft.training.bank.base import FrozenBase, load_frozen_base
from raytune_ft.training.bank.preferences import Preferences
from raytune_ft.training.bank.products import GroupedProducts
from raytune_ft.training.bank.referenced import ReferencedRows
from tests.conftest import make_tiny_model

from .conftest import MakeBank, Settings, losses_of
from .test_equality import MIXED, difference
from .test_preferences import MIXED as PREFERENCES
from .test_preferences import PAIRS, Given, bank_of

pytestmark = pytest.mark.gpu


@pytest.fixture
def base(trial: Settings) -> FrozenBase:
    torch.backends.cuda.matmul.allow_tf32 = False
    return load_frozen_base(trial(precision="fp32"), "cuda")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses_are_those_of_the_cpu(
    base: FrozenBase, make_bank: MakeBank, trial: Settings, rows: list[Encoded], dropout: float
) -> None:
    configs = {name: trial(max_steps=20, lora_dropout=dropout, **changes) for name, changes in MIXED.items()}
    here, there = make_bank(arithmetic="ragged"), AdapterBank(base, rows)
    for name, config in configs.items():
        here.admit(name, config)
        there.admit(name, config)
    expected, found = losses_of(here), losses_of(there)
    for name in configs:
        assert difference(found[name], expected[name]) <= 1e-4, name


def test_pairs_have_the_losses_of_the_cpu(base: FrozenBase, make_bank: MakeBank, preference: Settings) -> None:
    configs = {name: preference(**changes) for name, changes in PREFERENCES.items()}
    here = bank_of(make_bank, configs, PAIRS)
    there = AdapterBank(base, ReferencedRows(Given(PAIRS)), criterion=Preferences())
    for name, config in configs.items():
        there.admit(name, config)
    expected, found = losses_of(here), losses_of(there)
    for name in configs:
        assert difference(found[name], expected[name]) <= 1e-4, name


def launches(base: FrozenBase, trial: Settings, rows: list[Encoded], trials: int) -> int:
    """Kernels that one step of so many trials launches, all of which have rows of the same lengths."""
    from torch.profiler import ProfilerActivity, profile

    bank = AdapterBank(base, rows, token_budget=1 << 20)
    for number in range(trials):
        bank.admit(f"trial-{number}", trial(max_steps=8, lora_r=4 + number % 8, seed=number))
    bank.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        assert len(bank.step()) == trials
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if "cudaLaunchKernel" in event.key)


def test_launches_do_not_grow_with_the_trials(trial: Settings, tmp_path: Path) -> None:
    """bf16, as on GPUs: attention over all segments and products over all trials are single kernels there.

    Each trial's AdamW is a launch of its own, a small part of those of a model of eight layers.
    """
    deep = make_tiny_model(tmp_path / "deep", layers=8)
    base = load_frozen_base(trial(model_path=str(deep), precision="bf16"), "cuda")
    even = [Encoded(list(range(3, 27)), [place >= 8 for place in range(24)]) for _ in range(64)]
    few, many = (launches(base, trial, even, trials) for trials in (2, 32))
    assert few > 0
    assert many <= 1.1 * few


@pytest.mark.parametrize("lengths", [[5, 0, 33, 8], [0, 7], [16], [9, 0, 0]])
def test_grouped_products_take_empty_and_uneven_segments(lengths: list[int]) -> None:
    """Against products in fp32, one segment after the other; factors lie as the slots hold them."""
    torch.manual_seed(0)
    held = torch.randn(len(lengths), 16, 104 + 40, device="cuda").bfloat16()
    a, b = held[..., :104], held[..., 104:]
    x = torch.randn(sum(lengths), 104, device="cuda").bfloat16()
    products = GroupedProducts(lengths, x.device)
    low = products.apply(x, a.transpose(1, 2))
    high, outer = products.apply(low, b), products.outer(low, x)
    parts = zip(*(torch.split(tensor.float(), lengths) for tensor in (x, low, high)), outer, a, b, strict=True)
    for mine, low_part, high_part, outer_part, a_part, b_part in parts:
        torch.testing.assert_close(low_part, mine @ a_part.float().t(), rtol=2e-2, atol=0.2)
        torch.testing.assert_close(high_part, low_part @ b_part.float(), rtol=2e-2, atol=0.5)
        torch.testing.assert_close(outer_part.float(), low_part.t() @ mine, rtol=2e-2, atol=1.0)


@pytest.mark.parametrize(
    "changes", [{"precision": "bf16"}, {"method": "qlora", "precision": "bf16"}], ids=["bf16", "nf4"]
)
def test_rounding_keeps_trials_as_near_to_fp32_as_it_keeps_a_trial_alone(
    base: FrozenBase, trial: Settings, rows: list[Encoded], changes: dict[str, str]
) -> None:
    configs = {f"r{rank}": trial(max_steps=20, lora_r=rank, seed=rank, **changes) for rank in (4, 8, 20)}
    rough = load_frozen_base(trial(**changes), "cuda")
    together = AdapterBank(rough, rows)
    for name, config in configs.items():
        together.admit(name, config)
    packed = losses_of(together)
    for name, config in configs.items():
        alone = AdapterBank(rough, rows, arithmetic="ragged")
        alone.admit(name, config)
        expected = losses_of(alone)[name]
        assert difference(packed[name], expected) <= 3e-2, name


def test_a_trial_that_rests_keeps_every_bit_while_others_step(trial: Settings, rows: list[Encoded]) -> None:
    bank = AdapterBank(load_frozen_base(trial(precision="bf16"), "cuda"), rows)
    for name in ("one", "two", "three"):
        bank.admit(name, trial(max_steps=8, seed=len(name)))
    bank.step()
    before = bank.snapshot("two").weights
    for _ in range(3):
        bank.step(hold=["two"])
    after = bank.snapshot("two").weights
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_adapter_of_a_gpu_loads_in_plain_peft(
    base: FrozenBase, trial: Settings, rows: list[Encoded], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = trial(lora_r=8)
    bank = AdapterBank(base, rows)
    bank.admit("trial", config)
    losses_of(bank)
    bank.save("trial", tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model_path), tmp_path / "adapter")
    ids = torch.tensor([rows[0].input_ids])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
    assert not torch.allclose(plain, bare)
