"""DeepSpeed's settings: ours, and with them those of a user's own DeepSpeed JSON, wherever it does not contradict ours.

The optimizer and the learning rates are ours in any case (`engine.optimizer_for`, `schedule.learning_rate_at`): blocks
for them are compared and left out. Pure functions; loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from raytune_ft.core.errors import ArtifactError, ConfigError
from raytune_ft.core.storage import Location

if TYPE_CHECKING:
    from raytune_ft.training.config import FineTuningConfig

AUTO = "auto"
_STAGE = "zero_optimization.stage"
_OFFLOAD = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")
_FORMATS = ("bf16", "fp16")
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_NOT_TAKEN = {
    "amp": "precision decides the number formats",
    "pipeline": "workers hold equal models, not stages of one",
    "tensor_parallel": "workers share batches, not layers",
    "elasticity": "num_workers says how many there are",
    "compression_training": "raytune-ft prune and quantize make models smaller",
    "data_efficiency": "the order of the data is a function of seed and step",
    "curriculum_learning": "the order of the data is a function of seed and step",
    "zero_optimization.zenflow": "its optimizer state cannot be checkpointed here",
    "zero_optimization.mics_shard_size": "checkpoints want shards over all workers",
    "zero_optimization.zero_hpz_partition_size": "checkpoints want shards over all workers",
}


def read_deepspeed_json(path: str) -> dict[str, Any]:
    """The contents of a DeepSpeed JSON file, here or on storage.

    Raises:
        ConfigError: if there is no such file, or it holds no JSON object.
    """
    try:
        found = json.loads(Location.at(path).read())
    except (ArtifactError, ValueError) as error:
        raise ConfigError(f"deepspeed_config: {path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"deepspeed_config: {path} holds no JSON object")
    return found


def contradictions(config: FineTuningConfig, given: Mapping[str, Any]) -> list[str]:
    """Every value of a user's DeepSpeed settings that says other than the training settings, with both values."""
    found = [f"{key} is not taken: {reason}" for key, reason in _NOT_TAKEN.items() if not _is_off(_at(given, key))]
    for key, mine, source in _expected(config):
        theirs = _at(given, key)
        if theirs in (None, AUTO) or _same(theirs, mine):
            continue
        found.append(f"{key} is {json.dumps(theirs)} there, and {source} makes it {json.dumps(mine)}")
    return [*found, *_optimizer(config, given), *_scheduler(config, given)]


def refuse_contradictions(config: FineTuningConfig, given: Mapping[str, Any]) -> None:
    """Checks a user's DeepSpeed settings against the training settings.

    Raises:
        ConfigError: naming each contradiction with both values.
    """
    _refuse(contradictions(config, given))


def _refuse(found: Sequence[str]) -> None:
    if found:
        raise ConfigError(f'deepspeed_config: {"; ".join(found)}. Make them equal, or write "auto" in the JSON')


def refuse_other_run(config: FineTuningConfig, precision: str, *, total: int, warmup: int) -> None:
    """Checks a user's DeepSpeed settings against what only the run decides: ``auto`` precision, and its steps.

    Args:
        config: settings, with the contents of the user's JSON.
        precision: what the weights are in: ``fp32``, ``bf16`` or ``fp16``.
        total: steps of the run.
        warmup: steps of its warmup.

    Raises:
        ConfigError: naming each contradiction with both values.
    """
    given = config.deepspeed_config if isinstance(config.deepspeed_config, dict) else {}
    found = []
    for name in _FORMATS:
        theirs, mine = _at(given, f"{name}.enabled"), precision == name
        if theirs not in (None, AUTO) and not _same(theirs, mine):
            source = f"precision ({config.precision}, here {precision})"
            found.append(f"{name}.enabled is {json.dumps(theirs)} there, and {source} makes it {json.dumps(mine)}")
    steps = {
        "warmup_num_steps": (warmup, "the warmup (warmup_steps, warmup_ratio)"),
        "total_num_steps": (total, "the number of steps (max_steps, num_train_epochs)"),
    }
    found += _others(_params(given.get("scheduler")), steps, "scheduler.params")
    _refuse(found)


def deepspeed_settings(config: FineTuningConfig, precision: str) -> dict[str, Any]:
    """What DeepSpeed is started with.

    Args:
        config: settings, with the contents of the user's JSON (not its path), which do not contradict them.
        precision: what the weights are in: ``fp32``, ``bf16`` or ``fp16``.
    """
    given = config.deepspeed_config if isinstance(config.deepspeed_config, dict) else {}
    settings = _without_auto(deepcopy(given))
    for block in ("optimizer", "scheduler", "train_batch_size"):
        settings.pop(block, None)
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": _accumulated(config),
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_allow_untested_optimizer": True,
    }
    devices = zip(("offload_optimizer", "offload_param"), (_moved(config, part) for part in _OFFLOAD), strict=True)
    own["zero_optimization"] |= {block: {"device": "cpu"} for block, device in devices if device == "cpu"}
    if config.offload != "none":
        own["zero_force_ds_cpu_optimizer"] = False
    ours_by_default: dict[str, Any] = {"steps_per_print": 10**9, "zero_optimization": {"overlap_comm": False}}
    if precision == "bf16":  # the loop stops at a norm that is no number; looking into each gradient for one takes long
        ours_by_default["bf16"] = {"check_grad_overflow": False}
    return _joined(_joined(ours_by_default, settings), own)


