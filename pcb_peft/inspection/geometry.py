"""Singular values, spans and sampled rows of deltas, from their factors where they have some."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, Dense, LowRank
from pcb_peft.deltas.linalg import RANK_TOLERANCE
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


class Spans(NamedTuple):
    """Orthonormal bases of one delta, float64.

    Attributes:
        outputs: Of its column space, (out, k); k is its numerical rank, 0 for a delta of zero.
        inputs: Of its row space, (in, k).
        initial: Of the rows of lora_A, (in, r), which training moves little; None for other kinds.
    """

    outputs: Tensor
    inputs: Tensor
    initial: Tensor | None


@one_thread()
def spans(delta: Delta, factors: tuple[Tensor, Tensor]) -> Spans:
    """Return orthonormal bases of what a delta reads and writes.

    Args:
        delta: The delta.
        factors: Those of its low-rank part.
    """
    left, right = torch.linalg.qr(factors[0]), torch.linalg.qr(factors[1].T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    count = int((s > RANK_TOLERANCE * s[:1]).sum()) if s.any() else 0
    initial = right.Q if isinstance(delta.low_rank_part, LowRank) else None
    return Spans(left.Q @ u[:, :count], right.Q @ vh[:count].T, initial)


@one_thread()
def blocks(matrices: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return XᵀY for each pair of some matrices (n, p), (n, q) …, by row and column."""
    together = torch.cat(list(matrices), 1)
    sizes = [matrix.shape[1] for matrix in matrices]
    return [list(row.split(sizes, 1)) for row in (together.T @ together).split(sizes)]


def products(factors: Sequence[tuple[Tensor, Tensor]]) -> list[list[float]]:
    """Return ⟨ΔW_s, ΔW_t⟩ for each pair of low-rank deltas, from their lora_B and lora_A."""
    left, right = blocks([b for b, _ in factors]), blocks([a.T for _, a in factors])
    return [
        [float((one * other).sum()) for one, other in zip(row, across, strict=True)]
        for row, across in zip(left, right, strict=True)
    ]


@one_thread()
def principal_cosines(block: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two spans, the largest first.

    Args:
        block: XᵀY (p, q) of orthonormal bases X and Y of the two.

    Returns:
        (min(p, q),): 1 for each direction that the spans share, 0 for each that is orthogonal to the other span.

    Source: Björck, Golub 1973, Numerical methods for computing angles between linear subspaces.
    """
    return torch.linalg.svdvals(block).clamp(0, 1)


def overlap(block: Tensor) -> float:
    """Return the root mean square of the principal cosines of two spans: 1 if one holds the other.

    Args:
        block: XᵀY (p, q) of orthonormal bases X and Y of the two.

    Returns:
        From 0 to 1. Of random spans √(max(p, q) / n), in the mean of its square.
    """
    return float(block.norm()) / math.sqrt(min(block.shape))


@one_thread()
def sampled_signs(factors: tuple[Tensor, Tensor], count: int) -> Tensor:
    """Return the signs of rows of a low-rank ΔW, evenly spread: (at most `count`, in), int8."""
    lora_B, lora_A = factors
    rows = torch.linspace(0, len(lora_B) - 1, min(count, len(lora_B))).round().long()
    return (lora_B[rows] @ lora_A).sign().to(torch.int8)
