"""What the curves of a run say is wrong with it, with the guide's remedies in the names of our settings.

Pure functions over rows of the history (one a step). A finding is said when its sign first shows; while the sign
stays, it is the same episode and is not said again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import fmean, median
from typing import Any

from raytune_ft.core.grammar import number_of
from raytune_ft.training.config import FineTuningConfig, FineTuningMethod
from raytune_ft.training.cursor import layouts

Row = Mapping[str, float]

WINDOW = 16
"""Steps before a step that it is held against."""
_FEWEST = 8
_SPIKE = 2.0
_DEVIATIONS = 6.0
_EXPLOSION = 10.0
_RISE = 0.01
_FLAT = 0.01
_HIGH = 0.8
_LEARNED = 0.5
_PLATEAU = 30
_NO_SIGNAL = 0.9


class Trouble(StrEnum):
    """The guide's table of training issues."""

    OVERFITTING = "overfitting"
    UNDERFITTING = "underfitting"
    INSTABILITY = "instability"
    MEMORY = "memory"


@dataclass(frozen=True)
class Finding:
    """A sign of trouble: at which step it showed, by which numbers, and what mends it."""

    kind: Trouble
    step: int
    sign: str
    numbers: dict[str, float]
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind} at step {self.step}: {self.sign}. {self.remedy}"

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON-ready values; numbers that are not finite become words."""
        numbers = {key: value if math.isfinite(value) else str(value) for key, value in self.numbers.items()}
        return {**asdict(self), "numbers": numbers}


def diagnose(rows: Sequence[Row], config: FineTuningConfig) -> list[Finding]:
    """All findings of a curve, one for each kind and episode, in order of their steps."""
    watch = Watch(config)
    return [finding for row in rows for finding in watch.see(row)]


@dataclass
class Watch:
    """Takes in a run's rows one by one and gives what is found at each, once for each kind and episode.

    What it keeps does not grow with the run beyond one entry for each evaluation.
    """

    config: FineTuningConfig
    _recent: list[Row] = field(default_factory=list)
    _evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    _since: list[float] = field(default_factory=list)
    _start: list[float] = field(default_factory=list)
    _open: dict[Trouble, int] = field(default_factory=dict)

    def see(self, row: Row) -> list[Finding]:
        """Takes in the row after the last one."""
        step = int(row["step"])
        if math.isfinite(row["loss"]):
            self._since.append(row["loss"])
            if len(self._start) < _FEWEST:
                self._start.append(row["loss"])
        if "eval_loss" in row:
            self._evaluations.append((step, row["eval_loss"], fmean(self._since) if self._since else math.nan))
            self._since = []
        found = [instability(row, self._recent, self.config), memory(row, self._recent, self.config)]
        if "eval_loss" in row:
            found.append(overfitting(self._evaluations, self.config))
        self._recent = [*self._recent[-(_PLATEAU - 1) :], row]
        if self.config.loss_has_level:
            found.append(underfitting(self._recent, self._start, self._evaluations, self.config))
        found.append(no_signal(self._recent))
        return [finding for finding in found if finding is not None and self._is_new(finding)]

    def _is_new(self, finding: Finding) -> bool:
        """Whether an episode begins: the kind was not seen for a window of steps (evaluations, for overfitting)."""
        last = self._open.get(finding.kind)
        self._open[finding.kind] = finding.step
        if last is None or finding.kind is Trouble.MEMORY:
            return True
        if finding.kind is Trouble.OVERFITTING:
            return any(last < step < finding.step for step, *_ in self._evaluations)
        return finding.step - last > WINDOW


def instability(row: Row, before: Sequence[Row], config: FineTuningConfig) -> Finding | None:
    """A loss or gradient norm that is no number, a loss far above the steps before, or an exploding gradient norm.

    A spike is twice the median of the last 16 steps, and six deviations (1.48 x median absolute deviation) above it;
    an explosion is ten times the median norm, where that is above `max_grad_norm`, which clips it.
    """
    step, loss, norm = int(row["step"]), row["loss"], row.get("grad_norm", 0.0)
    remedy = (
        f"Lower learning_rate (it is {config.learning_rate:g}) or max_grad_norm (it is {config.max_grad_norm:g}), "
        f"raise warmup_ratio, or look at the rows of this step"
    )
    if not math.isfinite(loss) or not math.isfinite(norm):
        sign = f"loss {loss:g}, gradient norm {norm:g}"
        return Finding(Trouble.INSTABILITY, step, sign, {"loss": loss, "grad_norm": norm}, remedy)
    recent = [r for r in before[-WINDOW:] if math.isfinite(r["loss"])]
    if len(recent) < _FEWEST:
        return None
    middle = median(r["loss"] for r in recent)
    spread = 1.4826 * median(abs(r["loss"] - middle) for r in recent)
    if config.loss_has_level and loss > _SPIKE * middle and loss > middle + _DEVIATIONS * spread:
        sign = f"the loss jumped to {loss:.4g}, {loss / middle:.1f} times the median of the last {len(recent)} steps"
        return Finding(Trouble.INSTABILITY, step, sign, {"loss": loss, "median_loss": middle}, remedy)
    usual = median(r.get("grad_norm", 0.0) for r in recent)
    if norm > _EXPLOSION * usual and norm > config.max_grad_norm:
        sign = f"the gradient norm jumped to {norm:.4g}, from a median of {usual:.4g}"
        return Finding(Trouble.INSTABILITY, step, sign, {"grad_norm": norm, "median_grad_norm": usual}, remedy)
    return None


def overfitting(evaluations: Sequence[tuple[int, float, float]], config: FineTuningConfig) -> Finding | None:
    """Validation loss that rose at each of the last two evaluations, by 1% in all, while training loss fell.

    Args:
        evaluations: step, validation loss, and mean training loss since the evaluation before.
        config: whose settings the remedy names.
    """
    if len(evaluations) < 3:
        return None
    (then, low, train_then), (_, between, _), (step, high, train) = evaluations[-3:]
    if not (low < between < high and high > low * (1 + _RISE) and train < train_then):
        return None
    sign = (
        f"validation loss rose from {low:.4f} (step {then}) to {high:.4f} "
        f"while training loss fell from {train_then:.4f} to {train:.4f}"
    )
    regular = f"raise weight_decay (it is {config.weight_decay:g})"
    smaller = ""
    if config.method in {FineTuningMethod.LORA, FineTuningMethod.QLORA}:
        regular += f" or lora_dropout ({config.lora_dropout:g})"
        smaller = f", lower lora_r ({config.lora_r})"
    early = "" if config.early_stopping_patience else ", set early_stopping_patience=2"
    remedy = f"{regular[0].upper()}{regular[1:]}{smaller}{early}, train fewer num_train_epochs, or add data"
    numbers = {"eval_loss": high, "eval_loss_before": low, "train_loss": train, "train_loss_before": train_then}
    return Finding(Trouble.OVERFITTING, step, sign, numbers, remedy)


def underfitting(
    recent: Sequence[Row],
    start: Sequence[float],
    evaluations: Sequence[tuple[int, float, float]],
    config: FineTuningConfig,
) -> Finding | None:
    """Both losses flat (within 1% of the start over 30 steps, or 3 evaluations) and still above 80% of the start.

    A loss below 0.5 nats a token is not called high, however it began. Steps of the warmup are not looked at.
    """
    if len(recent) < _PLATEAU:
        return None
    losses = [r["loss"] for r in recent]
    if not all(map(math.isfinite, losses)) or _rising(recent):
        return None
    half = len(losses) // 2
    began, earlier, level = fmean(start), fmean(losses[:half]), fmean(losses[half:])
    if level < _LEARNED or level < _HIGH * began or abs(earlier - level) > _FLAT * began:
        return None
    numbers = {"train_loss": level, "train_loss_at_start": began}
    sign = f"training loss stays at {level:.4f}, {level / began:.0%} of its start"
    if evaluations:
        values = [value for _, value, _ in evaluations]
        if len(values) < 3 or values[-1] < _HIGH * values[0] or max(values[-3:]) - min(values[-3:]) > _FLAT * values[0]:
            return None
        numbers |= {"eval_loss": values[-1], "eval_loss_at_start": values[0]}
        sign += f", validation loss at {values[-1]:.4f}"
    return Finding(Trouble.UNDERFITTING, int(recent[-1]["step"]), sign, numbers, _more_capacity(config))


def no_signal(recent: Sequence[Row]) -> Finding | None:
    """Rewards that were the same for all answers to a prompt, at nine of ten prompts of the last 8 steps."""
    shares = [row["equal_rewards_share"] for row in recent[-_FEWEST:] if "equal_rewards_share" in row]
    if len(shares) < _FEWEST or fmean(shares) < _NO_SIGNAL:
        return None
    rewards = fmean(row["reward"] for row in recent[-_FEWEST:])
    sign = f"at {fmean(shares):.0%} of the prompts all answers have the same reward (mean {rewards:.4g})"
    remedy = (
        "Nothing is learned from these. Take prompts that are neither always nor never answered well, raise "
        "num_generations, or take a reward that tells answers apart"
    )
    numbers = {"equal_rewards_share": fmean(shares), "reward": rewards}
    return Finding(Trouble.UNDERFITTING, int(recent[-1]["step"]), sign, numbers, remedy)


def _rising(recent: Sequence[Row]) -> bool:
    """Whether the learning rate still rises: losses of a warmup are flat for want of steps that count."""
    return recent[-1]["learning_rate"] > recent[0]["learning_rate"]


def _more_capacity(config: FineTuningConfig) -> str:
    larger = f"raise learning_rate (it is {config.learning_rate:g})"
    if config.method in {FineTuningMethod.LORA, FineTuningMethod.QLORA}:
        larger += f", lora_r ({config.lora_r}) or the lora_target_modules (all-linear), or lower lora_dropout"
    return f"Train more num_train_epochs, {larger}, or lower weight_decay ({config.weight_decay:g})"


def memory(row: Row, before: Sequence[Row], config: FineTuningConfig) -> Finding | None:
    """A step that ran out of memory and was made again in smaller micro-batches (`micro_batch_divisor` rose)."""
    divisor, last = row.get("micro_batch_divisor", 1), before[-1].get("micro_batch_divisor", 1) if before else 1
    if divisor <= last:
        return None
    most = math.ceil(config.per_device_train_batch_size / divisor)
    (_, rows, steps), *_ = layouts(config.global_batch_size, config.num_workers, most)
    sign = (
        f"out of memory; micro-batches have at most {number_of(most, 'row')} from here on, and the global batch stays "
        "the same"
    )
    remedy = (
        f"Set per_device_train_batch_size={rows} gradient_accumulation_steps={steps} from the start, "
        "lower max_length, or take method=qlora"
    )
    numbers = {"micro_batch_divisor": divisor, "rows": rows, "gradient_accumulation_steps": steps}
    return Finding(Trouble.MEMORY, int(row["step"]), sign, numbers, remedy)
