"""Helpers of spectral methods, which merge whole matrices and do not depend on the bases of the space."""

from collections.abc import Callable

from torch import Tensor

from pcb_peft.deltas.linalg import Svd, orthonormalized
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


def merge_matrices(tasks: TaskVectors, merge: Callable[[Tensor], Tensor]) -> Merged:
    """Merge each block as a whole, in float64.

    The weights scale the task vectors before anything else: −1 is the negated task vector, and equal weights are the
    papers' scaling of the result. A zero task vector is left out, and one that is then alone is returned unchanged.

    Args:
        tasks: The task vectors.
        merge: A function of two or more matrices (T, rows, cols), none of them zero, to the merged one (rows, cols).
    """

    def rule(x: Tensor, weights: Tensor) -> Tensor:
        x = (weights * x).double()
        x = x[x.flatten(1).any(1)]
        return merge(x) if len(x) > 1 else x.sum(0)

    return tasks.combine(rule, whole=True)


def leading(svd: Svd, count: int | None) -> Svd:
    """Return the first triplets of an SVD, those of the largest singular values; all if the count is None."""
    u, s, vh = svd
    return u[:, :count], s[:count], vh[:count]


def without_overlap(svd: Svd) -> Tensor:
    """Return U_⊥ Σ V_⊥ᵀ: triplets that may overlap, with the nearest vectors that are orthonormal."""
    u, s, vh = svd
    return (orthonormalized(u) * s) @ orthonormalized(vh.T).T
