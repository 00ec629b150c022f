"""Compress-then-Merge space: coordinates in shared bases whose rank is that of the result."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.deltas.delta import MATRICES, Core, Delta
from pcb_peft.deltas.linalg import svd
from pcb_peft.plugins.options import Range
from pcb_peft.spaces.bases import shared_bases, signs
from pcb_peft.spaces.registry import Projection, space
from pcb_peft.tasks.blocks import stacked

CONVERGED = 1e-8  # the iteration ends when the retained energy grows by no more than this fraction


@space("ctm", accepts=MATRICES, low_rank_output=True)
def ctm(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    basis_rank: Annotated[int, Range(1, 1 << 20)] | None = None,
    beta: Annotated[float, Range(0, 1)] = 0.25,
    iterations: Annotated[int, Range(0, 1 << 20)] = 100,
) -> Projection:
    """Uᵀ ΔW_t V, r×r, in the orthonormal U (out, r) and V (in, r) that hold most of all adapters together.

    The result has rank r, so nothing is truncated after the merge. But if r is less than the rank of all adapters
    together, the part of them outside of U and V is lost before the merge; the report counts it as lost energy.

    Args:
        basis_rank: r; default: the largest rank of an adapter.
        beta: For the bases, adapters are scaled to the norms β ‖ΔW_t‖ + (1 − β) mean ‖ΔW‖, so that a large adapter does
            not determine them alone.
        iterations: Rounds of higher-order orthogonal iteration after the higher-order SVD, at most.

    Source: He et al. 2026, arXiv:2606.03723, and github.com/ZhengbaoHe/compress-then-merge at 6017d1e. Differences: the
    norms are those of λ_t ΔW_t, and an adapter that does not touch the module does not enter the mean; the cores are
    canonical, so that (BG, G⁻¹A) has the bases of (B, A).
    """
    factors = [delta.factors() for delta in deltas]
    bases = shared_bases(factors)
    rank = basis_rank or max(lora_B.shape[1] for lora_B, _ in factors)
    weighted = bases.cores * torch.tensor(weights, dtype=bases.cores.dtype)[:, None, None]
    u, v = _tucker(_smoothed(weighted, beta), rank, iterations)
    u, v = u * signs(bases.left.turned(u)), v * signs(bases.right.turned(v))
    left, right = bases.left.turned(u), bases.right.turned(v)
    layout = deltas[0].layout
    total = weighted.square().sum()
    retained = (u.T @ weighted @ v).square().sum()
    return Projection(
        (stacked(u.T @ bases.cores @ v, weights),),
        lambda merged: Core(left, merged[0], right, layout=layout),
        energy=float(retained / total) if total > 0 else 1.0,
    )


def _smoothed(cores: Tensor, beta: float) -> Tensor:
    """The cores (T, p, q) with their norms moved towards the mean norm of those that are not 0."""
    norms = torch.linalg.matrix_norm(cores)[:, None, None]
    mean = norms.sum() / norms.count_nonzero().clamp(min=1)
    return cores * torch.where(norms > 0, beta + (1 - beta) * mean / norms, 0)


def _tucker(cores: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Orthonormal U (p, r) and V (q, r) that make Σ_t ‖Uᵀ C_t V‖² large, by HOSVD and then HOOI."""
    u, v = _leading(cores, rank), _leading(cores.mT, rank)
    energy = torch.zeros(())
    for _ in range(iterations):
        u = _leading(cores @ v, rank)
        v = _leading((u.T @ cores).mT, rank)
        energy_before, energy = energy, (u.T @ cores @ v).square().sum()
        if energy - energy_before <= CONVERGED * energy:
            break
    return u, v


def _leading(matrices: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of [M_1 … M_T]."""
    u, _, _ = svd(matrices.transpose(0, 1).flatten(1))
    return u[:, :rank]
