"""Model Breadcrumbs: task arithmetic without the largest and the smallest entries."""

from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.methods.ops import clamp_positive, num_kept
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Density, Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("breadcrumbs", paper="arXiv:2312.06795", space="knots", scope="module")
def breadcrumbs(
    tasks: TaskVectors,
    *,
    density: Density = 0.9,
    gamma: Annotated[float, Range(0, 1)] = 0.01,
) -> Merged:
    """Drop the outliers and the smallest entries of each task vector, then add: τ_m = Σ_t λ_t τ_t m_t.

    The mask m_t drops the fraction `gamma` of the entries with the largest |τ_t|, and keeps the fraction `density` that
    comes next in size. In `core` space the largest entries are the strongest directions of the adapters, not outliers.

    Args:
        density: Fraction of entries kept per task vector.
        gamma: Fraction of entries dropped as outliers, the largest in magnitude; at most 1 − density.

    Good at: task vectors with outliers, says its paper.

    Measured: LoRA 85.2 (65.5).

    Source: Davari and Belilovsky 2024, with a mask per layer. The paper's β, the fraction dropped at the bottom, is
    1 − density − gamma here. Difference: entries that tie with the smallest or the largest kept one are kept. Without
    ties, for one weight in dense space, it equals mergekit's `breadcrumbs` to rounding. (The authors' code masks each
    row of a weight by itself.)
    """
    count = num_kept(tasks, density)
    outliers = min(int(gamma * tasks.size), tasks.size - count)
    first, last = tasks.size - outliers - count, tasks.size - outliers - 1  # kept, by magnitude
    low, high = tasks.order_statistics(torch.abs, [first, last]).unbind(-1)
    low = clamp_positive(low)

    def merge(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        mask = (x.abs() >= low) & (x.abs() <= high)
        return (weights * x * mask).sum(0), mask

    return tasks.combine(merge)
