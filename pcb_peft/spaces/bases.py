"""Bases that all adapters of a module share; they depend on the ΔW alone, not on how each is factored."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pcb_peft.deltas.linalg import RANK_TOLERANCE, Basis, spanned

FACTOR_ROUNDING = 1e-7  # times ‖lora_B‖ ‖lora_A‖: what rounding to float32 files adds to ΔW
GRAM_TOLERANCE = 1e-9  # smallest to largest eigenvalue of a Gram matrix, above which its eigenvectors are accurate


@dataclasses.dataclass(frozen=True, slots=True)
class SharedBases:
    """U and V with U Uᵀ ΔW_t V Vᵀ = ΔW_t for every t.

    Attributes:
        left: U (out, p): left singular vectors of [ΔW_1 … ΔW_T].
        right: V (in, q): right singular vectors of [ΔW_1; …; ΔW_T].
        cores: Uᵀ ΔW_t V (T, p, q), float64.
    """

    left: Basis
    right: Basis
    cores: Tensor


def shared_bases(factors: Sequence[tuple[Tensor, Tensor]]) -> SharedBases:
    """Compute the canonical bases from spans of the stacked factors and decompositions of that size; no ΔW is formed.

    Args:
        factors: Two factors per adapter, (out, r_t) and (r_t, in), whose product is ΔW_t.
    """
    left, left_parts = spanned(torch.cat([b.double() for b, _ in factors], dim=1))
    right, right_parts = spanned(torch.cat([a.double() for _, a in factors]).T)
    ranks = [b.shape[1] for b, _ in factors]
    parts = zip(left_parts.split(ranks, 1), right_parts.split(ranks, 1), strict=True)
    small = torch.stack([b @ a.T for b, a in parts])  # ΔW_t in the two spans
    rounding = FACTOR_ROUNDING * max(float(b.norm() * a.norm()) for b, a in factors)
    u, v = _span(small, rounding), _span(small.mT, rounding)
    u, v = u * signs(left.turned(u)), v * signs(right.turned(v))
    return SharedBases(left.turned(u), right.turned(v), u.T @ small @ v)


def signs(basis: Basis) -> Tensor:
    """Return a sign per direction: it makes the product with (cos 0, cos 1, cos 2 …) positive, a fixed choice."""
    ruler = torch.arange(basis.shape[0], dtype=basis.columns.dtype).cos()
    return torch.where(basis.coordinates(ruler) < 0, -1, 1)


def _span(matrices: Tensor, rounding: float) -> Tensor:
    """The left singular vectors of [M_1 … M_T] (p, T q) that carry more than rounding; at least one."""
    values, vectors = torch.linalg.eigh((matrices @ matrices.mT).sum(0))
    if values[0] > max(GRAM_TOLERANCE * values[-1], rounding**2):
        return vectors.flip(1)
    triangle = torch.linalg.qr(matrices.mT.flatten(0, 1), mode="r").R
    u, s, _ = torch.linalg.svd(triangle.T, full_matrices=False)
    return u[:, : max(1, int((s > max(rounding, RANK_TOLERANCE * float(s[0]))).sum()))]
