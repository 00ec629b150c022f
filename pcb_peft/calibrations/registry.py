"""What a calibration is, and the shelves on which they stand.

A calibration changes deltas of one module, and goes with every method: adapters before they are merged, or the merged
delta afterwards. Its keyword-only parameters are its options.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

from pcb_peft.deltas.delta import Delta
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import Option, bind, did_you_mean, options_of

When: TypeAlias = Literal["before", "after"]
Kinds: TypeAlias = tuple[type[Delta], ...]
Survey: TypeAlias = Callable[[Delta, Sequence[Delta]], Tensor]
Function: TypeAlias = Callable[..., Any]

_REGISTRIES: dict[When, dict[str, "Calibration"]] = {"before": {}, "after": {}}


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration and what the engine has to know of it.

    Attributes:
        name: As recipes and the command line call it.
        function: Before a merge: ``function(deltas, **options) -> deltas``, the deltas of one module. After it:
            ``function(merged, deltas, **options) -> merged``, with the deltas as they were before any calibration,
            times their weights. An adapter that does not touch the module brings a zero.
        paper: Where it was published.
        accepts: The kinds of delta that it can take.
        survey: Of one after a merge that looks at the whole model: what it wants to know of each module. The sum over
            the modules is its third argument.
    """

    name: str
    function: Function
    paper: str
    accepts: Kinds
    survey: Survey | None = None

    @property
    def options(self) -> dict[str, Option]:
        return options_of(self.function)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def before(name: str, *, paper: str, accepts: Kinds) -> Callable[[Function], Function]:
    """Puts a function on the shelf of what is done to adapters; the arguments are `Calibration`'s."""

    def register(function: Function) -> Function:
        _REGISTRIES["before"][name] = Calibration(name, function, paper, accepts)
        return function

    return register


def after(
    name: str, *, paper: str, accepts: Kinds, survey: Survey | None = None
) -> Callable[[Function], Function]:
    """Puts a function on the shelf of what is done to the merged delta; the arguments are `Calibration`'s."""

    def register(function: Function) -> Function:
        _REGISTRIES["after"][name] = Calibration(name, function, paper, accepts, survey)
        return function

    return register


def list_calibrations(when: When) -> dict[str, Calibration]:
    """Those that come before a merge, or after it, by name."""
    return dict(sorted(_REGISTRIES[when].items()))


def get_calibration(when: When, name: str) -> Calibration:
    """The calibration of that name.

    Raises:
        OptionError: There is none.
    """
    shelf = _REGISTRIES[when]
    if name not in shelf:
        known = ", ".join(sorted(shelf))
        raise OptionError(
            f"{when}: no calibration {name!r}{did_you_mean(name, shelf)}; there are {known}"
        )
    return shelf[name]


def bound(
    when: When, steps: Sequence[Mapping[str, Mapping[str, Any]]], kinds: set[type[Delta]]
) -> tuple[list[Calibration], tuple[dict[str, dict[str, Any]], ...]]:
    """The calibrations that a recipe names, with their options bound, and the steps with every default written out.

    Raises:
        OptionError: An unknown name, an option that is not allowed, or one that cannot take deltas of these kinds.
    """
    calibrations, complete = [], []
    for name, given in ((name, given) for step in steps for name, given in step.items()):
        calibration = get_calibration(when, name)
        if not kinds <= set(calibration.accepts):
            taken = ", ".join(kind.__name__ for kind in calibration.accepts)
            raise OptionError(
                f"{when}: {name} cannot take these adapters; it takes deltas of kind {taken}"
            )
        options = bind(calibration.options, given, f"{when} {name}")
        function = functools.partial(calibration.function, **options)
        calibrations.append(dataclasses.replace(calibration, function=function))
        complete.append({name: options})
    return calibrations, tuple(complete)


def prepared(deltas: Sequence[Delta], steps: Sequence[Calibration]) -> Sequence[Delta]:
    """The adapters' deltas of one module as they enter a merge, after these calibrations."""
    for calibration in steps:
        deltas = calibration(deltas)
    return deltas
