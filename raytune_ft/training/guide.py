"""Where settings leave the ranges that the user's guide gives, and why it gives them. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ft.core.grammar import number_of
from raytune_ft.training.config import FineTuningConfig, FineTuningMethod
from raytune_ft.training.config_alignment import PreferenceConfig, ReinforcementConfig, RewardConfig
from raytune_ft.training.schedule import Timetable, learning_rate_at


@dataclass(frozen=True)
class Range:
    """The guide's typical values of a setting, both ends included, and its reason."""

    setting: str
    low: float
    high: float
    why: str


FULL_LEARNING_RATE = Range("learning_rate", 1e-5, 5e-5, "higher ones make full fine-tuning forget or diverge")
ADAPTER_LEARNING_RATE = Range(
    "learning_rate",
    1e-4,
    5e-4,
    "the guide's 1e-5 to 5e-5 are meant for full fine-tuning; the few weights of LoRA want about ten times more",
)
PREFERENCE_LEARNING_RATES = (
    Range("learning_rate", 1e-7, 5e-6, "pairs pull on and on, and higher ones unlearn what the model could do"),
    Range("learning_rate", 1e-6, 5e-5, "pairs pull on and on: a tenth of what examples are learned with"),
)
"""Of training on preferences, in full and with an adapter. The guide has none; these are the field's: the papers' 5e-7
and 1e-6 (Zephyr, DPO) are of full fine-tuning."""
REINFORCEMENT_LEARNING_RATES = (
    Range("learning_rate", 1e-7, 5e-6, "rewards are noisy, and larger steps lose what the model could do"),
    Range("learning_rate", 1e-6, 1e-4, "rewards are noisy, and larger steps lose what the model could do"),
)
GENERAL = (
    Range("per_device_train_batch_size", 1, 8, "limited by memory; gradient_accumulation_steps makes a batch larger"),
    Range("num_train_epochs", 2, 5, "more for smaller datasets"),
    Range("weight_decay", 0.01, 0.1, "helps to prevent overfitting"),
    Range("warmup_ratio", 0.05, 0.15, "the guide's 10% of all steps help to stabilize training"),
)
LORA = (
    Range("lora_r", 4, 32, "higher for more complex tasks"),
    Range("lora_alpha", 16, 64, "usually twice the rank"),
    Range("lora_dropout", 0.05, 0.1, "helps to prevent overfitting"),
)
_WITH_LORA = frozenset({FineTuningMethod.LORA, FineTuningMethod.QLORA})


def departures_from_guide(config: FineTuningConfig) -> list[str]:
    """What to warn about: settings outside the guide's ranges, each with the range and why it is given."""
    found = [_words(config, wanted) for wanted in ranges_for(config) if not _inside(config, wanted)]
    if config.method is FineTuningMethod.QLORA and config.bits in {4, None}:
        if config.bnb_4bit_quant_type != "nf4":
            found.append(f"bnb_4bit_quant_type is {config.bnb_4bit_quant_type}; the guide: nf4 often works better")
        if not config.bnb_4bit_use_double_quant:
            found.append("bnb_4bit_use_double_quant is false; the guide: true reduces memory further")
    return found


def ranges_for(config: FineTuningConfig) -> list[Range]:
    """The ranges that count for a method, without those that another setting overrides."""
    lora = config.method in _WITH_LORA
    overridden = set()
    if config.max_steps is not None:
        overridden.add("num_train_epochs")
    if config.warmup_steps is not None or config.lr_scheduler_type == "constant":
        overridden.add("warmup_ratio")
    full = config.method is FineTuningMethod.FULL
    rates = [FULL_LEARNING_RATE] if full else [ADAPTER_LEARNING_RATE] if lora else []
    if isinstance(config, PreferenceConfig):
        rates = [PREFERENCE_LEARNING_RATES[0 if full else 1]]
    if isinstance(config, ReinforcementConfig):
        rates = [REINFORCEMENT_LEARNING_RATES[0 if full else 1]]
    if isinstance(config, PreferenceConfig | ReinforcementConfig | RewardConfig):
        overridden |= {"num_train_epochs", "lora_dropout"}  # one pass, and no dropout, are usual there
    return [r for r in (*rates, *GENERAL, *(LORA if lora else ())) if r.setting not in overridden]


def departures_of_timetable(config: FineTuningConfig, timetable: Timetable) -> list[str]:
    """What to warn about once the number of steps is known: a warmup that takes up the whole run."""
    total, warmup = timetable.total, timetable.warmup
    if warmup < total:
        return []
    last = learning_rate_at(total, total, peak=1.0, warmup=warmup, kind=config.lr_scheduler_type)
    what = (
        f"the warmup takes {number_of(warmup, 'step')} and the run has {total}: its learning rate ends at {last:.0%} of"
    )
    remedy = f"set warmup_steps: {total // 10}, or train longer (num_train_epochs, max_steps)"
    nothing = ", so that nothing is learned" if total == 1 else ""
    return [f"{what} learning_rate ({config.learning_rate:g}){nothing}; {remedy}"]


def _inside(config: FineTuningConfig, wanted: Range) -> bool:
    value = float(getattr(config, wanted.setting))
    return wanted.low * (1 - 1e-9) <= value <= wanted.high * (1 + 1e-9)


def _words(config: FineTuningConfig, wanted: Range) -> str:
    value = getattr(config, wanted.setting)
    return f"{wanted.setting} is {value:g}; typical are {wanted.low:g} to {wanted.high:g}: {wanted.why}"
