"""Deltas that rescale W, in a space of low-rank deltas: their parts compete side by side."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, Rescaled
from pcb_peft.spaces.registry import Encode, Projection
from pcb_peft.tasks.blocks import stacked


def in_parts(encode: Encode) -> Encode:
    """A space in which ΔW_t = diag(g_t) W + L_t has one more block: g_t times the norms of the rows of W.

    These are the coordinates of diag(g_t) W in the orthonormal basis of the normed rows of W, so that they are of one
    measure with those of L_t, which has the blocks of the space. What is low-rank as a whole has g_t = 0.

    Args:
        encode: The space.
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
    """(out,)."""
    return delta.gain * norms if isinstance(delta, Rescaled) else torch.zeros_like(norms)


def _energy(deltas: Sequence[Delta], weights: Sequence[float], held: float) -> float:
    """Fraction of Σ_t ‖λ_t ΔW_t‖²_F that is held where that of the low-rank parts is known."""
    if held == 1:
        return held
    whole, added = (
        sum((w * d.norm()) ** 2 for w, d in zip(weights, some, strict=True))
        for some in (deltas, [delta.low_rank_part for delta in deltas])
    )
    return max(0.0, 1 - (1 - held) * added / whole)
