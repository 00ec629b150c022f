"""DARE: drop entries at random and rescale the others, then task arithmetic."""

from pcb_peft.methods.ops import drop_at_random
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Density
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("dare_linear", paper="arXiv:2311.03099", space="knots", scope="module")
def dare_linear(tasks: TaskVectors, *, density: Density = 0.5, rescale: bool = True) -> Merged:
    """Drop entries at random, rescale the rest, then add: τ_m = Σ_t λ_t τ_t m_t / density.

    Each entry of the mask m_t is 1 with probability `density`, else 0, so that the expected result is that of `linear`.
    No statistics are taken, so both scopes give the same result. In `core` space a few entries hold most of
    a task vector, and luck decides which of them are kept.

    Args:
        density: Probability with which an entry is kept; the paper's 1 − p.
        rescale: Divide what is kept by the density.

    Good at: fully fine-tuned models with much redundancy, says its paper.

    Measured: LoRA 80.9 (44.4).

    Source: Yu et al. 2024, the two steps of DARE before task arithmetic. Difference: the random numbers follow from
    seed, adapter, module and position. With the same masks it equals PEFT's `dare_linear` to rounding. (mergekit's
    `rescale` restores the sum of |τ_t| of each tensor instead of the expectation of each entry.)
    """
    dropped = drop_at_random(tasks, density, rescale)
    return dropped.combine(lambda x, weights: ((weights * x).sum(0), x))
