"""Bases that all adapters of a module share, in a form that depends on the ΔW alone and not on their factors."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pcb_peft.linalg import column_signs, spanned

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
    """The canonical bases, from the spans of the stacked factors and SVDs of matrices of their size: no ΔW is formed.

    Args:
        factors: Per adapter (out, r_t) and (r_t, in), whose product is ΔW_t.
    """
    left, to_left, left_parts = spanned(torch.cat([b.double() for b, _ in factors], dim=1))
    right, to_right, right_parts = spanned(torch.cat([a.T.double() for _, a in factors], dim=1))
    ranks = [b.shape[1] for b, _ in factors]
    small = [
        b @ a.T
        for b, a in zip(left_parts.split(ranks, 1), right_parts.split(ranks, 1), strict=True)
    ]
    u, v = _span(torch.cat(small, dim=1)), _span(torch.cat([m.T for m in small], dim=1))
    u, left = _signed(u, left @ (to_left @ u))
    v, right = _signed(v, right @ (to_right @ v))
    return SharedBases(left, right, torch.stack([u.T @ m @ v for m in small]))


def _span(matrix: Tensor) -> Tensor:
    """The left singular vectors that carry more than rounding; at least one."""
    triangle = torch.linalg.qr(matrix.T, mode="r").R
    u, s, _ = torch.linalg.svd(triangle.T, full_matrices=False)
    return u[:, : max(1, int((s > NOISE * s[0]).sum()))]


def _signed(small: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The same directions, of which each has its largest entry positive; the basis in float32."""
    basis = basis.float()
    signs = column_signs(basis)
    return small * signs, basis.mul_(signs)
