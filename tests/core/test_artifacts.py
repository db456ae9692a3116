"""Artifacts: finished exactly when the manifest is there, verified when opened, resumed and never overwritten."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import boto3
import numpy as np
import pytest
from ray.exceptions import RayTaskError
from safetensors import SafetensorError
from safetensors.numpy import save_file

from raytune_ft.core.artifacts import open_artifact, read_claim, read_failures
from raytune_ft.core.draft import Draft, begin, refuse_other
from raytune_ft.core.errors import ArtifactError, RunError
from raytune_ft.core.manifest import CLAIM, FAILURES, MANIFEST, ArtifactKind, Parent, differences
from raytune_ft.core.storage import Location

SETTINGS = {"lora_r": 8, "optimizer": {"learning_rate": 0.001}}


def finished(where, settings=SETTINGS, **kwargs):
    draft = begin(where, ArtifactKind.MODEL, settings=settings, **kwargs)
    assert draft.finished is None
    with draft:
        (draft.folder / "deep").mkdir()
        (draft.folder / "deep" / "weights.bin").write_bytes(b"12345")
        draft.write_json("account.json", {"rows": 3})
        draft.numbers["loss"] = 0.25
    return draft.artifact


def test_what_was_written_is_read_back(storage):
    made = finished(f"{storage}/a")
    found = open_artifact(f"{storage}/a", ArtifactKind.MODEL)
    assert found.manifest == made.manifest
    assert found.numbers == {"loss": 0.25}
    assert found.manifest.settings == SETTINGS
    assert found.read_json("account.json") == {"rows": 3}
    entry = found.manifest.files["deep/weights.bin"]
    # printf 12345 | sha256sum
    assert (entry.size, entry.sha256[:16]) == (5, "5994471abb01112a")
    assert sorted(found.manifest.files) == ["account.json", "deep/weights.bin"]
    assert (found.local() / "deep" / "weights.bin").read_bytes() == b"12345"


def test_a_file_is_found_whole_or_not_at_all(storage):
    file = Location.at(storage) / "note.json"
    content = b"1" * 1_000_000
    writer = threading.Thread(target=lambda: [file.write(content) for _ in range(20)])
    writer.start()
    sizes = set()
    while writer.is_alive():
        if file.exists():
            sizes.add(len(file.read()))
    writer.join()
    assert sizes == {1_000_000}
    assert list(Location.at(storage).files()) == ["note.json"]


def test_packed_files_go_to_storage_and_back_as_they_are(storage, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "rows.jsonl.gz").write_bytes(b"12345")
    Location.at(storage).upload(tmp_path / "there")
    file = Location.at(storage) / "rows.jsonl.gz"
    assert (file.size(), file.read()) == (5, b"12345")
    # printf 12345 | sha256sum
    assert file.sha256()[:16] == "5994471abb01112a"
    Location.at(storage).download(tmp_path / "back")
    assert (tmp_path / "back" / "rows.jsonl.gz").read_bytes() == b"12345"


def test_the_same_run_finds_its_finished_work(storage):
    made = finished(f"{storage}/a")
    again = begin(f"{storage}/a", ArtifactKind.MODEL, settings=SETTINGS)
    assert again.finished is not None
    assert again.finished.manifest.finished_at == made.manifest.finished_at


def test_another_run_is_refused_and_nothing_is_touched(storage):
    finished(f"{storage}/a")
    before = (Location.at(storage) / "a" / MANIFEST).read()
    with pytest.raises(ArtifactError, match=r"made with other settings: lora_r: 8 -> 16.*Nothing was overwritten"):
        begin(f"{storage}/a", ArtifactKind.MODEL, settings={**SETTINGS, "lora_r": 16})
    with pytest.raises(ArtifactError, match="holds a finished model, a report was to be written there"):
        begin(f"{storage}/a", ArtifactKind.REPORT, settings=SETTINGS)
    assert (Location.at(storage) / "a" / MANIFEST).read() == before


def test_what_is_put_together_in_seconds_is_made_anew_for_other_settings(storage):
    def said(settings, kind=ArtifactKind.PIPELINE):
        draft = begin(f"{storage}/a", kind, settings=settings, renew=True)
        if draft.finished is None:
            with draft:
                draft.write_json(f"{settings['steps']}.json", settings)
        return draft.artifact

    first = said({"steps": 4})
    assert said({"steps": 4}).manifest == first.manifest
    second = said({"steps": 5})
    assert (list(second.manifest.files), second.manifest.settings) == (["5.json"], {"steps": 5})
    assert open_artifact(f"{storage}/a").manifest == second.manifest
    with pytest.raises(ArtifactError, match="holds a finished pipeline, a model was to be written there"):
        said({"steps": 5}, ArtifactKind.MODEL)


def test_a_folder_that_will_be_refused_is_refused_long_before(storage):
    refuse_other(f"{storage}/a", ArtifactKind.MODEL, SETTINGS)
    (Location.at(storage) / "b" / "thesis.txt").write(b"mine")
    with pytest.raises(ArtifactError, match=r"holds something else \(thesis.txt\)"):
        refuse_other(f"{storage}/b", ArtifactKind.MODEL, SETTINGS)
    with pytest.raises(ArtifactError, match="is a file; a folder is needed to write the model into"):
        refuse_other(f"{storage}/b/thesis.txt", ArtifactKind.MODEL)
    finished(f"{storage}/a")
    refuse_other(f"{storage}/a", ArtifactKind.MODEL, SETTINGS)
    refuse_other(f"{storage}/a", ArtifactKind.MODEL)
    with pytest.raises(ArtifactError, match="made with other settings: lora_r: 8 -> 16"):
        refuse_other(f"{storage}/a", ArtifactKind.MODEL, {**SETTINGS, "lora_r": 16})
    begin(f"{storage}/c", ArtifactKind.MODEL, settings=SETTINGS)
    refuse_other(f"{storage}/c", ArtifactKind.MODEL, {})  # its turn tells what becomes of it
    with pytest.raises(ArtifactError, match="holds an unfinished model, a report was to be written there"):
        refuse_other(f"{storage}/c", ArtifactKind.REPORT)


def test_a_parent_with_another_content_is_another_run(storage):
    parent = Parent(role="dataset", where="runs/d", digest="aaaa")
    finished(f"{storage}/a", parents=[parent])
    assert begin(f"{storage}/a", ArtifactKind.MODEL, settings=SETTINGS, parents=[parent]).finished
    with pytest.raises(ArtifactError, match="dataset: another content at runs/d"):
        begin(
            f"{storage}/a",
            ArtifactKind.MODEL,
            settings=SETTINGS,
            parents=[Parent(role="dataset", where="runs/d", digest="bbbb")],
        )


def test_a_claim_that_a_kill_cut_short_is_written_anew(tmp_path):
    def claim(path):
        begin(path, ArtifactKind.MODEL, settings=SETTINGS).lock.release()

    claim(tmp_path / "whole")
    torn = tmp_path / "torn" / ".started.json.17-140.part"
    torn.parent.mkdir()
    torn.write_bytes((tmp_path / "whole/started.json").read_bytes()[:9])
    claim(tmp_path / "torn")
    assert [path.name for path in torn.parent.iterdir()] == ["started.json"]
    (torn.parent / "started.json").unlink()
    torn.with_name(".thesis.txt.17-140.part").touch()
    with pytest.raises(ArtifactError, match="holds something else"):
        claim(tmp_path / "torn")


def test_a_folder_with_something_else_is_refused(storage):
    (Location.at(storage) / "a" / "thesis.txt").write(b"mine")
    with pytest.raises(ArtifactError, match=r"holds something else \(thesis.txt\)"):
        begin(f"{storage}/a", ArtifactKind.MODEL, settings=SETTINGS)
    assert (Location.at(storage) / "a" / "thesis.txt").read() == b"mine"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file; a folder is needed"):
        begin(tmp_path / "a", ArtifactKind.MODEL, settings=SETTINGS)


def test_a_failure_is_kept_and_the_next_attempt_goes_on(storage):
    where = f"{storage}/a"
    for attempt in (1, 2):
        draft = begin(where, ArtifactKind.MODEL, settings=SETTINGS, keep=["checkpoints"])
        with pytest.raises(RuntimeError), draft:
            raise RuntimeError(f"attempt {attempt} at https://me:secret@host broke")
    failures = read_failures(where)
    assert [failure.message for failure in failures] == [f"attempt {n} at https://***@host broke" for n in (1, 2)]
    assert "secret" not in failures[0].trace
    assert read_claim(where).settings == SETTINGS
    with pytest.raises(ArtifactError, match=r"did not finish\. Run the same command again to resume"):
        open_artifact(where)
    made = finished(where, keep=["checkpoints"])
    assert len(made.manifest.failures) == 2


def test_what_is_kept_survives_the_next_attempt_and_the_rest_does_not(storage):
    where = Location.at(storage) / "a"
    with pytest.raises(RuntimeError), begin(where, ArtifactKind.MODEL, settings=SETTINGS):
        (where / "checkpoints/step1").write(b"state")
        (where / "half.bin").write(b"torn")
        raise RuntimeError("stop")
    begin(where, ArtifactKind.MODEL, settings=SETTINGS, keep=["checkpoints"])
    assert [name for name in where.files() if not name.startswith(FAILURES)] == ["checkpoints/step1", CLAIM]


def test_unfinished_work_to_go_on_from_is_not_given_up_for_other_settings(storage):
    begin(f"{storage}/a", ArtifactKind.MODEL, settings=SETTINGS)
    (Location.at(f"{storage}/a") / "checkpoints/step1").write(b"1")
    with pytest.raises(ArtifactError, match="holds an unfinished model, made with other settings"):
        begin(f"{storage}/a", ArtifactKind.MODEL, settings={"lora_r": 1}, keep=["checkpoints"])


def test_another_value_of_a_setting_that_decides_nothing_makes_no_other_run(storage):
    def again(where: str, epochs: int, **more: object) -> Draft:
        settings = {"training": {"max_steps": 4, "epochs": epochs}}
        return begin(f"{storage}/{where}", ArtifactKind.SWEEP, settings=settings, keep=["ray"], **more)

    draft = again("a", 2)
    (draft.location / "ray/state").write(b"1")
    with draft:
        pass
    (again("b", 2).location / "ray/state").write(b"1")
    for where, state in (("a", "finished"), ("b", "unfinished")):
        for idle in ([], ["epochs", "training.max_steps"]):
            with pytest.raises(ArtifactError, match=rf"{state} sweep, .*other settings: training\.epochs: 2 -> 3\."):
                again(where, 3, idle=idle)
        assert "ray/state" in again(where, 3, idle=["training.epochs"]).location.files()


def test_an_unfinished_attempt_with_nothing_to_go_on_from_gives_way_to_other_settings(storage):
    begin(f"{storage}/a", ArtifactKind.MODEL, settings=SETTINGS)
    draft = begin(f"{storage}/a", ArtifactKind.MODEL, settings={"lora_r": 1}, keep=["checkpoints"])
    with draft:
        pass
    assert open_artifact(f"{storage}/a").manifest.settings == {"lora_r": 1}
    with pytest.raises(ArtifactError, match="holds a finished model, a report was to be written there"):
        begin(f"{storage}/a", ArtifactKind.REPORT, settings={})


def test_a_claim_torn_by_a_kill_is_taken_over(storage):
    (Location.at(storage) / "a" / CLAIM).write(b'{"kind": "mod')
    finished(f"{storage}/a")
    assert open_artifact(f"{storage}/a").numbers == {"loss": 0.25}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda at: (at / "deep/weights.bin").delete(), "deep/weights.bin is missing"),
        (lambda at: (at / "deep/weights.bin").write(b"123"), "deep/weights.bin has 3 bytes instead of 5"),
        (lambda at: (at / "deep/weights.bin").write(b"12346"), r"deep/weights.bin was changed \(its sha256 differs\)"),
        (lambda at: (at / MANIFEST).write(b'{"kind": "model"}'), "is not a manifest of raytune-ft"),
        (lambda at: (at / MANIFEST).write(b"{"), "is not a manifest of raytune-ft"),
        (lambda at: ((at / MANIFEST).delete(), (at / CLAIM).delete()), "was not made by raytune-ft"),
    ],
)
def test_harm_is_found_and_named(storage, harm, message):
    finished(f"{storage}/a")
    harm(Location.at(storage) / "a")
    with pytest.raises(ArtifactError, match=message):
        open_artifact(f"{storage}/a")


def test_a_folder_that_is_not_there_and_a_wrong_kind_are_named(storage):
    with pytest.raises(ArtifactError, match="there is no such folder"):
        open_artifact(f"{storage}/nowhere")
    finished(f"{storage}/a")
    with pytest.raises(ArtifactError, match="expected a dataset or report, found a model"):
        open_artifact(f"{storage}/a", ArtifactKind.DATASET, ArtifactKind.REPORT)


def test_the_digest_depends_on_content_alone(storage):
    assert finished(f"{storage}/a").digest == finished(f"{storage}/b", settings={"lora_r": 1}).digest


def test_a_child_remembers_its_parent(storage):
    parent = finished(f"{storage}/a").as_parent("model")
    child = finished(f"{storage}/b", parents=[parent])
    kept = open_artifact(f"{storage}/b").manifest.parents
    assert kept == [parent] and child.manifest.parents == kept
    assert open_artifact(kept[0].where).digest == kept[0].digest


def test_a_killed_run_leaves_no_manifest_and_its_claim_resumes(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from raytune_ft.core.draft import ArtifactKind, begin\n"
        f"draft = begin(sys.argv[1], ArtifactKind.MODEL, settings={SETTINGS!r})\n"
        "with draft:\n"
        "    (draft.folder / 'half.bin').write_bytes(b'torn')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["half.bin", CLAIM]
    assert sorted(finished(tmp_path / "a").manifest.files) == ["account.json", "deep/weights.bin"]


def test_uploads_larger_than_one_part_arrive_whole(s3_bucket):
    content = os.urandom(11 << 20)  # parts of a multipart upload are 5 MiB or more
    draft = begin(f"{s3_bucket}/big", ArtifactKind.MODEL, settings={})
    with draft:
        (draft.folder / "weights.bin").write_bytes(content)
    found = open_artifact(f"{s3_bucket}/big")
    assert (found.local() / "weights.bin").read_bytes() == content


def test_a_bucket_that_is_not_there_is_the_users_mistake(s3_bucket):
    with pytest.raises(ArtifactError, match="s3://no-such-bucket-here/a"):
        finished("s3://no-such-bucket-here/a")


def test_a_storage_that_nobody_knows_is_the_users_mistake():
    with pytest.raises(ArtifactError, match="this storage cannot be opened"):
        begin("floppy://disk/a", ArtifactKind.MODEL, settings={})


def test_the_manifest_is_plain_json(tmp_path):
    finished(tmp_path / "a")
    content = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert content["kind"] == "model" and content["schema_version"] == 1
    assert {"python", "ray", "torch", "pyarrow"} <= set(content["versions"])


def test_differences_name_dotted_keys():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}
    assert differences(old, new) == ["b.c: 2 -> 4", "e: None -> 5"]


def test_locations_join_and_name_their_parts(tmp_path):
    place = Location.at("s3://bucket/runs?region=eu-west-1") / "a"
    assert (place.uri, place.name, str(place.parent)) == (
        "s3://bucket/runs/a?region=eu-west-1",
        "a",
        "s3://bucket/runs",
    )
    assert str(Location.at("s3://key:secret@bucket/a")) == "s3://***@bucket/a"
    assert Location.at(tmp_path / "x").is_local and not place.is_local
    assert Path((Location.at(f"file://{tmp_path}") / "x").path) == tmp_path / "x"


NAMES = ["a b", "100%", "a%20b", "a#b", "a?b", "ü", "a+b=c", "a[1]{x}|y", 'a"b', "a:b@c"]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_file_or_folder_is_called_it_is_found_by_its_name(storage, name):
    if storage.startswith("gs://") and name == "a#b":
        pytest.skip("the server that stands for Google's storage cuts names at a #")
    folder = Location.at(storage) / name
    (folder / name).write(b"1")
    assert list(folder.files()) == [name]
    assert f"{name}/{name}" in Location.at(storage).files()
    assert (folder / name).read() == b"1"
    assert ((folder / name).name, (folder / name).parent) == (name, folder)
    assert Location.at(str(folder / name)).read() == b"1"
    assert open_artifact(finished(folder / "art").location).manifest.settings == SETTINGS


def test_uris_may_be_written_with_blanks_and_umlauts_or_as_uris_have_them(s3_bucket):
    Location.at(f"{s3_bucket}/läufe 1/x").write(b"1")
    assert Location.at(f"{s3_bucket}/l%C3%A4ufe%201/x").read() == b"1"
    assert str(Location.at(f"{s3_bucket}/l%C3%A4ufe%201")) == f"{s3_bucket}/läufe 1"
    assert Location.at("https://host/a%20b?x=1").uri == "https://host/a%20b?x=1"


def test_files_whose_names_lead_out_of_a_folder_are_not_copied(s3_bucket, s3_server, tmp_path):
    where = f"{s3_bucket}/a/b/c/art"
    finished(where)
    bucket = s3_bucket.removeprefix("s3://")
    client = boto3.client("s3", endpoint_url=s3_server)
    for key in ("a/b/c/art/../../escaped.txt", "a/escaped.txt"):  # the server here finds the first by the second
        client.put_object(Bucket=bucket, Key=key, Body=b"evil")
    with pytest.raises(ArtifactError, match="leads out of the folder"):
        Location.at(where).download(tmp_path / "copy" / "here")
    local = open_artifact(where).local()
    assert sorted(path.name for path in local.rglob("*") if path.is_file())[0] != "escaped.txt"
    assert not list(tmp_path.rglob("escaped.txt"))


def test_two_runs_at_once_do_not_write_into_one_folder(tmp_path):
    first = begin(tmp_path / "a", ArtifactKind.DATASET, settings={"seed": 1})
    with first:
        (first.folder / "rows.txt").write_text("1")
        with pytest.raises(ArtifactError, match="another run is writing into this folder right now"):
            begin(tmp_path / "a", ArtifactKind.DATASET, settings={"seed": 2})
        code = "import sys; from raytune_ft.core.draft import begin; begin(sys.argv[1], 'dataset', settings={})"
        program = [sys.executable, "-c", code, str(tmp_path / "a")]
        other = subprocess.run(program, check=False, capture_output=True, text=True)
        assert "another run is writing into this folder right now" in other.stderr
    assert list(open_artifact(tmp_path / "a").manifest.files) == ["rows.txt"]
    assert begin(tmp_path / "a", ArtifactKind.DATASET, settings={"seed": 1}).finished is not None


def test_a_run_whose_folder_another_one_took_is_not_called_finished(storage):
    first = begin(storage, ArtifactKind.DATASET, settings={"seed": 1})
    (first.folder / "first.txt").write_text("1")
    if first.lock is not None:
        first.lock.release()  # as where the file system knows no locks
    second = begin(storage, ArtifactKind.DATASET, settings={"seed": 1})
    (second.folder / "second.txt").write_text("1")
    with pytest.raises(ArtifactError, match="another run has begun in this folder since"), first:
        pass
    with second:
        pass
    assert open_artifact(storage).manifest.attempt == second.claim.attempt


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"file/out: this folder cannot be made \(Not a directory\)"):
        begin(tmp_path / "file" / "out", ArtifactKind.DATASET, settings={})


def test_settings_that_json_changes_are_the_run_s_own_all_the_same(storage):
    assert finished(storage, {"max_grad_norm": math.inf, "where": Path("/x"), "betas": (0.9, 0.99)}).numbers


def test_a_refused_run_holds_no_lock(tmp_path):
    for settings in ({"seed": 1}, {"seed": 2}):
        draft = begin(tmp_path / "a", ArtifactKind.DATASET, settings=settings, keep=("kept",))
        (draft.folder / "kept").mkdir(exist_ok=True)
        (draft.folder / "kept" / "rows").write_text("1")
        del draft
        with pytest.raises(ArtifactError, match="made with other settings") as caught:
            begin(tmp_path / "a", ArtifactKind.DATASET, settings={"seed": 3}, keep=("kept",))
        assert caught.value.__traceback__ is not None  # which holds every frame, and so the refused run
        begin(tmp_path / "a", ArtifactKind.DATASET, settings=settings, keep=("kept",))
        shutil.rmtree(tmp_path / "a")


@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.ENOSPC, "Make room there"), (errno.EROFS, "Make it writable"), (errno.EACCES, "Make it writable")],
)
def test_how_storage_is_mended_and_what_the_same_command_does_then_is_told(number, mend, tmp_path):
    for keep, then in (((), "begins anew"), (("pieces",), "goes on from what is there")):
        told = rf"{mend}, or choose another folder\. Then the same command {then}\.$"
        with (
            pytest.raises(ArtifactError, match=told),
            begin(tmp_path / then, ArtifactKind.MODEL, settings=SETTINGS, keep=keep),
        ):
            raise OSError(number, os.strerror(number))


def test_a_limit_of_file_sizes_is_told_of_weights_too_wherever_they_were_written(tmp_path):
    def write(folder):
        save_file({"weight": np.zeros(1 << 16)}, folder / "model.safetensors")

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write_in in (("here", write), ("task", lambda folder: _as_ray_raises(write, folder))):
        draft = begin(tmp_path / name, ArtifactKind.MODEL, settings=SETTINGS)
        told = rf"{name}: the storage refused: .*File too large.* Make room"
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
        try:
            with pytest.raises(ArtifactError, match=told), draft:
                write_in(draft.folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert read_failures(tmp_path / name)


def _as_ray_raises(write, folder):
    """What the driver sees of an error in a task."""
    try:
        write(folder)
    except SafetensorError as error:
        raise RayTaskError("write", traceback.format_exc(), error).as_instanceof_cause() from None


def test_a_full_disk_is_told_in_words_and_hides_no_other_error(tmp_path, caplog):
    full = r"a: the storage refused: .*No space left on device.* Make room there"
    draft = begin(tmp_path / "a", ArtifactKind.MODEL, settings=SETTINGS)
    with pytest.raises(ArtifactError, match=full), draft:
        (draft.folder / "weights.bin").symlink_to("/dev/full")  # takes nothing
        draft.write_json("weights.bin", [0])
    assert read_failures(tmp_path / "a")[0].error == "OSError"
    draft = begin(tmp_path / "b", ArtifactKind.MODEL, settings=SETTINGS)
    with pytest.raises(RunError, match="the run's own"), draft:
        (draft.folder / "failures").touch()  # there can be no folder
        raise RunError("the run's own")
    assert "b: why it failed could not be kept" in caplog.text
    with (
        pytest.raises(ArtifactError, match=r"^/elsewhere: no permission"),
        begin(tmp_path / "d", ArtifactKind.MODEL, settings=SETTINGS),
    ):
        raise PermissionError(errno.EACCES, "denied", "/elsewhere")
    told = r"e/x: the storage refused: .*No space left on device.* Make room there.* Then .* begins anew"
    with (
        pytest.raises(ArtifactError, match=told),
        begin(tmp_path / "e", ArtifactKind.MODEL, settings=SETTINGS) as draft,
    ):
        (draft.folder / "x").symlink_to("/dev/full")
        (tmp_path / "from").mkdir()
        (tmp_path / "from/x").write_bytes(bytes(1 << 16))
        draft.location.upload(tmp_path / "from")  # as a model's worker does
    (tmp_path / "c" / "started.json").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"c: the storage refused: .*Is a directory"):
        begin(tmp_path / "c", ArtifactKind.MODEL, settings=SETTINGS)
