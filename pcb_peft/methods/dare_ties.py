"""DARE: drop entries at random and rescale the others, then the sign election of TIES."""

from torch import Tensor

from pcb_peft.methods.ops import drop_at_random, elected_mean
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Density, Election
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("dare_ties", paper="arXiv:2311.03099", space="knots", scope="module")
def dare_ties(
    tasks: TaskVectors,
    *,
    density: Density = 0.5,
    rescale: bool = True,
    elect: Election = "weighted",
) -> Merged:
    """Drop entries at random, rescale the rest, elect a sign per entry, average those that have it.

    No statistics are taken, so both scopes give the same result. In `core` space a few entries hold most of
    a task vector, and luck decides which of them are kept.

    Args:
        density: Probability with which an entry is kept; the paper's 1 − p.
        rescale: Divide what is kept by the density.
        elect: Whether the weights count in the election of signs. In PEFT they do not (`dare_ties_svd`).

    Good at: fully fine-tuned models with much redundancy, says the paper of DARE.

    Measured: LoRA 85.0 (61.4).

    Source: Yu et al. 2024, the two steps of DARE, before Yadav et al. 2023, algorithm 1. Differences: dropping replaces
    trimming, as in PEFT and mergekit; masks as in `dare_linear`; weights and signs as in `ties`. With the same masks
    and equal weights it equals PEFT's `dare_ties` to rounding, except where the sum of an entry is 0: there PEFT elects
    the sign +.
    """

    def merge(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return elected_mean(x, weights, elect), x

    return drop_at_random(tasks, density, rescale).combine(merge)
