"""The few decompositions that spaces and truncation share."""

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


def column_signs(columns: Tensor) -> Tensor:
    """±1 per column of an (m, k) matrix: what makes the entry of largest magnitude positive."""
    return torch.where(-columns.amin(0) > columns.amax(0), -1, 1).to(columns.dtype)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    if math.isfinite(float(values.sum())):  # is cheap, and is so only if all of them are
        return True
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def spanned(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X (m, p), K (p, p) and R (p, n): the columns of X K are orthonormal, and X K R is the matrix of `columns`.

    By Cholesky QR, where the columns, each made 1 in length, depend on each other so little that X K is orthonormal to
    1e-8: it takes the Gram matrix, and X is the columns themselves. Else by Householder QR, which takes several times
    as long.

    Args:
        columns: (m, n), float64.

    Source: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015, Roundoff error analysis of the CholeskyQR2 algorithm.
    """
    if columns.shape[1] <= columns.shape[0]:
        gram = columns.T @ columns
        lengths = gram.diagonal().sqrt()
        lengths = torch.where(lengths > 0, lengths, 1)
        factor, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None])
        inverse = torch.linalg.solve_triangular(factor, _identity(factor), upper=False)
        if not failed and factor.square().sum() * inverse.square().sum() < CONDITION:
            return columns, inverse.T / lengths[:, None], factor.T * lengths
    basis, triangle = torch.linalg.qr(columns)
    return basis, _identity(triangle), triangle


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype)


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
