"""Bases that all adapters of a module share, in a form that depends on the ΔW alone and not on their factors."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pcb_peft.linalg import column_signs, svd

NOISE = 1e-10  # a direction with less than this part of the largest singular value is rounding


@dataclasses.dataclass(frozen=True, slots=True)
class SharedBases:
    """U and V with U Uᵀ ΔW_t V Vᵀ = ΔW_t for every t.

    Attributes:
        left: U (out, p), float32: left singular vectors of [ΔW_1 … ΔW_T].
        right: V (in, q), float32: right singular vectors of [ΔW_1; …; ΔW_T].
        cores: Uᵀ ΔW_t V (T, p, q), float64.
    """

    left: Tensor
    right: Tensor
    cores: Tensor


def shared_bases(factors: Sequence[tuple[Tensor, Tensor]]) -> SharedBases:
    """The canonical bases, from QR of the stacked factors and SVDs of matrices of their size: no ΔW is formed.

    Args:
        factors: Per adapter (out, r_t) and (r_t, in), whose product is ΔW_t.
    """
    left, left_triangle = torch.linalg.qr(torch.cat([b.double() for b, _ in factors], dim=1))
    right, right_triangle = torch.linalg.qr(torch.cat([a.double() for _, a in factors]).T)
    ranks = [b.shape[1] for b, _ in factors]
    small = [
        b @ a.T
        for b, a in zip(left_triangle.split(ranks, 1), right_triangle.split(ranks, 1), strict=True)
    ]
    u, v = _span(torch.cat(small, dim=1)), _span(torch.cat(small).T)
    left, right = left @ u, right @ v
    u, left = _signed(u, left)
    v, right = _signed(v, right)
    return SharedBases(left.float(), right.float(), torch.stack([u.T @ m @ v for m in small]))


def _span(matrix: Tensor) -> Tensor:
    """The left singular vectors that carry more than rounding; at least one."""
    u, s, _ = svd(matrix)
    return u[:, : max(1, int((s > NOISE * s[0]).sum()))]


def _signed(small: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The same directions, of which each has its largest entry positive."""
    signs = column_signs(basis)
    return small * signs, basis * signs
