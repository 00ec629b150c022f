"""What a merge will cost, before a tensor is read.

For modules of the same kinds and ranks stand two random ones, of which the second has more rows. Both are merged; what
grows between them is how time grows with size, whatever the method and the space do.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Sequence

import torch

from pcb_peft import fusion
from pcb_peft.adapter import Adapter
from pcb_peft.alignment import Alignment, common_base
from pcb_peft.base_model import lazy_base
from pcb_peft.blocks import Block
from pcb_peft.calibrations import Calibration, prepared
from pcb_peft.delta import Delta, Dense, Diagonal, LowRank, Rescaled
from pcb_peft.departure import check_leaving
from pcb_peft.engine import DEFAULT_MEMORY, gathered
from pcb_peft.loading import load_adapters
from pcb_peft.measured import open_statistics
from pcb_peft.methods import get_method
from pcb_peft.peft_names import method_of, spelled_out
from pcb_peft.plan import Setting, calibrations_of, plan
from pcb_peft.policy import settle
from pcb_peft.rank import Rank, added_part, budget_of, truncate
from pcb_peft.recipe import Recipe
from pcb_peft.rescaling import leaving_as_one
from pcb_peft.resources import number_of_bytes
from pcb_peft.selection import KEPT_IN_ALL, KEPT_VALUES, MARGIN
from pcb_peft.spaces import Projection
from pcb_peft.stand_in import TIMES, Kinds, Shape, StandIn, least, stand_ins, timed
from pcb_peft.statistics import SAMPLE_VALUES, TILE_VALUES, TaskVectors, dtype_of, sample_size
from pcb_peft.written_size import Left, adapter_bytes, folded_bytes, head_bytes, unread

PROCESS_BYTES = 250 << 20  # Python with torch and this package
TILES_HELD = 10  # what a method makes of a tile, in tiles
STAND_IN_SAMPLE = 1 << 14  # per adapter, where the real scope is sampled
CPU = torch.device("cpu")
GIB = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What a merge takes in one process.

    Attributes:
        modules: How many.
        values: Per adapter, in the spaces in which they compete.
        passes: Over these, the last of which merges; the most that a part of the model needs.
        read: Bytes of the adapters' tensors, as often as they are read.
        written: Bytes of tensors; at most so many where the data tells the rank, or whether heads are the same.
        memory: Bytes, at the peak.
        seconds: On this machine as it is now; without what the disk takes.
    """

    modules: int
    values: int
    passes: int
    read: int
    written: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.modules} modules, {self.values:.4g} values per adapter, passes over them: {self.passes}\n"
            f"reads {self.read / GIB:.3g} GiB, writes {self.written / GIB:.3g} GiB\n"
            f"peak memory about {self.memory / GIB:.2g} GiB; time about {self.seconds:.2g} s in one process, "
            "as fast as this machine is now"
        )


@dataclasses.dataclass(slots=True)
class _Cost:
    """Of one module.

    Attributes:
        seconds: Of the whole merge.
        values: Per adapter.
        passes: Over them.
        left: What becomes of it.
        working: Bytes while it is merged.
        kept: Bytes between passes, if there is room.
        encode: Seconds of them for the way into the space.
    """

    seconds: float
    values: int
    passes: int
    left: Left
    working: int
    kept: int
    encode: float


def estimate_merge(
    recipe: Recipe,
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    dtype: torch.dtype = torch.float32,
    rank_pattern: bool = False,
    fold: bool = False,
) -> Estimate:
    """What `merge` and `save_pretrained`, or `fold`, will take. Of the adapters only headers, and token rows, are read.

    Args:
        recipe: What would be merged.
        max_memory: As `merge` takes it.
        dtype: Of the tensors written, as `save_pretrained` takes it.
        rank_pattern: Likewise.
        fold: The recipe's base model is written, with the merge in it.

    Raises:
        PcbPeftError: As they do, where that can be known from the headers.
    """
    check_leaving(recipe, fold=fold)
    base, room = lazy_base(recipe.base_model), number_of_bytes(max_memory)
    given = load_adapters(recipe.adapters, base_model=base, hashed=False)
    adapters, _ = leaving_as_one(gathered(recipe, given, base), base)
    common_base(adapters, recipe.base_model)  # refuses different ones
    alignment = Alignment(adapters)
    method = get_method(method_of(recipe.method))
    measured = next(map(open_statistics, recipe.statistics), None)
    kind = measured.kind if measured else None
    recipe, settings = plan(spelled_out(recipe, adapters), method, alignment, kind)
    recipe, before, after = calibrations_of(recipe, alignment)
    settled = settle(unread(adapters), recipe.weights or (), recipe.heads)
    costs = [
        cost
        for setting in settings
        for cost in _costs(alignment, setting, recipe.rank, before, after)
    ]

    stored = sum(map(_stored_bytes, given))
    kept, passes = sum(cost.kept for cost in costs), max(cost.passes for cost in costs)
    again = max(0.0, 1 - room / kept) * (2 * passes) if kept else 0.0
    left = adapter_bytes([cost.left for cost in costs], dtype, rank_pattern=rank_pattern)
    written = left + head_bytes(settled, dtype)
    if fold and base:
        written = folded_bytes(base(), settled, alignment.modules, recipe.tied)
    return Estimate(
        modules=len(alignment.modules),
        values=sum(cost.values for cost in costs),
        passes=passes,
        read=int(stored * (2 + again)),
        written=written,
        memory=PROCESS_BYTES
        + min(room, kept)
        + max(cost.working for cost in costs)
        + (0 if recipe.rank == "full" else 2 * left)
        + max(_statistics_bytes(alignment, setting, costs) for setting in settings),
        seconds=sum(cost.seconds + again * cost.encode for cost in costs)
        + stored * _hash_seconds(),
    )


