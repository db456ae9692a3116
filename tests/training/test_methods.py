"""Every method against plain PEFT on padded batches, and what its folder is to plain transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.core.errors import ConfigError, ModelError
from raytune_ft.core.storage import Location
from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.generation import generate
from raytune_ft.models.loading import load_model
from raytune_ft.models.scoring import sequence_scores
from raytune_ft.training.batches import TokenRows, step_rows
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.engine import make_trainee
from raytune_ft.training.session import Seat, train_in_process

Settings = Callable[..., FineTuningConfig]
STEPS = 4
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "learning_rate": 1e-3},
    "lora": {"method": "lora"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "lora_target_modules": ["q_proj", "down_proj"]},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 5},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 3},
}


def losses(config: FineTuningConfig, splits: dict[str, list[str]], output: Path | None = None) -> list[float]:
    found: list[float] = []

    def report(step, metrics):
        found.append(metrics["loss"])

    train_in_process(config, splits, Seat(), output=Location.at(output) if output else None, report=report)
    return found


def plain_model(config: FineTuningConfig) -> Any:
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(config.model_path)
    torch.manual_seed(config.seed)
    if config.method == "full":
        return base
    common = {"task_type": "CAUSAL_LM"}
    if config.method == "prefix_tuning":
        return get_peft_model(base, PrefixTuningConfig(**common, num_virtual_tokens=config.num_virtual_tokens))
    if config.method == "prompt_tuning":
        start = {"num_virtual_tokens": config.num_virtual_tokens, "prompt_tuning_init": "SAMPLE_VOCAB"}
        return get_peft_model(base, PromptTuningConfig(**common, **start))
    targets = config.lora_target_modules
    shape = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "target_modules": targets}
    options = {"use_dora": config.use_dora, "use_rslora": config.use_rslora}
    return get_peft_model(base, LoraConfig(**common, **shape, **options))


def padded(rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows])
    kept = torch.tensor([row.supervised + [False] * (longest - len(row.supervised)) for row in rows])
    return ids, mask, kept


def plain_loss(model: Any, rows: list[Any]) -> torch.Tensor:
    """Mean over supervised tokens of a padded batch; logits of virtual tokens are dropped from the front."""
    ids, mask, kept = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :][:, :-1]
    return torch.nn.functional.cross_entropy(logits[kept[:, 1:]], ids[:, 1:][kept[:, 1:]])


def plain_losses(config: FineTuningConfig, splits: dict[str, list[str]], cache: Path) -> list[float]:
    from transformers import get_scheduler

    model = plain_model(config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)
    steps = config.max_steps
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps or 1, steps)
    data = TokenRows(splits["train"], str(cache))
    found = []
    for numbers in islice(step_rows(len(data), config.global_batch_size, config.seed), steps):
        loss = plain_loss(model, [data[number] for number in numbers])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", METHODS)
def test_losses_equal_plain_peft_on_padded_batches(name: str, settings: Settings, splits, tmp_path: Path) -> None:
    config = settings(**METHODS[name], max_steps=STEPS, eval_strategy="no")
    ours = losses(config, splits)
    assert ours == pytest.approx(plain_losses(config, splits, tmp_path / "cache"), abs=1e-5)
    assert ours[-1] != ours[0]


def test_what_the_optimizer_is_told_is_what_torchs_is_told(settings: Settings, splits, tmp_path: Path) -> None:
    """Twelve steps of which clipping, decay and the moments decide the losses: each of them alone changes these."""
    told = {"max_grad_norm": 0.02, "weight_decay": 2.0, "adam_beta1": 0.6, "adam_beta2": 0.8, "adam_epsilon": 1e-3}
    common = {"use_rslora": True, "lr_scheduler_type": "cosine", "warmup_steps": 3, "eval_strategy": "no"}
    config = settings(**common, **told, lora_r=4, learning_rate=5e-2, max_steps=12)
    ours = losses(config, splits)
    assert ours == pytest.approx(plain_losses(config, splits, tmp_path / "cache"), abs=1e-5)
    for name in [*told, "use_rslora"]:
        other = config.with_overrides(**{name: FineTuningConfig.model_fields[name].default})
        assert max(abs(a - b) for a, b in zip(losses(other, splits), ours, strict=True)) > 1e-3, name


@pytest.mark.parametrize("name", METHODS)
def test_layouts_and_gradient_checkpointing_do_not_change_losses(name: str, settings: Settings, splits) -> None:
    common = {**METHODS[name], "max_steps": STEPS, "eval_strategy": "no", "lora_dropout": 0.0}
    whole = losses(settings(**common), splits)
    parts = losses(settings(**common, per_device_train_batch_size=1, gradient_accumulation_steps=8), splits)
    assert parts == pytest.approx(whole, abs=1e-5)
    assert losses(settings(**common, gradient_checkpointing=True), splits) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_folder_loads_in_plain_peft_with_equal_logits_scores_and_answers(
    name: str, settings: Settings, splits, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    losses(settings(**METHODS[name], max_steps=2), splits, tmp_path / "out")
    if name == "full":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    else:
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "out").eval()
    loaded = load_model(str(tmp_path / "out"), device="cpu")
    ids = torch.arange(5, 25).unsqueeze(0)
    data = TokenRows(splits["validation"], str(tmp_path / "cache"))
    rows = [data[number] for number in range(len(data))]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, plain(ids).logits)
        expected = [plain_loss(plain, [row]).item() for row in rows]
    scores = sequence_scores(loaded, rows)
    assert [score.nll / score.tokens for score in scores] == pytest.approx(expected, abs=1e-5)
    prompts = [row.input_ids[: 4 + 3 * place] for place, row in enumerate(rows)]
    answers = [answer.token_ids for answer in generate(loaded, prompts, DecodingConfig(max_new_tokens=6))]
    assert answers == [greedy(loaded, plain, prompt, 6) for prompt in prompts]


def greedy(loaded: Any, model: Any, prompt: list[int], tokens: int) -> list[int]:
    """The most likely tokens, each by a whole forward pass of plain PEFT, up to a stop token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            token = int(model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, -1].argmax())
            if token in {*loaded.chat.stop_ids, loaded.tokenizer.pad_token_id}:
                break
            ids.append(token)
    return ids[len(prompt) :]


