"""DeepSpeed's settings: ours, and with them those of a user's own DeepSpeed JSON, wherever it does not contradict ours.

The optimizer and the learning rates are ours in any case (`engine.optimizer_for`, `schedule.learning_rate_at`): blocks
for them are compared and left out. Pure functions; loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
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
_FORMAT_IS_OURS = "precision decides the number formats"
_NOT_TAKEN = {
    "amp": _FORMAT_IS_OURS,
    "torch_autocast": _FORMAT_IS_OURS,
    "data_types": _FORMAT_IS_OURS,
    "bfloat16": "it is an old name; write bf16",
    "pipeline": "workers hold equal models, not stages of one",
    "tensor_parallel": "workers share batches, not layers",
    "sequence_parallel_size": "workers share batches, not rows",
    "expert_parallel": "workers share batches, not layers",
    "elasticity": "num_workers says how many there are",
    "autotuning": "raytune-ft tune searches settings",
    "compression_training": "raytune-ft prune and quantize make models smaller",
    "weight_quantization": "bits and method say how the base is quantized",
    "data_efficiency": "the order of the data is a function of seed and step",
    "curriculum_learning": "the order of the data is a function of seed and step",
    "progressive_layer_drop": "every step computes all layers",
    "zero_optimization.cpu_offload": "it is an old name; write offload_optimizer",
    "zero_optimization.cpu_offload_params": "it is an old name; write offload_param",
    "zero_optimization.cpu_offload_param": "it is an old name; write offload_param",
    "zero_optimization.zenflow": "its optimizer state cannot be checkpointed here",
    "zero_optimization.mics_shard_size": "checkpoints want shards over all workers",
    "zero_optimization.zero_hpz_partition_size": "checkpoints want shards over all workers",
}
_OFF = {"sequence_parallel_size": 1, "zero_optimization.zero_hpz_partition_size": 1}
"""Values of what is not taken by which DeepSpeed itself says that it is off."""
_COMPARED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", *_FORMATS, "optimizer", "scheduler", "gradient_allreduce_op"),
)
_HANDED_ON = (
    *("activation_checkpointing", "aio", "checkpoint", "comet", "comms_logger", "communication_data_type", "compile"),
    *("csv_monitor", "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc"),
    *("dump_state", "eigenvalue", "flops_profiler", "gradient_predivide_factor", "hybrid_engine", "log_level"),
    *("managed_gradient_accumulation", "memory_breakdown", "nebula", "prescale_gradients"),
    *("seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients", "steps_per_print"),
    *("tensorboard", "timers", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown"),
    *("wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)
_BLOCKS = ("zero_optimization", *_FORMATS, "optimizer", "scheduler")
_OF_OPTIMIZER = ("adam_w_mode", "torch_adam", "fused", "foreach", "fp32_optimizer_states")
_OF_SCHEDULER = ("last_batch_iteration", "warmup_num_steps", "total_num_steps")


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
    asked = {key: reason for key, reason in _NOT_TAKEN.items() if not _is_off(_at(given, key), _OFF.get(key))}
    found = [f"{key} is not taken: {reason}" for key, reason in asked.items()]
    found += _unknown(given, (*_NOT_TAKEN, *_COMPARED, *_HANDED_ON))
    for key in _BLOCKS:
        if given.get(key) not in (None, AUTO) and not isinstance(given[key], Mapping):
            found.append(f"{key} is {json.dumps(given[key])} there, and a block of settings is wanted")
    for key, mine, source in _expected(config):
        found += _difference(key, _at(given, key), mine, source)
    return [*found, *_optimizer(config, given), *_scheduler(config, given)]


def refuse_contradictions(config: FineTuningConfig, given: Mapping[str, Any]) -> None:
    """Checks a user's DeepSpeed settings against the training settings.

    Raises:
        ConfigError: naming each contradiction with both values.
    """
    _refuse(contradictions(config, given))


def _refuse(found: Sequence[str]) -> None:
    if found:
        raise ConfigError(
            f'deepspeed_config: {"; ".join(found)}. Make them equal, or write "auto" in the JSON; leave out what is '
            "not taken"
        )


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
    found: list[str] = []
    for name in _FORMATS:
        source = f"precision ({config.precision}, here {precision})"
        found += _difference(f"{name}.enabled", _at(given, f"{name}.enabled"), precision == name, source)
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
    for block in ("optimizer", "scheduler", "train_batch_size", *_NOT_TAKEN):
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
    yield "gradient_allreduce_op", "mean", "the loss, a mean over all workers,"
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
    kind, parameters = _kind(block) or "AdamW", _params(block)
    decoupled = kind.lower() == "adamw" or (kind.lower() == "adam" and parameters.get("adam_w_mode", True))
    if not decoupled:
        yield f"optimizer.type is {json.dumps(kind)} there, and the optimizer here is AdamW"
    mine = {
        "lr": (config.learning_rate, "learning_rate"),
        "betas": ([config.adam_beta1, config.adam_beta2], "adam_beta1, adam_beta2"),
        "eps": (config.adam_epsilon, "adam_epsilon"),
        "weight_decay": (config.weight_decay, "weight_decay"),
        "amsgrad": (False, "the optimizer here, AdamW,"),
        "bias_correction": (True, "the optimizer here, AdamW,"),
    }
    yield from _unknown(parameters, (*mine, *_OF_OPTIMIZER), "optimizer.params.")
    yield from _others(parameters, mine, "optimizer.params")


def _scheduler(config: FineTuningConfig, given: Mapping[str, Any]) -> Iterator[str]:
    block = given.get("scheduler")
    if not isinstance(block, Mapping):
        return
    kind, parameters = _kind(block), _params(block)
    if kind is not None and _SCHEDULES.get(kind) != config.lr_scheduler_type:
        same = next(name for name, schedule in _SCHEDULES.items() if schedule == config.lr_scheduler_type)
        yield (
            f"scheduler.type is {json.dumps(kind)} there, and lr_scheduler_type ({config.lr_scheduler_type}) makes it "
            f"{json.dumps(same)}"
        )
    mine: dict[str, tuple[Any, str]] = {
        "warmup_max_lr": (config.learning_rate, "learning_rate"),
        "warmup_min_lr": (0, "the schedule, which starts from 0,"),
        "warmup_min_ratio": (0, "the schedule, which starts from 0,"),
        "warmup_type": ("linear", "the schedule, which rises along a line,"),
        "cos_min_ratio": (0, "the schedule, which falls to 0,"),
    }
    if config.warmup_steps is not None:
        mine["warmup_num_steps"] = (config.warmup_steps, "warmup_steps")
    if config.max_steps is not None:
        mine["total_num_steps"] = (config.max_steps, "max_steps")
    yield from _unknown(parameters, (*mine, *_OF_SCHEDULER), "scheduler.params.")
    yield from _others(parameters, mine, "scheduler.params")


def _others(parameters: Mapping[str, Any], mine: Mapping[str, tuple[Any, str]], where: str) -> Iterator[str]:
    for name, (value, source) in mine.items():
        yield from _difference(f"{where}.{name}", parameters.get(name), value, source)


def _difference(key: str, theirs: Any, mine: Any, source: str) -> Iterator[str]:
    """What is wrong with a value of theirs; nothing, if it is left to us, or ours."""
    if theirs in (None, AUTO):
        return
    if _is_number(mine) and not _is_number(theirs):
        wanted = f"{json.dumps(mine)}, by {source.rstrip(',')}"
        yield f"{key} is {json.dumps(theirs)} there, and a number is wanted ({wanted})"
    elif theirs != mine:
        yield f"{key} is {json.dumps(theirs)} there, and {source} makes it {json.dumps(mine)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unknown(given: Mapping[str, Any], known: Sequence[str], where: str = "") -> Iterator[str]:
    """Names that mean nothing here, each with the nearest that does."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            yield f"{where}{name} is not taken: there is no such setting here{meant}"


def _kind(block: Mapping[str, Any]) -> str | None:
    """What a block says that it is; None, where it leaves that to us."""
    found = block.get("type")
    return None if found in (None, AUTO) else str(found)


def _params(block: Any) -> Mapping[str, Any]:
    """What a block says of its own; nothing, where it leaves that to us (``null``, or "auto")."""
    found = block.get("params") if isinstance(block, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _is_off(value: Any, off: int | None) -> bool:
    """Whether a setting asks for nothing, as the value `off` does; of a block, if it says that it is not enabled."""
    if isinstance(value, Mapping):
        return not value or value.get("enabled") is False
    return value in (None, 0, AUTO, off)


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
