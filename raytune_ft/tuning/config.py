"""Settings of a hyperparameter search: what is searched, how, and how far."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationInfo, WrapValidator, model_validator

from raytune_ft.core.config import Config
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import OBJECTIVES
from raytune_ft.training.goal import OF_REWARDS, Goal
from raytune_ft.tuning.combinations import Grid, idle_everywhere, refuse_invalid_pairs, refuse_without_effect
from raytune_ft.tuning.given import plain_space
from raytune_ft.tuning.space import OF_RUNS, OF_WORKERS, Space, TimesRank, check_space, extremes

_OF_PREFERENCES = frozenset({"loss", "eval_loss", "eval_reward_margin", "eval_chosen_reward"})
_DEFINED = {
    **dict.fromkeys(("beta", "loss_type", "label_smoothing", "chosen_nll_weight"), _OF_PREFERENCES),
    **dict.fromkeys(("desirable_weight", "undesirable_weight", "center_rewards_weight"), _OF_PREFERENCES),
    **dict.fromkeys(("temperature", "hard_loss_weight"), frozenset({"loss"})),
}
"""What is measured in units that a setting decides, by the setting."""

_OF_SCHEDULERS = {"grace_steps": ("asha", "median", "pbt"), "reduction_factor": ("asha", "hyperband")}
"""Settings that only some schedulers look at."""
_SHAPE = ("lora_r", "lora_target_modules")
"""What an adapter's tensors have their shapes from."""


def _by_objective(value: Any, handler: Any, info: ValidationInfo) -> FineTuningConfig:
    """The training settings as the verb has them that `objective` names."""
    kind = OBJECTIVES.get(info.data.get("objective", ""))
    return handler(value) if kind is None else kind.model_validate(value)


