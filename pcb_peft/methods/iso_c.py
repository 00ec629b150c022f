"""Isotropic merging in the common subspace: Iso-C."""

from torch import Tensor

from pcb_peft.deltas.linalg import significant
from pcb_peft.methods.registry import merge_method
from pcb_peft.methods.spectral import merge_matrices
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method(
    "iso_c", paper="arXiv:2502.04959", scope="module", identity_on_one=True, whole_matrix=True
)
def iso_c(tasks: TaskVectors) -> Merged:
    """Sum the task vectors, then give all directions of the sum the same strength.

    With Σ_t λ_t ΔW_t = U Σ Vᵀ: ΔW = σ̄ U Vᵀ, where σ̄ is the mean of the singular values.

    Good at: many tasks if the common weight can be searched: with `iso_cts` the most that any method keeps here.

    Measured: LoRA 95.4 (87.5), at 1.6 99.2 (95.5).

    Source: Marczak et al. 2025, and github.com/danielm1405/iso-merging at d34010a. Departures: the mean goes over the
    numerical rank, where the authors take it over all min(out, in) singular values, which for a LoRA are mostly 0 and
    make σ̄ smaller by the factor rank / min(out, in); and a task vector that has no competitor is returned, not
    flattened.
    """
    return merge_matrices(tasks, _merge)


def _merge(x: Tensor) -> Tensor:
    u, s, vh = significant(x.sum(0))
    return s.sum() / max(1, len(s)) * (u @ vh)
