"""What can be told from a sweep's rows before it starts: what a budget has to cover, and that trials are comparable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow.parquet as pq

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.training.schedule import refuse_without_validation
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.own import Splits
from raytune_ft.tuning.space import extremes


def tokens_to_first_evaluation(config: SweepConfig, files: Sequence[str]) -> int:
    """About how many tokens a trial of the smallest batches trains on before its first evaluation.

    Args:
        config: the sweep's.
        files: Parquet files of the tokenized training rows.
    """
    rows, tokens = rows_and_tokens(files)
    batch = min(_values(config, "per_device_train_batch_size")) * min(_values(config, "gradient_accumulation_steps"))
    batch *= config.training.num_workers
    epoch = -(-rows // batch)
    steps = min(config.training.eval_steps, epoch) if config.training.eval_strategy == "steps" else epoch
    return round(steps * batch * tokens / max(1, rows))


def refuse_small_budget(config: SweepConfig, trials: int, files: Sequence[str]) -> None:
    """Checks that `max_tokens` takes every trial to its first evaluation: before that nothing can be compared.

    Args:
        config: the sweep's.
        trials: how many there are.
        files: Parquet files of the tokenized training rows.

    Raises:
        ConfigError: if it does not.
    """
    if config.max_tokens is None:
        return
    each = tokens_to_first_evaluation(config, files)
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


def _values(config: SweepConfig, key: str) -> list[int]:
    return extremes(config.space[key]) if key in config.space else [getattr(config.training, key)]
