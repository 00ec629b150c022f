"""Random numbers that follow from a key and a position alone: tiles, threads, processes and devices change nothing."""

import hashlib
import json

import torch
from torch import Tensor

INCREMENT = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, 2⁶⁴ over the golden ratio, as a signed number
ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # shift, multiplier
BITS = 53  # all that a float64 in [0, 1) holds


def key(*parts: str | int) -> int:
    """64 bits, signed as torch has them, that are different for different parts."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1), float64: one per key and position.

    Args:
        keys: (T,), int64.
        positions: (r, c), int64.

    Returns:
        (T, r, c).

    Source: SplitMix64, Steele, Lea and Flood 2014, whose generator, seeded with the key, gives the number of position n
    as its n-th from 0: its state is the key plus a multiple of a constant, so that none has to be drawn before. Two
    keys share one cycle of 2⁶⁴ numbers; if they are hashes, D positions of each overlap with probability D/2⁶³.
    """
    state = keys[:, None, None] + (positions + 1) * INCREMENT  # wraps around, as int64 does
    for shift, multiplier in ROUNDS:
        state ^= _shifted(state, shift)
        state *= multiplier
    state ^= _shifted(state, 31)
    return _shifted(state, 64 - BITS).to(torch.float64).mul_(2.0**-BITS)


def _shifted(state: Tensor, shift: int) -> Tensor:
    """To the right, as if unsigned."""
    return (state >> shift).bitwise_and_((1 << (64 - shift)) - 1)
