"""Magnitude pruning: task arithmetic on the largest entries."""

from torch import Tensor

from pcb_peft.methods.ops import magnitude_threshold
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Density
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("magnitude_prune", paper="arXiv:1506.02626")
def magnitude_prune(tasks: TaskVectors, *, density: Density = 0.5) -> Merged:
    """Trim each task vector, then add: τ_m = Σ_t λ_t τ_t m_t, where m_t marks the largest |τ_t|.

    Args:
        density: Fraction of entries kept per task vector, the largest in magnitude.

    Good at: sparse task vectors in a sum.

    Measured: LoRA 79.1 (29.1).

    Source: Han et al. 2015, section 3.1, applied to task vectors, as PEFT's function of this name does and the baseline
    of DARE (Yu et al. 2024). Differences: the threshold is taken over the scope, not per tensor; and entries that tie
    with the smallest kept one are kept. Without ties, and per tensor, the result equals PEFT's to rounding.
    """
    threshold = magnitude_threshold(tasks, density)

    def merge(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        mask = x.abs() >= threshold
        return (weights * x * mask).sum(0), mask

    return tasks.combine(merge)
