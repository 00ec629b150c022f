"""What an adapter does to one weight W, in the form in which it is known exactly.

Shapes are those of the operator: ``out`` is the number of output features, ``in`` of input features (of a convolution
times its kernel; of an embedding, the tokens). How a layer stores W is its `Layout`, and only the last step, from ΔW to
W's own orientation, looks at it.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pcb_peft.deltas.layout import LINEAR, Layout
from pcb_peft.deltas.linalg import Basis, row_slices
from pcb_peft.errors import BaseModelError
from pcb_peft.runtime.threads import one_thread

VANISHED = 2**-20  # a factor of a row of W that is smaller is 0
ROUNDING = 1e-6  # what is a smaller part of a row is 0
# What so many values of a weight take on the way, in float32, stays in a core's cache.
_AT_A_TIME = 1 << 17


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Delta(abc.ABC):
    """The change of one weight.

    Attributes:
        layout: How the layer stores W.
    """

    layout: Layout = LINEAR

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""

    @abc.abstractmethod
    def matrix(self) -> Tensor:
        """ΔW, float32, shape (out, in), whichever way W is stored."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, k) and (k, in), float64, whose product is ΔW."""
        matrix = self.matrix().double()
        identity = torch.eye(min(matrix.shape), dtype=matrix.dtype)
        return (identity, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix, identity)

    @abc.abstractmethod
    def norm(self) -> float:
        """‖ΔW‖_F."""

    @abc.abstractmethod
    def scaled(self, weight: float) -> "Delta":
        """The same change, `weight` times as large."""

    @abc.abstractmethod
    def zero(self) -> "Delta":
        """No change, of the same kind and shape: what an adapter does to a module that it does not touch."""

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """ΔW in W's own orientation, float32.

        Args:
            weight: W, asked for only where ΔW depends on it.

        Raises:
            BaseModelError: ΔW depends on W and `weight` is None.
        """
        del weight
        return self.layout.stored(self.matrix())

    def apply(self, weight: Tensor) -> Tensor:
        """W + ΔW in W's dtype: computed in float32, or in float64 if W is, and rounded once."""
        return self.apply_(weight.clone())

    def apply_(self, weight: Tensor) -> Tensor:
        """`apply` in W's own memory."""
        parts = row_slices(weight.shape, _AT_A_TIME)
        for rows, change in zip(parts, self._changes(weight, parts), strict=True):
            weight[rows].add_(change)  # torch adds in the wider dtype of the two
        return weight

    def _changes(self, weight: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        """ΔW in W's own orientation, part by part of its rows, each valid until the next; W is not yet changed."""
        change = self.delta(weight)
        yield from (change[rows] for rows in parts)

    def split(self, parts: Sequence[slice]) -> "Sequence[Delta] | None":
        """What is done to each of these rows of W, as it is stored; None where W must be changed as a whole."""
        del parts
        return None

    def apply_to_bias(self, bias: Tensor) -> Tensor:
        """The layer's bias after the change, in its own dtype."""
        return bias


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LowRank(Delta):
    """ΔW = scaling · lora_B @ lora_A: a LoRA.

    Attributes:
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: alpha/r or alpha/√r, kept apart so that a single adapter folds bit for bit as PEFT folds it.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def matrix(self) -> Tensor:
        return (self.lora_B.float() @ self.lora_A.float()).mul_(self.scaling)

    def _changes(self, weight: Tensor, parts: Sequence[slice]) -> Iterator[Tensor]:
        if self.layout != LINEAR:
            yield from Delta._changes(self, weight, parts)
            return
        lora_A, lora_B, scaling = self.lora_A.float(), self.lora_B.float(), self.scaling
        if abs(math.frexp(scaling)[0]) == 0.5:  # a power of two rounds nothing: it may go first
            lora_B, scaling = lora_B * scaling, 1.0
        room = torch.empty(
            max((rows.stop - rows.start for rows in parts), default=0), self.shape[1]
        )
        for rows in parts:
            change = torch.mm(lora_B[rows], lora_A, out=room[: rows.stop - rows.start])
            yield change if scaling == 1.0 else change.mul_(scaling)

    def split(self, parts: Sequence[slice]) -> "Sequence[LowRank] | None":
        if self.layout != LINEAR:
            return None
        with one_thread():  # others that were woken for so little would go on spinning
            lora_A, lora_B = self.lora_A.float(), self.lora_B.float()
        return [LowRank(lora_A, lora_B[rows], self.scaling) for rows in parts]

    def factors(self) -> tuple[Tensor, Tensor]:
        """The scaling is shared out evenly."""
        root = math.sqrt(abs(self.scaling))
        signed = math.copysign(root, self.scaling)
        left, right = (x.to(torch.float64, copy=True) for x in (self.lora_B, self.lora_A))
        return left.mul_(signed), right.mul_(root)

    def norm(self) -> float:
        """From the Gram matrices of the factors: ‖BA‖² = tr(BᵀB AAᵀ)."""
        lora_B, lora_A = self.factors()
        return math.sqrt(max(0.0, float(((lora_B.T @ lora_B) * (lora_A @ lora_A.T)).sum())))

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

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def matrix(self) -> Tensor:
        return self.values.float()

    def split(self, parts: Sequence[slice]) -> "Sequence[Dense] | None":
        return [Dense(self.values[rows]) for rows in parts] if self.layout == LINEAR else None

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
        added: Low-rank.
        weight: Reads W (out, in), float32; it does not go along to other processes.
    """

    gain: Tensor
    added: Delta
    weight: Callable[[], Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.added.shape

    def matrix(self) -> Tensor:
        return torch.addcmul(self.added.matrix(), self.gain.float()[:, None], self.weight())

    def factors(self) -> tuple[Tensor, Tensor]:
        return Delta.factors(self) if self.gain.any() else self.added.factors()

    def norm(self) -> float:
        whole = self.gain.any()
        return float(torch.linalg.vector_norm(self.matrix())) if whole else self.added.norm()

    def scaled(self, weight: float) -> "Rescaled":
        return dataclasses.replace(self, gain=self.gain * weight, added=self.added.scaled(weight))

    def zero(self) -> "Rescaled":
        gain = torch.zeros_like(self.gain)
        return dataclasses.replace(self, gain=gain, added=self.added.zero())

    def inverse_scale(self) -> Tensor:
        """1 / (1 + gain) (out,); 0 for the rows of W that are multiplied by 0."""
        factor = 1 + self.gain
        return torch.where(factor.abs() < VANISHED, 0, 1 / factor)

    def without_zero_rows(self) -> "Rescaled":
        """The same change as W' = diag(1 + gain) (W + …) can hold it: a row of W that is multiplied by 0 stays 0.

        Where something is added to such a row, it is also what takes the row out of W, and its rank rises by one.
        """
        vanished = (self.inverse_scale() == 0).nonzero().flatten()
        if not len(vanished):
            return self
        left, right = self.added.factors()
        rows = self.weight()[vanished].double()
        sizes = [torch.linalg.vector_norm(x, dim=1) for x in (left[vanished] @ right, rows)]
        refilled = sizes[0] > ROUNDING * sizes[1]
        if not refilled.any():
            return self
        vanished = vanished[refilled]
        taken = self.gain[vanished, None] * rows[refilled]
        places = torch.eye(len(left), dtype=left.dtype)[:, vanished]
        lora_A, lora_B = torch.cat([right, taken]), torch.cat([left, places], dim=1)
        added = LowRank(lora_A.float(), lora_B.float(), layout=self.layout)
        gain = self.gain.index_fill(0, vanished, 0)
        return dataclasses.replace(self, gain=gain, added=added)

    def __reduce__(self) -> tuple[Callable[..., "Rescaled"], tuple[object, ...]]:
        return functools.partial(Rescaled, layout=self.layout), (self.gain, self.added, _elsewhere)


def _elsewhere() -> Tensor:
    raise BaseModelError("W is not known in this process: give base_model (--base-model)")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Diagonal(Delta):
    """W' = diag(l) W, or W diag(l) for a feed-forward layer: an (IA)³.

    Attributes:
        l: (out,), or (in,) where `feedforward` is true. 1 changes nothing.
        feedforward: The layer's input is scaled, not its output.
    """

    l: Tensor  # noqa: E741  (the paper's letter)
    feedforward: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (1, self.l.numel()) if self.feedforward else (self.l.numel(), 1)

    def matrix(self) -> Tensor:
        raise BaseModelError(
            "an (IA)³ adapter multiplies W, so its ΔW is W∘(l − 1): give base_model"
        )

    def delta(self, weight: Tensor | None = None) -> Tensor:
        if weight is None:
            return self.matrix()
        return weight.float() * (self._along(weight) - 1)

    def apply_(self, weight: Tensor) -> Tensor:
        along = self._along(weight).expand(weight.shape)
        for rows in row_slices(weight.shape, _AT_A_TIME):
            weight[rows].mul_(along[rows])
        return weight

    def apply_to_bias(self, bias: Tensor) -> Tensor:
        return bias if self.feedforward else (bias.float() * self.l.float()).to(bias.dtype)

    def norm(self) -> float:
        """‖l − 1‖: ΔW is not known."""
        return float((self.l.double() - 1).norm())

    def scaled(self, weight: float) -> "Diagonal":
        return dataclasses.replace(self, l=1 + weight * (self.l - 1))

    def zero(self) -> "Diagonal":
        return dataclasses.replace(self, l=torch.ones_like(self.l))

    def _along(self, weight: Tensor) -> Tensor:
        """`l`, shaped to scale the outputs or the inputs of W as it is stored."""
        columns = self.feedforward != self.layout.transposed
        kernel = [1] * (weight.ndim - 2)
        return (
            self.l.float().to(weight.device).view([1, -1, *kernel] if columns else [-1, 1, *kernel])
        )


MATRICES = (LowRank, Core, Dense, Rescaled)
"""The kinds whose ΔW is a matrix, known or read beside W: all but the vector of an (IA)³."""
