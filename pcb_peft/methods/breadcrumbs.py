"""Model Breadcrumbs."""

from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.methods.ops import clamp_positive, num_kept
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Density, Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("breadcrumbs", paper="arXiv:2312.06795", scope="module")
def breadcrumbs(
    tasks: TaskVectors,
    *,
    density: Density = 0.9,
    gamma: Annotated[float, Range(0, 1)] = 0.01,
) -> Merged:
    """Drop the outliers and the smallest entries of each task vector, then add: τ_m = Σ_t λ_t τ_t m_t.

    m_t marks the fraction `density` of the entries whose |τ_t| come next below the fraction `gamma` of the largest.

    Args:
        density: Fraction of entries kept per task vector.
        gamma: Fraction of entries dropped as outliers, the largest in magnitude; at most 1 − density.

    Good at: task vectors with outliers, according to its paper; far behind a sum here.

    Measured: LoRA 71.3 (54.5).

    Source: Davari and Belilovsky 2024, the masks per layer, whose fraction β at the bottom is 1 − density − gamma here.
    Departure: entries that tie with the smallest or the largest kept one are kept. Without ties, of one weight in dense
    space, it is mergekit's `breadcrumbs` to rounding. (The authors' code masks each row of a weight for itself.)
    """
    kept = num_kept(tasks, density)
    outliers = min(int(gamma * tasks.size), tasks.size - kept)
    ends = [tasks.size - outliers - kept, tasks.size - outliers - 1]
    low, high = tasks.order_statistics(torch.abs, ends).unbind(-1)
    low = clamp_positive(low)

    def merge(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        kept = (x.abs() >= low) & (x.abs() <= high)
        return (weights * x * kept).sum(0), kept

    return tasks.combine(merge)
