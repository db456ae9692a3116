"""Settings of a hyperparameter search: what is searched, how, and how far."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raytune_ft.core.config import Config
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.tuning.space import Space, TimesRank, check_space, with_guide


class SweepConfig(Config):
    """A search over training settings, under Ray Tune's schedulers."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "packed", "cpus_per_trial", "max_concurrent_trials"}
    )

    output_dir: str = Field(min_length=1)
    """Folder or URI of the sweep's artifact."""
    training: FineTuningConfig
    """What all trials have in common. Its `output_dir` may be left out: trials write below the sweep's."""
    space: Space
    """Training settings to search: a list is a grid; ``{uniform: [low, high]}``, ``loguniform``, ``quniform``
    (with a step) and ``{choice: [...]}`` are sampled; ``guide`` takes the guide's values; `lora_alpha` may be
    ``{times_rank: [1, 2]}``."""
    searcher: Literal["grid", "random", "optuna"] = "grid"
    """``grid`` tries all combinations of lists; ``random`` samples every setting `num_trials` times; ``optuna`` samples
    where earlier trials did well (tree-structured Parzen estimator)."""
    num_trials: int | None = Field(None, ge=1)
    """Number of trials of a random or optuna search."""
    scheduler: Literal["asha", "hyperband", "median", "pbt", "none"] = "asha"
    """``asha`` stops the trials that are worse than others at the same step; ``hyperband`` the same in rounds that wait
    for each other; ``median`` stops those below the median of the others' running means; ``pbt`` lets the worse go on
    from the better ones' states with changed settings; ``none`` runs each to its last step."""
    grace_steps: int = Field(1, ge=1)
    """ASHA and median: no trial is stopped before this step; pbt: steps between exchanges."""
    reduction_factor: float = Field(2, gt=1)
    """ASHA and hyperband: one in so many trials goes on at each rung."""
    max_tokens: int | None = Field(None, ge=1)
    """Budget: no trial goes on once all together have trained on so many tokens."""
    max_hours: float | None = Field(None, gt=0)
    """Budget: no trial goes on after so many hours."""
    seed: int = 0
    """Decides what is sampled."""
    repeat_top: int = Field(0, ge=0)
    """So many of the best settings are trained again with fresh seeds, so that the winner wins by more than noise."""
    repeat_seeds: int = Field(2, ge=1)
    """Fresh seeds of each repeated setting."""
    metric: Literal["eval_loss", "loss"] = "eval_loss"
    """What is compared, lower is better: validation loss, or training loss where there is no validation split."""
    packed: Literal["auto", "never"] = "auto"
    """``auto`` trains LoRA trials together on one frozen base; those that differ in what a base decides (precision,
    bits, row length) on a base for each of its values. Where some can't share any, it says why, and each is a training
    run of its own; so with ``never``."""
    cpus_per_trial: float = Field(1, gt=0)
    """Logical CPUs, and at least as many threads, of a trial."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials at the same time; by default as many as the cluster can hold."""

    @model_validator(mode="before")
    @classmethod
    def _trials_write_below(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and "space" in settings:
            settings = {**settings, "space": with_guide(settings["space"])}
        if isinstance(settings, dict) and isinstance(settings.get("training"), dict):
            below = f"{settings.get('output_dir', '')}/trials"
            return {**settings, "training": {"output_dir": below, **settings["training"]}}
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_space(self.space, self.training)
        sampled = [key for key, choice in self.space.items() if not isinstance(choice, list | TimesRank)]
        if self.searcher == "grid" and sampled:
            raise ValueError(f"space: {', '.join(sampled)} is sampled, which a grid cannot do; set searcher: random")
        if self.searcher != "grid" and self.num_trials is None:
            raise ValueError(f"num_trials: a search with searcher {self.searcher} needs a number of trials")
        if self.scheduler in {"hyperband", "pbt"} and self.packed == "never":
            raise ValueError(f"scheduler: {self.scheduler} pauses trials, which only packed ones can; set packed: auto")
        if self.training.max_steps is not None and self.grace_steps > self.training.max_steps:
            raise ValueError(
                f"grace_steps: {self.grace_steps} is beyond the last step ({self.training.max_steps}): nothing would "
                "ever be compared"
            )
        if self.searcher == "grid" and self.num_trials is not None:
            raise ValueError("num_trials: a grid has as many trials as combinations; leave it out, or search at random")
        if self.repeat_top and "seed" in self.space:
            raise ValueError("repeat_top: repeats settings with fresh seeds, but the space searches the seed; drop one")
        if self.metric == "eval_loss" and self.training.eval_strategy == "no":
            raise ValueError("metric: eval_loss needs evaluations; set training.eval_strategy to steps or epoch")
        return self

    def identity(self) -> dict[str, Any]:
        """As `Config.identity`, with the training settings' own exceptions."""
        return {**super().identity(), "training": self.training.identity()}
