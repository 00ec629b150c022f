"""Progress bars for people, silence for pipes.

All bars of a process share one display on standard error. Its clock ticks also while one item takes long, and its
estimate of the time left is averaged over the last half minute.
"""

import contextlib
import importlib.util
import sys
import threading
from collections.abc import Generator, Iterable, Sized
from typing import TYPE_CHECKING, Protocol, TypeVar

from pcb_peft.runtime.processes import current

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")

SECONDS_AVERAGED = 30  # by the estimate of the time left


class Track(Protocol):
    """Wraps what is iterated over, under a description."""

    def __call__(self, items: Iterable[Item], description: str) -> Iterable[Item]: ...


def tracker(progress: bool | None) -> Track:
    """Make a function that shows the progress of an iteration.

    Args:
        progress: Whether to show bars; None: where a person looks at them, in a terminal or a notebook.

    Returns:
        A `Track`. Without bars, and in every process but the first, it returns the items as they are.
    """
    visible = (_is_watched() if progress is None else progress) and current().is_main

    return _tracked if visible else silent


def silent(items: Iterable[Item], description: str) -> Iterable[Item]:  # noqa: ARG001  (a `Track` has it)
    """Show nothing: a `Track` that can be pickled."""
    return items


@contextlib.contextmanager
def phase(description: str, progress: bool | None = None) -> Generator[None]:
    """Show a description and a clock while the block runs; bars inside of the block are shown below it."""
    for _ in tracker(progress)(iter([None]), description):
        yield


def say(text: str, progress: bool | None = None) -> None:
    """Show a line above the bars, where bars are shown."""
    visible = (_is_watched() if progress is None else progress) and current().is_main
    if visible:
        with _display.opened() as bars:
            bars.console.print(text, markup=False, highlight=False)


def close() -> None:
    """Remove the bars of an iteration that was interrupted, so that other text can be printed."""
    _display.close()


def _is_watched() -> bool:
    notebook = "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None
    return notebook or sys.stderr.isatty()


def _tracked(items: Iterable[Item], description: str) -> Generator[Item]:
    total = len(items) if isinstance(items, Sized) else None
    with _display.opened() as bars:
        task = bars.add_task(description, total=total, count="", left="left" if total else "")
        try:
            for done, item in enumerate(items, 1):
                yield item
                count = f"{done}/{total}" if total else ""
                bars.update(task, advance=1, count=count)
        finally:
            bars.remove_task(task)


class _Display:
    """The bars on the screen: shown while at least one iteration is under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._bars: Progress | None = None

    @contextlib.contextmanager
    def opened(self) -> "Generator[Progress]":
        """Show the bars while the block runs."""
        with self._lock:
            if self._bars is None:
                self._bars = _new_bars()
                self._bars.start()
            self._users += 1
            bars = self._bars
        try:
            yield bars
        finally:
            with self._lock:
                self._users -= 1
            if self._users == 0:
                self.close()

    def close(self) -> None:
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
            self._bars = None


def _new_bars() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=SECONDS_AVERAGED,
        redirect_stdout=False,
    )


_display = _Display()
