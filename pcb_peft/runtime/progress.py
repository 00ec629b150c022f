"""Progress bars for people, silence for pipes."""

import sys
from collections.abc import Iterable
from typing import Protocol, TypeVar

from tqdm import tqdm

from pcb_peft.runtime.processes import current

Item = TypeVar("Item")


class Track(Protocol):
    """Wraps what is iterated over, under a description."""

    def __call__(self, items: Iterable[Item], description: str) -> Iterable[Item]: ...


def tracker(progress: bool | None) -> Track:
    """Bars on standard error: always, never, or (None) where a person looks at it; of one process."""
    shown = (sys.stderr.isatty() if progress is None else progress) and current().is_main

    def track(items: Iterable[Item], description: str) -> Iterable[Item]:
        return tqdm(items, description, leave=False) if shown else items

    return track
