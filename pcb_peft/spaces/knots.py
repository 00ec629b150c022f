"""KnOTS space: a left basis that all adapters share, and a right part for each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcb_peft.deltas.delta import MATRICES, Delta, LowRank
from pcb_peft.spaces.bases import shared_bases
from pcb_peft.spaces.registry import Projection, space
from pcb_peft.tasks.blocks import products


@space("knots", accepts=MATRICES, low_rank_output=True, statistics=("gram", "gradient"))
def knots(deltas: Sequence[Delta], weights: Sequence[float]) -> Projection:
    """Uᵀ ΔW_t, at most R×in for R = Σ r_t, with U the left singular vectors of [ΔW_1 … ΔW_T].

    Source: KnOTS, Stoica et al. 2025, arXiv:2410.19735; the blocks are its ΣV_tᵀ. Difference: U is computed from the
    factors, without an SVD of the concatenated ΔW's.
    """
    factors = [delta.factors() for delta in deltas]
    basis = shared_bases(factors).left
    left = basis.matrix().float()
    layout = deltas[0].layout
    block = products([(basis.coordinates(b), a) for b, a in factors], weights)

    def decode(merged: Sequence[Tensor]) -> LowRank:
        right = merged[0].float()
        rank, columns = right.shape
        if rank > columns:  # U has more columns than ΔW: the product itself is the smaller factor
            return LowRank(torch.eye(columns), left @ right, layout=layout)
        return LowRank(right, left, layout=layout)

    return Projection(
        (block,), decode, project_statistic={"gram": lambda x: x, "gradient": lambda x: left.T @ x}
    )
