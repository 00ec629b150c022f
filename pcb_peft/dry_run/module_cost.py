"""What merging a module will cost, from two stand-ins that are merged for a moment."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from pcb_peft.calibrations import Calibration, prepared
from pcb_peft.deltas.delta import Delta, Dense, Diagonal, LowRank, Rescaled
from pcb_peft.deltas.linalg import GROUP
from pcb_peft.deltas.rank import truncate
from pcb_peft.deltas.rank_choice import (
    LOSSLESS,
    EnergyFraction,
    FixedRank,
    Full,
    NetUtility,
    RankBudget,
    RankChoice,
)
from pcb_peft.dry_run.output_size import OutputShape
from pcb_peft.dry_run.probes import Kinds, Probe, Shape, best_of, probes_of, timed
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.merging.plan import Setting
from pcb_peft.spaces import Projection
from pcb_peft.tasks import compiling
from pcb_peft.tasks.limits import DEFAULT_LIMITS
from pcb_peft.tasks.task_vectors import TaskVectors

CPU = torch.device("cpu")


@dataclasses.dataclass(slots=True)
class ModuleCost:
    """Of one module.

    Attributes:
        seconds: Of the whole merge.
        values: Per adapter.
        passes: Over them.
        left: What becomes of it.
        working: Bytes while it is merged, of all that are merged side by side.
        kept: Bytes between passes, if there is room.
        encode: Seconds of them for the way into the space.
        held: Bytes of its scope's tiles and scores that stay in memory.
        tile: Values of its lowest tile, of all adapters.
    """

    seconds: float
    values: int
    passes: int
    left: OutputShape
    working: int
    kept: int
    encode: float
    held: int
    tile: int


def module_costs(
    alignment: AdapterSet,
    setting: Setting,
    rank: RankChoice,
    before: Sequence[Calibration],
    after: Sequence[Calibration],
    room: int,
) -> list[ModuleCost]:
    """Those of a setting's modules, where no more than `room` bytes are kept between passes."""
    pairs: dict[tuple[Kinds, Shape, Shape], _Pair] = {}
    keys: list[tuple[Kinds, Shape, Shape]] = []
    shapes = [alignment.modules[module].shape for module in setting.modules]
    for module, shape in zip(setting.modules, shapes, strict=True):
        kinds = _kinds(alignment, module, in_parts=setting.in_parts)
        small, large = probes_of(kinds, shape, low_rank_output=setting.space.low_rank_output)
        keys.append((kinds, small, large))
        if keys[-1] not in pairs:
            weights = [float(w) if isinstance(w, int | float) else 1.0 for w in setting.weights]
            pairs[keys[-1]] = _Pair(setting, rank, weights, before, after, *keys[-1])
    sizes = [pairs[key].values(shape) for key, shape in zip(keys, shapes, strict=True)]
    scope = None if setting.scope == "module" else sum(sizes)
    costs = [
        pairs[key].cost(shape, scope or size, room if scope else math.inf)
        for key, shape, size in zip(keys, shapes, sizes, strict=True)
    ]
    for module, cost in zip(setting.modules, costs, strict=True):
        cost.left = _limited(cost.left, alignment, module, setting, rank, after)
    costs[0].seconds += max(pair.compiling for pair in pairs.values())
    if scope is None:
        for cost in costs:
            cost.kept = 0
    return costs


def modules_at_once(setting: Setting) -> int:
    """How many modules are merged side by side."""
    threads = torch.get_num_threads()
    return min(threads, len(setting.modules)) if setting.space.low_rank_output else 1


def _limited(
    left: OutputShape,
    alignment: AdapterSet,
    module: str,
    setting: Setting,
    rank: RankChoice,
    after: Sequence[Calibration],
) -> OutputShape:
    """What is left of a module, of no higher rank than there can be."""
    limits: list[int | None] = [rank.total] if isinstance(rank, RankBudget | NetUtility) else []
    if isinstance(rank, EnergyFraction) and not setting.space.low_rank_output:
        limits.append(left.rank)
    elif not after:
        limits.append(alignment.total_rank(module, in_parts=setting.in_parts))
    most = None if left.rank is None else min(*left.shape, left.rank, *filter(None, limits))
    return dataclasses.replace(left, rank=most, stacked=alignment.modules[module].stacked)


def _kinds(alignment: AdapterSet, module: str, *, in_parts: bool) -> Kinds:
    """What rescales W counts as dense where it does not compete in parts."""
    template = alignment.modules[module]
    found = [adapter.modules.entries.get(module) for adapter in alignment.adapters]
    kinds = [(e.kind, e.rank or 0) if e else (template.kind, 1) for e in found]
    return tuple((Dense, 0) if k is Rescaled and not in_parts else (k, r) for k, r in kinds)


class _Way(NamedTuple):
    """How a scope is computed: see `TaskVectors`."""

    dtype: torch.dtype
    compiled: bool
    holds: bool
    sampled: bool


