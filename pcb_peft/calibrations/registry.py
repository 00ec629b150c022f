"""Calibrations: changes to the deltas of a module before or after any merge, and where each is registered.

One that comes before a merge changes the adapters; one that comes after it changes the merged delta. Its keyword-only
parameters are its options.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor

from pcb_peft.deltas.delta import Delta
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import bind
from pcb_peft.plugins.registry import Plugin, Registry

When: TypeAlias = Literal["before", "after"]
Kinds: TypeAlias = tuple[type[Delta], ...]
Survey: TypeAlias = Callable[[Delta, Sequence[Delta]], Tensor]
Before = TypeVar("Before", bound=Callable[..., Sequence[Delta]])
After = TypeVar("After", bound=Callable[..., Delta])


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration(Plugin):
    """A calibration and what the engine has to know about it.

    Attributes:
        name: Its name in recipes and on the command line.
        function: Before a merge: ``function(deltas, **options) -> deltas``, the deltas of one module. After it:
            ``function(merged, deltas, **options) -> merged``, with the adapters' deltas as they were before any
            calibration, times their weights. An adapter that does not touch the module has a zero delta.
        paper: The publication, such as "arXiv:2602.05536".
        accepts: The kinds of delta that it can change.
        survey: For one that comes after a merge and looks at the whole model: the function that measures one module.
            The sum over all modules is passed as its third argument. With an option `per` it is only called if that
            is "model".
    """

    paper: str
    accepts: Kinds
    survey: Survey | None = None

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


_REGISTRIES: dict[When, Registry[Calibration]] = {
    "before": Registry("calibration", entry_points="pcb_peft.calibrations", prefix="before: "),
    "after": Registry("calibration", entry_points="pcb_peft.calibrations", prefix="after: "),
}


def before(name: str, *, paper: str, accepts: Kinds) -> Callable[[Before], Before]:
    """Register a function as a calibration of the adapters before a merge; the arguments are `Calibration`'s."""

    def register(function: Before) -> Before:
        entry = Calibration(name, function, paper, accepts)
        _REGISTRIES["before"].add(name, entry, defined_by=function)
        return function

    return register


def after(
    name: str, *, paper: str, accepts: Kinds, survey: Survey | None = None
) -> Callable[[After], After]:
    """Register a function as a calibration of the merged delta; the arguments are `Calibration`'s."""

    def register(function: After) -> After:
        entry = Calibration(name, function, paper, accepts, survey)
        _REGISTRIES["after"].add(name, entry, defined_by=function)
        return function

    return register


def list_calibrations(when: When) -> dict[str, Calibration]:
    """Return the calibrations that come before, or after, a merge, by name.

    Args:
        when: "before" or "after".

    Returns:
        Names and calibrations.

    Example:
        >>> from pcb_peft import list_calibrations
        >>> sorted(list_calibrations("before"))
        ['equalize', 'exponent', 'pico']
    """
    return _REGISTRIES[when].list()


def get_calibration(when: When, name: str) -> Calibration:
    """Return the calibration of that name.

    Raises:
        OptionError: There is none.
    """
    return _REGISTRIES[when].get(name)


def bound(
    when: When, steps: Sequence[Mapping[str, Mapping[str, Any]]], kinds: set[type[Delta]]
) -> tuple[list[Calibration], tuple[dict[str, dict[str, Any]], ...]]:
    """Bind the options of the calibrations that a recipe names.

    Args:
        when: "before" or "after".
        steps: Names and options, in order.
        kinds: The kinds of the adapters' deltas.

    Returns:
        The calibrations, ready to be called; and the steps with every default written out.

    Raises:
        OptionError: An unknown name, an option that is not allowed, or one that cannot take deltas of these kinds.
    """
    calibrations, complete = [], []
    for name, values in ((name, values) for step in steps for name, values in step.items()):
        calibration = get_calibration(when, name)
        if not kinds <= set(calibration.accepts):
            names = [kind.kind_name for kind in calibration.accepts]
            refused = [kind.kind_name for kind in kinds if kind not in calibration.accepts]
            raise OptionError(
                f"{when}: {name} cannot take {' and '.join(sorted(refused))} adapters; it takes "
                f"{', '.join(dict.fromkeys(names))}"
            )
        options = bind(calibration.options, values, f"{when} {name}")
        function = functools.partial(calibration.function, **options)
        survey = calibration.survey if options.get("per", "model") == "model" else None
        calibrations.append(dataclasses.replace(calibration, function=function, survey=survey))
        complete.append({name: options})
    return calibrations, tuple(complete)


def prepared(deltas: Sequence[Delta], steps: Sequence[Calibration]) -> Sequence[Delta]:
    """Return the adapters' deltas of one module after these calibrations, as they enter a merge."""
    for calibration in steps:
        deltas = calibration(deltas)
    return deltas
