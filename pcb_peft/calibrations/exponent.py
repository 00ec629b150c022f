"""Exponent: a power of the singular values, of the adapters or of their merge."""

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from pcb_peft.calibrations.registry import after, before
from pcb_peft.calibrations.spectral import assembled
from pcb_peft.deltas.delta import MATRICES, Delta
from pcb_peft.deltas.rank import triplets
from pcb_peft.plugins.options import Range

PAPER = "arXiv:2502.04959"

Power: TypeAlias = Annotated[float, Range(0, 2)]


@before("exponent", paper=PAPER, accepts=MATRICES)
def of_adapters(deltas: Sequence[Delta], *, power: Power = 0.5) -> list[Delta]:
    """Make the spectrum of each adapter flatter, or steeper.

    Args:
        power: p in σ ↦ c σᵖ, where c keeps the sum of the singular values: 1 changes nothing, 0 makes them equal.

    Source: power 0 is what Iso-C does to a sum (Marczak et al. 2025); other powers are ours.
    """
    return [_bent(delta, power) for delta in deltas]


@after("exponent", paper=PAPER, accepts=MATRICES)
def of_the_merge(merged: Delta, deltas: Sequence[Delta], *, power: Power = 0.5) -> Delta:
    """Make the spectrum of the merge flatter, or steeper.

    Args:
        power: p in σ ↦ c σᵖ, where c keeps the sum of the singular values: 1 changes nothing, 0 makes them equal.

    Source: power 0 after `linear` is Iso-C (Marczak et al. 2025); other powers are ours.
    """
    del deltas
    return _bent(merged, power)


def _bent(delta: Delta, power: float) -> Delta:
    """The delta with its singular values raised to a power, and their sum kept."""
    u, s, vh = triplets(delta)
    if not len(s):
        return delta
    powers = s**power
    return assembled(delta, (u, powers * (s.sum() / powers.sum()), vh))
