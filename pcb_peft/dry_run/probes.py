"""Random modules that stand for real ones, to see how long things take."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch

from pcb_peft.deltas.delta import Delta, Dense, Diagonal, LowRank, Rescaled
from pcb_peft.runtime.threads import in_order, one_thread
from pcb_peft.spaces import Projection

Result = TypeVar("Result")
Shape: TypeAlias = tuple[int, int]
Kinds: TypeAlias = tuple[tuple[type[Delta], int], ...]
"""Of a module's deltas: each one's type, and its rank or 0."""

STAND_IN_VALUES = 1 << 21  # of all adapters together, in the smaller of two stand-ins
LEAST_SIDE, MOST_SIDE = 64, 640  # of a stand-in; large matrices are truncated in another way
LEAST_TIMES, MOST_TIMES = 3, 9  # a stand-in is merged
AGREEING = 1.1  # times as long as the fastest
GROWTH = 3  # how many times as many rows the larger one has


def probes_of(kinds: Kinds, shape: Shape, *, low_rank_output: bool) -> tuple[Shape, Shape]:
    """Two smaller shapes, in which rows, columns and ranks are still told from each other."""
    side = math.isqrt(STAND_IN_VALUES // len(kinds))
    side = max(LEAST_SIDE, min(side, MOST_SIDE))
    if low_rank_output:
        side = max(side, 2 * sum(rank for _, rank in kinds))
    rows, cols = min(shape[0], side), min(shape[1], side - 16)
    return (rows, cols), (min(shape[0], GROWTH * rows), cols)


class Probe:
    """One random module in its space.

    Attributes:
        shape: (rows, cols).
        deltas: The adapters'.
        projection: What competes.
        seconds: How long the way there takes.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Delta], Sequence[float]], Projection],
        weights: Sequence[float],
        kinds: Kinds,
        shape: Shape,
        copies: int,
    ) -> None:
        self.shape = shape
        self.deltas = [_random(kind, rank, shape, seed) for seed, (kind, rank) in enumerate(kinds)]
        with one_thread():
            self.seconds, projection = best_of(lambda: encode(self.deltas, weights), copies)
        keys = tuple(range(len(kinds)))
        blocks = tuple(dataclasses.replace(block, keys=keys) for block in projection.blocks)
        self.projection = dataclasses.replace(projection, blocks=blocks)


def _random(kind: type[Delta], rank: int, shape: Shape, seed: int) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    rows, cols = shape
    if kind is Diagonal:
        return Diagonal(torch.rand(max(shape), generator=generator), rows == 1)
    if kind is Dense:
        return Dense(torch.randn(shape, generator=generator))
    lora_A = torch.randn(rank, cols, generator=generator)
    added = LowRank(lora_A, torch.randn(rows, rank, generator=generator))
    if kind is LowRank:
        return added
    return Rescaled(torch.randn(rows, generator=generator), added, lambda: torch.ones(shape))


def timed(function: Callable[[], Result], copies: int = 1) -> tuple[float, Result]:
    """Seconds per call, where so many are made side by side, and what came out of the last one."""
    started = time.perf_counter()
    if copies == 1:
        result = function()
    else:
        *_, result = in_order(lambda _: function(), range(copies), copies)
    return (time.perf_counter() - started) / copies, result


def best_of(function: Callable[[], Result], copies: int = 1) -> tuple[float, Result]:
    """As `timed`, the fastest of several times, until two agree: what else the machine does only adds."""
    fastest: list[float] = []
    while True:
        seconds, result = timed(function, copies)
        fastest = sorted((*fastest, seconds))
        agree = len(fastest) >= LEAST_TIMES and fastest[1] <= AGREEING * fastest[0]
        if agree or len(fastest) == MOST_TIMES:
            return fastest[0], result
