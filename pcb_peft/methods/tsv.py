"""TSV-Merge: task singular vectors."""

import math

from torch import Tensor

from pcb_peft.deltas.linalg import cat_svds, significant
from pcb_peft.methods.registry import merge_method
from pcb_peft.methods.spectral import leading, merge_matrices, without_overlap
from pcb_peft.plugins.options import Density
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method(
    "tsv", paper="arXiv:2412.00081", scope="module", identity_on_one=True, whole_matrix=True
)
def tsv(tasks: TaskVectors, *, density: Density = 1.0) -> Merged:
    """Put all tasks' singular vectors side by side, make them orthonormal, and give them their singular values back.

    With λ_t ΔW_t = U_t Σ_t V_tᵀ, U = [U_1 … U_T] and V = [V_1 … V_T]: ΔW = U_⊥ diag(Σ_1 … Σ_T) V_⊥ᵀ, where U_⊥ is the
    matrix with orthonormal columns that is nearest to U.

    Args:
        density: Fraction of each task's singular triplets that is kept, the largest. At 1 / T the result has about the
            rank of one adapter.

    Good at: many tasks, at weight 1 or a little below.

    Measured: LoRA 82.8 (44.8).

    Source: TSV-M, Gargiulo et al. 2025, and github.com/AntoAndGar/task_singular_vectors at a6c9718. Differences: a task
    has as many triplets as its numerical rank; the authors take min(out, in) / T, which for a LoRA are mostly arbitrary
    vectors of its null space. And singular vectors that depend on each other, as those of two equal adapters do, share
    their span instead of being completed by arbitrary ones, so that equal adapters merge to themselves.
    """
    return merge_matrices(tasks, lambda x: _merge(x, density))


def _merge(x: Tensor, density: float) -> Tensor:
    svds = [significant(matrix) for matrix in x]
    return without_overlap(
        cat_svds([leading(svd, math.ceil(density * len(svd[1]))) for svd in svds])
    )
