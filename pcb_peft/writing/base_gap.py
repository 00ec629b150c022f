"""The distance between two base models, in units of an adapter's change: a quantised one and what it was made from."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch

from pcb_peft.base.canonical import names_in_checkpoint
from pcb_peft.base.model import BaseModel
from pcb_peft.deltas.delta import Delta
from pcb_peft.errors import MismatchError
from pcb_peft.runtime.processes import current, union
from pcb_peft.writing.edits import fitted

_SMALL, _LARGE = 0.1, 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class BaseGap:
    """The distance between two base models over the weights that an adapter changes.

    Attributes:
        one: Name of the base model that was folded into.
        other: Name of the model that it was compared with.
        norms: Module to ‖W' − W‖ and ‖ΔW‖.
    """

    one: str
    other: str
    norms: Mapping[str, tuple[float, float]]

    @property
    def ratio(self) -> float:
        """‖W' − W‖ / ‖ΔW‖ over all modules; infinite where the adapter changes nothing."""
        distance = math.hypot(*(distance for distance, _ in self.norms.values()))
        change = math.hypot(*(change for _, change in self.norms.values()))
        return distance / change if change else math.inf

    @property
    def ratios(self) -> dict[str, float]:
        """‖W' − W‖ / ‖ΔW‖ of each module."""
        pairs = self.norms.items()
        return {name: a / b if b else math.inf for name, (a, b) in pairs}

    def __str__(self) -> str:
        ratios = self.ratios
        if not ratios:
            return f"{self.one} and {self.other} were not compared: the adapter adds to no weight"
        worst = max(ratios, key=lambda module: ratios[module])
        if self.ratio < _SMALL:
            verdict = "small: a fold into either is nearly what was trained"
        elif self.ratio < _LARGE:
            verdict = "not small: fold into the one that the adapter was trained on"
        else:
            verdict = (
                "as large as the adapter's change itself: only a fold into the one that the adapter was trained on is "
                "what was trained"
            )
        return (
            f"{self.one} and {self.other} differ by {self.ratio:.3g} times ‖ΔW‖ (most in {worst}: "
            f"{ratios[worst]:.3g}); that is {verdict}"
        )


class MeasuredDeltas(Mapping[str, Delta]):
    """Deltas by module that are measured, when they are read, against the distance between two base models."""

    def __init__(
        self, deltas: Mapping[str, Delta], base: BaseModel, other: BaseModel | None
    ) -> None:
        """Take deltas for a base model, and the model to compare it with; without one nothing is measured.

        Raises:
            MismatchError: The other model does not have these modules, or has them in other shapes.
        """
        self._deltas, self._base, self._other = deltas, base, other
        self._norms: dict[str, tuple[float, float]] = {}
        self._names = {} if other is None else names_in_checkpoint(other, deltas)
        if other is not None:
            for module in deltas:
                _check_shapes(module, base, other, self._names.get(module, module))

    def __getitem__(self, module: str) -> Delta:
        delta = self._deltas[module]
        if self._other is not None and module not in self._norms:
            weight = self._base.weight(module).float()
            there = self._other.weight(self._names.get(module, module)).float()
            change = fitted(delta, module, self._base).delta(weight)
            norms = (torch.linalg.vector_norm(values) for values in (there - weight, change))
            distance, size = map(float, norms)
            self._norms[module] = (distance, size)
        return delta

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def gap(self) -> BaseGap:
        """Return the distances that were measured, by all processes."""
        known = union(current().all_gather(self._norms))
        ordered = {module: known[module] for module in self._deltas if module in known}
        other = "no other model" if self._other is None else self._other.source
        return BaseGap(self._base.source, other, ordered)


def _check_shapes(module: str, base: BaseModel, other: BaseModel, name: str) -> None:
    shape, there = base.shape(module), other.shape(name)
    if shape != there:
        raise MismatchError(
            f"{module} has shape {shape} in {base.source} and {there} in {other.source}: they are not the same model; "
            "give compare_base (--compare-base) the model that the other was quantised from"
        )
