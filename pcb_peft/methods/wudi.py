"""WUDI-Merging in closed form."""

from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.deltas.linalg import significant
from pcb_peft.methods.registry import merge_method
from pcb_peft.methods.spectral import merge_matrices
from pcb_peft.plugins.options import Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method(
    "wudi", paper="arXiv:2503.08099", scope="module", identity_on_one=True, whole_matrix=True
)
def wudi(tasks: TaskVectors, *, ridge: Annotated[float, Range(0, 1e6)] = 0.0) -> Merged:
    """Disturb each task as little as possible on the inputs that its own task vector responds to.

    Minimises Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖². With G_t = τ_tᵀ τ_t / ‖τ_t‖² that is τ = (Σ_t τ_t G_t)(Σ_t G_t)⁺.

    Args:
        ridge: ε of the term ε ‖τ − Σ_t τ_t‖² that is added; every G_t has trace 1. It stands for stopping early, on the
            way from task arithmetic (large ε) to the minimum (0).

    Good at: many tasks if the common weight can be searched.

    Measured: LoRA 93.2 (81.2), at 0.5 96.9 (88.8).

    Source: Cheng et al. 2025, and github.com/nathanielyvo/WUDI-Merging at dc3cd12. Departure: the authors take 300
    steps of Adam of size 1e-5 from Σ_t τ_t, and so stop somewhere on the way; here the minimum is computed.
    """
    return merge_matrices(tasks, lambda x: _merge(x, ridge))


def _merge(x: Tensor, ridge: float) -> Tensor:
    normalize_direction = x / torch.linalg.matrix_norm(x)[:, None, None]
    _, s, vh = significant(
        normalize_direction.flatten(0, 1)
    )  # Σ_t G_t = V diag(s²) Vᵀ, and V spans all rows
    x, normalize_direction = x @ vh.T, normalize_direction @ vh.T
    target = (x @ (normalize_direction.mT @ normalize_direction) + ridge * x).sum(0)
    return target / (s.square() + ridge) @ vh
