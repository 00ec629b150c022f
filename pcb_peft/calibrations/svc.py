"""SVC: singular value calibration."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.calibrations.registry import after
from pcb_peft.calibrations.spectral import assembled
from pcb_peft.deltas.delta import MATRICES, Delta
from pcb_peft.deltas.linalg import Svd
from pcb_peft.deltas.rank import triplets
from pcb_peft.plugins.options import Range


@after("svc", paper="arXiv:2602.05536", accepts=MATRICES)
def svc(
    merged: Delta,
    deltas: Sequence[Delta],
    *,
    floor: Annotated[float, Range(0, 1, low_open=True)] | None = None,
) -> Delta:
    """Shrink the directions of the merge that several tasks share, and were counted several times.

    For ΔW = U Σ Vᵀ, with a = u_rᵀ ΔW and a_t = u_rᵀ ΔW_t: s_t = ⟨a, a_t⟩ / ‖a_t‖² is the fraction of task t's response
    in direction r that the merge has, and σ_r is multiplied by T / Σ_t max(floor, s_t).

    Args:
        floor: α of the paper; default: 1 / T, as in the paper. (The authors' script uses 1 for TSV-M.)

    Source: Li et al. 2026, and github.com/lyymuwu/SVC at 6ad2b31. Differences: T counts the adapters that touch the
    module; and ΔW_t includes the weight λ_t, so that equal weights still scale the result.
    """
    present = [delta for delta in deltas if delta.norm() > 0]
    if not present:
        return merged
    u, s, vh = triplets(merged)
    if not len(s):  # the adapters take each other back
        return merged
    shares = torch.stack([_share((u, s, vh), delta) for delta in present])
    gain = len(present) / shares.clamp(min=floor or 1 / len(present)).sum(0)
    return assembled(merged, (u, s * gain, vh))


def _share(merged: Svd, delta: Delta) -> Tensor:
    """Fraction s_t of every direction; 0 where the task has no response."""
    u, s, vh = merged
    lora_B, lora_A = delta.factors()
    response = (u.T @ lora_B) @ lora_A
    square = response.square().sum(1)
    return torch.where(square > 0, s * (response * vh).sum(1) / square, 0)
