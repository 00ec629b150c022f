"""Metrics: which directions of a module's inputs count, and how much.

A merge compares directions of ΔW as if every input were as likely as any other. Activations are not like that: a few
directions of a layer's inputs carry most of their energy. In the metric P of a module (in, in), symmetric and positive
definite, adapters are compared as ΔW_t P, and the merge M of these leaves as M P⁻¹.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, Dense, LowRank

DEFAULT_POWER = 0.25
DEFAULT_RIDGE = 0.05


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The second moments S = E[x xᵀ] of a module's inputs x: the largest eigenvalues, and the mean of the others.

    Attributes:
        values: The largest eigenvalues (K,).
        vectors: Their eigenvectors (in, K), orthonormal.
        rest: The mean of the other eigenvalues.
    """

    values: Tensor
    vectors: Tensor
    rest: float

    @property
    def trace(self) -> float:
        """The mean of ‖x‖²."""
        size, known = self.vectors.shape
        return float(self.values.double().sum()) + self.rest * (size - known)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ModuleMetric:
    """P = rest · I + V diag(values − rest) Vᵀ.

    Attributes:
        values: Eigenvalues of P (K,), float64.
        vectors: Their eigenvectors V (in, K), float64.
        rest: The eigenvalue of everything else.
    """

    values: Tensor
    vectors: Tensor
    rest: float

    def enter(self, delta: Delta) -> Delta:
        """Return ΔW P, in factors where the delta has some."""
        return _times(delta, self.times)

    def leave(self, delta: Delta) -> Delta:
        """Return ΔW P⁻¹: the opposite of `enter`."""
        inverse = ModuleMetric(1 / self.values, self.vectors, 1 / self.rest)
        return _times(delta, inverse.times)

    def times(self, rows: Tensor) -> Tensor:
        """Return R P (k, in), for rows R (k, in)."""
        rows = rows.double()
        return self.rest * rows + (rows @ self.vectors * (self.values - self.rest)) @ self.vectors.T


def metric_of(
    moments: Moments, power: float = DEFAULT_POWER, ridge: float = DEFAULT_RIDGE
) -> ModuleMetric:
    """Return P = (S + ridge · tr(S)/in · I)^power.

    Its scale is arbitrary and cancels; the eigenvalues are taken relative to their mean.

    Args:
        moments: S, the second moments of a module's inputs.
        power: 0 treats all directions alike; 0.5 makes ‖ΔW P‖² the mean of ‖ΔW x‖² (whitened inputs).
        ridge: The fraction of the mean eigenvalue that is added to all: inputs that were not seen may come.
    """
    size, known = moments.vectors.shape
    mean = moments.trace / size
    if mean == 0:  # a module that sees nothing but zeros prefers no direction
        return ModuleMetric(torch.ones_like(moments.values).double(), moments.vectors.double(), 1.0)
    vectors = moments.vectors.double()
    vectors = 1.5 * vectors - 0.5 * vectors @ (vectors.T @ vectors)  # orthonormal to float64
    values = (moments.values.double() / mean + ridge) ** power
    rest = 1.0 if known == size else (moments.rest / mean + ridge) ** power
    return ModuleMetric(values, vectors, rest)


def _times(delta: Delta, times: Callable[[Tensor], Tensor]) -> Delta:
    if isinstance(delta, Dense):
        return Dense(times(delta.values), layout=delta.layout)
    left, right = delta.factors()
    return LowRank(times(right), left, layout=delta.layout)
