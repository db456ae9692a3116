"""How a command ends: in words and with an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress

import typer

from raytune_ft.console import set_up_logging
from raytune_ft.core.errors import RaytuneError

logger = logging.getLogger("raytune_ft")


def guarded(action: Callable[[], None], *, resumes: bool = True) -> int:
    """Does something, and gives the exit code: what goes wrong on purpose is said in words.

    Args:
        action: what is done.
        resumes: whether the same command, given again, goes on from where it was interrupted.

    Raises:
        Exception: what nobody foresaw, so that its traceback is shown.
    """
    set_up_logging()
    try:
        action()
    except RaytuneError as error:
        return fail(error)
    except KeyboardInterrupt:
        terminated = False
        if "ray" in sys.modules:
            from raytune_ft.core.cluster import disconnect
            from raytune_ft.core.termination import was_terminated

            terminated = was_terminated()
            with suppress(KeyboardInterrupt):  # Ctrl-C again: Ray's processes end with this one
                disconnect()
        again = "goes on from here" if resumes else "begins anew"
        logger.warning("%s; the same command %s", "terminated" if terminated else "interrupted", again)
        return 143 if terminated else 130
    return 0


def fail(error: RaytuneError) -> int:
    """Says an error, and gives its exit code."""
    # What a Ray worker raised comes wrapped in its remote traceback, with the error itself as `cause`.
    cause = getattr(error, "cause", None)
    own = cause if isinstance(cause, RaytuneError) else error
    typer.echo(f"raytune-ft: {own}", err=True)
    return own.exit_code
