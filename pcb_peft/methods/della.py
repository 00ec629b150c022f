"""DELLA: drop by magnitude, elect, fuse."""

from typing import Annotated

import torch
from torch import Tensor

from pcb_peft.methods.ops import majority_sign_mask, masked_mean
from pcb_peft.methods.registry import merge_method
from pcb_peft.plugins.options import Density, Range
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@merge_method("della", paper="arXiv:2406.11617", scope="module")
def della(
    tasks: TaskVectors,
    *,
    density: Density = 0.7,
    epsilon: Annotated[float, Range(0, 1)] = 0.14,
    rescale: bool = True,
) -> Merged:
    """Drop entries at random, small ones sooner, rescale the rest, elect a sign per entry, average those that have it.

    MAGPRUNE keeps the entry of rank r (from 0: the smallest |τ|) of the n in its row with a probability of
    density + ε (r/(n − 1) − ½), and divides it by that. It takes no statistics: both scopes give the same.

    Args:
        density: Mean probability with which an entry is kept; the paper's 1 − p.
        epsilon: How much likelier the largest entry of a row is kept than its smallest. Cut down to what leaves all
            probabilities in [0, 1]: at a density of 1 nothing is dropped.
        rescale: Divide what is kept by its probability.

    Good at: as `dare_linear`.

    Measured: LoRA 90.3 (74.6).

    Source: Deep et al. 2024, steps drop (MAGPRUNE), elect and fuse, and github.com/declare-lab/della at 0641b61, whose
    `window_size` is ε and whose `normalize` is the mean. Departures: ε is cut down; a row is one of the block, that of
    an output only in dense space; masks, weights and signs as in `dare_ties`. (mergekit's `epsilon` is half of this
    one, and its `rescale` restores the sum of |τ_t| of each tensor instead of the expectation of each entry.)
    """
    spread = min(epsilon, 2 * density, 2 * (1 - density))

    def drop(x: Tensor, uniform: Tensor) -> Tensor:
        keep = density + spread * centred_ranks(x.abs())
        left = x / keep.to(x.dtype) if rescale else x
        return torch.where(uniform < keep, left, 0)

    def merge(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        weighted = weights * x
        return masked_mean(weighted, majority_sign_mask(weighted)), x

    return tasks.transformed(drop).combine(merge)


def centred_ranks(x: Tensor) -> Tensor:
    """Each entry's rank in its row, from −½ for the smallest to ½, float64; of equal entries the first ranks lower."""
    ranks = torch.linspace(-0.5, 0.5, x.shape[-1], dtype=torch.float64, device=x.device)
    if len(ranks) == 1:
        return torch.zeros_like(x, dtype=torch.float64)
    order = x.argsort(dim=-1, stable=True)
    return torch.empty_like(x, dtype=torch.float64).scatter_(-1, order, ranks.expand(x.shape))