def _stored_bytes(adapter: Adapter) -> int:
    """Of the tensors in an adapter's files."""
    if adapter.files is None:
        return 0
    tensors = adapter.files.tensors
    return sum(
        math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors.names()
    )


@functools.cache
def _hash_seconds() -> float:
    """Per byte."""
    content = bytes(1 << 22)
    return least(lambda: hashlib.sha256(content))[0] / len(content)


@functools.cache
def _sort_seconds() -> float:
    """Per value."""
    values = torch.rand(1 << 16)
    return least(lambda: values.sort())[0] / len(values)


def _statistics_bytes(alignment: Alignment, setting: Setting, costs: Sequence[_Cost]) -> int:
    """Of the tiles in work, of a sample, and of the values that brackets keep."""
    tasks = len(alignment.adapters)
    scope = sum(cost.values for cost in costs)
    if setting.scope == "module":
        scope = max(cost.values for cost in costs)
    width = dtype_of(tasks, scope).itemsize
    tiles = torch.get_num_threads() * min(TILE_VALUES, tasks * scope) * TILES_HELD
    sampled = sample_size(tasks, scope)
    sample = 4 * tasks * min(scope, sampled)
    inside = int(scope * MARGIN / sampled**0.5)
    inside = min(KEPT_VALUES, KEPT_IN_ALL // (2 * tasks), inside)
    brackets = 4 * tasks * inside if scope > SAMPLE_VALUES else 0  # two of them, with room to grow
    return width * (tiles + sample + brackets)


def _costs(
    alignment: Alignment,
    setting: Setting,
    rank: Rank,
    before: Sequence[Calibration],
    after: Sequence[Calibration],
) -> list[_Cost]:
    """Those of a setting's modules."""
    pairs: dict[tuple[Kinds, Shape, Shape], _Pair] = {}
    keys: list[tuple[Kinds, Shape, Shape]] = []
    shapes = [alignment.modules[module].shape for module in setting.modules]
    for module, shape in zip(setting.modules, shapes, strict=True):
        kinds = _kinds(alignment, module, in_parts=setting.in_parts)
        small, large = stand_ins(kinds, shape, lossless=setting.space.lossless)
        keys.append((kinds, small, large))
        if keys[-1] not in pairs:
            weights = [float(w) if isinstance(w, int | float) else 1.0 for w in setting.weights]
            pairs[keys[-1]] = _Pair(setting, rank, weights, before, after, *keys[-1])
    sizes = [pairs[key].values(shape) for key, shape in zip(keys, shapes, strict=True)]
    scope = None if setting.scope == "module" else sum(sizes)
    costs = [
        pairs[key].cost(shape, scope or size)
        for key, shape, size in zip(keys, shapes, sizes, strict=True)
    ]
    for module, cost in zip(setting.modules, costs, strict=True):
        cost.left = _limited(cost.left, alignment, module, setting, rank, after)
    sampled = [scope] if scope else sizes
    tasks = len(alignment.adapters)
    sorts = sum(sample_size(tasks, size) for size in sampled if size > SAMPLE_VALUES)
    costs[0].seconds += sorts * (costs[0].passes - 1) * tasks * _sort_seconds()
    costs[0].seconds += max(pair.compiling for pair in pairs.values())
    if scope is None:
        for cost in costs:
            cost.kept = 0
    return costs


def _limited(
    left: Left,
    alignment: Alignment,
    module: str,
    setting: Setting,
    rank: Rank,
    after: Sequence[Calibration],
) -> Left:
    """What is left of a module, of no higher rank than there can be."""
    limits = [budget_of(rank, kind) for kind in ("budget", "utility")]
    if isinstance(rank, float) and not setting.space.lossless:
        limits.append(left.rank)
    elif not after:
        limits.append(alignment.total_rank(module, in_parts=setting.in_parts))
    most = None if left.rank is None else min(*left.shape, left.rank, *filter(None, limits))
    return dataclasses.replace(left, rank=most, stacked=alignment.modules[module].stacked)


def _kinds(alignment: Alignment, module: str, *, in_parts: bool) -> Kinds:
    """What rescales W counts as dense where it does not compete in parts."""
    template = alignment.modules[module]
    found = [adapter.modules.entries.get(module) for adapter in alignment.adapters]
    kinds = [(e.kind, e.rank or 0) if e else (template.kind, 1) for e in found]
    return tuple((Dense, 0) if k is Rescaled and not in_parts else (k, r) for k, r in kinds)


class _Pair:
    """Two stand-ins for modules of the same kinds, in their space."""

    def __init__(
        self,
        setting: Setting,
        rank: Rank,
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
        self.total_rank = sum(rank or min(small) for _, rank in kinds)
        shapes = [small] if small == large else [small, large]

        def encode(deltas: Sequence[Delta], weights: Sequence[float]) -> Projection:
            return setting.encode(prepared(deltas, before), weights)

        self.ones = [StandIn(encode, weights, kinds, shape) for shape in shapes]
        self.compiling = 0.0  # seconds
        self._merged: dict[
            tuple[torch.dtype, bool, bool], list[tuple[float, float, int, Left]]
        ] = {}

    def values(self, shape: Shape) -> int:
        """In the blocks of a module of that shape."""
        first = self.ones[0]
        real = dict(zip(first.shape, shape, strict=True))
        sizes = (block.shape[1:] for block in first.projection.blocks)
        return sum(real.get(rows, rows) * real.get(cols, cols) for rows, cols in sizes)

    def cost(self, shape: Shape, scope: int) -> _Cost:
        """Of a module of that shape, in a scope of so many values."""
        tasks, wide = len(self.kinds), sum(shape)
        compiled = fusion.worth(tasks, scope) and not fusion.obstacle(CPU)
        key = dtype_of(tasks, scope), compiled, scope > SAMPLE_VALUES
        if key not in self._merged:
            self._merged[key] = [self._run(one, *key) for one in self.ones]
        runs, values = self._merged[key], self.values(shape)
        dense = not self.setting.space.lossless
        area = math.prod(shape) if dense else wide
        sizes = [one.shape for one in self.ones]
        areas = [math.prod(small) if dense else sum(small) for small in sizes]
        encode = _line([sum(small) for small in sizes], [one.seconds for one in self.ones], wide)
        encode *= 1 if self._kept else 1 + self._surveys
        compete = _line([self.values(small) for small in sizes], [run[0] for run in runs], values)
        depart = _line(areas, [run[1] for run in runs], area)
        return _Cost(
            encode + compete + depart,
            values,
            runs[0][2],
            dataclasses.replace(runs[-1][3], shape=shape),
            36 * self.total_rank * wide + 24 * tasks * values * (not dense) + 20 * area * dense,
            12 * self.total_rank * wide + 8 * tasks * self.total_rank**2,
            encode,
        )

    def _run(
        self, one: StandIn, dtype: torch.dtype, compiled: bool, sampled: bool
    ) -> tuple[float, float, int, Left]:
        """Seconds to compete and to depart, passes, and what leaves."""
        passes = 0

        def track(items: Iterable[int]) -> Iterable[int]:
            nonlocal passes
            passes += 1
            return items

        def compete(blocks: Sequence[Block]) -> list[torch.Tensor]:
            tasks = TaskVectors(blocks, track=track)
            tasks.dtype, tasks.compiled = dtype, compiled
            tasks.sample = STAND_IN_SAMPLE if sampled else SAMPLE_VALUES
            merged = self.setting.decide(tasks)
            return [merged.block(index)[0] for index in range(len(blocks))]

        blocks = one.projection.blocks
        scopes = [blocks] if self._kept else [[block] for block in blocks]
        first, _ = timed(lambda: [compete(some) for some in scopes]) if compiled else (0.0, None)
        passes = 0
        competing, results = least(lambda: [compete(some) for some in scopes])
        self.compiling = max(self.compiling, first - competing)
        delta = one.projection.decode([block for some in results for block in some])
        departing, left = least(lambda: self._left(self._calibrated(delta, one)))
        passes = passes // (TIMES * len(scopes)) + 1
        repeats = 1 + self._surveys / (passes if self._kept else 1)
        return competing * repeats, departing, passes, left

    def _calibrated(self, delta: Delta, one: StandIn) -> Delta:
        for calibration in self.after:
            survey = calibration.survey
            whole = (survey(delta, one.deltas),) if survey else ()
            delta = calibration(delta, one.deltas, *whole)
        return delta

    def _left(self, delta: Delta) -> Left:
        """What becomes of a delta; of at most that rank where only the data knows."""
        if self.rank == "full" or isinstance(delta, Diagonal):
            return Left(delta.shape, None)
        rescales = isinstance(delta, Rescaled)
        rank = self.rank if isinstance(self.rank, int) else None
        if rank is None and not self.setting.space.lossless:
            rank = self.total_rank
        if isinstance(delta, LowRank) and rank is None:
            return Left(delta.shape, delta.rank)
        return Left(delta.shape, truncate(added_part(delta), rank)[0].rank, rescales)


def _line(sizes: Sequence[int], seconds: Sequence[float], size: int) -> float:
    """The time at `size`, of a line through one point or two that does not fall."""
    if len(sizes) == 1 or sizes[0] == sizes[1]:
        return seconds[-1] * size / sizes[-1]
    slope = max(0.0, (seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return max(seconds[0], seconds[0] + slope * (size - sizes[0]))
