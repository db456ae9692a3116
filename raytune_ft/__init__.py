"""Prepare, search, train, evaluate, shrink and serve language models on a Ray cluster.

The face: every public name is here, flat, and its room is loaded when the name is first used, so that
``import raytune_ft`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytune_ft.compression.config import (
        PruningConfig,
        PruningMethod,
        QuantizationConfig,
        QuantizationMethod,
    )
    from raytune_ft.compression.run import prune_model, quantize_model
    from raytune_ft.core.errors import (
        ArtifactError,
        ClusterError,
        ConfigError,
        DataError,
        MissingDependencyError,
        ModelError,
        RaytuneError,
        RunError,
        ServingError,
        UserError,
    )
    from raytune_ft.data.config import DataCollectionConfig, DatasetFormat
    from raytune_ft.data.run import DataCollector
    from raytune_ft.evaluation.ab import analyse_ab_test
    from raytune_ft.evaluation.config import EvaluationConfig, EvaluationMetric
    from raytune_ft.evaluation.config_ab import ABAnalysisConfig
    from raytune_ft.evaluation.config_inference import BatchGenerationConfig, EndpointConfig
    from raytune_ft.evaluation.generate import generate
    from raytune_ft.evaluation.run import ModelEvaluator, compare_models, generate_evaluation_report
    from raytune_ft.models.adapters import merge_adapter
    from raytune_ft.models.combination import combine_adapters, load_adapters
    from raytune_ft.pipeline.config import PipelineConfig
    from raytune_ft.pipeline.run import Pipeline
    from raytune_ft.serving.config import ServingConfig
    from raytune_ft.serving.config_ab import ABTestConfig
    from raytune_ft.serving.run import ModelServer
    from raytune_ft.training.config import DistillationConfig, FineTuningConfig, FineTuningMethod
    from raytune_ft.training.config_alignment import PreferenceConfig, PreferenceLoss, ReinforcementConfig, RewardConfig
    from raytune_ft.training.recommend import recommend_method
    from raytune_ft.training.run import FineTuner, distill_model
    from raytune_ft.tuning.config import SweepConfig
    from raytune_ft.tuning.run import HyperparameterSweep

__version__ = "0.1.0"

_ROOMS = {
    "compression.config": ("PruningConfig", "PruningMethod", "QuantizationConfig", "QuantizationMethod"),
    "compression.run": ("prune_model", "quantize_model"),
    "core.errors": (
        "ArtifactError",
        "ClusterError",
        "ConfigError",
        "DataError",
        "MissingDependencyError",
        "ModelError",
        "RaytuneError",
        "RunError",
        "ServingError",
        "UserError",
    ),
    "data.config": ("DataCollectionConfig", "DatasetFormat"),
    "data.run": ("DataCollector",),
    "evaluation.ab": ("analyse_ab_test",),
    "evaluation.config": ("EvaluationConfig", "EvaluationMetric"),
    "evaluation.config_ab": ("ABAnalysisConfig",),
    "evaluation.config_inference": ("BatchGenerationConfig", "EndpointConfig"),
    "evaluation.generate": ("generate",),
    "evaluation.run": ("ModelEvaluator", "compare_models", "generate_evaluation_report"),
    "models.adapters": ("merge_adapter",),
    "models.combination": ("combine_adapters", "load_adapters"),
    "pipeline.config": ("PipelineConfig",),
    "pipeline.run": ("Pipeline",),
    "serving.config": ("ServingConfig",),
    "serving.config_ab": ("ABTestConfig",),
    "serving.run": ("ModelServer",),
    "training.config": ("DistillationConfig", "FineTuningConfig", "FineTuningMethod"),
    "training.config_alignment": ("PreferenceConfig", "PreferenceLoss", "ReinforcementConfig", "RewardConfig"),
    "training.recommend": ("recommend_method",),
    "training.run": ("FineTuner", "distill_model"),
    "tuning.config": ("SweepConfig",),
    "tuning.run": ("HyperparameterSweep",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "ABAnalysisConfig",
    "ABTestConfig",
    "ArtifactError",
    "BatchGenerationConfig",
    "ClusterError",
    "ConfigError",
    "DataCollectionConfig",
    "DataCollector",
    "DataError",
    "DatasetFormat",
    "DistillationConfig",
    "EndpointConfig",
    "EvaluationConfig",
    "EvaluationMetric",
    "FineTuner",
    "FineTuningConfig",
    "FineTuningMethod",
    "HyperparameterSweep",
    "MissingDependencyError",
    "ModelError",
    "ModelEvaluator",
    "ModelServer",
    "Pipeline",
    "PipelineConfig",
    "PreferenceConfig",
    "PreferenceLoss",
    "PruningConfig",
    "PruningMethod",
    "QuantizationConfig",
    "QuantizationMethod",
    "RaytuneError",
    "ReinforcementConfig",
    "RewardConfig",
    "RunError",
    "ServingConfig",
    "ServingError",
    "SweepConfig",
    "UserError",
    "__version__",
    "analyse_ab_test",
    "combine_adapters",
    "compare_models",
    "distill_model",
    "generate",
    "generate_evaluation_report",
    "load_adapters",
    "merge_adapter",
    "prune_model",
    "quantize_model",
    "recommend_method",
]


def __getattr__(name: str) -> Any:
    room = _HOME.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
