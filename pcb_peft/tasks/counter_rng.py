"""Counter-based random numbers: each follows from a key and a position alone.

Nothing has to be drawn before it, so that tiles, threads, processes and devices all get the same numbers.
"""

import hashlib
import json

import torch
from torch import Tensor

INCREMENT = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, 2⁶⁴ over the golden ratio, as signed int64
ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # (shift, multiplier) each
LAST_SHIFT = 31
MANTISSA_BITS = 53  # bits of a float64 in [0, 1)


def key(*parts: str | int) -> int:
    """Return 64 bits, as a signed number, that differ for different parts: a hash of seed, adapter and module."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Return random numbers in [0, 1), float64: one for each key and position.

    Args:
        keys: (T,), int64; see `key`.
        positions: (r, c), int64.

    Returns:
        (T, r, c).

    Source: SplitMix64 (Steele, Lea and Flood 2014), seeded with the key; position n gets its n-th output, counted from
    0. The generator's state after n steps is key + n · INCREMENT, so that any output can be computed directly. All keys
    share one cycle of 2⁶⁴ states; if keys are hashes, D positions of two keys overlap with probability D/2⁶³.
    """
    state = keys[:, None, None] + (positions + 1) * INCREMENT  # wraps around, as int64 does
    for shift, multiplier in ROUNDS:
        state ^= _logical_shift(state, shift)
        state *= multiplier
    state ^= _logical_shift(state, LAST_SHIFT)
    mantissa = _logical_shift(state, 64 - MANTISSA_BITS)
    return mantissa.to(torch.float64).mul_(2.0**-MANTISSA_BITS)


def _logical_shift(values: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64: zeros come in from the left."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)
