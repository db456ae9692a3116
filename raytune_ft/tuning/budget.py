"""What can be told from a sweep's rows before it starts: what a budget has to cover, and that trials are comparable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import pyarrow.parquet as pq

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.training.schedule import Timetable, refuse_without_validation
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.own import Splits
from raytune_ft.tuning.space import extremes

_OF_LENGTH = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("eval_strategy", "eval_steps"),
)
"""What of the settings decides how long trials are, and when they are evaluated."""


def tokens_to_first_evaluation(config: SweepConfig, split: Mapping[str, Sequence[str]]) -> int:
    """About how many tokens a trial trains on before its first evaluation; where trials differ, the fewest.

    Args:
        config: the sweep's.
        split: Parquet files of the tokenized splits.
    """
    rows, tokens = rows_and_tokens(split["train"])
    first = []
    for batch, timetable in _timetables(config, rows, has_validation=bool(split.get("validation"))):
        steps = min(timetable.eval_every or 1, timetable.total)
        epochs, more = divmod(steps, timetable.steps_per_epoch)
        first.append(epochs * rows + more * batch)
    return round(min(first) * tokens / max(1, rows))


def refuse_late_grace(config: SweepConfig, split: Mapping[str, Sequence[str]]) -> None:
    """Checks that some trial goes beyond `grace_steps`, also where their epochs decide how long they are.

    Args:
        config: the sweep's.
        split: Parquet files of the tokenized splits.

    Raises:
        ConfigError: if none does.
    """
    rows, _ = rows_and_tokens(split["train"])
    last = max(timetable.total for _, timetable in _timetables(config, rows, has_validation=True))
    if config.grace_steps > last:
        raise ConfigError(
            f"grace_steps: {config.grace_steps} is beyond the last step of the longest trial ({last}): nothing would "
            "ever be compared"
        )


def _timetables(config: SweepConfig, rows: int, *, has_validation: bool) -> Iterator[tuple[int, Timetable]]:
    """Rows of a step, and what happens at which, of each kind of trial."""
    keys = [key for key in _OF_LENGTH if key in config.space]
    for values in product(*(extremes(config.space[key]) for key in keys)):
        training = config.training.with_overrides(**dict(zip(keys, values, strict=True)))
        yield training.global_batch_size, Timetable.of(training, max(1, rows), has_validation=has_validation)


def refuse_small_budget(config: SweepConfig, trials: int, split: Mapping[str, Sequence[str]]) -> None:
    """Checks that `max_tokens` takes every trial to its first evaluation: before that nothing can be compared.

    Args:
        config: the sweep's.
        trials: how many there are.
        split: Parquet files of the tokenized splits.

    Raises:
        ConfigError: if it does not.
    """
    if config.max_tokens is None:
        return
    each = tokens_to_first_evaluation(config, split)
    if each * trials > config.max_tokens:
        raise ConfigError(
            f"max_tokens: {config.max_tokens:,} do not take {trials} trials to their first evaluation (about {each:,} "
            f"tokens each, {each * trials:,} together); raise it, evaluate earlier, or search fewer trials"
        )


def refuse_other_rows(config: SweepConfig, splits: Splits) -> None:
    """Checks that all trials are measured on the same rows, and that there are any.

    Args:
        config: the sweep's.
        splits: see `Splits`.

    Raises:
        ConfigError: if they are not.
    """
    split = "train" if config.metric == "loss" else "validation"
    for found in splits.values():
        if found.get("validation"):
            continue
        if config.metric != "loss":
            raise ConfigError(
                f"metric: {config.metric} is measured on validation rows, and {config.training.dataset_path} has none; "
                "add a split (`raytune-ft prepare`, validation_split), or compare by metric: loss, that of training"
            )
        refuse_without_validation(config.training)
    if len(splits) == 1:
        return
    rows = {longest: sum(footer.num_rows for footer in _footers(found[split])) for longest, found in splits.items()}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{count} rows fit {longest} tokens" for longest, count in sorted(rows.items()))
        raise ConfigError(
            f"space.max_length: trials would be compared by {config.metric} on other {split} rows each ({counts}); "
            f"search lengths that all {split} rows fit, or train with each length (one sweep each) and measure the "
            "models on the same rows with `raytune-ft evaluate`"
        )


def rows_and_tokens(files: Sequence[str]) -> tuple[int, int]:
    """Rows of tokenized Parquet files and their tokens, from the files' footers alone."""
    rows = tokens = 0
    for footer in _footers(files):
        rows += footer.num_rows
        column = [footer.schema.column(place).path.split(".")[0] for place in range(len(footer.schema))]
        place = column.index("input_ids")
        tokens += sum(footer.row_group(group).column(place).num_values for group in range(footer.num_row_groups))
    return rows, tokens


def _footers(files: Sequence[str]) -> Iterator[pq.FileMetaData]:
    for file in files:
        where = Location.at(file)
        with where.filesystem.open_input_file(where.path) as stream:
            yield pq.read_metadata(stream)