class SweepConfig(Config):
    """A search over training settings, under Ray Tune's schedulers."""

    not_identity: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "packed", "cpus_per_trial", "max_concurrent_trials"}
    )

    output_dir: str = Field(min_length=1)
    """Folder or URI of the sweep's artifact."""
    objective: Literal["train", "distill", "align", "reward", "reinforce"] = "train"
    """What trials do: the verb whose settings `training` holds. Those that ``train`` on examples, or ``align``, can
    share a base."""
    training: Annotated[SerializeAsAny[FineTuningConfig], WrapValidator(_by_objective)]
    """What all trials have in common. Its `output_dir` may be left out: trials write below the sweep's."""
    space: Space
    """Training settings to search: a list is a grid; ``{uniform: [low, high]}``, ``loguniform``, ``quniform``
    (with a step) and ``{choice: [...]}`` are sampled; ``guide`` takes the guide's values, for a key, or (``space:
    guide``) for all that it names; `lora_alpha` may be ``{times_rank: [1, 2]}``."""
    searcher: Literal["grid", "random", "optuna"] = "grid"
    """``grid`` tries all combinations of lists; ``random`` samples every setting `num_trials` times; ``optuna`` samples
    where earlier trials did well (tree-structured Parzen estimator)."""
    num_trials: int | None = Field(None, ge=1)
    """Number of trials of a random or optuna search."""
    scheduler: Literal["asha", "hyperband", "median", "pbt", "none"] = "asha"
    """``asha`` stops the trials that are worse than others at the same step; ``hyperband`` the same in rounds that wait
    for each other; ``median`` stops those below the median of the others' running means; ``pbt`` lets the worse go on
    from the better ones' states with changed settings, so that what it finds is a model and a schedule of settings;
    ``none`` runs each to its last step."""
    grace_steps: int = Field(1, ge=1)
    """ASHA and median: no trial is stopped before this step; pbt: steps between exchanges."""
    reduction_factor: float = Field(2, gt=1)
    """ASHA and hyperband: one in so many trials goes on at each rung."""
    max_tokens: int | None = Field(None, ge=1)
    """Budget: no trial goes on once all together have trained on so many tokens; of these, what takes each trial to its
    first evaluation is kept for it. Repeats are made beyond the budget."""
    max_hours: float | None = Field(None, gt=0)
    """Budget: no trial goes on after so many hours; those that were not evaluated by then are counted. Repeats are made
    beyond the budget."""
    seed: int = 0
    """Decides what is sampled, and what pbt draws at each exchange."""
    repeat_top: int = Field(0, ge=0)
    """So many of the best settings are trained again with fresh seeds, so that the winner wins by more than noise. All
    repeats are trained to their last step, whatever the search's budget, and of the search's own trials those count
    beside them that finished: means of cut ones could not be compared."""
    repeat_seeds: int = Field(2, ge=1)
    """Fresh seeds of each repeated setting."""
    metric: str = "eval_loss"
    """What trials are compared by: ``eval_loss``; ``loss``, that of training, where there is no validation split (the
    mean of the last quarter of a trial's values); or what their answers are measured by, such as ``eval_exact_match``,
    with `training.eval_generation_rows`."""
    mode: Literal["min", "max"] | None = None
    """Which values of `metric` are better, the lower or the higher; it follows from the metric, and may be left out."""
    packed: Literal["auto", "never"] = "auto"
    """``auto`` trains LoRA trials on examples or preferences together on one frozen base; those that differ in what a
    base decides (precision, bits, row length) on a base for each of its values. Those that can't share any are training
    runs of their own, a process each, beside the others, and it says why; with ``never``, all are."""
    cpus_per_trial: float = Field(1, gt=0)
    """Logical CPUs, and at least as many threads, of a trial that shares no base; on GPUs it has one besides."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials at the same time; by default as many as the cluster can hold."""

    @model_validator(mode="before")
    @classmethod
    def _trials_follow_the_sweep(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and "space" in settings:
            settings = {**settings, "space": plain_space(settings["space"])}
        if isinstance(settings, dict) and isinstance(settings.get("training"), FineTuningConfig):
            verb = next((verb for verb, kind in OBJECTIVES.items() if type(settings["training"]) is kind), "train")
            given = settings["training"].model_dump(exclude_unset=True)
            settings = {"objective": verb, **settings, "training": given}
        if isinstance(settings, dict) and isinstance(settings.get("training"), dict):
            training = {"output_dir": f"{settings.get('output_dir', '')}/trials", **settings["training"]}
            of_examples = settings.get("objective", "train") in {"train", "distill"}
            measured = {"eval_perplexity"} if of_examples else set(OF_REWARDS)
            if training.get("eval_generation_rows"):
                measured.add(f"eval_{training.get('eval_generation_metric', 'exact_match')}")
            if settings.get("metric") in measured:
                training.setdefault("metric_for_best_model", settings["metric"])
            space = settings.get("space")
            sizes = space.get("student_layers") if isinstance(space, dict) else None
            if isinstance(sizes, list) and sizes and "model_path" not in training:
                training.setdefault("student_layers", sizes[0])
            return {**settings, "training": training}
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_space(self.space, self.training)
        refuse_without_effect(self.space, self.training)
        refuse_invalid_pairs(self.space, self.training)
        sampled = [key for key, choice in self.space.items() if not isinstance(choice, list | TimesRank)]
        if self.searcher == "grid" and sampled:
            raise ValueError(f"space: {', '.join(sampled)} is sampled, which a grid cannot do; set searcher: random")
        if self.searcher != "grid" and self.num_trials is None:
            raise ValueError(f"num_trials: a search with searcher {self.searcher} needs a number of trials")
        if self.scheduler in {"hyperband", "pbt"} and self.packed == "never":
            raise ValueError(f"scheduler: {self.scheduler} pauses trials, which only packed ones can; set packed: auto")
        if self.last_step is not None and self.grace_steps > self.last_step:
            raise ValueError(
                f"grace_steps: {self.grace_steps} is beyond the last step ({self.last_step}): nothing would ever be "
                "compared"
            )
        if self.searcher == "grid" and self.num_trials is not None:
            raise ValueError("num_trials: a grid has as many trials as combinations; leave it out, or search at random")
        if self.repeat_top and "seed" in self.space:
            raise ValueError("repeat_top: repeats settings with fresh seeds, but the space searches the seed; drop one")
        if self.repeat_top > self.trials:
            raise ValueError(
                f"repeat_top: {self.repeat_top} of the {self.trials} trials that the search makes cannot be repeated; "
                f"set {self.trials} at most"
            )
        self._refuse_of_other_searches()
        self._refuse_other_schedule()
        self._refuse_unused()
        self._refuse_other_metric()
        self._refuse_other_losses()
        return self

    def _refuse_other_schedule(self) -> None:
        """What the scheduler cannot do its work with."""
        if self.scheduler == "hyperband" and self.last_step is None:
            raise ValueError(
                "scheduler: hyperband plans its rounds from the last step, which only max_steps tells it; set "
                "training.max_steps, or scheduler: asha"
            )
        trials = self.trials
        if self.scheduler in {"hyperband", "pbt"} and (self.max_concurrent_trials or trials) < trials:
            raise ValueError(
                f"max_concurrent_trials: {self.scheduler} compares the trials that are there at the same time, so it "
                f"wants all {trials} of them (got {self.max_concurrent_trials}); leave it out, or set scheduler: asha"
            )
        if self.scheduler != "pbt":
            return
        for key in _SHAPE:
            if key in self.space:
                raise ValueError(
                    f"space.{key}: under scheduler pbt trials go on from each other's states, which adapters of "
                    "another shape cannot; give all the same (training), or set scheduler: asha"
                )
        if self.searcher == "optuna":
            raise ValueError("searcher: under scheduler pbt, which changes settings itself, take grid or random")
        if self.repeat_top:
            raise ValueError(
                "repeat_top: under scheduler pbt settings change on the way, so that training again with the last ones "
                "repeats nothing; leave it out, or set scheduler: asha"
            )

    def _refuse_other_losses(self) -> None:
        """Trials whose losses are different quantities cannot be compared by them."""
        for key in self.space:
            if self.metric not in _DEFINED.get(key, ()):
                continue
            left = [name for name in self.training.evaluated_metrics if name not in _DEFINED[key]]
            raise ValueError(
                f"metric: {self.metric} is another quantity for every {key}, which the space searches: trials cannot "
                f"be compared by it; take {' or '.join(left) or 'another objective'}"
            )

    def _refuse_of_other_searches(self) -> None:
        """Settings of the search that another kind of search has a use for."""
        for key, schedulers in _OF_SCHEDULERS.items():
            if self.scheduler not in schedulers:
                self.refuse_idle(
                    [key], f"belongs to scheduler {' or '.join(schedulers)} (got {self.scheduler}); leave it out"
                )
        if not self.repeat_top:
            self.refuse_idle(["repeat_seeds"], "nothing is repeated (repeat_top is 0); set that, or leave it out")
        if self.searcher == "grid" and self.scheduler != "pbt":
            self.refuse_idle(["seed"], "a grid draws nothing; what trials draw follows from training.seed")
        if self.training.num_workers > 1:
            why = "the workers of a trial are given training.cpus_per_worker each; set that instead"
            self.refuse_idle(["cpus_per_trial"], why)

    def _refuse_unused(self) -> None:
        """Settings of a training run that trials would leave without effect."""
        refused = dict.fromkeys(
            OF_RUNS,
            "a trial saves, and tells how far it is, where it is evaluated (eval_strategy, eval_steps); leave it out",
        )
        afresh = "trials start afresh, and the same command goes on with a sweep; leave it out"
        refused["resume_from_checkpoint"] = afresh
        if self.training.num_workers == 1:
            refused |= dict.fromkeys(
                OF_WORKERS,
                "trials on one worker go without DeepSpeed; leave it out, or give each trial workers of its own with "
                "training.num_workers above 1",
            )
            refused["cpus_per_worker"] = "a trial on one worker is given cpus_per_trial; set that instead"
        for key, why in refused.items():
            self.training.refuse_idle([key], why, under="training.")

    def _refuse_other_metric(self) -> None:
        known = ("loss", *self.training.evaluated_metrics)
        if self.metric not in known:
            raise ValueError(
                f"metric: no trial reports {self.metric}, only {', '.join(known)}; answers are measured with "
                "training.eval_generation_rows and training.eval_generation_metric"
            )
        strategies = extremes(self.space.get("eval_strategy", [self.training.eval_strategy]))
        if self.metric != "loss" and "no" in strategies:
            raise ValueError(
                f"metric: {self.metric} needs evaluations of every trial; set eval_strategy to steps or epoch"
            )
        if self.metric not in {"loss", self.training.metric_for_best_model}:
            raise ValueError(
                f"training.metric_for_best_model: trials keep their best by {self.training.metric_for_best_model}, but "
                f"are compared by {self.metric}; name the same in both"
            )
        if self.mode not in {None, self.goal.mode}:
            better = "higher" if self.goal.higher else "lower"
            raise ValueError(f"mode: {better} values of {self.metric} are better; leave it out or say {self.goal.mode}")

    @property
    def trials(self) -> int:
        """How many trials the search makes."""
        return self.num_trials or len(self.grid.points)

    @cached_property
    def grid(self) -> Grid:
        """What a grid tries, worked out once; population-based training, which changes settings on the way, begins with
        all there are."""
        return Grid.whole(self.space) if self.scheduler == "pbt" else Grid.of_runs(self.space, self.training)

    @property
    def last_step(self) -> int | None:
        """The last step of the trials that make most; None where their epochs decide that."""
        steps = extremes(self.space["max_steps"]) if "max_steps" in self.space else [self.training.max_steps]
        return None if None in steps else int(max(steps))

    @property
    def goal(self) -> Goal:
        """What trials are compared by."""
        return Goal.of(self.metric)

    def identity(self) -> dict[str, Any]:
        """As `Config.identity`, with the training settings' own exceptions."""
        return {**super().identity(), "training": self.training.identity()}

    @property
    def idle(self) -> Collection[str]:
        """Those of the training settings that decide nothing in any trial."""
        return [f"training.{name}" for name in idle_everywhere(self.space, self.training)]
