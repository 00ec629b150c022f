"""Amplitude: the norm of the whole merge."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.calibrations.registry import after
from pcb_peft.deltas.delta import MATRICES, Delta, Diagonal
from pcb_peft.plugins.options import Range


def _squares(merged: Delta, deltas: Sequence[Delta]) -> Tensor:
    """‖ΔW‖² of the merged module and of each adapter there: (1 + T,)."""
    norms = [merged.norm(), *(delta.norm() for delta in deltas)]
    return torch.tensor(norms, dtype=torch.float64).square()


@after(
    "amplitude",
    paper="arXiv:2608.17366",
    accepts=(*MATRICES, Diagonal),
    survey=_squares,
)
def amplitude(
    merged: Delta,
    deltas: Sequence[Delta],
    squares: Tensor,
    *,
    strength: Annotated[float, Range(0, 1e6)] = 1.0,
) -> Delta:
    """Give the merge as a whole the norm of a typical adapter: one factor for all modules, and no weight to choose.

    Args:
        strength: κ in the factor κ RMS_t‖λ_t ΔW_t‖ / ‖ΔW‖, with norms over all modules. The paper uses 1.15 for
            adapters of similar norms, and 0.5 for others.

    Source: the measured amplitude restoration of CORAM, Sui et al. 2026, equations 3 and 4.
    """
    del deltas
    merged_square, adapter_squares = squares[0], squares[1:]
    present = adapter_squares[adapter_squares > 0]
    if merged_square == 0 or not len(present):
        return merged
    return merged.scaled(strength * float((present.mean() / merged_square).sqrt()))
