"""Equalize: the norms of the adapters."""

from collections.abc import Sequence
from typing import Annotated

from pcb_peft.calibrations.registry import before
from pcb_peft.deltas.delta import MATRICES, Delta, Diagonal
from pcb_peft.plugins.options import Range


@before("equalize", paper="arXiv:2606.03723", accepts=(*MATRICES, Diagonal))
def equalize(deltas: Sequence[Delta], *, beta: Annotated[float, Range(0, 1)] = 0.0) -> list[Delta]:
    """Bring the adapters' norms at each module together, so that none drowns the others.

    Args:
        beta: ‖ΔW_t‖ becomes β ‖ΔW_t‖ + (1 − β) times the mean norm: 0 makes them equal, 1 changes nothing.

    Source: the norm smoothing of Compress-then-Merge, He et al. 2026, which uses it for the bases only. Difference: the
    mean is over the adapters that touch the module.
    """
    norms = [delta.norm() for delta in deltas]
    mean = sum(norms) / max(1, sum(size > 0 for size in norms))
    return [
        delta.scaled(beta + (1 - beta) * mean / size) if size > 0 else delta
        for delta, size in zip(deltas, norms, strict=True)
    ]
