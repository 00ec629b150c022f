"""How a parameter stores the matrix (out, in) of the operator that it is part of."""

import dataclasses
import math

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """One way to store a matrix (out, in).

    Attributes:
        transposed: As (in, out): ``Conv1D`` of GPT-2, and embeddings, whose inputs are tokens.
        shape: As this, in the same order of values: (out, in, *kernel) of a convolution, (out,) of a bias; or None.
        lookup: The layer looks rows up instead of multiplying: an embedding.
        expert: Which matrix it is of a parameter that holds a stack of them.
    """

    transposed: bool = False
    shape: tuple[int, ...] | None = None
    lookup: bool = False
    expert: int | None = None

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) as the parameter stores it."""
        if self.shape is not None:
            return matrix.reshape(self.shape)
        return matrix.T if self.transposed else matrix

    def matrix(self, stored: Tensor) -> Tensor:
        """The matrix (out, in) of what a parameter stores."""
        if self.shape is not None:
            return stored.reshape(stored.shape[0], -1)
        return stored.T if self.transposed else stored

    def matrix_shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """(out, in) of a parameter of this shape."""
        out, rest = stored[0], math.prod(stored[1:])
        return (rest, out) if self.transposed else (out, rest)


LINEAR = Layout()
CONV1D = Layout(transposed=True)
EMBEDDING = Layout(transposed=True, lookup=True)


def layout_of(layer: nn.Module | None) -> Layout:
    """How a layer stores a W of two dimensions."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, nn.Embedding):
        return EMBEDDING
    return CONV1D if isinstance(layer, Conv1D) else LINEAR


def held_by(layer: nn.Module | None) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The parameters that a layer holds itself, in their order: shape, and whether its matrices are (in, out)."""
    if layer is None:
        return {}
    transposed = bool(getattr(layer, "is_transposed", False))
    parameters = layer.named_parameters(recurse=False)
    return {name: (tuple(values.shape), transposed) for name, values in parameters}
