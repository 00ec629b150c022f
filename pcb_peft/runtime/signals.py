"""Signals: how SIGINT, SIGTERM, SIGHUP and SIGQUIT end a run so that it cleans up behind itself."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator

REPEAT_SECONDS = 3.0
"""Launchers send each process, within this time, the signal that all of them got already."""
ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    if hasattr(signal, name)  # Windows lacks some
)
"""Signals that end a run."""
AGAIN_SECONDS = 1.0
"""Pause after which an exception that was lost is raised again."""


@contextlib.contextmanager
def raising_on_signals(on_first: Callable[[], None]) -> Generator[list[signal.Signals]]:
    """Turn the first of these signals into an exception, so that the block cleans up; a later one ends the process.

    Signals that the parent told this process to ignore (as `nohup` does) stay ignored. Only the main thread of Python
    gets signals: elsewhere the block runs as it is.

    Args:
        on_first: Called when the first signal comes, before the exception is raised.

    Yields:
        A list that is empty until a signal comes, and then holds it.
    """
    received: list[signal.Signals] = []
    first_at = 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal first_at
        del frame
        if _is_importing("torch"):  # its C code loses exceptions; nothing is written before it
            os._exit(128 + number)
        if received:
            if time.monotonic() - first_at > REPEAT_SECONDS:
                os._exit(128 + number)
            return
        received.append(signal.Signals(number))
        first_at = time.monotonic()
        on_first()
        stack.enter_context(_repeating(leave))
        leave()

    def leave() -> None:
        number = received[0]
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [
        number for number in ENDING if in_main_thread and signal.getsignal(number) != signal.SIG_IGN
    ]
    handlers_before = {number: signal.signal(number, handle) for number in handled}
    stack = contextlib.ExitStack()
    try:
        with stack:
            yield received
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _repeating(leave: Callable[[], None]) -> Generator[None]:
    """Raise an exception again as long as nobody handles it: C code, and Python's own finalisers, lose exceptions.

    While the block that was interrupted cleans up behind itself, its exception is being handled, and none is raised.
    """
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def look(number: int, frame: object) -> None:
        del number, frame
        handled = sys.exc_info()[1]
        while handled is not None and not isinstance(handled, KeyboardInterrupt | SystemExit):
            handled = handled.__context__
        if handled is None:
            leave()

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_importing(module: str) -> bool:
    """Return whether a module is being imported at this moment."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return getattr(spec, "_initializing", False)


@contextlib.contextmanager
def dying_on_signals() -> Generator[None]:
    """Let the signals that end a run end the process at once, in C code that does not return to Python, too."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in ENDING if in_main_thread}
    handlers = {
        number: handler
        for number, handler in handlers.items()
        if handler not in (signal.SIG_IGN, None)
    }
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_process(code: int) -> None:
    """End the process at once, without the exit handlers of torch, which would wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
