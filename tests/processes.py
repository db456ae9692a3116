"""Faults made for real: processes that are killed, files that take no more."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import subprocess
from collections.abc import Iterator

import psutil


def kill_tree(process: subprocess.Popen) -> None:
    """Ends a process and all below it with SIGKILL, and waits until they are gone."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # gone with its parent
            one.kill()
    psutil.wait_procs(tree, timeout=30)
    process.communicate()


def unshrinkable_file() -> int:
    """The descriptor of a file that may grow, but from which nothing can be cut off again."""
    file = os.memfd_create("unshrinkable", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return file


@contextlib.contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """Within the block, this process can make no file larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
