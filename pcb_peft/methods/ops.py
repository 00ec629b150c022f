"""Verbs that several methods share: trim, drop, elect, average; and what follows from inner products alone."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pcb_peft.tasks.task_vectors import Merged, TaskVectors

Direction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Cosines (T, T) between unit vectors and shares (T,) that add up to 1, to the coefficients (T,) of a unit vector."""


def num_kept(tasks: TaskVectors, density: float) -> int:
    """That fraction of the entries, rounded down, but at least one."""
    return max(1, int(density * tasks.size))


def magnitude_threshold(tasks: TaskVectors, density: float) -> Tensor:
    """The magnitude from which on a task vector's entries are kept if it keeps its largest: (T, 1, 1).

    Never 0, so that no zero counts as kept, even where fewer other entries are left than the density asks for.
    """
    index = tasks.size - num_kept(tasks, density)
    return clamp_positive(tasks.order_statistics(torch.abs, [index])[..., 0])


def clamp_positive(x: Tensor) -> Tensor:
    """At least the smallest positive number."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def drop_at_random(tasks: TaskVectors, density: float, rescale: bool) -> TaskVectors:
    """Each entry is kept with a probability of `density`, and then divided by it to leave its expectation as it was."""
    scale = 1 / density if rescale else 1.0
    return tasks.transformed(lambda x, uniform: x * (uniform < density) * scale)


def majority_sign_mask(x: Tensor) -> Tensor:
    """Which entries have the sign of their sum over the tasks: where that is 0, the zeros, which change no mean."""
    return x.sign() == x.sum(0).sign()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean, over the tasks, of the entries in the mask; 0 where there are none."""
    return (x * mask).sum(0) / mask.sum(0).clamp(min=1)


def normalized(x: Tensor) -> Tensor:
    """x_t / Σ_t x_t, of numbers that are not negative; 0 if all are."""
    return x / clamp_positive(x.sum(0))


def combination(tasks: TaskVectors, coefficients: Callable[[Tensor], Tensor]) -> Merged:
    """Σ_t c_t τ_t, where the coefficients (T,) follow from the weights (T,), both float64 and on the CPU."""
    return tasks.combine(lambda x, weights: (weights * x).sum(0), weigh=coefficients)


def lengths_and_cosines(tasks: TaskVectors) -> tuple[Tensor, Tensor]:
    """‖τ_t‖ (T,) and the cosines of the angles between task vectors (T, T), 0 for a zero one."""
    products = tasks.sums(lambda x: (x[:, None] * x).flatten(0, 1))
    gram = products.double().cpu().view(tasks.tasks, tasks.tasks)
    lengths = gram.diagonal().sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0)
    return lengths, (gram * scale * scale[:, None]).clamp(-1, 1)


def average_on_sphere(
    tasks: TaskVectors, direction: Direction, shares: Tensor | None = None
) -> Merged:
    """The vector of a direction that is found among the units τ_t / ‖τ_t‖, as long as the task vectors are on average.

    |λ| is a task's mass, its share the mass over the sum of all; a negative λ turns the task vector around. The length
    is the mean mass times Σ_t share_t ‖τ_t‖: with all λ = 1 the mean of the lengths. Zero task vectors have no say.

    Args:
        tasks: The task vectors.
        direction: The average of directions.
        shares: (T,), in the place of those of the masses.
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
    """The coefficients of the same direction at length 1; as they are where directions cancel and none is left."""
    length = (coefficients @ cosines @ coefficients).clamp(min=0).sqrt()
    return coefficients / length if length > 1e-6 else coefficients