class _Pair:
    """Two stand-ins for modules of the same kinds, in their space."""

    def __init__(
        self,
        setting: Setting,
        rank: RankChoice,
        weights: Sequence[float],
        before: Sequence[Calibration],
        after: Sequence[Calibration],
        kinds: Kinds,
        small: Shape,
        large: Shape,
    ) -> None:
        self.setting, self.rank, self.kinds, self.after = setting, rank, kinds, after
        self._surveys = sum(calibration.survey is not None for calibration in after)
        self._kept = setting.scope == "global"  # what was encoded, and the statistics
        self._copies = copies = modules_at_once(setting)
        self.total_rank = sum(rank or min(small) for _, rank in kinds)
        shapes = [small] if small == large else [small, large]

        def encode(deltas: Sequence[Delta], weights: Sequence[float]) -> Projection:
            return setting.encode(prepared(deltas, before), weights)

        self.ones = [Probe(encode, weights, kinds, shape, copies) for shape in shapes]
        self.compiling = 0.0  # seconds
        self._merged: dict[_Way, list[tuple[float, float, int, OutputShape]]] = {}

    def values(self, shape: Shape) -> int:
        """In the blocks of a module of that shape."""
        return sum(rows * cols for rows, cols in self._blocks(shape))

    def _blocks(self, shape: Shape) -> list[tuple[int, int]]:
        """(rows, cols) of the blocks of a module of that shape."""
        first = self.ones[0]
        real = dict(zip(first.shape, shape, strict=True))
        sizes = (block.shape[1:] for block in first.projection.blocks)
        return [(real.get(rows, rows), real.get(cols, cols)) for rows, cols in sizes]

    def cost(self, shape: Shape, scope: int, room: float) -> ModuleCost:
        """Of a module of that shape, in a scope of so many values that has so much room."""
        tasks, wide = len(self.kinds), sum(shape)
        limits = DEFAULT_LIMITS
        compiled = limits.worth_compiling(tasks, scope) and not compiling.why_not_compiled(CPU)
        held = limits.cached_bytes(tasks, scope, room)
        way = _Way(limits.dtype(tasks, scope), compiled, held > 0, scope > limits.sample_values)
        if way not in self._merged:
            self._merged[way] = [self._run(one, way) for one in self.ones]
        runs, values = self._merged[way], self.values(shape)
        dense = not self.setting.space.low_rank_output
        area = math.prod(shape) if dense else wide
        sizes = [one.shape for one in self.ones]
        areas = [math.prod(small) if dense else sum(small) for small in sizes]
        encode = _line([sum(small) for small in sizes], [one.seconds for one in self.ones], wide)
        encode *= 1 if self._kept else 1 + self._surveys
        compete = _line([self.values(small) for small in sizes], [run[0] for run in runs], values)
        depart = _line(areas, [run[1] for run in runs], area)
        working = 36 * self.total_rank * wide
        working += 20 * area if dense else 24 * tasks * values
        return ModuleCost(
            seconds=encode + compete + depart,
            values=values,
            passes=runs[0][2],
            left=dataclasses.replace(runs[-1][3], shape=shape),
            working=self._copies * working,
            kept=12 * self.total_rank * wide + 8 * tasks * self.total_rank**2,
            encode=encode,
            held=held,
            tile=GROUP * tasks * max(cols for _, cols in self._blocks(shape)),
        )

    def _run(self, one: Probe, way: _Way) -> tuple[float, float, int, OutputShape]:
        """Seconds to compete and to depart, passes, and what leaves."""
        blocks = one.projection.blocks
        scopes = [blocks] if self._kept else [[block] for block in blocks]

        def compete() -> tuple[int, list[torch.Tensor]]:
            swept: list[Iterable[int]] = []  # a pass each
            results: list[torch.Tensor] = []

            def track(items: Iterable[int]) -> Iterable[int]:
                swept.append(items)
                return items

            for scope in scopes:
                tasks = TaskVectors(scope, track=track)
                tasks.dtype, tasks.compiled, tasks.caches_tiles = way.dtype, way.compiled, way.holds
                tasks.sample = max(1, tasks.size >> 4) if way.sampled else tasks.size
                merged = self.setting.decide(tasks)
                results += [merged.block(index)[0] for index in range(len(scope))]
            return len(swept) // len(scopes) + 1, results

        first = timed(compete)[0] if way.compiled else 0.0
        competing, (passes, results) = best_of(compete, self._copies)
        self.compiling = max(self.compiling, first - competing)
        delta = one.projection.decode(results)
        departing, left = best_of(lambda: self._left(self._calibrated(delta, one)), self._copies)
        repeats = 1 + self._surveys / (passes if self._kept else 1)
        return competing * repeats, departing, passes, left

    def _calibrated(self, delta: Delta, one: Probe) -> Delta:
        for calibration in self.after:
            survey = calibration.survey
            whole = (survey(delta, one.deltas),) if survey else ()
            delta = calibration(delta, one.deltas, *whole)
        return delta

    def _left(self, delta: Delta) -> OutputShape:
        """What becomes of a delta; of at most that rank where only the data knows."""
        if self.rank == Full() or isinstance(delta, Diagonal):
            return OutputShape(delta.shape, None)
        rescales = isinstance(delta, Rescaled)
        rank = self.rank if isinstance(self.rank, FixedRank) else LOSSLESS
        if rank == LOSSLESS and not self.setting.space.low_rank_output:
            rank = FixedRank(self.total_rank)
        if isinstance(delta, LowRank) and rank == LOSSLESS:
            return OutputShape(delta.shape, delta.rank)
        return OutputShape(delta.shape, truncate(delta.low_rank_part, rank)[0].rank, rescales)


def _line(sizes: Sequence[int], seconds: Sequence[float], size: int) -> float:
    """The time at `size`, of a line through one point or two that does not fall."""
    if len(sizes) == 1 or sizes[0] == sizes[1]:
        return seconds[-1] * size / sizes[-1]
    slope = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return max(seconds[0], seconds[0] + slope * (size - sizes[0]))
