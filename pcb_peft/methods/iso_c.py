"""Iso-C: isotropic merging in the common subspace."""

from torch import Tensor

from pcb_peft.deltas.linalg import significant
from pcb_peft.methods.registry import merge_method
from pcb_peft.methods.spectral import leading, merge_matrices
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method(
    "iso_c", paper="arXiv:2502.04959", scope="module", identity_on_one=True, whole_matrix=True
)
def iso_c(tasks: TaskVectors, *, rank: int | None = None) -> Merged:
    """Sum the task vectors, then give all directions of the sum the same strength.

    With Σ_t λ_t ΔW_t = U Σ Vᵀ: ΔW = σ̄ U Vᵀ, where σ̄ is the mean of the singular values. Where the result has a rank k,
    these are the k largest: k of R equally strong directions, chosen afterwards, would be arbitrary.

    Args:
        rank: k, the rank of the result; None: all directions stay.

    Good at: many tasks with a tuned common weight, or without one after `response` with `least=0.7`.

    Measured: LoRA 86.9 (66.2).

    Source: Marczak et al. 2025, and github.com/danielm1405/iso-merging at d34010a. Differences: σ̄ is the mean over the
    directions that stay. The authors take it over all min(out, in) singular values; those of a LoRA are mostly 0, which
    makes σ̄ smaller by the factor rank / min(out, in). And a task vector without a competitor is returned unchanged,
    not flattened.
    """
    return merge_matrices(tasks, lambda x: _merge(x, rank))


def _merge(x: Tensor, rank: int | None) -> Tensor:
    u, s, vh = leading(significant(x.sum(0)), rank)
    mean = s.sum() / max(1, len(s))
    return mean * (u @ vh)
