"""Layouts: ways in which a parameter stores the matrix (out, in) of its operator."""

import dataclasses
import math
from typing import NamedTuple

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """One way to store a matrix (out, in).

    Attributes:
        transposed: True if it is stored as (in, out): ``Conv1D`` of GPT-2, and embeddings, whose inputs are tokens.
        shape: Shape with the same values in the same order: (out, in, *kernel) of a convolution, (out,) of a bias;
            None for a matrix.
        lookup: True if the layer looks rows up instead of multiplying: an embedding.
        expert: Number of the matrix in a parameter that holds a stack of them.
    """

    transposed: bool = False
    shape: tuple[int, ...] | None = None
    lookup: bool = False
    expert: int | None = None

    def stored(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out, in) as the parameter stores it."""
        if self.shape is not None:
            return matrix.reshape(self.shape)
        return matrix.T if self.transposed else matrix

    def matrix(self, stored: Tensor) -> Tensor:
        """Return the matrix (out, in) of a parameter's values."""
        if self.shape is not None:
            return stored.reshape(stored.shape[0], -1)
        return stored.T if self.transposed else stored

    def matrix_shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return (out, in) of a parameter of this shape."""
        first, rest = stored[0], math.prod(stored[1:])
        return (rest, first) if self.transposed else (first, rest)


LINEAR = Layout()
CONV1D = Layout(transposed=True)
EMBEDDING = Layout(transposed=True, lookup=True)


def layout_of(layer: nn.Module | None) -> Layout:
    """Return how a layer stores a W of two dimensions."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, nn.Embedding):
        return EMBEDDING
    return CONV1D if isinstance(layer, Conv1D) else LINEAR


class ParameterForm(NamedTuple):
    """The form of a parameter that a module holds itself.

    Attributes:
        shape: Shape of the parameter.
        transposed: True if its matrices are stored as (in, out).
    """

    shape: tuple[int, ...]
    transposed: bool


def own_parameters_of(layer: nn.Module | None) -> dict[str, ParameterForm]:
    """Return the parameters that a layer holds itself, in their order."""
    if layer is None:
        return {}
    transposed = bool(getattr(layer, "is_transposed", False))
    return {
        name: ParameterForm(tuple(values.shape), transposed)
        for name, values in layer.named_parameters(recurse=False)
    }
