"""Helper of the calibrations that change singular values."""

import torch

from pcb_peft.deltas.delta import Core, Delta
from pcb_peft.deltas.linalg import Basis, Svd


def assembled(like: Delta, triplets: Svd) -> Core:
    """Return the delta U Σ Vᵀ in the layout of another one."""
    u, s, vh = triplets
    return Core(Basis(u), torch.diag(s), Basis(vh.T), layout=like.layout)
