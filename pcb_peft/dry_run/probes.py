"""Random modules that are merged for a moment, to see how long it takes on this machine."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch

from pcb_peft.calibrations import prepared
from pcb_peft.deltas.delta import Delta, Dense, Diagonal, LowRank, Rescaled
from pcb_peft.deltas.rank import truncate
from pcb_peft.deltas.rank_choice import LOSSLESS, FixedRank, Full, RankChoice
from pcb_peft.dry_run.output_size import OutputShape
from pcb_peft.merging.plan import Plan, Setting
from pcb_peft.runtime.threads import one_thread
from pcb_peft.spaces import Projection
from pcb_peft.tasks.blocks import Block
from pcb_peft.tasks.limits import Limits
from pcb_peft.tasks.task_vectors import TaskVectors

Result = TypeVar("Result")
Shape: TypeAlias = tuple[int, int]
Kinds: TypeAlias = tuple[tuple[type[Delta], int], ...]
"""The type of each adapter's delta in a module, and its rank or 0."""

PROBE_VALUES = 1 << 22  # of all adapters together
LEAST_SIDE, MOST_SIDE = 64, 1024  # from 512 on, matrices are truncated as large ones are
LEAST_TIMES, MOST_TIMES = 3, 9  # that a probe is merged
AGREEING = 1.1  # times as long as the fastest


class ProbeTimes(NamedTuple):
    """Measurements of a probe that is merged.

    Attributes:
        merge: Seconds of all passes over its blocks.
        finish: Seconds from the merged blocks to the result at its rank.
        compile: Seconds that compiling takes, once.
        passes: Passes over the blocks, the last of which merges.
        output: The result.
    """

    merge: float
    finish: float
    compile: float
    passes: int
    output: OutputShape


class Probe:
    """One random module in its space.

    Attributes:
        shape: (rows, cols) of ΔW.
        kinds: The adapters' deltas.
        encode: Seconds that the way into the space takes.
    """

    def __init__(self, plan: Plan, setting: Setting, kinds: Kinds, shape: Shape) -> None:
        self.shape, self.kinds = shape, kinds
        self._plan, self._setting = plan, setting
        self._deltas = [_random(kind, rank, shape, seed) for seed, (kind, rank) in enumerate(kinds)]
        weights = [float(w) if isinstance(w, int | float) else 1.0 for w in setting.weights]
        with one_thread():
            self.encode, self._projection = best_of(lambda: self._encoded(weights))
        self._times: dict[Limits, ProbeTimes] = {}

    @property
    def total_rank(self) -> int:
        """Σ r_t; a dense delta counts with its full rank."""
        return sum(rank or min(self.shape) for _, rank in self.kinds)

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling took."""
        return max((times.compile for times in self._times.values()), default=0.0)

    def block_shapes(self, shape: Shape) -> list[Shape]:
        """Return (rows, cols) of the blocks of a module of that shape."""
        sides = dict(zip(self.shape, shape, strict=True))
        blocks = (block.shape[1:] for block in self._projection.blocks)
        return [(sides.get(rows, rows), sides.get(cols, cols)) for rows, cols in blocks]

    def values(self, shape: Shape) -> int:
        """Return the values per adapter in the blocks of a module of that shape."""
        return sum(rows * cols for rows, cols in self.block_shapes(shape))

    def times(self, limits: Limits) -> ProbeTimes:
        """Merge the probe within these limits, and measure it."""
        if limits not in self._times:
            side_by_side = self._setting.space.low_rank_output  # then a module has one thread
            with one_thread() if side_by_side else contextlib.nullcontext():
                self._times[limits] = self._measured(limits)
        return self._times[limits]

    def _measured(self, limits: Limits) -> ProbeTimes:
        first = _timed(lambda: self._merged(limits))[0] if limits.compile_values == 0 else 0.0
        merge, (passes, results) = best_of(lambda: self._merged(limits))
        delta = self._projection.decode(results)
        finish, output = best_of(lambda: self._output(self._calibrated(delta)))
        return ProbeTimes(merge, finish, max(0.0, first - merge), passes, output)

    def _encoded(self, weights: Sequence[float]) -> Projection:
        projection = self._setting.encode(prepared(self._deltas, self._plan.before), weights)
        keys = tuple(range(len(self.kinds)))
        blocks = tuple(dataclasses.replace(block, keys=keys) for block in projection.blocks)
        return dataclasses.replace(projection, blocks=blocks)

    def _merged(self, limits: Limits) -> tuple[int, list[torch.Tensor]]:
        """The number of passes over a block, and the merged blocks."""
        passes: list[Iterable[int]] = []

        def track(items: Iterable[int]) -> Iterable[int]:
            passes.append(items)
            return items

        def merged(scope: Sequence[Block]) -> list[torch.Tensor]:
            result = self._setting.decide(TaskVectors(scope, track=track, limits=limits))
            return [result.block(index)[0] for index in range(len(scope))]

        blocks = self._projection.blocks
        scopes = [blocks] if self._setting.scope == "global" else [[block] for block in blocks]
        results = [values for scope in scopes for values in merged(scope)]
        return len(passes) // len(scopes) + 1, results

    def _calibrated(self, delta: Delta) -> Delta:
        for calibration in self._plan.after:
            survey = calibration.survey
            totals = (survey(delta, self._deltas),) if survey else ()
            delta = calibration(delta, self._deltas, *totals)
        return delta

    def _output(self, delta: Delta) -> OutputShape:
        """The result of a merged delta; an upper bound of its rank where only the data tells it."""
        rank: RankChoice = self._plan.recipe.rank
        if rank == Full() or isinstance(delta, Diagonal):
            return OutputShape(delta.shape, None)
        cut = rank if isinstance(rank, FixedRank) else LOSSLESS
        if cut == LOSSLESS and not self._setting.space.low_rank_output:
            cut = FixedRank(self.total_rank)
        if isinstance(delta, LowRank) and cut == LOSSLESS:
            return OutputShape(delta.shape, delta.rank)
        low_rank, _ = truncate(delta.low_rank_part, cut)
        return OutputShape(delta.shape, low_rank.rank, isinstance(delta, Rescaled))


def probe_shape(kinds: Kinds, shape: Shape, *, low_rank_output: bool) -> Shape:
    """Return the shape of a smaller module, in which rows, columns and ranks are still told from each other."""
    side = math.isqrt(PROBE_VALUES // len(kinds))
    side = max(LEAST_SIDE, min(side, MOST_SIDE))
    if low_rank_output:
        side = max(side, 2 * sum(rank for _, rank in kinds))
    return min(shape[0], side), min(shape[1], side - 16)


def best_of(function: Callable[[], Result]) -> tuple[float, Result]:
    """Call a function until its two fastest times agree; return the fastest, and the last result.

    Whatever else the machine does only adds to a time.
    """
    fastest: list[float] = []
    while True:
        seconds, result = _timed(function)
        fastest = sorted((*fastest, seconds))
        agree = len(fastest) >= LEAST_TIMES and fastest[1] <= AGREEING * fastest[0]
        if agree or len(fastest) == MOST_TIMES:
            return fastest[0], result


def _timed(function: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


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
