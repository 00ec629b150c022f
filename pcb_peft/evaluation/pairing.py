"""Pairs of adapters and their data."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.errors import OptionError
from pcb_peft.evaluation.texts import Rows

Measure: TypeAlias = Callable[[Any], float]
"""A function of the user's: takes a model, returns a score, the higher the better."""

TaskData: TypeAlias = Rows | Measure
"""A ``.jsonl`` file, rows, a function that measures, or "lm-eval:NAME" for a task of lm-evaluation-harness."""

HARNESS = "lm-eval:"
_BY_NAME = "by name (data={name: …}, --data NAME=FILE)"


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A task before its texts are read.

    Attributes:
        name: The task's name: that of the adapter, if it has one.
        adapter: The adapter that was trained on it.
        data: What it is measured on.
    """

    name: str
    adapter: Adapter | None
    data: TaskData

    @property
    def harness_task(self) -> str | None:
        """The name in lm-evaluation-harness, if the task is one of its."""
        named = isinstance(self.data, str) and self.data.startswith(HARNESS)
        return str(self.data).removeprefix(HARNESS) if named else None


def pair(
    adapters: Sequence[Adapter], data: Mapping[str, TaskData] | Sequence[TaskData] | TaskData
) -> tuple[list[Pair], list[str]]:
    """Give each adapter its data: by name, or in order.

    Args:
        adapters: Of different names.
        data: By the adapter's name (other names are tasks that no adapter was trained on); or one per adapter, in
            order, unless the names of the files begin with those of the adapters (subj-test.jsonl), or their folders
            are called so.

    Returns:
        The pairs, and notes on how they were found.

    Raises:
        OptionError: There are not as many data as adapters.
    """
    if not data:
        raise OptionError("there is nothing to measure on: give data, one file per adapter")
    if not isinstance(data, Mapping):
        data = _named([adapter.name for adapter in adapters], _several(data))
    by_name = {adapter.name: adapter for adapter in adapters}
    unused = [name for name in by_name if name not in data]
    notes = [f"not measured, because there are no data: {', '.join(unused)}"] if unused else []
    if unused and (others := [name for name in data if name not in by_name]):
        notes.append(f"measured as tasks that no adapter was trained on: {', '.join(others)}")
    return [Pair(name, by_name.get(name), given) for name, given in data.items()], notes


def _several(data: Sequence[TaskData] | TaskData) -> list[TaskData]:
    """One or several data, as a list."""
    if isinstance(data, str | Path) or callable(data):
        return [data]
    rows = bool(data) and isinstance(data[0], Mapping)
    return [data] if rows else [*data]


def _named(names: Sequence[str], data: Sequence[TaskData]) -> dict[str, TaskData]:
    """The data by the name of the task.

    Raises:
        OptionError: Neither their names nor their number says which is whose.
    """
    found = [_name(given, names) for given in data]
    all_known = set(names) <= set(found) or (len(data) < len(names) and set(found) <= set(names))
    if names and all_known and len(set(found)) == len(found):
        return dict(zip(map(str, found), data, strict=True))
    if not names:
        return {_name(given, ()) or f"task {n}": given for n, given in enumerate(data, 1)}
    if len(data) != len(names):
        raise OptionError(
            f"number of data: {len(data)}, of adapters: {len(names)} ({', '.join(names)}); give one per adapter, in "
            f"order, or {_BY_NAME}"
        )
    for name, called, given in zip(names, found, data, strict=True):
        if called in names and called != name:
            raise OptionError(
                f"{given} is called after {called}, and in the order of the adapters it would be the data of {name}; "
                f"give all data {_BY_NAME}"
            )
    return dict(zip(names, data, strict=True))


def _name(given: TaskData, names: Sequence[str]) -> str | None:
    """The name that data have: that of the adapter after which the file or its folder is called, or the file's own."""
    if not isinstance(given, str | Path):
        return None
    if str(given).startswith(HARNESS):
        return Path(str(given).removeprefix(HARNESS)).stem
    path = Path(given)
    if path.parent.name in names:
        return path.parent.name
    begins = (name for name in names if re.match(rf"{re.escape(name)}([-_. ]|$)", path.stem))
    return max(begins, key=len, default=path.stem)
