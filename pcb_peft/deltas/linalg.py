"""The few decompositions that spaces and truncation share, and products by parts."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Svd: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(U, σ, Vᵀ): (m, k), (k,), (k, n)."""

OVERSAMPLING = 16
POWER_ITERATIONS = 3
CONDITION = 1e8  # squared: beyond, what rounding leaves of a Gram matrix is not enough
ROUNDING = 1e-6  # a smaller part of the largest singular value is what float32 files leave of a 0
GROUP = 4  # rows that a BLAS computes at once


def column_signs(columns: Tensor) -> Tensor:
    """±1 per column of an (m, k) matrix: what makes the entry of largest magnitude positive."""
    return torch.where(-columns.amin(0) > columns.amax(0), -1, 1).to(columns.dtype)


def row_slices(shape: Sequence[int], at_most: int) -> list[slice]:
    """Slices of rows, of some `at_most` values each, by which a product of that shape can be computed, bit for bit.

    A BLAS rounds rows that do not fill a group in another way. So each slice starts where a group does, and none is
    less than a group, unless all are.
    """
    rows, height = shape[0], at_most // max(1, math.prod(shape[1:]))
    height = max(GROUP, height // GROUP * GROUP)
    starts = range(0, max(min(rows, 1), rows - GROUP + 1), height)
    return [slice(*ends) for ends in itertools.pairwise([*starts, rows])]


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if math.isfinite(float(values.sum())):  # is cheap, and is so only if all of them are
        return True
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Orthonormal columns X K, which are not computed before they are multiplied with something smaller.

    All products are float64, whatever the dtypes of their parts.

    Attributes:
        columns: X (m, n).
        change: K (n, p); None for the identity.
    """

    columns: Tensor
    change: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        last = self.columns if self.change is None else self.change
        return self.columns.shape[0], last.shape[1]

    def matrix(self) -> Tensor:
        """X K (m, p)."""
        columns = self.columns.double()
        return columns if self.change is None else columns @ self.change.double()

    def __matmul__(self, small: Tensor) -> Tensor:
        """X K C (m, k), for C (p, k)."""
        return self.columns.double() @ self._changed(small)

    def across(self, small: Tensor) -> Tensor:
        """C (X K)ᵀ (k, m), for C (k, p)."""
        return self._changed(small.T).T @ self.columns.double().T

    def coordinates(self, long: Tensor) -> Tensor:
        """(X K)ᵀ M (p, …), for M (m, …)."""
        inner = self.columns.double().T @ long.double()
        return inner if self.change is None else self.change.double().T @ inner

    def turned(self, rotation: Tensor) -> "Basis":
        """The basis X K Q, for orthonormal columns Q (p, q)."""
        return Basis(self.columns, self._changed(rotation))

    def _changed(self, small: Tensor) -> Tensor:
        """K C."""
        return small.double() if self.change is None else self.change.double() @ small.double()


def spanned(columns: Tensor) -> tuple[Basis, Tensor]:
    """An orthonormal basis of what the columns span, and R (p, n), their coordinates in it.

    By Cholesky QR, where the columns, each made 1 in length, depend on each other so little that the basis is
    orthonormal to 1e-8: it takes the Gram matrix, and X is the columns themselves. Else by Householder QR, which takes
    several times as long.

    Args:
        columns: (m, n), float64.

    Source: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015, Roundoff error analysis of the CholeskyQR2 algorithm.
    """
    if columns.shape[1] <= columns.shape[0]:
        gram = columns.T @ columns
        lengths = gram.diagonal().sqrt()
        lengths = torch.where(lengths > 0, lengths, 1)
        factor, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None])
        identity = torch.eye(len(factor), dtype=factor.dtype)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        if not failed and factor.square().sum() * inverse.square().sum() < CONDITION:
            return Basis(columns, inverse.T / lengths[:, None]), factor.T * lengths
    basis, triangle = torch.linalg.qr(columns)
    return Basis(basis), triangle


def svd(matrix: Tensor) -> Svd:
    """The thin singular value decomposition, by way of a QR if the matrix is long."""
    rows, cols = matrix.shape
    if rows < cols:
        u, s, vh = svd(matrix.T)
        return vh.T, s, u.T
    if rows > 2 * cols:
        q, r = torch.linalg.qr(matrix)
        u, s, vh = torch.linalg.svd(r, full_matrices=False)
        return q @ u, s, vh
    return torch.linalg.svd(matrix, full_matrices=False)


def leading_svd(matrix: Tensor, count: int) -> Svd:
    """The `count` leading singular triplets, to the accuracy of a randomised range finder with power iterations.

    Source: Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1. The test matrix is drawn from a fixed seed.
    """
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(matrix.shape[1], count + OVERSAMPLING, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ test).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = svd(basis.T @ matrix)
    return basis @ u[:, :count], s[:count], vh[:count]


def significant(matrix: Tensor, scale: Tensor | None = None) -> Svd:
    """The singular triplets of the numerical rank.

    Args:
        matrix: (m, n).
        scale: What singular values are compared with; default: the largest of them.
    """
    u, s, vh = svd(matrix)
    count = int((s > ROUNDING * (s[:1] if scale is None else scale)).sum())
    return u[:, :count], s[:count], vh[:count]


def joined(triplets: Sequence[Svd]) -> Svd:
    """Side by side: (U_1 … U_T), (σ_1 … σ_T), (V_1 … V_T)ᵀ."""
    u, s, vh = zip(*triplets, strict=True)
    return torch.cat(u, dim=1), torch.cat(s), torch.cat(vh)


def orthonormalized(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns: the orthogonal polar factor, which solves Procrustes' problem.

    Columns that depend on each other share their span: singular values of 0 stay 0.
    """
    u, _, vh = significant(columns)
    return u @ vh
