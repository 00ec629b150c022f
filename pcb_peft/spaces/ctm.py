"""Compress-then-Merge space: coordinates in shared bases of the rank that the result shall have."""

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

CONVERGED = 1e-8  # the bases are found when they retain no more than this part more than before


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

    The result has rank r without truncation. Where r is less than the rank of all adapters together, what U and V do
    not hold is lost before the merge; the report counts it as lost energy.

    Args:
        basis_rank: r; default: the largest rank of an adapter.
        beta: The bases are those of the adapters scaled to the norms β ‖ΔW_t‖ + (1 − β) mean ‖ΔW‖, so that a large
            adapter does not take all of them.
        iterations: At most so many rounds of higher-order orthogonal iteration follow upon the higher-order SVD.

    Source: He et al. 2026, arXiv:2606.03723, and github.com/ZhengbaoHe/compress-then-merge at 6017d1e. Departures: the
    norms are those of λ_t ΔW_t, and an adapter that does not touch the module does not enter the mean; the cores are
    canonical, so that (BG, G⁻¹A) has the bases of (B, A).
    """
    factors = [delta.factors() for delta in deltas]
    bases = shared_bases(factors)
    rank = basis_rank or max(left.shape[1] for left, _ in factors)
    weighted = bases.cores * torch.tensor(weights, dtype=bases.cores.dtype)[:, None, None]
    u, v = _tucker(_smoothed(weighted, beta), rank, iterations)
    u, v = u * signs(bases.left.turned(u)), v * signs(bases.right.turned(v))
    left, right = bases.left.turned(u), bases.right.turned(v)
    layout = deltas[0].layout
    total = weighted.square().sum()
    held = (u.T @ weighted @ v).square().sum()
    return Projection(
        (stacked(u.T @ bases.cores @ v, weights),),
        lambda merged: Core(left, merged[0], right, layout=layout),
        energy=float(held / total) if total > 0 else 1.0,
    )


def _smoothed(cores: Tensor, beta: float) -> Tensor:
    """The cores (T, p, q), the norms of those that are not 0 brought closer to their mean."""
    norms = torch.linalg.matrix_norm(cores)[:, None, None]
    mean = norms.sum() / norms.count_nonzero().clamp(min=1)
    return cores * torch.where(norms > 0, beta + (1 - beta) * mean / norms, 0)


def _tucker(cores: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Orthonormal U (p, r) and V (q, r) for which Σ_t ‖Uᵀ C_t V‖² is large: HOSVD, then HOOI."""
    u, v = _leading(cores, rank), _leading(cores.mT, rank)
    held = torch.zeros(())
    for _ in range(iterations):
        u = _leading(cores @ v, rank)
        v = _leading((u.T @ cores).mT, rank)
        before, held = held, (u.T @ cores @ v).square().sum()
        if held - before <= CONVERGED * held:
            break
    return u, v


def _leading(matrices: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of [M_1 … M_T]."""
    u, _, _ = svd(matrices.transpose(0, 1).flatten(1))
    return u[:, :rank]
