"""The operations that every kind of change of a weight has."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor

from pcb_peft.deltas.layout import LINEAR, Layout
from pcb_peft.deltas.linalg import row_slices

VALUES_AT_A_TIME = 1 << 17
"""Values of a weight whose float32 values, while they are computed, fit into a core's cache."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Delta(abc.ABC):
    """The change of one weight.

    Attributes:
        layout: How the layer stores W.
        kind_name: Name of this kind of change for messages.
        multiplies: True for a kind that multiplies W and has no ΔW without W: (IA)³.
        rescales: True for a kind that rescales W's rows as well as adding to W: DoRA.
    """

    layout: Layout = LINEAR
    kind_name: ClassVar[str]
    multiplies: ClassVar[bool] = False
    rescales: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""

    @abc.abstractmethod
    def matrix(self) -> Tensor:
        """Return ΔW, float32, shape (out, in), whichever way W is stored."""

    @abc.abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (out, k) and (k, in), float64, whose product is ΔW."""

    @abc.abstractmethod
    def norm(self) -> float:
        """Return ‖ΔW‖_F."""

    @abc.abstractmethod
    def scaled(self, weight: float) -> "Delta":
        """Return the same change, `weight` times as large."""

    @abc.abstractmethod
    def zero(self) -> "Delta":
        """Return no change, of the same kind and shape, for an adapter that does not touch the module."""

    @property
    def low_rank_part(self) -> "Delta":
        """The part of ΔW that has a rank: what is added to W beside rescaling it, or all of it."""
        return self

    def with_low_rank_part(self, added: "Delta") -> "Delta":
        """Return the same change with another low-rank part."""
        return added

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """Return ΔW in W's own orientation, float32.

        Args:
            weight: W, needed only where ΔW depends on it.

        Raises:
            BaseModelError: ΔW depends on W and `weight` is None.
        """
        del weight
        return self.layout.stored(self.matrix())

    def apply(self, weight: Tensor) -> Tensor:
        """Return W + ΔW in W's dtype: computed in float32, or in float64 if W is, and rounded once."""
        return self.apply_(weight.clone())

    def apply_(self, weight: Tensor) -> Tensor:
        """Do the same as `apply`, in W's own memory."""
        slices = row_slices(weight.shape, VALUES_AT_A_TIME)
        for rows, change in zip(slices, self._row_changes(weight, slices), strict=True):
            weight[rows].add_(change)  # torch adds in the wider dtype of the two
        return weight

    def _row_changes(self, weight: Tensor, slices: Sequence[slice]) -> Iterator[Tensor]:
        """Yield ΔW in W's own orientation, slice by slice, each valid until the next; W is not changed yet."""
        return slices_of(self.delta(weight), slices)

    def split(self, slices: Sequence[slice]) -> "Sequence[Delta] | None":
        """Return the changes of these rows of W, as it is stored; None where W must be changed as a whole."""
        del slices
        return None

    def apply_to_bias(self, bias: Tensor) -> Tensor:
        """Return the layer's bias after the change, in its own dtype."""
        return bias

    def fits(self, layout: Layout, weight: tuple[int, ...]) -> bool:
        """Return whether a weight of this shape, stored in this layout, can be changed so."""
        return self.shape == layout.matrix_shape(weight)


def slices_of(change: Tensor, slices: Sequence[slice]) -> Iterator[Tensor]:
    """Yield the rows of a change, slice by slice."""
    return (change[rows] for rows in slices)
