"""TIES-Merging: trim, elect signs, average what agrees."""

from torch import Tensor

from pcb_peft.methods.ops import elected_mean, magnitude_threshold
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Density, Election
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("ties", paper="arXiv:2306.01708")
def ties(tasks: TaskVectors, *, density: Density = 0.2, elect: Election = "weighted") -> Merged:
    """Trim each task vector, elect a sign per entry, average those that have it.

    Args:
        density: Fraction of entries kept per task vector, the largest in magnitude.
        elect: Whether the weights count in the election of signs. In PEFT they do not (`ties_svd`).

    Good at: (IA)³ adapters.

    Measured: LoRA 86.7 (63.4); (IA)³ 88.4 (67.2).

    Source: Yadav et al. 2023, algorithm 1. Differences: the weights scale the task vectors before the election, so that
    a weight of −1 is the negated task vector and equal weights are the paper's λ; entries that tie with the smallest
    kept one are kept; an entry whose sum is 0 elects no sign and merges to 0 (the authors' code gives it the sign that
    most other entries have). Of D entries int(density · D) are kept, as in PEFT and mergekit; the code of the authors,
    of KnOTS and of MergeLM keeps one more, because the threshold itself counts as kept. mergekit divides by the
    weights of the elected tasks unless `normalize` is false.
    """
    threshold = magnitude_threshold(tasks, density)

    def merge(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        mask = x.abs() >= threshold
        return elected_mean(x * mask, weights, elect), mask

    return tasks.combine(merge)
