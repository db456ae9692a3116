"""A run goes on in the same order of data, under any layout of its global batch, or says which layouts would do."""

from __future__ import annotations

import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.training.cursor import Cursor, layouts
from raytune_ft.training.folder import CHECKPOINTS
from raytune_ft.training.inputs import refuse_other_batch
from raytune_ft.training.run import FineTuner


def test_a_cursor_says_epoch_and_row() -> None:
    # 18 rows in batches of 8: steps of 8, 8 and 2 rows.
    places = [(Cursor(0, 8, 18).at(step)["epoch"], Cursor(0, 8, 18).at(step)["row"]) for step in range(5)]
    assert places == [(0, 0), (0, 8), (0, 16), (1, 0), (1, 8)]


def test_layouts_keep_the_global_batch_and_the_number_of_workers_where_they_can() -> None:
    assert layouts(12, 3, 4) == [(3, 4, 1)]
    assert layouts(12, 2, 4) == [(2, 3, 2)]
    assert layouts(8, 3, 4) == [(2, 4, 1), (4, 2, 1)]
    assert layouts(7, 2, 4) == [(1, 1, 7), (7, 1, 1)]


def test_another_global_batch_is_refused_with_layouts_that_go(settings) -> None:
    config = settings(num_workers=3, per_device_train_batch_size=4)
    with pytest.raises(ArtifactError) as caught:
        Cursor(0, 12, 18).refuse_other(Cursor(0, 8, 18).at(4), "the checkpoint of step 4", config)
    message = str(caught.value)
    assert "has a global batch of 8 rows, and these settings make 12 (4 per_device" in message
    assert "num_workers: 2, per_device_train_batch_size: 4, gradient_accumulation_steps: 1" in message


@pytest.mark.parametrize(("there", "word"), [(Cursor(1, 8, 18), "seed is 1 there"), (Cursor(0, 8, 17), "rows is 17")])
def test_another_order_of_the_data_is_refused(there: Cursor, word: str, settings) -> None:
    with pytest.raises(ArtifactError, match=word):
        Cursor(0, 8, 18).refuse_other(there.at(2), "the checkpoint of step 2", settings())


def test_an_unfinished_run_of_another_global_batch_is_refused_before_anything_starts(settings, tmp_path) -> None:
    config = settings(per_device_train_batch_size=4, num_workers=2)
    draft = begin(
        config.output_dir,
        ArtifactKind.MODEL,
        settings=config.resolved(),
        identity=config.identity(),
        keep=(CHECKPOINTS,),
    )
    (draft.location / CHECKPOINTS / "step-00000004/manifest.json").write(b"{}")
    refuse_other_batch(settings(per_device_train_batch_size=8, num_workers=1, zero_stage=3), draft.location)
    with pytest.raises(ArtifactError, match=r"begun here has a global batch of 8 rows, and these settings make 4"):
        FineTuner(settings(per_device_train_batch_size=4)).train()


def test_layout_stage_and_offload_are_no_part_of_a_runs_identity(settings) -> None:
    one = settings(num_workers=2, per_device_train_batch_size=4, zero_stage=3, offload="all").identity()
    assert one == settings(gradient_accumulation_steps=2, per_device_train_batch_size=4).identity()
    assert one != settings(per_device_train_batch_size=4).identity()
