"""Norm: the norm of each merged module."""

from collections.abc import Sequence
from typing import Annotated

from pcb_peft.calibrations.registry import after
from pcb_peft.deltas.delta import MATRICES, Delta, Diagonal
from pcb_peft.plugins.options import Range


@after("norm", paper="arXiv:2604.16826", accepts=(*MATRICES, Diagonal))
def norm(
    merged: Delta, deltas: Sequence[Delta], *, strength: Annotated[float, Range(0, 1e6)] = 1.0
) -> Delta:
    """Give each merged module the mean norm of what was merged there: no weight has to be chosen.

    Args:
        strength: ‖ΔW‖ of the result as a multiple of the mean of ‖λ_t ΔW_t‖.

    Source: the rescaling γ of Pico, Tang and Yang 2026. Difference: the mean is over the adapters that touch the
    module.
    """
    norms = [size for delta in deltas if (size := delta.norm()) > 0]
    merged_norm = merged.norm()
    if not norms or merged_norm == 0:
        return merged
    return merged.scaled(strength * sum(norms) / len(norms) / merged_norm)
