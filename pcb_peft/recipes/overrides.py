"""Settings that differ from module to module: overrides by name, and weights that change with depth."""

import dataclasses
import fnmatch
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from pcb_peft.errors import OptionError

Weight: TypeAlias = float | tuple[float, ...]
"""λ of one adapter: a number, or a gradient: its values from the first layer to the last, evenly spaced."""

REGEX = "re:"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """What some modules do differently; None, or an absent option, leaves it as the recipe has it.

    Attributes:
        modules: A glob (``*.mlp.*``), or a regular expression after ``re:``, that matches a whole module path.
        method: With another method, the recipe's options do not apply to these modules.
        space: Its name.
        scope: "global" is then over these modules.
        weights: One per adapter.
        options: Of the method and the space.
    """

    modules: str
    method: str | None = None
    space: str | None = None
    scope: str | None = None
    weights: tuple[Weight, ...] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def matches(self, module: str) -> bool:
        """Whether a module is one of those.

        Raises:
            OptionError: The regular expression is none.
        """
        if not self.modules.startswith(REGEX):
            return fnmatch.fnmatchcase(module, self.modules)
        try:
            return re.fullmatch(self.modules.removeprefix(REGEX), module) is not None
        except re.error as error:
            raise OptionError(
                f"overrides: {self.modules!r} is not a regular expression: {error}"
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without what is left as it is."""
        fields = dataclasses.asdict(self) | {"weights": self.weights and plain(self.weights)}
        return {name: value for name, value in fields.items() if value}


def read_overrides(items: object) -> tuple[Override, ...]:
    """Overrides from plain data.

    Raises:
        OptionError: Something else than a list of mappings with the fields of `Override`.
    """
    known = [field.name for field in dataclasses.fields(Override)]
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise OptionError(f"overrides is {items!r}; it must be a list")
    found: list[Override] = []
    for item in items:
        if isinstance(item, Override):
            found.append(item)
            continue
        if not isinstance(item, Mapping) or "modules" not in item or item.keys() - set(known):
            raise OptionError(
                f"overrides: {item!r} must be a mapping with modules, and of {', '.join(known[1:])}"
            )
        fields: dict[str, Any] = dict(item)
        if fields.get("weights") is not None:
            fields["weights"] = read_weights(fields["weights"])
        found.append(Override(**fields))
    return tuple(found)


def read_weights(values: Sequence[Any]) -> tuple[Weight, ...]:
    """Weights from plain data: numbers, and lists of numbers.

    Raises:
        OptionError: Anything else.
    """
    return tuple(
        tuple(map(_finite, value)) if isinstance(value, list | tuple) and value else _finite(value)
        for value in values
    )


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise OptionError(f"weights: {value!r} is not a finite number, nor a list of them")
    return float(value)


def plain(weights: Sequence[Weight]) -> list[float | list[float]]:
    """Weights as plain data."""
    return [list(weight) if isinstance(weight, tuple) else weight for weight in weights]


def layer_of(module: str) -> int | None:
    """The number of the layer that a module belongs to: the first number in its path."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def at_depth(weights: Sequence[Weight], module: str, layers: int) -> tuple[float, ...]:
    """The weights of one module.

    Args:
        weights: One per adapter.
        module: Its path. One that is in no layer gets the mean of a gradient's ends.
        layers: How many layers the model has.
    """
    layer = layer_of(module)
    depth = 0.5 if layer is None else layer / max(1, layers - 1)
    return tuple(
        _interpolated(w, depth, layer is None) if isinstance(w, tuple) else float(w)
        for w in weights
    )


def _interpolated(values: tuple[float, ...], depth: float, outside: bool) -> float:
    if outside:
        return (values[0] + values[-1]) / 2
    place = depth * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)
