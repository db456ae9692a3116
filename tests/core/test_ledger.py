"""The ledger: what lies under a storage path, finished or not, here and on S3."""

import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.ledger import RunState, differing, find_run, flat, lines, list_runs, scalars, story, table
from raytune_ft.core.manifest import MANIFEST, ArtifactKind, Parent
from raytune_ft.core.storage import Location


def make(where, kind=ArtifactKind.MODEL, numbers=None, parents=(), **settings):
    draft = begin(where, kind, settings={"output_dir": where, **settings}, identity=settings, parents=parents)
    with draft:
        draft.write_json("account.json", {})
        draft.numbers.update(numbers or {})
    return draft.artifact


def fail(where, message, **settings):
    with pytest.raises(RuntimeError), begin(where, ArtifactKind.MODEL, settings=settings):
        raise RuntimeError(message)


@pytest.fixture
def history(storage):
    """A dataset, a model from it, a model that failed twice, and one that was never finished."""
    dataset = make(f"{storage}/data", ArtifactKind.DATASET, {"rows_out": 7}).as_parent("dataset")
    make(f"{storage}/sweep/a", numbers={"loss": 0.51234567, "curve": [1, 2]}, parents=[dataset], lora={"r": 8}, seed=1)
    fail(f"{storage}/c", "first", lora={"r": 4})
    fail(f"{storage}/c", "second", lora={"r": 4})
    begin(f"{storage}/d", ArtifactKind.MODEL, settings={"lora": {"r": 2}})
    return storage


def test_every_run_is_listed_with_how_far_it_got(history):
    make(f"{history}/again", lora={"r": 1})
    found = {run.name: (run.kind, run.outcome) for run in list_runs(history)}
    assert found == {
        "data": ("dataset", "finished"),
        "sweep/a": ("model", "finished"),
        "c": ("model", "failed (2 failures kept)"),
        "d": ("model", "unfinished"),
        "again": ("model", "finished"),
    }


def test_a_success_after_a_failure_keeps_the_failure(storage):
    fail(f"{storage}/a", "out of memory", lora={"r": 16})
    with begin(f"{storage}/a", ArtifactKind.MODEL, settings={"lora": {"r": 16}}):
        pass
    (run,) = list_runs(storage)
    assert (run.state, run.outcome) == (RunState.FINISHED, "finished (1 failure kept)")
    assert run.failures[0].message == "out of memory"


def test_runs_of_a_kind_show_where_their_settings_differ(history):
    models = [run for run in list_runs(history) if run.name in {"sweep/a", "c"}]
    assert differing(models) == {"sweep/a": {"lora.r": 8, "seed": 1}, "c": {"lora.r": 4, "seed": None}}
    assert differing(models[:1]) == {models[0].name: {}}


def test_the_table_names_parents_and_numbers(history):
    rows = {row[0]: row[1:] for row in table([run for run in list_runs(history) if run.kind == "model"])}
    assert rows["sweep/a"] == (
        "finished",
        f"dataset: {history}/data",
        "lora.r=8\nseed=1",
        "loss=0.5123",
    )


def test_a_story_tells_where_a_run_came_from_and_why_it_failed(history):
    told = dict(story(find_run("a", history)))
    assert told["from"].startswith(f"dataset: {history}/data (")
    assert "lora.r=8" in told["settings"] and "curve=[1, 2]" in told["numbers"]
    assert "account.json" in told["files"] and "ray=" in told["versions"]
    assert "RuntimeError: second" in dict(story(find_run("c", history)))["failures"]


def test_a_run_is_found_by_path_by_name_and_by_the_end_of_its_name(history):
    assert find_run(f"{history}/sweep/a", "elsewhere").name == "a"
    assert find_run("sweep/a", history).name == "sweep/a"
    assert find_run("a", history).name == "sweep/a"


def test_a_name_that_fits_none_or_two_is_the_users_mistake(history):
    with pytest.raises(ArtifactError, match=r"nothing: is no run, and none below .* is called so \(there: "):
        find_run("nothing", history)
    make(f"{history}/other/a")
    with pytest.raises(ArtifactError, match=r"more than one run is called so: .*/a, .*/a$"):
        find_run("a", history)


def test_another_programs_manifest_is_passed_over_and_a_damaged_one_is_shown(storage):
    make(f"{storage}/a")
    (Location.at(storage) / "web" / MANIFEST).write(b'{"name": "app"}')
    (Location.at(storage) / "a" / MANIFEST).write(b"{")
    (run,) = list_runs(storage)
    assert (run.name, run.state) == ("a", RunState.DAMAGED)


def test_a_torn_failure_is_counted_and_ten_come_after_two(storage):
    fail(f"{storage}/a", "x", seed=1)
    where = Location.at(storage) / "a"
    kept = (where / "failures/1.json").read()
    (where / "failures/2.json").write(b"{")
    (where / "failures/10.json").write(kept.replace(b'"x"', b'"last"'))
    (run,) = list_runs(storage)
    assert [failure.message for failure in run.failures] == ["x", "failures/2.json is torn", "last"]


def test_the_path_itself_may_be_a_run(storage):
    make(f"{storage}/a")
    (run,) = list_runs(f"{storage}/a")
    assert run.name == "a" and run.state == RunState.FINISHED


def test_a_path_that_is_not_there_is_the_users_mistake(storage):
    with pytest.raises(ArtifactError, match="there is no such folder"):
        list_runs(f"{storage}/nowhere")


def test_nested_values_become_dotted_lines():
    values = {"a": {"b": 1, "c": {"d": 0.123456}}, "e": [1], "f": None}
    assert flat(values) == {"a.b": 1, "a.c.d": 0.123456, "e": [1], "f": None}
    assert scalars(values) == {"a.b": 1, "a.c.d": 0.123456}
    assert lines(scalars(values)) == "a.b=1\na.c.d=0.1235"
    assert lines({"a": 1, "b": 2, "c": 3}, most=1) == "a=1\n... and 2 more"


def test_a_parent_elsewhere_is_shown_as_it_was_written(storage):
    parent = Parent(role="model", where="starter:smollm2-135m", digest="abcd")
    make(f"{storage}/a", parents=[parent])
    assert table(list_runs(storage))[0][2] == "model: starter:smollm2-135m"