def test_a_row_does_not_see_the_rows_beside_it_under_prompt_methods(settings: Settings, splits, tmp_path) -> None:
    data = TokenRows(splits["train"], str(tmp_path / "cache"))
    rows = [data[number] for number in range(3)]
    for name in ("prefix", "prompt"):
        losses(settings(**METHODS[name], max_steps=1), splits, tmp_path / name)
        loaded = load_model(str(tmp_path / name))
        together = sequence_scores(loaded, rows, token_budget=10_000)
        alone = [sequence_scores(loaded, [row])[0] for row in rows]
        assert [score.nll for score in together] == pytest.approx([score.nll for score in alone], abs=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_upon_a_quantized_base_are_right_after_an_evaluation(settings: Settings, splits, bits, tmp_path):
    """The slope of the loss along each factor's gradient, once more by central differences."""
    from raytune_ft.models.collate import pack

    data = TokenRows(splits["train"], str(tmp_path / "cache"))
    batch = pack([data[number] for number in range(3)])
    trainee = make_trainee(settings(method="qlora", bits=bits), "cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainee.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        trainee.model.eval()
        trainee.loss(batch)
        trainee.model.train()
    trainee.loss(batch).backward()
    for name, parameter in trainee.trainable().items():
        if "lora_B" not in name:
            continue
        direction = parameter.grad / parameter.grad.norm()
        with torch.no_grad():
            sides = []
            for step in (0.02, -0.04):
                parameter.add_(step * direction)
                sides.append(trainee.loss(batch).item())
            parameter.add_(0.02 * direction)
        assert (sides[0] - sides[1]) / 0.04 == pytest.approx(float(parameter.grad.norm()), rel=0.08), name


def test_training_goes_on_from_an_adapter(settings: Settings, splits, tmp_path: Path) -> None:
    for name in ("dora", "prefix", "prompt"):
        losses(settings(**METHODS[name], max_steps=3), splits, tmp_path / name)
        path = str(tmp_path / name)
        first = make_trainee(settings(**METHODS[name], adapter_path=path), "cpu").trainable()
        saved = load_model(path).model
        fresh = make_trainee(settings(**METHODS[name]), "cpu").trainable()
        for key, parameter in saved.named_parameters():
            if key in first:
                assert torch.equal(first[key], parameter), key
        assert any(not torch.equal(first[key], fresh[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_r": 4}, r"lora_r is 8 there and 4 in the settings"),
        ({"use_dora": True}, r"use_dora is False there and True"),
        ({"lora_target_modules": ["q_proj"]}, r"tensors are not those of the settings.*lora_target_modules"),
        ({"method": "prompt_tuning"}, r"method \(PEFT's type\) is .*LORA there"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(changes, words, settings: Settings, splits, tmp_path: Path) -> None:
    losses(settings(max_steps=1, eval_strategy="no"), splits, tmp_path / "lora")
    with pytest.raises(ModelError, match=words):
        make_trainee(settings(**changes, adapter_path=str(tmp_path / "lora")), "cpu")


def test_a_whole_model_is_no_adapter_to_go_on_from(settings: Settings, tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="whole model, not an adapter"):
        make_trainee(settings(adapter_path=str(tiny_model)), "cpu")
    with pytest.raises(ConfigError, match="method full trains no adapter"):
        settings(method="full", adapter_path=str(tiny_model))


def test_an_adapter_of_another_base_is_refused(settings: Settings, splits, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = settings(max_steps=1, eval_strategy="no")
    losses(config, splits, tmp_path / "lora")
    other = AutoModelForCausalLM.from_pretrained(config.model_path)
    torch.nn.init.zeros_(other.model.norm.weight)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(config.model_path).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="belongs to the base"):
        make_trainee(settings(model_path=str(tmp_path / "other"), adapter_path=str(tmp_path / "lora")), "cpu")


def test_prompt_tuning_starts_from_a_text_and_cuts_none_off(settings: Settings, tiny_model: Path) -> None:
    config = settings(method="prompt_tuning", num_virtual_tokens=40, prompt_tuning_init_text="red blue green")
    trainee = make_trainee(config, "cpu")
    tokens = trainee.tokenizer("red blue green")["input_ids"]
    embeddings = trainee.model.get_input_embeddings().weight
    expected = embeddings[[tokens[place % len(tokens)] for place in range(40)]]
    assert torch.equal(next(iter(trainee.trainable().values())), expected)
    with pytest.raises(ModelError, match=f"num_virtual_tokens: {len(tokens)}"):
        make_trainee(config.with_overrides(num_virtual_tokens=len(tokens) - 1), "cpu")
