"""Model references: a folder, an artifact, a URI, a hub id, or the starter; with or without an adapter."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from raytune_ft.core.artifacts import Artifact, has_manifest, open_artifact
from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.core.manifest import ArtifactKind, Parent
from raytune_ft.core.storage import Location, cache_folder, source_digest
from raytune_ft.models import starter
from raytune_ft.models.fetching import SCHEME

logger = logging.getLogger("raytune_ft")

COMPACT = "weights.compact.safetensors"
"""File that holds the weights of a pruned model's compact folder (`models.sparsity`)."""
_TOLD_GB = 2.0
"""From which size on the check of an artifact's files is announced, since it takes seconds."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelReference:
    """Where a model's parts lie: what `from_pretrained` takes, an adapter folder upon it, and our artifact, if any."""

    given: str
    base: str
    adapter: Path | None
    artifact: Artifact | None
    digest: str

    @property
    def tokenizer_source(self) -> str:
        """The folder (or hub id) whose tokenizer and chat template count: the adapter's, if it brings them."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").exists():
            return str(self.adapter)
        return self.base


def shared_model(reference: str, storage: Location) -> str:
    """What every node of the cluster can load: the starter is put under `storage`, anything else stays as it is.

    A relative local path becomes absolute, since workers have another working folder.
    """
    if reference.startswith(SCHEME):
        return starter.place(reference, storage)
    if "://" not in reference and Path(reference).expanduser().exists():
        return str(Path(reference).expanduser().absolute())
    return reference


def resolve_model(reference: str) -> ModelReference:
    """Where the parts of a model lie; artifacts on object stores are copied into this machine's cache.

    Raises:
        ModelError: if `reference` leads to nothing, or to a folder that holds no model.
        ArtifactError: if it leads to an artifact that is unfinished, damaged, or no model.
    """
    if reference.startswith(SCHEME):
        return resolve_model(str(starter.cached(reference)))
    location = Location.at(reference)
    if not location.exists():
        if "://" not in reference and _HUB_ID.fullmatch(reference):
            return ModelReference(reference, reference, None, None, short_hash(reference))
        raise ModelError(f"{location}: there is no such model folder (nor is this a hub id like org/name)")
    artifact = None
    if has_manifest(location) or (location / "started.json").exists():
        artifact = open_artifact(location, ArtifactKind.MODEL, verify="size")
        folder, digest = artifact.local(), artifact.digest
    else:
        folder, digest = _local_folder(location)
    if (folder / "adapter_config.json").exists():
        base = resolve_model(_adapter_base(folder))
        return ModelReference(reference, base.base, folder, artifact, digest)
    if is_compact(folder):
        return ModelReference(reference, str(_expanded(folder, digest)), None, artifact, digest)
    if not (folder / "config.json").exists():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ModelError(f"{location}: is not a model: neither config.json nor adapter_config.json is in it ({found})")
    return ModelReference(reference, str(folder), None, artifact, digest)


def resolve_adapter(reference: str, setting: str = "") -> ModelReference:
    """As `resolve_model`, of an adapter, which lies in a folder or on an object store; `setting` begins what is said.

    Raises:
        ModelError: as there, or if it is a whole model, or only a name that a hub may know.
    """
    resolved = resolve_model(reference)
    if resolved.adapter is not None:
        return resolved
    named = f"{setting}: {reference}" if setting else reference
    if not reference.startswith(SCHEME) and not Location.at(reference).exists():
        raise ModelError(f"{named}: there is no such adapter folder; one that a hub has is to be downloaded first")
    raise ModelError(f"{named} is a whole model, not an adapter" + ("; give it as model_path" if setting else ""))


def is_compact(folder: Path) -> bool:
    """Whether a folder holds its weights in the compact form."""
    return (folder / COMPACT).exists()


def _expanded(folder: Path, digest: str) -> Path:
    """The ordinary folder of a compact pruned model, made once in this machine's cache."""
    target = cache_folder() / "models" / f"{digest}-expanded"
    if not (target / ".complete").exists():
        from raytune_ft.models.sparsity import expand

        expand(folder, target)
        (target / ".complete").touch()
    return target


