"""Checkpoints: a safetensors file of each rank, progress as JSON, and a manifest last, by a single PUT.

DeepSpeed's own checkpoints are pickles and are not used. A rank writes the values that it holds under parameter names,
with their place in the whole parameter, so that any number of ranks reads just what each of them needs. A checkpoint
is whole exactly when its manifest verifies; resume asks storage for the newest whole one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.manifest import MANIFEST
from raytune_ft.core.storage import Location
from raytune_ft.training.peers import ALONE, Peers
from raytune_ft.training.slices import Slice, Stored, pieces
from raytune_ft.training.tensor_file import TensorFile, Written, write_tensors

logger = logging.getLogger("raytune_ft")

State = dict[str, Tensor]
WEIGHTS, BEST, MOMENTS = "weights.", "best.", ("exp_avg", "exp_avg_sq")
_PROGRESS, _SLICES, _FORMAT = "progress.json", "slices", 2
_STEP = re.compile(r"step-(\d{8,})")
_DAMAGE = (ArtifactError, ValueError, KeyError, TypeError, OSError)


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: whole (not sharded) weights and moments by parameter name, and its progress."""

    step: int
    weights: State
    moments: State
    progress: dict[str, Any]


def folder_of(folder: Location, step: int) -> Location:
    """Where the checkpoint of a step lies below `folder`."""
    return folder / f"step-{step:08d}"


def write(folder: Location, checkpoint: Checkpoint, *, keep: int) -> Location:
    """Writes a whole checkpoint below `folder`; deletes all but the newest `keep`. Returns its folder."""
    target = folder_of(folder, checkpoint.step)
    tensors = {WEIGHTS + name: tensor for name, tensor in checkpoint.weights.items()} | checkpoint.moments
    slices = {key: Slice(tuple(t.shape), 0, t.detach().cpu().flatten()) for key, t in tensors.items()}
    files = write_rank(target, slices, ALONE) | write_progress(target, checkpoint.progress)
    publish(target, checkpoint.step, files)
    for name in folder.folders()[:-keep]:
        (folder / name).delete()
    return target


def write_rank(target: Location, slices: Mapping[str, Slice], peers: Peers) -> dict[str, Written]:
    """Writes what one rank holds; the places of its slices stand in the file's metadata.

    Raises:
        OSError: if the storage takes no more.
    """
    name = f"rank-{peers.rank:05d}-of-{peers.world_size:05d}.safetensors"
    places = json.dumps({key: [part.start, *part.shape] for key, part in slices.items()})
    tensors = {key: part.values for key, part in slices.items()}
    return {name: write_tensors(target / name, tensors, {_SLICES: places})}


def write_progress(target: Location, progress: Mapping[str, Any]) -> dict[str, Written]:
    """Writes a run's scalars: JSON without NaN, one object."""
    content = json.dumps(progress).encode()
    (target / _PROGRESS).write(content)
    return {_PROGRESS: Written(len(content), hashlib.sha256(content).hexdigest())}


def publish(target: Location, step: int, files: Mapping[str, Written]) -> None:
    """Makes a checkpoint whole: its manifest names every file, by a single PUT."""
    content = {"format": _FORMAT, "step": step, "files": {name: asdict(file) for name, file in files.items()}}
    (target / MANIFEST).write(json.dumps(content).encode())


