"""Optimal truncation of a delta to a rank, and the energy that it retains."""

import functools
import math

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Core, Delta, Dense, Diagonal, LowRank, Rescaled
from pcb_peft.deltas.linalg import Basis, Svd, column_signs, leading_svd, significant, spanned, svd
from pcb_peft.deltas.rank_choice import LOSSLESS, EnergyFraction, FixedRank, Lossless, Truncation
from pcb_peft.runtime.threads import one_thread

EXACT_SIZE = 512  # a matrix with at most so many rows or columns is decomposed in full
FIRST_GUESS = 32  # singular triplets of a large matrix that are tried first for an energy fraction
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
}  # a smaller part of the largest σ is rounding


@one_thread()
def truncate(delta: Delta, rank: Truncation) -> tuple[LowRank, float]:
    """Return the closest delta of lower rank (Eckart and Young), with balanced factors.

    Args:
        delta: Low-rank, core or dense.
        rank: At most this rank, or the lowest that keeps this fraction of the energy; `Lossless` drops only rounding.

    Returns:
        The truncated delta, float32, and the retained fraction of ‖ΔW‖²_F.
    """
    left, middle, right = decompose(delta)
    total = float(middle.double().square().sum())
    u, s, vh = _leading(middle, rank, total)
    energy = min(1.0, float(s.double().square().sum()) / total) if total > 0 else 1.0
    lora_A, lora_B = _across(right, s.sqrt()[:, None] * vh), _lift(left, u * s.sqrt())
    return LowRank(lora_A.float(), lora_B.float(), layout=delta.layout), energy


def at_rank(delta: Delta, rank: Truncation) -> tuple[Delta, float]:
    """Return the closest delta of that rank, and the energy that it retains; an (IA)³ vector has no rank and stays."""
    if isinstance(delta, Diagonal):
        return delta, 1.0
    if isinstance(delta, Rescaled):
        return truncate_low_rank_part(delta, rank)
    return truncate(delta, rank)


def truncate_low_rank_part(delta: Rescaled, rank: Truncation) -> tuple[Delta, float]:
    """Return the closest delta with the same gain whose low-rank part has a lower rank.

    Args:
        delta: A DoRA.
        rank: As in `truncate`. A fraction refers to the energy of the whole ΔW, and so does the energy returned.

    Returns:
        The truncated delta, and 1 − ‖lost‖²_F / ‖ΔW‖²_F; 0 where more is lost than ΔW has.
    """
    delta = delta.without_zero_rows()
    if rank == LOSSLESS and isinstance(delta.added, LowRank):
        return delta, 1.0
    if isinstance(rank, EnergyFraction):
        share = 1 - (1 - rank.fraction) * _energy_ratio(delta)
        rank = EnergyFraction(share) if share > 0 else FixedRank(1)
    added, energy = truncate(delta.added, rank)
    return delta.with_low_rank_part(added), energy_of_whole(delta, energy)


def energy_of_whole(delta: Delta, energy: float) -> float:
    """Return the energy that a delta retains if its low-rank part retains `energy` of its own."""
    if energy == 1 or not delta.rescales:
        return energy
    return max(0.0, 1 - (1 - energy) / _energy_ratio(delta))


def _energy_ratio(delta: Delta) -> float:
    """Return ‖ΔW‖² over that of its low-rank part."""
    part = delta.low_rank_part.norm() ** 2
    return delta.norm() ** 2 / part if part else math.inf


def balanced(delta: Delta) -> tuple[Tensor, Tensor]:
    """Return lora_A = √ΣVᵀ and lora_B = U√Σ, float64, each column of U signed so that its largest entry is positive.

    The result is the same for every pair (BG, G⁻¹A) of factors.
    """
    left, middle, right = decompose(delta)
    u, s, vh = svd(middle)
    u, vh = _lift(left, u), _across(right, vh)
    signs, root = column_signs(u), s.sqrt()
    return (root * signs)[:, None] * vh, u * (root * signs)


@functools.singledispatch
def decompose(delta: Delta) -> tuple[Basis | None, Tensor, Basis | None]:
    """Return left, middle and right with ΔW = left @ middle @ rightᵀ; None stands for the identity."""
    return None, delta.matrix(), None


@decompose.register
def _(delta: LowRank) -> tuple[Basis, Tensor, Basis]:
    left, left_parts = spanned(delta.lora_B.double() * delta.scaling)
    right, right_parts = spanned(delta.lora_A.double().T)
    return left, left_parts @ right_parts.T, right


@decompose.register
def _(delta: Core) -> tuple[Basis, Tensor, Basis]:
    return delta.left, delta.core.double(), delta.right


@decompose.register
def _(delta: Dense) -> tuple[None, Tensor, None]:
    return None, delta.values, None


def triplets(delta: Delta) -> Svd:
    """Return U (out, r), σ (r,) and Vᵀ (r, in), float64, for the numerical rank r of ΔW."""
    left, middle, right = decompose(delta)
    u, s, vh = significant(middle.double())
    return _lift(left, u), s, _across(right, vh)


def _lift(basis: Basis | None, columns: Tensor) -> Tensor:
    return columns if basis is None else basis @ columns


def _across(basis: Basis | None, rows: Tensor) -> Tensor:
    return rows if basis is None else basis.across(rows)


def _leading(matrix: Tensor, rank: Truncation, total: float) -> Svd:
    """Return the singular triplets that a rank asks for."""
    u, s, vh = _enough(matrix, rank, total)
    count = max(1, min(_count(s, rank, total), int((s > ROUNDING[s.dtype] * s[0]).sum())))
    return u[:, :count], s[:count], vh[:count]


def _enough(matrix: Tensor, rank: Truncation, total: float) -> Svd:
    """Return the leading triplets, at least as many as the rank asks for: a few of a large matrix, or else all."""
    match rank:
        case FixedRank(count) if _worth_searching(matrix, count):
            return leading_svd(matrix.float(), count)
        case EnergyFraction(fraction):
            count = FIRST_GUESS
            while _worth_searching(matrix, count):
                triplets = leading_svd(matrix.float(), count)
                if float(triplets[1].double().square().sum()) >= fraction * total:
                    return triplets
                count *= 2
        case _:
            pass
    return svd(matrix)


def _worth_searching(matrix: Tensor, count: int) -> bool:
    """True if a randomised search for so many triplets is faster than a full decomposition."""
    smaller = min(matrix.shape)
    return smaller > EXACT_SIZE and count < smaller // 4


def _count(s: Tensor, rank: Truncation, total: float) -> int:
    """Return the number of singular values that a rank asks for."""
    match rank:
        case Lossless():
            return len(s)
        case FixedRank(count):
            return count
        case EnergyFraction(fraction):
            return int((s.double().square().cumsum(0) < fraction * total).sum()) + 1
