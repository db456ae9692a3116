"""What the command line prints: tables and results to standard output, our log lines to standard error."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from raytune_ft.core.errors import OutputError

if TYPE_CHECKING:
    from raytune_ft.core.artifacts import Artifact

logger = logging.getLogger("raytune_ft")


def list_runs(where: str) -> None:
    """Prints the artifacts below a place, a table a kind."""
    from raytune_ft.core import ledger

    found = ledger.list_runs(where)
    for kind in dict.fromkeys(run.kind for run in found):
        shown = make_table("run", "state", "from", "settings that differ", "numbers")
        for row in ledger.table([run for run in found if run.kind == kind]):
            shown.add_row(*row)
        print_out(f"{kind} ({shown.row_count})", shown)
    if not found:
        print_out(f"no runs below {where}")


def show_run(name: str, storage: str) -> None:
    """Prints one artifact's story."""
    from raytune_ft.core.ledger import find_run, story

    shown = make_table()
    for heading, text in story(find_run(name, storage)):
        shown.add_row(heading, text)
    print_out(shown)


def print_artifact(artifact: Artifact) -> None:
    """Prints what was made, and its figures."""
    from raytune_ft.core.ledger import lines, scalars

    shown = make_table()
    for key, value in scalars(artifact.numbers).items():
        shown.add_row(key, lines({key: value}).partition("=")[2])
    print_out(f"{artifact.manifest.kind} {artifact.location}", shown)


def make_table(*columns: str) -> Any:
    """An empty table in our style; without columns it has no heading."""
    from rich.table import Column, Table

    named = [Column(name, overflow="fold") for name in columns]
    return Table(*named, box=None, pad_edge=False, show_header=bool(named))


def print_out(*what: Any) -> None:
    """Prints texts and tables, one below the other.

    Raises:
        OutputError: if standard output takes no more.
    """
    from rich.console import Console

    with standard_output() as out:
        # In a log a line may be long; folding it to 80 columns would cut paths in two.
        console = Console(file=out, markup=False, highlight=False, width=None if out.isatty() else 200)
        console.print(*what, sep="\n")


@contextmanager
def standard_output() -> Iterator[TextIO]:
    """Where the block writes: standard output, or nowhere if the program was started without one.

    Raises:
        OutputError: if it takes no more, as on a full disk.
        SystemExit: 1, where its reader went away, as rich does.
    """
    with Path(os.devnull).open("w") as nowhere:
        out = sys.stdout or nowhere
        try:
            yield out
            out.flush()
        except OSError as error:
            os.dup2(nowhere.fileno(), out.fileno())  # what is left goes nowhere, instead of failing again at the end
            if isinstance(error, BrokenPipeError):
                raise SystemExit(1) from None
            raise OutputError(f"standard output cannot be written to: {error.strerror}") from None


def set_up_logging() -> None:
    """Our lines go to standard error, with rich on a terminal; third parties are heard from `ERROR` on."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(asctime)s %(message)s"))
    if sys.stderr is not None and sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True)
        handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S")
        handler.setFormatter(_Plain("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "matplotlib", "huggingface_hub", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Plain(logging.Formatter):
    """``HH:MM:SS message``, with the level only where it is a warning or worse."""

    def __init__(self, pattern: str) -> None:
        super().__init__(pattern, datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        return text.replace(record.message, f"{record.levelname.lower()}: {record.message}", 1)
