"""Pre-merge interference calibration in output space: Pico."""

from collections.abc import Sequence

import torch

from pcb_peft.calibrations.registry import before
from pcb_peft.delta import Core, Delta, Dense, LowRank
from pcb_peft.linalg import svd


@before("pico", paper="arXiv:2604.16826", accepts=(LowRank, Core, Dense))
def pico(deltas: Sequence[Delta]) -> list[Delta]:
    """Shrink the output directions into which many tasks write.

    With [ΔW_1 … ΔW_T] = U Σ Vᵀ, direction j has the share s_j = σ_j² / Σσ² and becomes 1 / (1 + (T − 1) s_j) of itself
    in every ΔW_t. The paper then restores the norm of the merge: ``after: [norm]``.

    Source: Tang and Yang 2026. Departures: U is taken from the ΔW's, where the authors take the singular vectors of the
    stacked lora_B's, which (BG, G⁻¹A) changes; both are the same where the rows of every scaled lora_A are orthonormal.
    T counts the adapters that touch the module.
    """
    tasks = sum(delta.norm() > 0 for delta in deltas)
    if tasks < 2:
        return list(deltas)
    pairs = [_orthonormal_right(delta) for delta in deltas]
    u, s, _ = svd(torch.cat([left for left, _ in pairs], dim=1))
    share = s.square() / s.square().sum()
    change = 1 / (1 + (tasks - 1) * share) - 1
    return [
        LowRank(right, left + (u * change) @ (u.T @ left), fan_in_fan_out=delta.fan_in_fan_out)
        for delta, (left, right) in zip(deltas, pairs, strict=True)
    ]


def _orthonormal_right(delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, r) and (r, in), float64, whose product is ΔW, the second with orthonormal rows."""
    left, right = delta.factors()
    q, triangle = torch.linalg.qr(right.T)
    return left @ triangle.T, q.T
