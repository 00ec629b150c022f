"""STF: superposed task-specific features."""

import torch
from torch import Tensor

from pcb_peft.deltas.linalg import cat_svds, significant
from pcb_peft.methods.registry import merge_method
from pcb_peft.methods.spectral import merge_matrices
from pcb_peft.tasks.task_vectors import Merged, TaskVectors

ALIKE = 1e-6  # an eigenvalue of the kernel below this part of the largest: two features differ by rounding only


@merge_method(
    "stf", paper="arXiv:2502.10698", scope="module", identity_on_one=True, whole_matrix=True
)
def stf(tasks: TaskVectors) -> Merged:
    """Superpose the tasks' singular features so that each keeps its response: u_kᵀ ΔW v_k = σ_k for all of them.

    With the singular triplets (u_k, σ_k, v_k) of all λ_t ΔW_t together: ΔW = Σ_k x_k u_k v_kᵀ, where x solves the
    linear system (UᵀU ∘ VᵀV) x = σ. It is the smallest ΔW that has these responses.

    Good at: keeping each task's own response.

    Measured: LoRA 79.6 (29.6).

    Source: Qiu et al. 2025. Differences: a task has as many triplets as its numerical rank; and where features depend
    on each other, as those of two equal adapters do, or all but do, as those of a copy with other factors, x is the
    least-squares solution, so that equal adapters merge to themselves.
    """
    return merge_matrices(tasks, _merge)


def _merge(x: Tensor) -> Tensor:
    u, s, vh = cat_svds([significant(matrix) for matrix in x])
    kernel = (u.T @ u) * (vh @ vh.T)
    strength = torch.linalg.pinv(kernel, rtol=ALIKE, hermitian=True) @ s
    return (u * strength) @ vh