def _accumulated(config: FineTuningConfig) -> int:
    """The engine is told where a step ends; from this number it only takes whether gradients are ever added up."""
    least = 1 if config.max_tokens_per_micro_batch is None else 2
    return max(least, config.gradient_accumulation_steps)


def _expected(config: FineTuningConfig) -> Iterator[tuple[str, Any, str]]:
    rows, parts, workers = config.per_device_train_batch_size, config.gradient_accumulation_steps, config.num_workers
    layout = "per_device_train_batch_size x gradient_accumulation_steps x num_workers"
    yield "train_batch_size", config.global_batch_size, f"{layout} ({rows} x {parts} x {workers})"
    yield "train_micro_batch_size_per_gpu", rows, "per_device_train_batch_size"
    yield "gradient_accumulation_steps", parts, "gradient_accumulation_steps"
    yield "gradient_clipping", config.max_grad_norm, "max_grad_norm"
    yield _STAGE, config.zero_stage, "zero_stage"
    for key in _OFFLOAD:
        yield key, _moved(config, key), f"offload ({config.offload})"
    if config.precision != AUTO:
        for name in _FORMATS:
            yield f"{name}.enabled", config.precision == name, f"precision ({config.precision})"


def _moved(config: FineTuningConfig, key: str) -> str:
    wanted = {_OFFLOAD[0]: ("optimizer", "all"), _OFFLOAD[1]: ("all",)}[key]
    return "cpu" if config.offload in wanted else "none"


def _optimizer(config: FineTuningConfig, given: Mapping[str, Any]) -> Iterator[str]:
    block = given.get("optimizer")
    if not isinstance(block, Mapping):
        return
    kind, parameters = str(block.get("type", "AdamW")), _params(block)
    decoupled = kind.lower() == "adamw" or (kind.lower() == "adam" and parameters.get("adam_w_mode", True))
    if not decoupled:
        yield f"optimizer.type is {json.dumps(kind)} there, and the optimizer here is AdamW"
    mine = {
        "lr": (config.learning_rate, "learning_rate"),
        "betas": ([config.adam_beta1, config.adam_beta2], "adam_beta1, adam_beta2"),
        "eps": (config.adam_epsilon, "adam_epsilon"),
        "weight_decay": (config.weight_decay, "weight_decay"),
    }
    yield from _others(parameters, mine, "optimizer.params")


def _scheduler(config: FineTuningConfig, given: Mapping[str, Any]) -> Iterator[str]:
    block = given.get("scheduler")
    if not isinstance(block, Mapping):
        return
    kind, parameters = str(block.get("type")), _params(block)
    if _SCHEDULES.get(kind) != config.lr_scheduler_type:
        same = next(name for name, schedule in _SCHEDULES.items() if schedule == config.lr_scheduler_type)
        yield (
            f"scheduler.type is {json.dumps(kind)} there, and lr_scheduler_type ({config.lr_scheduler_type}) makes it "
            f"{json.dumps(same)}"
        )
    mine: dict[str, tuple[Any, str]] = {
        "warmup_max_lr": (config.learning_rate, "learning_rate"),
        "warmup_min_lr": (0, "the schedule, which starts from 0,"),
    }
    if config.warmup_steps is not None:
        mine["warmup_num_steps"] = (config.warmup_steps, "warmup_steps")
    if config.max_steps is not None:
        mine["total_num_steps"] = (config.max_steps, "max_steps")
    yield from _others(parameters, mine, "scheduler.params")


def _others(parameters: Mapping[str, Any], mine: Mapping[str, tuple[Any, str]], where: str) -> Iterator[str]:
    for name, (value, source) in mine.items():
        theirs = parameters.get(name)
        if theirs not in (None, AUTO) and not _same(theirs, value):
            yield f"{where}.{name} is {json.dumps(theirs)} there, and {source} makes it {json.dumps(value)}"


def _params(block: Any) -> Mapping[str, Any]:
    """What a block says of its own; nothing, where it leaves that to us (``null``, or "auto")."""
    found = block.get("params") if isinstance(block, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _is_off(value: Any) -> bool:
    """Whether a setting asks for nothing; of a block, if it says that it is not enabled."""
    if isinstance(value, Mapping):
        return not value or value.get("enabled") is False
    return value in (None, 0, AUTO)


def _same(theirs: Any, mine: Any) -> bool:
    return bool(theirs == mine)


def _at(settings: Mapping[str, Any], dotted: str) -> Any:
    found: Any = settings
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _without_auto(settings: Any) -> Any:
    """Without values left to us; what is not ours, DeepSpeed fills with its defaults."""
    if not isinstance(settings, dict):
        return settings
    return {key: _without_auto(value) for key, value in settings.items() if value != AUTO}


def _joined(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    joined = dict(base)
    for key, value in over.items():
        known = joined.get(key)
        joined[key] = _joined(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return joined
