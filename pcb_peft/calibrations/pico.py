"""Pico: pre-merge interference calibration in output space."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pcb_peft.calibrations.registry import before
from pcb_peft.deltas.delta import MATRICES, Delta, LowRank
from pcb_peft.deltas.linalg import svd

Factors: TypeAlias = tuple[Tensor, Tensor]
"""(out, r) and (r, in), float64, whose product is ΔW."""


def _canonical(delta: Delta) -> Factors:
    """Factors of ΔW whose second has orthonormal rows."""
    left, right = delta.factors()
    q, triangle = torch.linalg.qr(right.T)
    return left @ triangle.T, q.T


GAUGES: dict[str, Callable[[Delta], Factors]] = {
    "canonical": _canonical,
    "as_trained": lambda delta: delta.factors(),
}


@before("pico", paper="arXiv:2604.16826", accepts=MATRICES)
def pico(
    deltas: Sequence[Delta], *, gauge: Literal["canonical", "as_trained"] = "canonical"
) -> list[Delta]:
    """Shrink the output directions into which many tasks write.

    With [B_1 … B_T] = U Σ Vᵀ, direction j has the share s_j = σ_j² / Σσ² and becomes 1 / (1 + (T − 1) s_j) of itself in
    every ΔW_t = B_t A_t. The paper then restores the norm of the merge: ``after: [norm]``.

    Args:
        gauge: Which B_t are taken: (BG, G⁻¹A) is the same adapter for every invertible G. `canonical` takes those for
            an A_t with orthonormal rows, so that U belongs to [ΔW_1 … ΔW_T]; `as_trained` takes the stored ones, as the
            paper does.

    Source: Tang and Yang 2026, and the authors' code. Differences: the gauge; and T counts the adapters that touch the
    module.
    """
    tasks = sum(delta.norm() > 0 for delta in deltas)
    if tasks < 2:
        return list(deltas)
    pairs = [GAUGES[gauge](delta) for delta in deltas]
    u, s, _ = svd(torch.cat([left for left, _ in pairs], dim=1))
    share = s.square() / s.square().sum()
    change = 1 / (1 + (tasks - 1) * share) - 1
    return [
        LowRank(right, left + (u * change) @ (u.T @ left), layout=delta.layout)
        for delta, (left, right) in zip(deltas, pairs, strict=True)
    ]
