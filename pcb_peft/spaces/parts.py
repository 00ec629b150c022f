"""DoRA in spaces of low-rank deltas: the rescaling of W and the low-rank part compete side by side."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, Rescaled
from pcb_peft.spaces.registry import Encode, Projection
from pcb_peft.tasks.blocks import stacked


def in_parts(encode: Encode) -> Encode:
    """Extend a space to deltas ΔW_t = diag(g_t) W + L_t by one more block: g_t times the norms of the rows of W.

    These are the coordinates of diag(g_t) W in the orthonormal basis of the normalised rows of W, so that they have the
    same unit as those of L_t, which are in the space's own blocks. A plain low-rank delta has g_t = 0.

    Args:
        encode: The space.

    Returns:
        The extended space. Where no delta rescales W, it is the space itself.
    """
    return functools.partial(_encode_parts, encode)


def _encode_parts(
    encode: Encode, deltas: Sequence[Delta], weights: Sequence[float], **options: Any
) -> Projection:
    rescaled = [delta for delta in deltas if isinstance(delta, Rescaled)]
    if not rescaled:
        return encode(deltas, weights, **options)
    weight, layout = rescaled[0].weight, rescaled[0].layout
    norms = torch.linalg.vector_norm(weight().double(), dim=1)
    gains = torch.stack([_gain(delta, norms) for delta in deltas])
    inner = encode([delta.low_rank_part for delta in deltas], weights, **options)

    def decode(merged: Sequence[Tensor]) -> Rescaled:
        gain = torch.where(norms > 0, merged[0][0].double() / norms, 0)
        return Rescaled(gain, inner.decode(merged[1:]), weight, layout=layout)

    blocks = (stacked(gains[:, None], weights), *inner.blocks)
    return Projection(blocks, decode, _energy(deltas, weights, inner.energy))


def _gain(delta: Delta, norms: Tensor) -> Tensor:
    """g_t times the norms of the rows of W (out,)."""
    return delta.gain * norms if isinstance(delta, Rescaled) else torch.zeros_like(norms)


def _energy(deltas: Sequence[Delta], weights: Sequence[float], of_low_rank: float) -> float:
    """Fraction of Σ_t ‖λ_t ΔW_t‖²_F that the blocks hold, given the fraction for the low-rank parts alone."""
    if of_low_rank == 1:
        return of_low_rank
    total = _square_sum(deltas, weights)
    low_rank = _square_sum([delta.low_rank_part for delta in deltas], weights)
    return max(0.0, 1 - (1 - of_low_rank) * low_rank / total)


def _square_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> float:
    """Σ_t ‖λ_t ΔW_t‖²_F."""
    return sum((w * delta.norm()) ** 2 for w, delta in zip(weights, deltas, strict=True))
