"""Canonical core space: coordinates in bases that all adapters share."""

from collections.abc import Sequence

from pcb_peft.deltas.delta import MATRICES, Core, Delta
from pcb_peft.spaces.bases import shared_bases
from pcb_peft.spaces.registry import Projection, space
from pcb_peft.tasks.blocks import stacked


@space("core", accepts=MATRICES, low_rank_output=True, statistics=("gram", "gradient"))
def core(deltas: Sequence[Delta], weights: Sequence[float]) -> Projection:
    """Uᵀ ΔW_t V, at most R×R for R = Σ r_t, in left and right singular bases shared by all adapters.

    Source: Core Space, Panariello et al. 2025, arXiv:2509.17786. Difference: their bases are singular vectors of the
    stacked B's and of the stacked A's, so that (BG, G⁻¹A) merges differently from (B, A). Here they are those of the
    stacked ΔW's, which do not depend on the factors.
    """
    bases = shared_bases([delta.factors() for delta in deltas])
    left, right, layout = bases.left, bases.right, deltas[0].layout
    return Projection(
        (stacked(bases.cores, weights),),
        lambda merged: Core(left, merged[0], right, layout=layout),
        project_statistic={
            "gram": lambda x: right.coordinates(right.coordinates(x).T),
            "gradient": lambda x: right.coordinates(left.coordinates(x).T).T,
        },
    )
