"""Decompositions that spaces and truncation share, and products by parts."""

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
MAX_CONDITION_SQUARED = 1e8  # of a matrix for Cholesky QR; above it Householder QR is used
RANK_TOLERANCE = 1e-6
"""A smaller part of the largest singular value is the rounding of float32 files."""
GROUP = 4  # rows that a BLAS computes at once


def column_signs(columns: Tensor) -> Tensor:
    """Return ±1 per column of an (m, k) matrix, which makes the entry of largest magnitude positive."""
    return torch.where(-columns.amin(0) > columns.amax(0), -1, 1).to(columns.dtype)


def row_slices(shape: Sequence[int], at_most: int) -> list[slice]:
    """Return slices of rows, of about `at_most` values each, in which a product of that shape is the same bit for bit.

    A BLAS rounds rows that do not fill a group in another way. So each slice starts where a group does, and no slice
    has fewer rows than a group, unless the matrix has. A single number is one row.
    """
    rows = shape[0] if shape else 1
    if rows == 0:
        return []
    height = at_most // max(1, math.prod(shape[1:]))
    height = max(GROUP, height // GROUP * GROUP)
    last_start = max(0, rows - GROUP)  # a slice that starts later has fewer rows than a group
    starts = range(0, last_start + 1, height)
    return [slice(*ends) for ends in itertools.pairwise([*starts, rows])]


def pad_rows(matrix: Tensor, rows: int) -> Tensor:
    """Return a matrix with rows of zeros below it, so that it has so many rows."""
    missing = rows - matrix.shape[0]
    return torch.nn.functional.pad(matrix, (0, 0, 0, missing)) if missing else matrix


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    if math.isfinite(float(values.sum())):  # cheap; a finite sum means finite values
        return True
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Orthonormal columns X K, kept as two factors until they are multiplied with something smaller.

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
        """Return X K (m, p)."""
        columns = self.columns.double()
        return columns if self.change is None else columns @ self.change.double()

    def __matmul__(self, small: Tensor) -> Tensor:
        """Return X K C (m, k), for C (p, k)."""
        return self.columns.double() @ self._changed(small)

    def across(self, small: Tensor) -> Tensor:
        """Return C (X K)ᵀ (k, m), for C (k, p)."""
        return self._changed(small.T).T @ self.columns.double().T

    def coordinates(self, long: Tensor) -> Tensor:
        """Return (X K)ᵀ M (p, …), for M (m, …)."""
        inner = self.columns.double().T @ long.double()
        return inner if self.change is None else self.change.double().T @ inner

    def turned(self, rotation: Tensor) -> "Basis":
        """Return the basis X K Q, for orthonormal columns Q (p, q)."""
        return Basis(self.columns, self._changed(rotation))

    def _changed(self, small: Tensor) -> Tensor:
        """Return K C."""
        return small.double() if self.change is None else self.change.double() @ small.double()


def spanned(columns: Tensor) -> tuple[Basis, Tensor]:
    """Return an orthonormal basis of the span of some columns, and R (p, n), their coordinates in it.

    Cholesky QR is used where the columns, each scaled to length 1, are independent enough for a basis that is
    orthonormal to 1e-8: it takes the Gram matrix, and X is the columns themselves. Householder QR, which takes several
    times as long, is used elsewhere.

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
        if not failed and factor.square().sum() * inverse.square().sum() < MAX_CONDITION_SQUARED:
            return Basis(columns, inverse.T / lengths[:, None]), factor.T * lengths
    basis, triangle = torch.linalg.qr(columns)
    return Basis(basis), triangle


def inner_product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return ⟨B₁A₁, B₂A₂⟩, the sum over the entries of B₁ᵀB₂ ∘ A₁A₂ᵀ.

    Args:
        first: B₁ (out, r₁) and A₁ (r₁, in).
        second: B₂ (out, r₂) and A₂ (r₂, in).
    """
    (b1, a1), (b2, a2) = first, second
    return float(((b1.T @ b2).double() * (a1 @ a2.T).double()).sum())


def svd(matrix: Tensor) -> Svd:
    """Return the thin singular value decomposition, by way of a QR if the matrix is long."""
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
    """Return the `count` leading singular triplets, from a randomised range finder with power iterations.

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
    """Return the singular triplets of the numerical rank.

    Args:
        matrix: (m, n).
        scale: Singular value that the others are compared with; default: the largest.
    """
    u, s, vh = svd(matrix)
    count = int((s > RANK_TOLERANCE * (s[:1] if scale is None else scale)).sum())
    return u[:, :count], s[:count], vh[:count]


def cat_svds(triplets: Sequence[Svd]) -> Svd:
    """Return triplets side by side: (U_1 … U_T), (σ_1 … σ_T), (V_1 … V_T)ᵀ."""
    u, s, vh = zip(*triplets, strict=True)
    return torch.cat(u, dim=1), torch.cat(s), torch.cat(vh)


def orthonormalized(columns: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns: the polar factor, which solves Procrustes' problem.

    Columns that depend on each other share their span: singular values of 0 stay 0.
    """
    u, _, vh = significant(columns)
    return u @ vh
