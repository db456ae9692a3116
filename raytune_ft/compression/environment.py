"""An environment for the quantizer: llm-compressor wants other versions than this package, so it gets its own.

It is laid over this interpreter's packages: what it pins stands in front, everything else (torch, above all) is found
behind, so that making it takes seconds and no gigabytes. It is made once, in this machine's cache.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from raytune_ft.core.errors import RunError
from raytune_ft.core.storage import cache_folder

logger = logging.getLogger("raytune_ft")

REQUIREMENT = "llmcompressor==0.14.*"
_DONE = ".complete"


def quantizer_python() -> Path:
    """The interpreter of the environment that has llm-compressor, made first where it is not there yet.

    Raises:
        RunError: if it cannot be made, with the last words of pip and what to do.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_folder() / "environments" / f"llmcompressor-0.14-py{version}"
    python = folder / "bin" / "python"
    if (folder / _DONE).exists():
        return python
    logger.info("quantize: makes an environment with %s at %s, once", REQUIREMENT, folder)
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)], folder)
    packages = folder / "lib" / f"python{version}" / "site-packages"
    behind = dict.fromkeys([sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]])
    (packages / "behind.pth").write_text("\n".join(behind) + "\n", encoding="utf-8")
    _run([str(python), "-m", "pip", "install", "--quiet", REQUIREMENT], folder)
    (folder / _DONE).touch()
    return python


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise RunError(
            f"{' '.join(command)}: {words[-1] if words else 'failed without a word'}. The environment needs a package "
            f"index that has {REQUIREMENT}; with one of your own, set PIP_INDEX_URL, or make {folder} by hand with "
            f"these commands and an empty file {_DONE} in it."
        )
