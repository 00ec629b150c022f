"""Kinds of change that an adapter makes to one weight W, each in the form in which it is known exactly.

Shapes are those of the operator: ``out`` is the number of output features, ``in`` of input features (of a convolution
times its kernel; of an embedding, the tokens). How a layer stores W is its `Layout`, and only the last step, from ΔW to
W's own orientation, looks at it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pcb_peft.deltas.abstract import VALUES_AT_A_TIME, Delta, slices_of
from pcb_peft.deltas.layout import LINEAR, Layout
from pcb_peft.deltas.linalg import Basis, inner_product, pad_rows, row_slices
from pcb_peft.errors import BaseModelError
from pcb_peft.runtime.threads import one_thread

ZERO_FACTOR = 2**-20  # a row of W that is multiplied by less counts as multiplied by 0
ZERO_ROW = 1e-6  # an addition smaller than this part of a row of W counts as 0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LowRank(Delta):
    """ΔW = scaling · lora_B @ lora_A: a LoRA.

    Attributes:
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: alpha/r or alpha/√r, kept apart so that a single adapter folds bit for bit as PEFT folds it.
    """

    kind_name = "LoRA"

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.lora_A.shape[0]

    def matrix(self) -> Tensor:
        return (self.lora_B.float() @ self.lora_A.float()).mul_(self.scaling)

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return lora_A and lora_B, float32, of the same ΔW at scaling 1, padded with zeros to a rank."""
        lora_B = self.lora_B if self.scaling == 1 else self.lora_B.double() * self.scaling
        return pad_rows(self.lora_A.float(), rank), pad_rows(lora_B.float().T, rank).T

    def _row_changes(self, weight: Tensor, slices: Sequence[slice]) -> Iterator[Tensor]:
        if self.layout != LINEAR:
            return slices_of(self.delta(weight), slices)
        return self._products(slices)

    def _products(self, slices: Sequence[slice]) -> Iterator[Tensor]:
        """Yield the rows of ΔW, all in the same memory."""
        lora_A, lora_B, scaling = self.lora_A.float(), self.lora_B.float(), self.scaling
        if _is_power_of_two(scaling):  # rounds nothing, so it may be multiplied first
            lora_B, scaling = lora_B * scaling, 1.0
        height = max((rows.stop - rows.start for rows in slices), default=0)
        scratch = torch.empty(height, self.shape[1])
        for rows in slices:
            change = torch.mm(lora_B[rows], lora_A, out=scratch[: rows.stop - rows.start])
            yield change if scaling == 1.0 else change.mul_(scaling)

    def split(self, slices: Sequence[slice]) -> "Sequence[LowRank] | None":
        if self.layout != LINEAR:
            return None
        with one_thread():  # waking other threads for so little work would cost more than it saves
            lora_A, lora_B = self.lora_A.float(), self.lora_B.float()
        return [LowRank(lora_A, lora_B[rows], self.scaling) for rows in slices]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return lora_B and lora_A, each times the square root of the scaling."""
        lora_B = self.lora_B.to(torch.float64, copy=True)
        lora_A = self.lora_A.to(torch.float64, copy=True)
        if self.scaling == 1:  # a product with 1 takes as long as the copy
            return lora_B, lora_A
        root = math.sqrt(abs(self.scaling))
        return lora_B.mul_(math.copysign(root, self.scaling)), lora_A.mul_(root)

    def norm(self) -> float:
        """Return ‖BA‖ from the Gram matrices of the factors: ‖BA‖² = tr(BᵀB AAᵀ)."""
        factors = self.factors()
        return math.sqrt(max(0.0, inner_product(factors, factors)))

    def scaled(self, weight: float) -> "LowRank":
        return dataclasses.replace(self, scaling=self.scaling * weight)

    def zero(self) -> "LowRank":
        lora_A, lora_B = torch.zeros_like(self.lora_A[:1]), torch.zeros_like(self.lora_B[:, :1])
        return LowRank(lora_A, lora_B, layout=self.layout)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Core(Delta):
    """ΔW = left @ core @ rightᵀ.

    Attributes:
        left: (out, p).
        core: (p, q).
        right: (in, q).
    """

    kind_name = "low-rank change"

    left: Basis
    core: Tensor
    right: Basis

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[0]

    def matrix(self) -> Tensor:
        left, right = self.factors()
        return left.float() @ right.float()

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.left.matrix(), self.right.across(self.core)

    def norm(self) -> float:
        return float(self.core.double().norm())

    def scaled(self, weight: float) -> "Core":
        return dataclasses.replace(self, core=self.core * weight)

    def zero(self) -> "Core":
        return dataclasses.replace(self, core=torch.zeros_like(self.core))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Dense(Delta):
    """ΔW itself.

    Attributes:
        values: (out, in).
    """

    kind_name = "dense change"

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def matrix(self) -> Tensor:
        return self.values.float()

    def factors(self) -> tuple[Tensor, Tensor]:
        return _trivial_factors(self.matrix())

    def split(self, slices: Sequence[slice]) -> "Sequence[Dense] | None":
        return [Dense(self.values[rows]) for rows in slices] if self.layout == LINEAR else None

    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.values))

    def scaled(self, weight: float) -> "Dense":
        return dataclasses.replace(self, values=self.values * weight)

    def zero(self) -> "Dense":
        return dataclasses.replace(self, values=torch.zeros_like(self.values))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rescaled(Delta):
    """ΔW = diag(gain) W + added: a DoRA, or a weighted sum of DoRAs and LoRAs.

    The set of these is closed under such sums, however high in rank the ΔW are.

    Attributes:
        gain: (out,). 0 changes nothing.
        added: The low-rank part.
        weight: Reads W (out, in), float32.
    """

    kind_name = "DoRA"
    rescales = True

    gain: Tensor
    added: Delta
    weight: Callable[[], Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.added.shape

    @property
    def low_rank_part(self) -> Delta:
        return self.added

    def with_low_rank_part(self, added: Delta) -> "Rescaled":
        return dataclasses.replace(self, added=added)

    def matrix(self) -> Tensor:
        return torch.addcmul(self.added.matrix(), self.gain.float()[:, None], self.weight())

    def factors(self) -> tuple[Tensor, Tensor]:
        return _trivial_factors(self.matrix()) if self.gain.any() else self.added.factors()

    def norm(self) -> float:
        if not self.gain.any():
            return self.added.norm()
        return float(torch.linalg.vector_norm(self.matrix()))

    def scaled(self, weight: float) -> "Rescaled":
        return dataclasses.replace(self, gain=self.gain * weight, added=self.added.scaled(weight))

    def zero(self) -> "Rescaled":
        gain = torch.zeros_like(self.gain)
        return dataclasses.replace(self, gain=gain, added=self.added.zero())

    def inverse_scale(self) -> Tensor:
        """Return 1 / (1 + gain) (out,); 0 for the rows of W that are multiplied by 0."""
        factor = 1 + self.gain
        return torch.where(factor.abs() < ZERO_FACTOR, 0, 1 / factor)

    def without_zero_rows(self) -> "Rescaled":
        """Return the same change as W' = diag(1 + gain) (W + …) can hold it: a row of W times 0 stays 0.

        Where something is added to such a row, the low-rank part also takes the row out of W, and its rank rises by
        one.
        """
        vanished = (self.inverse_scale() == 0).nonzero().flatten()
        if not len(vanished):
            return self
        lora_B, lora_A = self.added.factors()
        rows = self.weight()[vanished].double()
        added_norms = torch.linalg.vector_norm(lora_B[vanished] @ lora_A, dim=1)
        refilled = added_norms > ZERO_ROW * torch.linalg.vector_norm(rows, dim=1)
        if not refilled.any():
            return self
        vanished = vanished[refilled]
        taken_out = self.gain[vanished, None] * rows[refilled]
        unit_columns = torch.eye(len(lora_B), dtype=lora_B.dtype)[:, vanished]
        lora_A, lora_B = torch.cat([lora_A, taken_out]), torch.cat([lora_B, unit_columns], dim=1)
        added = LowRank(lora_A.float(), lora_B.float(), layout=self.layout)
        gain = self.gain.index_fill(0, vanished, 0)
        return dataclasses.replace(self, gain=gain, added=added)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Diagonal(Delta):
    """W' = diag(l) W, or W diag(l) for a feed-forward layer: an (IA)³.

    Attributes:
        l: (out,), or (in,) where `feedforward` is true. 1 changes nothing.
        feedforward: True where the layer's input is scaled, not its output.
    """

    kind_name = "(IA)³"
    multiplies = True

    l: Tensor  # noqa: E741  (the paper's letter)
    feedforward: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (1, self.l.numel()) if self.feedforward else (self.l.numel(), 1)

    def matrix(self) -> Tensor:
        raise BaseModelError(
            "an (IA)³ adapter multiplies W, so its ΔW is W∘(l − 1): give base_model"
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        return _trivial_factors(self.matrix())

    def delta(self, weight: Tensor | None = None) -> Tensor:
        if weight is None:
            return self.matrix()
        return weight.float() * (self._along(weight) - 1)

    def apply_(self, weight: Tensor) -> Tensor:
        along = self._along(weight).expand(weight.shape)
        for rows in row_slices(weight.shape, VALUES_AT_A_TIME):
            weight[rows].mul_(along[rows])
        return weight

    def apply_to_bias(self, bias: Tensor) -> Tensor:
        return bias if self.feedforward else (bias.float() * self.l.float()).to(bias.dtype)

    def norm(self) -> float:
        """Return ‖l − 1‖: ΔW is not known."""
        return float((self.l.double() - 1).norm())

    def scaled(self, weight: float) -> "Diagonal":
        return dataclasses.replace(self, l=1 + weight * (self.l - 1))

    def zero(self) -> "Diagonal":
        return dataclasses.replace(self, l=torch.ones_like(self.l))

    def fits(self, layout: Layout, weight: tuple[int, ...]) -> bool:
        if len(weight) < 2:
            return False
        inputs_first = layout.transposed
        outputs, inputs = weight[1 if inputs_first else 0], weight[0 if inputs_first else 1]
        if not self.feedforward:
            return self.l.numel() == outputs
        groups, rest = divmod(self.l.numel(), inputs)  # more than 1 of a convolution only
        grouped = len(weight) > 2 and groups > 1 and outputs % groups == 0
        return rest == 0 and (groups == 1 or grouped)

    def _along(self, weight: Tensor) -> Tensor:
        """Return `l`, shaped to scale the outputs or the inputs of W as it is stored."""
        scales_columns = self.feedforward != self.layout.transposed
        kernel = [1] * (weight.ndim - 2)
        l = self.l.float().to(weight.device)  # noqa: E741  (the paper's letter)
        if not scales_columns:
            return l.view(-1, 1, *kernel)
        groups = l.numel() // weight.shape[1]
        if groups > 1:  # each group of outputs has inputs of its own
            rows = l.view(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
            return rows.view(len(weight), -1, *kernel)
        return l.view(1, -1, *kernel)


MATRICES = (LowRank, Core, Dense, Rescaled)
"""The kinds whose ΔW is a matrix, known or read beside W: all but the vector of an (IA)³."""


def _trivial_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix and the identity, in the order that makes the identity the smaller one, float64."""
    matrix = matrix.double()
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype)
    return (identity, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix, identity)


def _is_power_of_two(number: float) -> bool:
    """Return whether a number is ±2ⁿ, n any integer."""
    mantissa, _ = math.frexp(number)
    return abs(mantissa) == 0.5
