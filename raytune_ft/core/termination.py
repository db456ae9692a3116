"""SIGTERM, which ends a run as Ctrl-C does, also where Ray has put a handler of its own; and what signals call."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_terminated = threading.Event()


def was_terminated() -> bool:
    """Whether a `KeyboardInterrupt` was SIGTERM: no other exception is passed on from wherever Ray waits."""
    return _terminated.is_set()


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """Within the block Ray sets a handler of its own; after it the caller's is back, or, where there was none, ours.

    Ray's raises `SystemExit`: where it comes while a cluster starts, the process would end with an exit code of Ray's,
    and by an abort where it comes while Ray Serve starts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if before != signal.SIG_DFL:
            raise
        _terminated.set()
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, _on_sigterm if before == signal.SIG_DFL else before)


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    _terminated.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # asked again, the process ends at once
    raise KeyboardInterrupt


@contextmanager
def signals_calling(act: Callable[[], None], *numbers: signal.Signals) -> Iterator[None]:
    """Within the block these signals call `act`, where this is the main thread, which alone hears of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: act()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
