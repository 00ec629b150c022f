"""The places of weights in the files of a checkpoint: a tensor, a matrix of a stack, or some rows of one."""

import dataclasses
import itertools
from collections.abc import Sequence

from torch import Tensor

from pcb_peft.base.names import ParameterNames
from pcb_peft.errors import BaseModelError
from pcb_peft.images.rows import parts_of, rows_of_parts

EXCHANGED = "~"
"""End of the name of a parameter whose second half of rows stands before the first in the file of an image model."""


@dataclasses.dataclass(frozen=True, slots=True)
class WeightSlice:
    """The place of a weight, or of some rows of it, in the files.

    Attributes:
        parameter: Name in the files; in memory, if `converted`.
        index: Number of the matrix in a stack; None for a parameter that is not a stack.
        rows: First row and last row + 1 of the weight that are stored here; None for all rows.
        converted: True where the files hold the parameter's values in another arrangement.
        part: First row, last row + 1 and step of the matrix that are the weight; None where it is the whole matrix.
        columns: True where `part` counts columns: the matrix is stored as (in, out).
    """

    parameter: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    converted: bool = False
    part: tuple[int, int, int] | None = None
    columns: bool = False

    @property
    def is_whole_parameter(self) -> bool:
        """True if the parameter and the weight are the same."""
        return self.index is None and self.rows is None and self.part is None

    def view(self, values: Tensor) -> Tensor:
        """Return the view of this matrix inside the values of the parameter."""
        matrix = values if self.index is None else values[self.index]
        if self.part is None:
            return matrix
        return matrix[:, slice(*self.part)] if self.columns else matrix[slice(*self.part)]

    def shape_in(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the weight, if this is its last place.

        Args:
            parameter: Shape of the parameter.
        """
        matrix = parameter if self.index is None else parameter[1:]
        if self.rows is not None:
            return (self.rows[1], *matrix[1:])
        if self.part is None:
            return matrix
        size = len(range(*self.part))
        return (matrix[0], size) if self.columns else (size, *matrix[1:])


def places_in_files(module: str, names: ParameterNames) -> tuple[WeightSlice, ...]:
    """Return the places of a module's weight, from its first rows to its last; none if it is an ordinary parameter.

    Args:
        module: Path in memory.
        names: The names of the checkpoint's parameters.
    """
    kinds = (places_of, places_of_parts, places_in_whole, places_of_halves)
    return next(filter(None, (places(module, names) for places in kinds)), ())


def places_of(module: str, names: ParameterNames) -> tuple[WeightSlice, ...]:
    """Return the places of a weight of a model of transformers; arguments are those of `places_in_files`."""
    if names.in_files(f"{module}.weight"):
        return ()
    in_memory = names.skeleton.in_model(f"{module}.weight") or names.skeleton.in_model(module)
    if in_memory and names.conversion(in_memory) and not names.in_files(in_memory):
        return (WeightSlice(in_memory, converted=True),)
    stack, _, number = module.rpartition(".")
    if number.isdecimal() and (places := _in_stack(stack, int(number), names)):
        return places
    place = None if in_memory else names.skeleton.place_in_stack(module)
    if place is None:
        return ()
    if place.index is None:  # of a fused layer
        whole = places_of(place.stack, names) or (WeightSlice(names.in_files(place.stack) or ""),)
        return tuple([dataclasses.replace(one, part=place.rows) for one in whole if one.parameter])
    places = _in_stack(place.stack, place.index, names)
    if place.rows is None:
        return places
    if len(places) != 1:  # one of them is the part
        start, end, _ = place.rows
        parts = [one.parameter for one in places if one.rows == (start, end)]
        return tuple([WeightSlice(parameter, rows=(0, end - start)) for parameter in parts])
    (whole,) = places
    return (dataclasses.replace(whole, part=place.rows, columns=place.transposed),)


def places_of_parts(module: str, names: ParameterNames) -> tuple[WeightSlice, ...]:
    """Return the places of a matrix of an image model (``attn.{to_q,to_k,to_v}``) whose parts the files have."""
    parts = parts_of(module) if "{" in module else []
    return _one_below_the_other([names.in_files(f"{part}.weight") or "" for part in parts], names)


def places_in_whole(module: str, names: ParameterNames) -> tuple[WeightSlice, ...]:
    """Return the place of a matrix of an image model (``attn.to_q``) in one that the files hold whole."""
    for name, tensor in names.tensors.items():
        whole = name.removesuffix(".weight")
        if "{" in name and whole != name and module in parts_of(whole):
            rows = rows_of_parts(whole, (tensor.shape[0], tensor.shape[1]))[module]
            return (WeightSlice(name, part=(rows.start, rows.stop, 1)),)
    return ()


def places_of_halves(module: str, names: ParameterNames) -> tuple[WeightSlice, ...]:
    """Return the places of a weight or bias of an image model whose halves the files have in another order."""
    for parameter in (f"{module}.weight{EXCHANGED}", f"{module}{EXCHANGED}"):
        if parameter in names.tensors:
            half = names.tensors[parameter].shape[0] // 2
            first, second = (0, half), (half, 2 * half)
            return (
                WeightSlice(parameter, rows=first, part=(*second, 1)),
                WeightSlice(parameter, rows=second, part=(*first, 1)),
            )
    return ()


def _one_below_the_other(
    parameters: Sequence[str], names: ParameterNames
) -> tuple[WeightSlice, ...]:
    """Return the places of a weight whose rows are those of some parameters; none if the files lack one of them.

    Raises:
        BaseModelError: They are no matrices of the same width.
    """
    if not all(parameters):
        return ()
    shapes = [names.tensors[name].shape for name in parameters]
    if {len(shape) for shape in shapes} - {2} or len({shape[1] for shape in shapes}) > 1:
        raise BaseModelError(
            f"the base model's {', '.join(parameters)} are parts of one matrix, and have the shapes "
            f"{', '.join(map(str, shapes))}; fetch the model again"
        )
    heights = [shape[0] for shape in shapes]
    ends = itertools.accumulate(heights)
    return tuple(
        WeightSlice(name, rows=(end - height, end))
        for name, height, end in zip(parameters, heights, ends, strict=True)
    )


def _in_stack(stack: str, index: int, names: ParameterNames) -> tuple[WeightSlice, ...]:
    """Return the places of one matrix of a stack in memory; none if there is no such stack."""
    stored = names.in_files(stack)
    if stored is not None:
        return (WeightSlice(stored, index),) if index < names.tensors[stored].shape[0] else ()
    matrices = names.stack_sources(stack)
    if index < len(matrices):
        return _one_below_the_other(matrices[index], names)
    name = names.skeleton.in_model(stack)
    if name is None or not names.conversion(name) or index >= names.skeleton.shape(name)[0]:
        return ()
    return (WeightSlice(name, index, converted=True),)
