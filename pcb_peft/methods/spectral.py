"""What spectral methods share: they merge whole matrices, and the bases of the space do not matter to them."""

from collections.abc import Callable

from torch import Tensor

from pcb_peft.tasks.task_vectors import Merged, TaskVectors


def merge_matrices(tasks: TaskVectors, merge: Callable[[Tensor], Tensor]) -> Merged:
    """Merges each block as a whole, in float64.

    The weights scale the task vectors before anything else, so that −1 is the negated task vector and equal weights
    are the papers' scaling of the result. A zero task vector has no say, and one that is alone comes back as it is.

    Args:
        tasks: The task vectors.
        merge: From two or more matrices (T, rows, cols), none of them zero, to (rows, cols).
    """

    def rule(x: Tensor, weights: Tensor) -> Tensor:
        x = (weights * x).double()
        x = x[x.flatten(1).any(1)]
        return merge(x) if len(x) > 1 else x.sum(0)

    return tasks.combine(rule, whole=True)
