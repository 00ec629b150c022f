"""What spectral calibrations share."""

import torch

from pcb_peft.deltas.delta import Core, Delta
from pcb_peft.deltas.linalg import Basis, Svd


def assembled(like: Delta, triplets: Svd) -> Core:
    """The delta U Σ Vᵀ, stored as `like` is."""
    u, s, vh = triplets
    return Core(Basis(u), torch.diag(s), Basis(vh.T), layout=like.layout)
