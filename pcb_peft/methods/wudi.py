"""WUDI-Merging in closed form."""

from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.deltas.linalg import significant
from pcb_peft.methods.ops import clamp_positive
from pcb_peft.methods.registry import merge_method
from pcb_peft.methods.spectral import merge_matrices
from pcb_peft.plugins.options import Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method(
    "wudi", paper="arXiv:2503.08099", scope="module", identity_on_one=True, whole_matrix=True
)
def wudi(tasks: TaskVectors, *, ridge: Annotated[float, Range(0, 1e6)] = 0.03) -> Merged:
    """Disturb each task as little as possible on the inputs that its own task vector responds to.

    It minimises Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖². With G_t = τ_tᵀ τ_t / ‖τ_t‖² that is τ = (Σ_t τ_t G_t)(Σ_t G_t)⁺.

    Args:
        ridge: ε of an added term ε ‖τ − κ Σ_t τ_t‖²; every G_t has trace 1. Larger values move the result from the
            minimum (0) towards task arithmetic, like stopping the paper's iteration early. κ is 1, or
            Σ_t ‖τ_t‖² / ‖Σ_t τ_t‖² where that is less, so that equal adapters merge to themselves. Adapters that were
            trained from one random lora_A need a ridge: their row spaces nearly agree, and the minimum blows up what
            distinguishes them to many times their norm.

    Good at: many tasks with a tuned common weight.

    Measured: LoRA 81.9 (46.6).

    Source: Cheng et al. 2025, and github.com/nathanielyvo/WUDI-Merging at dc3cd12. Differences: the authors take 300
    steps of Adam of size 1e-5 from Σ_t τ_t, and so stop somewhere on the way, and leave the row space of the τ_t; here
    the minimum is computed, with a ridge in the place of stopping early.
    """
    return merge_matrices(tasks, lambda x: _merge(x, ridge))


def _merge(x: Tensor, ridge: float) -> Tensor:
    units = x / torch.linalg.matrix_norm(x)[:, None, None]
    _, s, vh = significant(units.flatten(0, 1))  # Σ_t G_t = V diag(s²) Vᵀ, and V spans all rows
    x, units = x @ vh.T, units @ vh.T
    total = x.sum(0)
    kappa = (x.square().sum() / clamp_positive(total.square().sum())).clamp(max=1)
    target = (x @ (units.mT @ units)).sum(0) + ridge * kappa * total
    return target / (s.square() + ridge) @ vh
