"""Settings of a pipeline: every step's own settings, with the joints between them filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from raytune_ft.compression.config import PruningJob, QuantizationJob
from raytune_ft.core.config import Config
from raytune_ft.core.grammar import number_of
from raytune_ft.core.storage import Location
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.evaluation.config import EvaluationConfig, EvaluationMetric
from raytune_ft.evaluation.config_ladder import LadderConfig
from raytune_ft.serving.config import ServingConfig
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import PROMPT_METHODS, PreferenceConfig
from raytune_ft.training.without_effect import idle_beside
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import OF_RUNS, OF_WORKERS

FOLDERS = {
    "prepare": "dataset",
    "tune": "sweep",
    "train": "tuned",
    "align": "aligned",
    "evaluate": "evaluation",
    "prune": "pruned",
    "heal": "healed",
    "quantize": "quantized",
    "ladder": "ladder",
    "serve": "endpoint",
}
"""The steps in their order, and the folder of each below the pipeline's storage."""

SUMMARY = "pipeline"
"""The folder of what the pipeline says about them."""

SHAPE = (
    *("method", "lora_r", "lora_alpha", "use_rslora", "use_dora", "lora_target_modules"),
    *("bits", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
)
"""What an adapter, and the base under it, keep when training goes on from it."""


class GateConfig(Config):
    """When a model may take the place of the one before it."""

    metric: EvaluationMetric | None = None
    """What counts; by default the strictest that the evaluation measures."""
    max_drop: float = Field(0.0, ge=0)
    """How much worse will do, in the metric's own units; 0 wants the new model shown to be better."""
    confidence: float = Field(0.95, ge=0.5, lt=1)
    """With which that has to be shown."""


class PipelineConfig(Config):
    """Prepare, search, train, align, evaluate, prune, heal, quantize, measure and serve; a step left out is not done.

    Every step's folder lies below `storage_path`, and what one step makes is what the next one takes: those paths
    need not (and cannot) be given.
    """

    storage_path: str = Field(min_length=1)
    """Folder or URI, reachable from every node, below which each step has its folder."""
    model_path: str = Field(min_length=1)
    """The base model."""
    prepare: DataCollectionConfig
    """Records to a dataset. A source ``quickstart:NAME`` is a file that ships with the package."""
    tune: SweepConfig | None = None
    """Search; its `training` says how trials differ from `train`."""
    train: FineTuningConfig
    """Training; the settings that the search found best replace these."""
    align: PreferenceConfig | None = None
    """Further training of the tuned model on what people prefer, on data of its own (``align.dataset_path``); all
    later steps take what it makes. An adapter keeps the shape that it was trained with."""
    evaluate: EvaluationConfig | None = None
    """Evaluation of the base model and the tuned one on the test split."""
    previous_path: str | None = Field(None, min_length=1)
    """The model in use, from an earlier round: it is evaluated, too, and the new one goes no further than the
    evaluation unless `gate` opens. To go on from an adapter, name it as ``train.adapter_path``, too."""
    gate: GateConfig | None = None
    """What the tuned model has to show against the previous one (without one, against the base) before it is shrunk
    and served. With `previous_path` there is always a gate."""
    prune: PruningJob | None = None
    """Pruning of the tuned model, an adapter merged."""
    heal: FineTuningConfig | None = None
    """A short full fine-tuning of the pruned model, on the same dataset, in which its zeros stay zero."""
    quantize: QuantizationJob | None = None
    """Quantization of the tuned model, or of the pruned one."""
    ladder: LadderConfig | None = None
    """What the smaller versions cost and give, beside the tuned model."""
    serve: ServingConfig | None = None
    """The endpoint; one held-out request is sent to it."""

    @model_validator(mode="before")
    @classmethod
    def _joined(cls, settings: Any) -> Any:
        given = settings.get("storage_path") if isinstance(settings, Mapping) else None
        if not isinstance(given, str) or not given:
            return settings
        return _join(dict(settings))

    @model_validator(mode="after")
    def _in_order(self) -> PipelineConfig:
        self._refuse_other_search()
        if self.heal is not None and self.prune is None:
            raise ValueError("heal: trains what prune made; name prune, too, or leave heal out")
        if (self.gate is not None or self.previous_path is not None) and self.evaluate is None:
            raise ValueError("gate, previous_path: models are compared by their evaluation; name evaluate, too")
        if self.evaluate is not None and self.gate is not None and self.gate.metric is not None:
            measured = self.evaluate.metrics
            if self.gate.metric not in measured:
                raise ValueError(
                    f"gate.metric: {self.gate.metric} is not among evaluate.metrics ({', '.join(measured)})"
                )
        if self.ladder is not None and self.prune is None and self.quantize is None:
            raise ValueError("ladder: there is no smaller version to measure; name prune or quantize, too")
        self._refuse_other_shape()
        self._refuse_lost_splits()
        self._refuse_unmerged()
        return self

    def _refuse_other_shape(self) -> None:
        """Further training of an adapter keeps its shape."""
        if self.align is None or not self.train.uses_adapter:
            return
        for key in SHAPE:
            if getattr(self.align, key) != getattr(self.train, key):
                why = "the adapter keeps the shape that it was trained with; leave it out"
                self.align.refuse_idle([key], why, under="align.")

    def _refuse_lost_splits(self) -> None:
        """Steps that want rows of a split which `prepare` does not make."""
        shares = {"validation": self.prepare.validation_split, "test": self.prepare.test_split}
        lost = [split for split, share in shares.items() if not share]
        if self.prepare.test_sources:
            lost = [split for split in lost if split != "test"]
        measuring = {"evaluate.split": self.evaluate, "ladder.split": self.ladder}
        wanted = {key: settings.split for key, settings in measuring.items() if settings is not None}
        if self.serve is not None:
            wanted["serve"] = "test"
        for key, split in wanted.items():
            if split in lost:
                raise ValueError(f"{key}: wants rows of the {split} split; prepare makes none ({split}_split is 0)")

    def _refuse_unmerged(self) -> None:
        """Weights are made smaller with the adapter merged into them, which virtual tokens cannot be."""
        smaller = next((step for step in ("prune", "quantize") if getattr(self, step) is not None), None)
        if smaller is not None and self.train.method in PROMPT_METHODS:
            raise ValueError(
                f"{smaller}: train.method {self.train.method} adds virtual tokens, which cannot be merged into "
                f"weights; take lora, or leave {smaller} out"
            )

    def _refuse_other_search(self) -> None:
        """A search whose best settings would mean something else in `train`."""
        if self.tune is None:
            return
        if self.tune.objective != "train":
            raise ValueError(f"tune.objective: the search is for the settings of train (got {self.tune.objective})")
        if self.tune.scheduler == "pbt":
            raise ValueError(
                "tune.scheduler: under pbt settings change on the way, and train takes those of a whole run; set asha, "
                "or run `raytune-ft tune` by itself, whose best/ holds the model"
            )
        here, there = self.tune.training.num_workers, self.train.num_workers
        if "gradient_accumulation_steps" in self.tune.space and here != there:
            raise ValueError(
                f"tune.space.gradient_accumulation_steps: the same number makes another batch on the "
                f"{number_of(here, 'worker')} of a trial than on the {there} of train; search "
                "per_device_train_batch_size, or set "
                f"tune.training.num_workers: {there}"
            )

    def with_overrides(self, **changes: Any) -> Self:
        """A copy with `changes`, validated again; the paths that lead from step to step follow anew."""
        settings = self.model_dump()
        for step, joints in _joints(settings).items():
            settings[step] = {key: value for key, value in settings[step].items() if key not in joints}
            if step == "tune":
                training = settings[step]["training"]
                settings[step]["training"] = {key: training[key] for key in training if key not in _OF_PLACE}
        return type(self)(**{**settings, **changes})

    @property
    def gate_settings(self) -> GateConfig | None:
        """What opens the gate; None if there is none."""
        return self.gate or (GateConfig() if self.previous_path is not None else None)

    @property
    def storage(self) -> Location:
        """Where everything lies."""
        return Location.at(self.storage_path)


def _on_one_worker(train: Mapping[str, Any]) -> dict[str, Any]:
    """The training on one worker that accumulates what the others would have computed: the global batch is the same.

    What only workers under DeepSpeed have a use for is left out.
    """
    train = {key: value for key, value in train.items() if key not in OF_WORKERS}
    workers, steps = train.get("num_workers", 1), train.get("gradient_accumulation_steps", 1)
    if not (isinstance(workers, int) and isinstance(steps, int)):
        return {**train}  # refused where its turn comes
    return {**train, "num_workers": 1, "gradient_accumulation_steps": steps * workers}


def _join(settings: dict[str, Any]) -> dict[str, Any]:
    """Fills in the paths that lead from step to step.

    Raises:
        ValueError: if another one is given.
    """
    for step in FOLDERS:
        given = settings.get(step)
        if isinstance(given, Config):
            settings[step] = _set_in(given)
        elif isinstance(given, Mapping):
            settings[step] = dict(given)
    _add_defaults(settings)
    for step, joints in _joints(settings).items():
        _fill(settings[step], step, joints)
        if step == "tune" and isinstance(settings[step].get("training"), Mapping):
            settings[step]["training"] = dict(settings[step]["training"])
            _fill(settings[step]["training"], "tune.training", _of_trials(settings))
    return settings


def _set_in(given: Config) -> dict[str, Any]:
    """What was set in an object of settings; a copy has its output folder set, too, where nobody has."""
    settings = given.model_dump(exclude_unset=True)
    return {key: value for key, value in settings.items() if key not in _OUTPUTS or given.differs(key)}


def _add_defaults(settings: dict[str, Any]) -> None:
    """What trials take over from the training (but what their own settings leave without effect), and that healing
    trains all weights, where nothing else is said."""
    train, tune, heal = (settings.get(step) for step in ("train", "tune", "heal"))
    if isinstance(heal, dict):
        settings["heal"] = {"method": "full", **heal}
    if not isinstance(tune, dict):
        return
    own = tune.get("training")
    if isinstance(own, FineTuningConfig):  # which cannot be without a place
        own = own.model_dump(exclude_unset=True, exclude=set(_OF_PLACE))
    if own is None or isinstance(own, Mapping):  # another is refused where its turn comes
        shared = {key: value for key, value in train.items() if key not in OF_RUNS} if isinstance(train, dict) else {}
        shared = {key: value for key, value in shared.items() if key not in _OF_PLACE}
        shared = shared if "num_workers" in (own or {}) else _on_one_worker(shared)
        idle = idle_beside({**_defaults(), **shared, **(own or {})})
        tune["training"] = {**{key: value for key, value in shared.items() if key not in idle}, **(own or {})}


def _defaults() -> dict[str, Any]:
    fields = FineTuningConfig.model_fields.items()
    return {name: field.get_default(call_default_factory=True) for name, field in fields}


_OF_PLACE = ("model_path", "dataset_path", "output_dir")
"""Where a training run begins and ends, which the pipeline says."""
_OUTPUTS = ("output_dir", "output_path")


def _joints(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each step that there is, the settings that follow from the pipeline's own."""
    storage = Location.at(settings["storage_path"])
    places = {name: (storage / name).uri for name in FOLDERS.values()}
    model, train = settings.get("model_path"), settings.get("train")
    tuned = places["tuned" if settings.get("align") is None else "aligned"]
    shrunk = next((places[FOLDERS[step]] for step in ("heal", "prune") if settings.get(step) is not None), None)
    smaller = [places[FOLDERS[step]] for step in ("prune", "heal", "quantize") if settings.get(step) is not None]
    data = {"dataset_path": places["dataset"]}
    joints: dict[str, dict[str, Any]] = {
        "prepare": {"output_path": places["dataset"], "model_path": model},
        "tune": {"output_dir": places["sweep"]},
        "train": {"model_path": model, **data, "output_dir": places["tuned"]},
        "align": {
            **(_taken_over({**train, "model_path": model}, places["tuned"]) if isinstance(train, Mapping) else {}),
            "output_dir": places["aligned"],
        },
        "evaluate": {
            "model_path": tuned,
            "base_model_path": model,
            "previous_model_path": settings.get("previous_path"),
            **data,
            "output_dir": places["evaluation"],
        },
        "prune": {"model_path": tuned, "output_dir": places["pruned"]},
        "heal": {"model_path": places["pruned"], **data, "output_dir": places["healed"]},
        "quantize": {"model_path": shrunk or tuned, "output_dir": places["quantized"]},
        "ladder": {"model_paths": [tuned, *(smaller or ["none"])], **data, "output_dir": places["ladder"]},
        "serve": {"model_path": places["quantized"] if settings.get("quantize") is not None else shrunk or tuned},
    }
    return {step: found for step, found in joints.items() if isinstance(settings.get(step), Mapping)}


def _of_trials(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What follows for `tune.training`."""
    storage = Location.at(settings["storage_path"])
    data, trials = ((storage / name).uri for name in ("dataset", "sweep/trials"))
    return {"model_path": settings.get("model_path"), "dataset_path": data, "output_dir": trials}


def _fill(step: dict[str, Any], name: str, joints: Mapping[str, Any]) -> None:
    for key, value in joints.items():
        given = step.get(key)
        if given is not None and not _is_same(given, value):
            follows = f", and is {value!r} here" if value is not None else ""
            raise ValueError(f"{name}.{key}: follows from the pipeline{follows}; leave it out (got {given!r})")
        step[key] = value


def _is_same(given: Any, value: Any) -> bool:
    """Whether two settings are equal, or two spellings of one path."""
    if isinstance(given, str) and isinstance(value, str) and given and value:
        return given == value or Location.at(given).uri == Location.at(value).uri
    return bool((list(given) if isinstance(given, tuple) else given) == value)


def shaped_like(training: FineTuningConfig, align: PreferenceConfig) -> PreferenceConfig:
    """The settings of the further training, with the adapter's shape as it was trained."""
    if not training.uses_adapter:
        return align
    return align.with_overrides(**{key: getattr(training, key) for key in SHAPE})


def _taken_over(train: Mapping[str, Any], tuned: str) -> dict[str, Any]:
    """What a training run takes over from the one that it goes on from: its adapter with its shape, or its model."""
    if train.get("method") == "full":
        return {"model_path": tuned}
    shape = {key: train[key] for key in SHAPE if key in train}
    return {**shape, "model_path": train.get("model_path"), "adapter_path": tuned}
