"""What a budget has to cover at least: every trial's way to its first evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.parquet as pq

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import extremes


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
    rows, tokens = rows_and_tokens(files)
    batch = min(_values(config, "per_device_train_batch_size")) * min(_values(config, "gradient_accumulation_steps"))
    batch *= config.training.num_workers
    epoch = -(-rows // batch)
    steps = min(config.training.eval_steps, epoch) if config.training.eval_strategy == "steps" else epoch
    each = round(steps * batch * tokens / max(1, rows))
    if each * trials > config.max_tokens:
        raise ConfigError(
            f"max_tokens: {config.max_tokens:,} do not take {trials} trials to their first evaluation (about {each:,} "
            f"tokens each, {each * trials:,} together); raise it, evaluate earlier, or search fewer trials"
        )


def rows_and_tokens(files: Sequence[str]) -> tuple[int, int]:
    """Rows of tokenized Parquet files and their tokens, from the files' footers alone."""
    rows = tokens = 0
    for file in files:
        where = Location.at(file)
        with where.filesystem.open_input_file(where.path) as stream:
            footer = pq.read_metadata(stream)
        rows += footer.num_rows
        column = [footer.schema.column(place).path.split(".")[0] for place in range(len(footer.schema))]
        place = column.index("input_ids")
        tokens += sum(footer.row_group(group).column(place).num_values for group in range(footer.num_row_groups))
    return rows, tokens


def _values(config: SweepConfig, key: str) -> list[int]:
    return extremes(config.space[key]) if key in config.space else [getattr(config.training, key)]
