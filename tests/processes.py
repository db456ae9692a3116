"""Faults made for real: processes that are killed."""

from __future__ import annotations

import contextlib
import subprocess

import psutil


def kill_tree(process: subprocess.Popen) -> None:
    """Ends a process and all below it with SIGKILL, and waits until they are gone."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # gone with its parent
            one.kill()
    psutil.wait_procs(tree, timeout=30)
    process.communicate()
