"""Dense space: ΔW itself."""

from collections.abc import Sequence

from pcb_peft.deltas.delta import MATRICES, Delta, Dense
from pcb_peft.spaces.registry import Projection, space
from pcb_peft.tasks.blocks import products


@space("dense", accepts=MATRICES, low_rank_output=False, statistics=("gram", "gradient"))
def dense(deltas: Sequence[Delta], weights: Sequence[float]) -> Projection:
    """The entries of ΔW, as in the papers; they are computed tile by tile, never all at once."""
    block = products([delta.factors() for delta in deltas], weights)
    layout = deltas[0].layout
    return Projection(
        (block,),
        lambda merged: Dense(merged[0], layout=layout),
        project_statistic={"gram": lambda x: x, "gradient": lambda x: x},
    )
