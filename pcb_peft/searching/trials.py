"""Trials of a search, and the log from which it goes on after it was stopped."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Generator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from pcb_peft.errors import OptionError
from pcb_peft.files.json_text import parse_json, read_bytes
from pcb_peft.files.schema import Count, checked
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.shown import shown
from pcb_peft.searching.knobs import Candidate
from pcb_peft.writing.lines import append_line
from pcb_peft.writing.locks import lock_of

_REPAIR = "take the line out, or give another file: log=…, --log …"
SEARCH, WITHOUT, TOGETHER = "search", "without", "together"
"""What a trial is for: the search itself, leaving one adapter out, or some adapters merged without the others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Objective:
    """The number that is maximised: the mean over the tasks of what is kept, the worst task, or a mixture.

    Attributes:
        worst: The share of the worst task in the mixture, from 0 (the mean alone) to 1.
    """

    worst: float

    def __call__(self, kept: Mapping[str, float]) -> float:
        """Return the value for what is kept of each task."""
        return (1 - self.worst) * fmean(kept.values()) + self.worst * min(kept.values())

    @classmethod
    def named(cls, given: str | float) -> "Objective":
        """Return the objective for "mean", "worst" or the share of the worst task.

        Raises:
            OptionError: It is none of these.
        """
        words = {"mean": 0.0, "worst": 1.0}
        if given in words:
            return cls(words[str(given)])
        try:
            worst = float(given)
        except ValueError:
            worst = -1.0
        if not 0 <= worst <= 1:
            raise OptionError(
                f"objective is {given!r}; it must be mean, worst, or the share of the worst task from 0 to 1"
            )
        return cls(worst)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A merge to try.

    Attributes:
        number: Its place in the search, from 0.
        candidate: The value of each knob.
        members: The names of the adapters to merge; they are the tasks that are measured.
        step: What it is for: `SEARCH`, `WITHOUT` or `TOGETHER`.
        aim: The response along its adapters at which the merge is measured first; None: at weight 1.
        best: The best value so far: a merge that begins far below it is not measured at other weights.
    """

    number: int
    candidate: Candidate
    members: tuple[str, ...]
    step: str = SEARCH
    aim: float | None = None
    best: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One merge, measured at some common weights: all of them come from one merge.

    Attributes:
        number: Its place in the search, from 0.
        candidate: The value of each knob.
        members: The names of the adapters that were merged.
        step: What it is for: `SEARCH`, `WITHOUT` or `TOGETHER`.
        kept: By common weight: what is kept of each task, by its name.
        response: The mean response of the merge along its adapters, at weight 1.
        seconds: What it took.
        error: Why it could not be merged; empty if it could.
    """

    number: int
    candidate: Candidate
    members: tuple[str, ...]
    step: str = SEARCH
    kept: Mapping[float, Mapping[str, float]] = dataclasses.field(
        default_factory=dict[float, Mapping[str, float]]
    )
    response: float = 0.0
    seconds: float = 0.0
    error: str = ""

    def best(self, objective: Objective) -> tuple[float, float]:
        """Return the best common weight, and the objective there; (1, 0) for a merge that failed."""
        scores = {scale: objective(kept) for scale, kept in self.kept.items()}
        if not scores:
            return 1.0, 0.0
        scale = max(scores, key=scores.__getitem__)
        return scale, scores[scale]

    def kept_at_best(self, objective: Objective) -> Mapping[str, float]:
        """Return what is kept of each task at the best common weight."""
        return self.kept[self.best(objective)[0]]

    def is_of(self, proposal: Proposal) -> bool:
        """Return whether it is what a proposal asks for."""
        return (self.step, self.members, self.candidate) == (
            proposal.step,
            proposal.members,
            proposal.candidate,
        )

    def to_json(self) -> str:
        """Return a line of the log."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_line(cls, line: Any, where: str) -> "Trial":
        """Return the trial of a line of the log.

        Args:
            line: What stands in the line.
            where: Name of the line, for messages.

        Raises:
            OptionError: It is no trial.
        """
        stated = checked(line, _Line, where, OptionError, _REPAIR)
        try:
            kept = {float(scale): tasks for scale, tasks in stated.kept.items()}
        except ValueError as error:
            raise OptionError(
                f"{where}: kept has a weight that is no number ({shown(error)}); {_REPAIR}"
            ) from error
        return cls(
            number=stated.number,
            candidate=stated.candidate,
            members=tuple(stated.members),
            step=stated.step,
            kept=kept,
            response=stated.response,
            seconds=stated.seconds,
            error=stated.error,
        )


class _Head(msgspec.Struct):
    """The first line of a log."""

    search: str
    planned: Count


class _Line(msgspec.Struct):
    """A line of a log: a trial."""

    number: Count
    candidate: dict[str, Any]
    members: list[str]
    step: str
    kept: dict[str, dict[str, float]]
    response: float
    seconds: float
    error: str


@dataclasses.dataclass(frozen=True, slots=True)
class TrialLog:
    """A file with a line for the search and a line for each trial.

    Attributes:
        path: The file; None keeps nothing.
        search: A hash of what the trials belong to: the recipe, the adapters, the texts, the knobs.
        planned: How many trials the search is meant to make; one that goes on keeps what its log says.
    """

    path: Path | None
    search: str
    planned: int

    def read(self) -> tuple[list[Trial], int]:
        """Return the trials that are there, and how many were planned; begin the file if there is none.

        A line that a kill cut off is dropped. All processes must call it together.

        Raises:
            OptionError: The file is the log of another search, or none, or damaged.
            OutputError: The file cannot be written.
        """
        lines: list[Any] = current().reduce(None, lambda _: self._lines())
        if not lines:
            self._write(json.dumps({"search": self.search, "planned": self.planned}))
            return [], self.planned
        head = checked(lines[0], _Head, f"{self.path}, line 1", OptionError, _REPAIR)
        if head.search != self.search:
            raise OptionError(
                f"{self.path} is the log of another search (other adapters, texts, knobs, base model or measure); "
                "give another file: log=…, --log …"
            )
        trials = [
            Trial.from_line(line, f"{self.path}, trial {number}")
            for number, line in enumerate(lines[1:], 1)
        ]
        return trials, head.planned

    @contextlib.contextmanager
    def alone(self) -> Generator[None]:
        """Keep other searches from the file during a block. All processes must call it together.

        Raises:
            OptionError: Another search is writing it.
        """
        lock = current().reduce(None, lambda _: self._lock())
        try:
            yield
        finally:
            if lock is not None and current().is_main:
                os.close(lock)

    def append(self, trial: Trial) -> None:
        """Write a trial, and make sure that it is on the disk."""
        self._write(trial.to_json())

    def _lock(self) -> int | None:
        try:
            return None if self.path is None else lock_of(self.path)
        except BlockingIOError as error:
            raise OptionError(
                f"{self.path} is the log of a search that is running; wait for it, or give another file: log=…, --log …"
            ) from error

    def _lines(self) -> list[Any]:
        if self.path is None or not self.path.exists():
            return []
        content = read_bytes(self.path, OptionError, _REPAIR)
        lines = content.decode("utf-8", errors="replace").splitlines()
        found = [line for line in map(_parsed, lines) if line is not None]
        if len(lines) > 1 and not found:
            raise OptionError(f"{self.path} is not the log of a search; {_REPAIR}")
        return found

    def _write(self, line: str) -> None:
        if self.path is not None and current().is_main:
            append_line(self.path, line)


def _parsed(line: str) -> Any:
    """The content of a line; None for one that a kill cut off."""
    try:
        return parse_json(line, "the line", OptionError, _REPAIR)
    except OptionError:
        return None
