"""Settings: ways to merge, as they are written on the command line of `run.py`."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from pcb_peft import get_method, list_methods
from pcb_peft.commands.arguments import parse_step

OTHERS = ("peft", "knots", "core", "mergekit")
"""Other people's code that a method may come from, as in ``peft:ties_svd``."""

CONTROLS = ("random", "average")
LABELLED = "labelled"
"""One adapter, trained on some texts of all tasks with their labels: the control of ``distill``."""
SEQUENTIAL = "sequential"
"""Least squares on some texts, module by module."""
DEFAULT = (
    *CONTROLS,
    "flat",
    "flat rank=32|16",
    "pcb",
    "pcb rank=32|16",
    "pcb space=dense scope=global formula=paper density=0.1",
    "ties density=0.2",
    "ties space=knots density=0.2",
    "iso_c",
    "iso_c rank=32|16",
    "tsv",
    "linear",
    "linear rank=32|16",
    "peft:ties_svd density=0.2 rank=16",
    "peft:dare_ties_svd density=0.2 rank=16",
)
"""Methods × spaces × ranks, beside PEFT's own; those of `run.py` where none are given."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One way to merge.

    Attributes:
        label: What tables call it.
        method: A method of this package; "peft:NAME" for one of PEFT's own, "knots:NAME", "core:NAME" and
            "mergekit:NAME" likewise; a control; or "labelled".
        options: Further arguments of `merge_adapters`, or of the other code.
        distill: Texts per task on which the merge is distilled; None: it is not.
        search: Merges with other weights and densities that CMA-ES tries on validation texts; None: no search.
        seed: Of the draw of these texts, and of their order; of CMA-ES.
    """

    label: str
    method: str
    options: dict[str, Any]
    distill: int | None = None
    search: int | None = None
    seed: int = 0

    @property
    def other(self) -> tuple[str, str] | None:
        """Other people's code that runs, and the name of the method there."""
        code, colon, name = self.method.partition(":")
        return (code, name) if colon and code in OTHERS else None


def settings_of(lines: Iterable[str]) -> list[Setting]:
    """Return the settings that some lines stand for.

    Args:
        lines: A method and its options each; ``|`` separates alternatives, and every combination is a setting.

    Example:
        >>> [setting.label for setting in settings_of(["pcb space=knots|core density=0.1"])]
        ['pcb space=knots density=0.1', 'pcb space=core density=0.1']
    """
    return [setting for line in lines for setting in _combinations(line)]


def every_method() -> list[str]:
    """Return the controls, and each method as it is by default; not those that take two adapters alone."""
    return [*CONTROLS, *(name for name in list_methods() if get_method(name).arity is None)]


def _combinations(line: str) -> Iterable[Setting]:
    method, *words = line.split()
    pairs = [word.partition("=") for word in words]
    for picked in itertools.product(*(values.split("|") for _, _, values in pairs)):
        chosen = {name: value for (name, _, _), value in zip(pairs, picked, strict=True)}
        label = " ".join([method, *(f"{name}={value}" for name, value in chosen.items())])
        options = {name: _value(name, value) for name, value in chosen.items()}
        distill, tried = options.pop("distill", None), options.pop("search", None)
        seed = 0 if distill is None and tried is None else options.pop("seed", 0)
        yield Setting(label, method, options, distill, tried, seed)


def _value(name: str, text: str) -> Any:
    """A calibration with its options, a number, numbers (``1,0.5``), or a word."""
    if name in ("before", "after"):
        return parse_step(text)
    if "," in text:
        return [float(part) for part in text.split(",")]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