def gives_scores(resolved: ModelReference) -> bool:
    """Whether a model, or the adapter upon it, gives scores and no text, by what its files say."""
    if resolved.adapter is not None:
        return bool(model_json(resolved.adapter / "adapter_config.json").get("task_type") == "SEQ_CLS")
    names = model_json(Path(resolved.base) / "config.json").get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def refuse_scorer(resolved: ModelReference) -> None:
    """Checks that a model writes text: loaded as if it did, one that gives scores would have a head of random values.

    Raises:
        ModelError: if it gives scores.
    """
    if gives_scores(resolved):
        raise ModelError(
            f"{resolved.given}: is a reward model (or another classifier), which gives scores and writes no text; give "
            "the model that it judges"
        )


def refuse_writer(resolved: ModelReference) -> None:
    """Checks that a model gives scores, as one that judges answers (``reward_model_path``) has to.

    Raises:
        ModelError: if it writes text.
    """
    if not gives_scores(resolved):
        raise ModelError(
            f"reward_model_path: {resolved.given} writes text; a reward model gives scores (`raytune-ft reward` trains "
            "one)"
        )


def model_json(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing, where there is none (a hub id).

    Raises:
        ModelError: if it is damaged, or holds something else than an object.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON ({first_line(error)}); copy the model's files again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(found).__name__}; copy the model's files again")
    return found


def check_content(reference: str, *, with_base: bool = True) -> None:
    """Checks every file of a model, and of the base below an adapter, by its hash, where they are artifacts of ours.

    Weights that a disk or a copy has changed would load without a word. It takes about a second a gigabyte, so each
    verb does it once for what it takes, and not each process that loads a model.

    Raises:
        ArtifactError: with the files that differ.
    """
    resolved = resolve_model(reference)
    if resolved.artifact is not None:
        folder = resolved.artifact.local()
        there = (folder / name for name in resolved.artifact.manifest.files)
        stamps = [path.stat() for path in there if path.exists()]
        _check_hashes(str(folder), tuple((stamp.st_size, stamp.st_mtime_ns) for stamp in stamps))
    if resolved.adapter is not None and with_base:
        check_content(_adapter_base(resolved.adapter))


@cache
def _check_hashes(folder: str, stamps: tuple[tuple[int, int], ...]) -> None:
    """Reads the files of an artifact, once in a process as long as their sizes and times (`stamps`) stay."""
    gigabytes = sum(size for size, _ in stamps) / 1e9
    if gigabytes > _TOLD_GB:
        logger.info("%s: checking %.1f GB against its manifest", folder, gigabytes)
    open_artifact(folder, ArtifactKind.MODEL, verify="hash")


def model_parent(reference: str, role: str = "model") -> Parent:
    """The entry of a model in the manifest of what is made from it, its content checked.

    Raises:
        ArtifactError: as `check_content`.
    """
    check_content(reference)
    resolved = resolve_model(reference)
    if resolved.artifact is not None:
        return resolved.artifact.as_parent(role)
    where = str(Location.at(reference)) if Location.at(reference).exists() else reference
    return Parent(role=role, where=where, digest=resolved.digest)


def _adapter_base(folder: Path) -> str:
    base = model_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{folder}/adapter_config.json: does not name its base_model_name_or_path")
    return str(base)


def _local_folder(location: Location) -> tuple[Path, str]:
    files = location.files()
    digest = short_hash(json.dumps({name: source_digest(location / name) for name in files}))
    if location.is_local:
        return Path(location.path), digest
    target = cache_folder() / "models" / digest
    if not (target / ".complete").exists():
        location.download(target)
        (target / ".complete").touch()
    return target, digest