class StoredCheckpoint:
    """A checkpoint on storage, of which any part of any tensor can be read."""

    def __init__(self, target: Location) -> None:
        self.target = target
        manifest = json.loads((target / MANIFEST).read())
        if manifest.get("format") != _FORMAT:
            raise ValueError(f"its format is {manifest.get('format', 1)}, and {_FORMAT} is read")
        self.step = int(manifest["step"])
        self._files: dict[str, dict[str, Any]] = manifest["files"]

    def check(self, peers: Peers = ALONE) -> None:
        """Reads this rank's share of the files, and compares each with the manifest.

        Raises:
            ValueError: naming the first that is not what the manifest says.
        """
        sizes = self.target.files()
        for name in list(self._files)[peers.rank :: peers.world_size]:
            wanted = self._files[name]
            if sizes.get(name) != wanted["size"]:
                found = f"has {sizes[name]} bytes" if name in sizes else "is missing"
                raise ValueError(f"{name} {found} (the manifest says {wanted['size']} bytes)")
            if (self.target / name).sha256() != wanted["sha256"]:
                raise ValueError(f"{name} does not match the manifest (its content was changed)")

    @cached_property
    def progress(self) -> dict[str, Any]:
        """The run's scalars."""
        found: dict[str, Any] = json.loads((self.target / _PROGRESS).read())
        return found

    @cached_property
    def _tensor_files(self) -> dict[str, TensorFile]:
        return {name: TensorFile(self.target / name) for name in self._files if name.endswith(".safetensors")}

    @cached_property
    def _index(self) -> dict[str, tuple[tuple[int, ...], list[Stored]]]:
        index: dict[str, tuple[tuple[int, ...], list[Stored]]] = {}
        for name, file in self._tensor_files.items():
            for key, (start, *shape) in json.loads(file.metadata[_SLICES]).items():
                _, stored = index.setdefault(key, (tuple(shape), []))
                stored.append(Stored(name, start, file.count(key)))
        return index

    def shapes(self, prefix: str = "") -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors whose key begins with `prefix`, by the rest of the key."""
        return {key.removeprefix(prefix): shape for key, (shape, _) in self._index.items() if key.startswith(prefix)}

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Values `start` to `start + count` of a flattened whole tensor, whichever ranks wrote them.

        Raises:
            KeyError: if there is no such tensor.
            ValueError: if some values are in no file.
        """
        found = [
            self._tensor_files[piece.file].read(key, piece.first, piece.count)
            for piece in pieces(self._index[key][1], start, count)
        ]
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def whole(self) -> Checkpoint:
        """Everything, unsharded: for states that fit into one process."""
        full = {key: self.read(key, 0, math.prod(shape)).view(shape) for key, shape in self.shapes().items()}
        weights = {key.removeprefix(WEIGHTS): tensor for key, tensor in full.items() if key.startswith(WEIGHTS)}
        moments = {key: tensor for key, tensor in full.items() if not key.startswith(WEIGHTS)}
        return Checkpoint(self.step, weights, moments, self.progress)


def read(target: Location) -> Checkpoint:
    """The checkpoint in a folder, whole.

    Raises:
        ValueError: if a file is not what the manifest says.
    """
    return opened(target).whole()


def opened(target: Location, peers: Peers = ALONE) -> StoredCheckpoint:
    """The checkpoint in a folder, after all ranks have verified it together.

    Raises:
        ValueError: if it is damaged, on every rank; the rank that found it says how.
    """
    found, problem = None, "another worker found it damaged"
    try:
        found = StoredCheckpoint(target)
        found.check(peers)
        sound = True
    except _DAMAGE as error:
        sound, problem = False, str(error)
    if not peers.all_say(sound) or found is None:
        raise ValueError(problem)
    return found


def named(path: str, peers: Peers = ALONE) -> StoredCheckpoint:
    """The whole checkpoint in a folder; under several ranks all call it, and each verifies a share.

    Raises:
        ArtifactError: if it is none, with what is wrong.
    """
    where = Location.at(path)
    wanted = "resume_from_checkpoint wants auto, or the folder of a checkpoint (.../checkpoints/step-00000010)"
    if not where.exists():
        raise ArtifactError(f"{where}: there is no such folder; {wanted}")
    if not (where / MANIFEST).exists():
        inside = [name for name in where.folders() if name.startswith("step-")]
        hint = f"it holds checkpoints, name one of them: {', '.join(inside[-3:])}" if inside else wanted
        raise ArtifactError(f"{where}: is no finished checkpoint (it has no {MANIFEST}); {hint}")
    try:
        return opened(where, peers)
    except ValueError as error:
        raise ArtifactError(f"{where}: is not a whole checkpoint: {error}; {wanted}") from None


def newest(folder: Location, peers: Peers = ALONE, *, before: float = math.inf) -> StoredCheckpoint | None:
    """The newest whole checkpoint below `folder`, the same on all ranks; damaged ones are named and passed over.

    `before`: only of steps below this one.
    """
    steps = (step for step in _finished(folder) if step < before) if peers.leads else iter(())
    while True:
        step = peers.leader_says(next(steps, -1))
        if step < 0:
            return None
        target = folder_of(folder, step)
        try:
            return opened(target, peers)
        except ValueError as error:
            logger.warning("checkpoint %s: damaged (%s), passed over", target, error)


def steps_below(folder: Location) -> list[int]:
    """Steps of the checkpoints below `folder`, whole or not, ascending."""
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, folder.folders()) if match)


def _finished(folder: Location) -> Iterator[int]:
    for step in reversed(steps_below(folder)):
        target = folder_of(folder, step)
        if (target / MANIFEST).exists():
            yield step
        else:
            logger.warning("checkpoint %s: was not finished, passed over", target)
