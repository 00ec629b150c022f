"""Singular values, spans and sampled rows of deltas, from their factors where they have some."""

import math

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, Dense, LowRank
from pcb_peft.deltas.linalg import RANK_TOLERANCE, svd
from pcb_peft.runtime.threads import one_thread


def has_factors(delta: Delta) -> bool:
    """Return whether the delta's factors are smaller than ΔW, so that its geometry costs little."""
    return not (delta.multiplies or isinstance(delta.low_rank_part, Dense))


@one_thread()
def singular_values(delta: Delta) -> Tensor:
    """Return the singular values of a delta's low-rank part, the largest first, without those that are rounding.

    From the factors: QR of each, then an SVD of an (r, r) matrix. An 8B model's largest module takes milliseconds.

    Returns:
        (rank,), float64; empty for a delta of zero.
    """
    lora_B, lora_A = delta.low_rank_part.factors()
    small = torch.linalg.qr(lora_B, mode="r").R @ torch.linalg.qr(lora_A.T, mode="r").R.T
    values = torch.linalg.svdvals(small)
    return values[values > RANK_TOLERANCE * values.max()] if values.any() else values[:0]


def effective_rank(values: Tensor) -> float:
    """Return the number of directions that carry a delta: e to the entropy of σ / Σσ; r equal values give r.

    Args:
        values: Singular values (r,).

    Returns:
        From 1 to r; 0 without values.

    Source: Roy, Vetterli 2007, The effective rank: a measure of effective dimensionality.
    """
    if not len(values):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


@one_thread()
def spans(delta: Delta) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of a delta's column space and row space: (out, k) and (in, k), float64.

    k is its numerical rank, 0 for a delta of zero.
    """
    lora_B, lora_A = delta.low_rank_part.factors()
    left, right = svd(lora_B), svd(lora_A)
    u, s, vh = svd(left[1][:, None] * (left[2] @ right[0]) * right[1])
    count = int((s > RANK_TOLERANCE * s[:1]).sum()) if s.any() else 0
    return left[0] @ u[:, :count], right[2].T @ vh[:count].T


@one_thread()
def initial_span(delta: Delta) -> Tensor | None:
    """Return an orthonormal basis (in, r) of the rows of lora_A, which training moves little; None for other kinds."""
    part = delta.low_rank_part
    return torch.linalg.qr(part.lora_A.double().T).Q if isinstance(part, LowRank) else None


@one_thread()
def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two spans, the largest first.

    Args:
        first: Orthonormal columns (n, p).
        second: Orthonormal columns (n, q).

    Returns:
        (min(p, q),): 1 for each direction that the spans share, 0 for each that is orthogonal to the other span.

    Source: Björck, Golub 1973, Numerical methods for computing angles between linear subspaces.
    """
    return torch.linalg.svdvals(first.T @ second).clamp(0, 1)


@one_thread()
def sampled_rows(delta: Delta, count: int) -> Tensor:
    """Return rows of ΔW's low-rank part, evenly spread: (at most `count`, in)."""
    lora_B, lora_A = delta.low_rank_part.factors()
    rows = torch.linspace(0, len(lora_B) - 1, min(count, len(lora_B))).round().long()
    return lora_B[rows] @ lora_A


@one_thread()
def overlap(first: Tensor, second: Tensor) -> float:
    """Return the root mean square of the principal cosines of two spans: 1 if one holds the other.

    Args:
        first: Orthonormal columns (n, p).
        second: Orthonormal columns (n, q).

    Returns:
        From 0 to 1. Of random spans √(max(p, q) / n), in the mean of its square.
    """
    return float((first.T @ second).norm()) / math.sqrt(min(first.shape[1], second.shape[1]))
