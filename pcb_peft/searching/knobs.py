"""Knobs: the things that a search may change, each with the values that it may take."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, TypeAlias

from pcb_peft.errors import OptionError
from pcb_peft.recipes.steps import read_steps

STEPS = ("before", "after")
"""Knobs whose values are lists of calibrations."""

Values: TypeAlias = Sequence[Any] | tuple[float, float]
"""A list of values to choose from, or a pair (low, high) of numbers to try all between."""

Candidate: TypeAlias = dict[str, Any]
"""A value for each knob, by its name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One of several values.

    Attributes:
        values: The values, as plain data.
    """

    values: tuple[Any, ...]

    def draw(self, generator: random.Random) -> Any:
        """Return any of the values."""
        return generator.choice(self.values)

    def nearest(self, value: Any) -> Any:
        """Return a value if it is among these, else the first of these."""
        return value if value in self.values else self.values[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A number between two others; on a logarithmic scale where both are positive.

    Attributes:
        low: The smallest number.
        high: The largest number.
    """

    low: float
    high: float

    @property
    def logarithmic(self) -> bool:
        """True if ratios count, not differences."""
        return self.low > 0

    def draw(self, generator: random.Random) -> float:
        """Return a number between the ends."""
        if self.logarithmic:
            return math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        return generator.uniform(self.low, self.high)

    def nearest(self, value: Any) -> float:
        """Return a number if it lies between the ends, else the nearer end; the middle for what is no number."""
        if isinstance(value, int | float):
            return min(max(float(value), self.low), self.high)
        return math.sqrt(self.low * self.high) if self.logarithmic else (self.low + self.high) / 2


Knob: TypeAlias = Choice | Interval


def knob_of(name: str, values: Values) -> Knob:
    """Return the knob that a user's words stand for.

    Args:
        name: What it changes.
        values: Values to choose from as a list, or (low, high) as a tuple of two numbers.

    Raises:
        OptionError: They are neither.

    >>> knob_of("density", (0.05, 0.5))
    Interval(low=0.05, high=0.5)
    >>> knob_of("after", [None, "svc"])
    Choice(values=([], [{'svc': {}}]))
    """
    given: Any = values  # of a user
    numbers = isinstance(given, tuple) and len(given) == 2
    if numbers and all(type(value) in (int, float) for value in given):
        low, high = given
        if not low < high:
            raise OptionError(f"vary: {name} is {given}; the first number must be the smaller one")
        return Interval(float(low), float(high))
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise OptionError(f"vary: {name} is {given!r}; it must be a list of values, or (low, high)")
    if name in STEPS:
        return Choice(tuple(list(read_steps(name, value or [])) for value in given))
    return Choice(tuple(given))
