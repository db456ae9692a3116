"""What this machine has of what a run needs, what it lacks, and how to get it.

In core, as a file of its own, because it belongs to no room: it looks at the interpreter, the libraries, the devices,
the storage and the cluster that all rooms stand on, changes nothing, and is used by the command line alone.
"""

from __future__ import annotations

import platform
import shutil
import socket
import sys
import uuid
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from raytune_ft.core.cluster import beside, found_here, named_address
from raytune_ft.core.errors import RaytuneError
from raytune_ft.core.storage import Location, cache_folder

GIB = 1 << 30


class Verdict(StrEnum):
    """What a finding means for the user."""

    OK = "OK"
    NOTE = "note"
    """Something that is not there, and that not every run needs."""
    MISSING = "missing"
    """Without it nothing runs."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `remedy` says how to get what is not there."""

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""


REQUIRED = ("ray", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "evaluate", "accelerate")
"""Packages that every installation has."""
OPTIONAL = {"trl": "bench", "lm-eval": "lm-eval", "liger-kernel": "gpu", "vllm": "vllm"}
"""Packages of some installations, with the extra that brings them."""


def examine(storage: str | None = None) -> list[Finding]:
    """Looks at everything; `storage` (a path or URI) is written to, read and cleared again."""
    findings = [_python(), *_packages(), *_torch(), _compiler(), _memory(), _disk(Path.cwd(), "disk, working folder")]
    findings.append(_disk(cache_folder(), "disk, model cache"))
    findings.append(_cluster(named_address()))
    if storage is not None:
        findings.append(_storage(storage))
    else:
        remedy = "raytune-ft doctor --storage PATH_OR_URI (on a cluster every node has to see the same storage)"
        findings.append(Finding("shared storage", Verdict.NOTE, "not checked", remedy))
    return findings


def _python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    return Finding("Python", Verdict.OK, found)


def _packages() -> list[Finding]:
    findings = []
    for package in REQUIRED:
        try:
            findings.append(Finding(package, Verdict.OK, metadata.version(package)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(package, Verdict.MISSING, "not installed", "pip install raytune-ft"))
    for package, extra in OPTIONAL.items():
        try:
            findings.append(Finding(package, Verdict.OK, metadata.version(package)))
        except metadata.PackageNotFoundError:
            findings.append(
                Finding(package, Verdict.NOTE, "not installed (optional)", f"pip install 'raytune-ft[{extra}]'")
            )
    return findings


def _torch() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("devices", Verdict.MISSING, f"torch cannot be imported: {error}", "pip install raytune-ft")]
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU"
    findings = [Finding("torch build", Verdict.OK, f"{torch.__version__}, {build}")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if gpu.major >= 8 else "no bf16 (fp16 or fp32 only)"
        found = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, {bf16}"
        findings.append(Finding(f"GPU {index}", Verdict.OK, found))
    if not torch.cuda.is_available():
        remedy = "small models train on the CPU; for a GPU: its driver, and a torch that is built for CUDA"
        findings.append(Finding("GPU", Verdict.NOTE, "none that torch can use; runs use the CPU in fp32", remedy))
    return findings


def _compiler() -> Finding:
    """DeepSpeed's CPU communication and its fused optimizers are compiled; training falls back where they cannot be."""
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    scripts = Path(sys.executable).parent
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(scripts))
    have = [name for name in (compiler, "ninja" if ninja else None) if name]
    if len(have) == 2:
        return Finding("compiler", Verdict.OK, f"{compiler} and {ninja}")
    remedy = "not needed: training goes on without compiled extensions. To have them: apt-get install g++ ninja-build"
    return Finding("compiler", Verdict.NOTE, f"{' and '.join(have) or 'neither compiler nor ninja'} only", remedy)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < 4 * GIB:
        return Finding("memory", Verdict.NOTE, found, "the quickstart wants about 6 GiB; close other programs")
    return Finding("memory", Verdict.OK, found)


def _disk(folder: Path, what: str) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / GIB:.1f} GiB free at {there}"
    if free < 5 * GIB:
        return Finding(what, Verdict.NOTE, found, "models and checkpoints want several GiB; free some, or use a disk")
    return Finding(what, Verdict.OK, found)


def _cluster(address: str) -> Finding:
    if not address:
        if other := found_here():
            return Finding("Ray cluster", Verdict.NOTE, "RAY_ADDRESS is not set: runs start a local one", beside(other))
        remedy = "RAY_ADDRESS=HOST:6379, or ray job submit, to use a cluster"
        return Finding("Ray cluster", Verdict.OK, "RAY_ADDRESS is not set: runs start a local one", remedy)
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        if parts.hostname and parts.port:
            # Ray itself tries for a minute before it gives up.
            socket.create_connection((parts.hostname, parts.port), timeout=5).close()
        return Finding("Ray cluster", Verdict.OK, _joined())
    except (OSError, ValueError, RaytuneError) as error:
        remedy = "start it (ray start --head), mend the address, or unset RAY_ADDRESS"
        found = str(error) if isinstance(error, RaytuneError) else f"RAY_ADDRESS={address} cannot be reached: {error}"
        return Finding("Ray cluster", Verdict.MISSING, found, remedy)


def _joined() -> str:
    from raytune_ft.core import cluster

    try:
        return str(cluster.connect())
    finally:
        cluster.disconnect()


def _storage(where: str) -> Finding:
    what, remedy = "shared storage", "mount it, or give this user access (s3://: credentials to read, write and delete)"
    root = Location.at(where)
    probe = root / f".raytune-ft-probe-{uuid.uuid4().hex}"
    content = uuid.uuid4().hex.encode()
    try:
        if root.is_local and not root.exists():
            return Finding(what, Verdict.MISSING, f"{root}: there is no such folder", remedy)
        probe.write(content)
        same = probe.read() == content
        probe.delete()
    except (RaytuneError, OSError) as error:
        return Finding(what, Verdict.MISSING, f"no probe could be written, read back and deleted: {error}", remedy)
    if not same:
        return Finding(what, Verdict.MISSING, f"{root}: another content came back than was written", remedy)
    return Finding(what, Verdict.OK, f"{root}: a probe was written, read back and deleted")
