"""Operations that several methods share: trim, drop, elect, average; and averages on the sphere."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pcb_peft.plugins.options import Election
from pcb_peft.tasks.task_vectors import Merged, TaskVectors

Direction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function of the cosines (T, T) between unit vectors, and of shares (T,) that add up to 1, to the coefficients (T,)
of an average direction."""

CANCELLED = 1e-6  # a sum of unit vectors shorter than this has lost its direction to cancellation


def num_kept(tasks: TaskVectors, density: float) -> int:
    """Return the number of entries that a density keeps: rounded down, but at least one."""
    return max(1, int(density * tasks.size))


def magnitude_threshold(tasks: TaskVectors, density: float) -> Tensor:
    """Return the smallest magnitude that is kept if each task vector keeps its largest entries: (T, 1, 1).

    It is never 0, so that zeros do not count as kept, even if fewer other entries are left than the density asks for.
    """
    index = tasks.size - num_kept(tasks, density)
    return clamp_positive(tasks.order_statistics(torch.abs, [index])[..., 0])


def clamp_positive(x: Tensor) -> Tensor:
    """Return x, or the smallest positive number of its dtype where x is smaller."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def drop_at_random(tasks: TaskVectors, density: float, rescale: bool) -> TaskVectors:
    """Keep each entry with probability `density`; if `rescale`, divide it by that to keep its expectation."""
    scale = 1 / density if rescale else 1.0
    return tasks.transformed(lambda x, uniform: x * (uniform < density) * scale)


def majority_sign_mask(x: Tensor) -> Tensor:
    """Return which entries have the sign of their sum over the tasks; if that is 0, the zeros, which change no mean."""
    return x.sign() == x.sum(0).sign()


def elected_mean(x: Tensor, weights: Tensor, elect: Election) -> Tensor:
    """Elect a sign per entry, and average the weighted entries that have it."""
    weighted = weights * x
    voters = weighted if elect == "weighted" else x
    return masked_mean(weighted, majority_sign_mask(voters))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean, over the tasks, of the entries in the mask; 0 where there are none."""
    return (x * mask).sum(0) / mask.sum(0).clamp(min=1)


def normalized(x: Tensor) -> Tensor:
    """Return x_t / Σ_t x_t for numbers that are not negative; 0 if all are 0."""
    return x / clamp_positive(x.sum(0))


def combination(tasks: TaskVectors, coefficients: Callable[[Tensor], Tensor]) -> Merged:
    """Return Σ_t c_t τ_t, where the coefficients (T,) are a function of the weights (T,), float64 on the CPU."""
    return tasks.combine(lambda x, weights: (weights * x).sum(0), weigh=coefficients)


def lengths_and_cosines(tasks: TaskVectors) -> tuple[Tensor, Tensor]:
    """Return ‖τ_t‖ (T,) and the cosines of the angles between task vectors (T, T); 0 for a zero one."""
    products = tasks.sums(lambda x: (x[:, None] * x).flatten(0, 1))
    gram = products.double().cpu().view(tasks.tasks, tasks.tasks)
    lengths = gram.diagonal().sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0)
    return lengths, (gram * scale * scale[:, None]).clamp(-1, 1)


def average_on_sphere(
    tasks: TaskVectors, direction: Direction, shares: Tensor | None = None
) -> Merged:
    """Merge into the average direction of the task vectors, at their average length.

    A task's share is |λ_t| / Σ_s |λ_s|; a negative λ turns its task vector around. The length is the mean |λ| times
    Σ_t share_t ‖τ_t‖: if all λ are 1, the mean of the lengths. Zero task vectors are left out.

    Args:
        tasks: The task vectors.
        direction: How directions are averaged.
        shares: (T,), to use instead of those of the weights.
    """
    lengths, cosines = lengths_and_cosines(tasks)

    def coefficients(weights: Tensor) -> Tensor:
        masses, signs = weights.abs() * (lengths > 0), weights.sign()
        parts = normalized(masses if shares is None else shares * (masses > 0))
        length = (parts @ lengths) * masses.sum() / (masses > 0).sum().clamp(min=1)
        units = direction(cosines * signs * signs[:, None], parts)
        return length * units * signs * torch.where(lengths > 0, 1 / lengths, 0)

    return combination(tasks, coefficients)


def normalize_direction(cosines: Tensor, coefficients: Tensor) -> Tensor:
    """Return the coefficients of the same direction at length 1; unchanged if directions cancel and none is left.

    Args:
        cosines: (T, T), of the angles between unit vectors.
        coefficients: (T,), of a vector as a sum of them.
    """
    length = (coefficients @ cosines @ coefficients).clamp(min=0).sqrt()
    return coefficients / length if length > CANCELLED else coefficients
