"""Edits of a parameter: its new values, made from those of the base model."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor

from pcb_peft.base.model import BaseModel
from pcb_peft.base.places import WeightSlice
from pcb_peft.deltas.delta import Delta, Dense
from pcb_peft.deltas.replacements import ReplacedParameter, TokenRows
from pcb_peft.errors import MismatchError


class TensorEdit(abc.ABC):
    """A function from a parameter's values to the values that take their place."""

    @abc.abstractmethod
    def apply(self, values: Tensor) -> Tensor:
        """Return the new values; the memory of the old ones may be used for them."""

    def split(self, slices: Sequence[slice]) -> Sequence[Delta] | None:
        """Return the changes of these rows, if each can be made for itself; None if all values are needed at once."""
        del slices
        return None


class FittedDeltas:
    """Deltas by module, each as the base model stores its weight; the last one is kept.

    A weight and its bias are neighbours in a file and ask for the same delta.
    """

    def __init__(
        self, deltas: Mapping[str, Delta], base: BaseModel, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Take deltas for a base model.

        Args:
            deltas: Module to delta.
            base: The base model.
            shapes: Module to the shape of its weight, where the adapter brings along another W than the base model's.
        """
        self._deltas, self._base, self._shapes = deltas, base, shapes
        self._last: tuple[str, Delta] | None = None

    def __reduce__(self) -> tuple[type["FittedDeltas"], tuple[object, ...]]:
        return FittedDeltas, (self._deltas, self._base, self._shapes)

    def __getitem__(self, module: str) -> Delta:
        last = self._last
        if last is None or last[0] != module:
            delta = fitted(self._deltas[module], module, self._base, self._shapes.get(module))
            self._last = last = (module, delta)
        return last[1]


@dataclasses.dataclass(frozen=True)
class AddDeltas(TensorEdit):
    """Adds deltas to a parameter.

    Attributes:
        deltas: Deltas by module.
        modules: Places in the parameter to the modules whose weights lie there.
    """

    deltas: FittedDeltas
    modules: Mapping[WeightSlice, str]

    def apply(self, values: Tensor) -> Tensor:
        for place, module in self.modules.items():
            delta = self.deltas[module]
            if place.rows is not None:
                delta = Dense(delta.matrix()[slice(*place.rows)])
            delta.apply_(place.view(values))
        return values

    def split(self, slices: Sequence[slice]) -> Sequence[Delta] | None:
        (place, module), *others = self.modules.items()
        if others or not place.is_whole_parameter:
            return None
        return self.deltas[module].split(slices)


@dataclasses.dataclass(frozen=True)
class ChangeBias(TensorEdit):
    """Changes a layer's bias where the layer's output is scaled ((IA)³)."""

    deltas: FittedDeltas
    module: str

    def apply(self, values: Tensor) -> Tensor:
        return self.deltas[self.module].apply_to_bias(values)


@dataclasses.dataclass(frozen=True)
class ReplaceParameter(TensorEdit):
    """Puts the adapter's values in the place of the base model's."""

    new: ReplacedParameter

    def apply(self, values: Tensor) -> Tensor:
        return self.new().to(values.dtype, copy=True)


@dataclasses.dataclass(frozen=True)
class ReplaceRows(TensorEdit):
    """Puts the adapter's rows in the place of the base model's.

    Attributes:
        name: Name of the parameter, for messages.
        rows: The new rows.
    """

    name: str
    rows: TokenRows

    def apply(self, values: Tensor) -> Tensor:
        last, shape = max(self.rows.indices), self.rows.load().shape
        if last >= len(values) or shape[1:] != values.shape[1:]:
            raise MismatchError(
                f"{self.name}: the adapter replaces rows up to {last} by {tuple(shape)}, the base has "
                f"{tuple(values.shape)}; give the base that the adapter was trained on, with its vocabulary"
            )
        return self.rows.put_into(values)


@dataclasses.dataclass(frozen=True)
class InTurn(TensorEdit):
    """Makes several edits, one after the other."""

    steps: Sequence[TensorEdit]

    def apply(self, values: Tensor) -> Tensor:
        for step in self.steps:
            values = step.apply(values)
        return values


class Unchanged(TensorEdit):
    """Leaves the values as they are, for a tied weight that becomes a parameter of its own."""

    def apply(self, values: Tensor) -> Tensor:
        return values


def fitted(
    delta: Delta, module: str, base: BaseModel, own_shape: tuple[int, ...] | None = None
) -> Delta:
    """Return a delta as the base model stores the module's weight: an adapter's configuration is often wrong on that.

    Args:
        delta: The delta.
        module: Path of its module.
        base: The base model.
        own_shape: Shape of the weight that the adapter brings along in place of the base model's.

    Raises:
        MismatchError: The base model has no such module, or its weight has another shape.
    """
    weight = own_shape or base.shape(module)
    layout = delta.layout if delta.layout.lookup else base.layout(module, delta.shape)
    if not delta.fits(layout, weight):
        orientation = " as (in, out)" if layout.transposed else ""
        raise MismatchError(
            f"{module}: the adapter's (out, in) is {delta.shape}, the weight in {base.source} is "
            f"{weight}{orientation}; give the base that the adapter was trained on"
        )
    return dataclasses.replace(
        delta, layout=dataclasses.replace(layout, expert=delta.layout.expert)
    )
