"""One case: what is run, what may come of it, and what is told if something else does."""

import dataclasses
import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz.values import Steps
from pcb_peft.errors import PcbPeftError

SECONDS = 2.0  # of the processor, for one case
MEBIBYTES = 600  # by which one case may raise the peak of the memory
LONGEST_MESSAGE = 3000  # characters

Attempt = Callable[[Random, Steps], Any]
"""Makes an input from random numbers, says what is odd about it, and gives it to the package."""

PACKAGE = Path(__file__).parents[2] / "pcb_peft"


class WrongAnswerError(Exception):
    """The package took an input, and what it made of it is wrong."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Something that should not be.

    Attributes:
        kind: The same for all cases that find the same: the error's type, and the place in the package.
        number: The case.
        message: What was raised or measured.
        steps: What was odd about the input.
    """

    kind: str
    number: int
    message: str
    steps: tuple[str, ...]


def run(surface: str, attempt: Attempt, seed: int, number: int) -> tuple[bool, list[Finding]]:
    """Run one case; return whether its input was taken, and what was found."""
    steps: Steps = []
    found: list[Finding] = []

    def add(kind: str, message: object) -> None:
        found.append(Finding(kind, number, str(message)[:500], tuple(steps)))

    taken = False
    peak, started = _peak(), time.process_time()
    try:
        attempt(Random(f"{surface} {seed} {number}"), steps)
        taken = True
    except PcbPeftError as error:
        if len(str(error)) > LONGEST_MESSAGE:
            add(f"a message of more than {LONGEST_MESSAGE} characters at {place_of(error)}", error)
    except Exception as error:  # noqa: BLE001  (whatever it is, it is a finding)
        add(f"{type(error).__name__} at {place_of(error)}", error)
    seconds, grown = time.process_time() - started, _peak() - peak
    if seconds > SECONDS:
        add("more than two seconds", f"{seconds:.1f} s")
    if grown > MEBIBYTES:
        add("too much memory", f"{grown:.0f} MiB")
    return taken, found


def place_of(error: BaseException) -> str:
    """The last place in the package that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    frame = (own or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])} {frame.name}"


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
