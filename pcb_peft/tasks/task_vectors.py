"""The task vectors of one scope, as a method sees them.

Shape legend, beside that of blocks.py: D is the number of values per adapter in all blocks of the scope.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pcb_peft.deltas.linalg import row_slices
from pcb_peft.runtime.processes import ALONE, Processes, union
from pcb_peft.runtime.threads import in_order, one_thread
from pcb_peft.tasks import compiling, order_statistics
from pcb_peft.tasks.blocks import Block, Transform, View, transformed, with_statistics_view

Score: TypeAlias = Callable[[Tensor], Tensor]
"""A tile (T, r, c) to (K, r, c), elementwise in r and c, for any K."""

Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
"""A tile (T, r, cols) and the weights (T, 1, 1) to the merged tile (r, cols); a method that drops entries adds, for the
report, a tensor (T, r, cols) that is not 0 where it kept them."""

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

TILE_VALUES = 1 << 19  # of all adapters; in shorter calls threads wait for the interpreter
DEVICE_TILE_VALUES = 1 << 24  # where a tile has an accelerator to fill
HELD_VALUES = 1 << 24  # in all: what a pass computes of a smaller scope is held for the next
SAMPLE_VALUES = 1 << 18  # per adapter; smaller scopes are looked at as a whole
SAMPLE_AT_MOST = 1 << 20  # ... of scopes so large that brackets would keep too much
SAMPLE_IN_ALL = 1 << 26  # ... and of thousands of adapters together
DOUBLE_VALUES = 1 << 27  # up to so many values in all, a scope is computed in float64


def dtype_of(tasks: int, size: int) -> torch.dtype:
    """In which a scope of so many adapters and values is computed."""
    return torch.float64 if tasks * size <= DOUBLE_VALUES else torch.float32


def sample_size(tasks: int, size: int) -> int:
    """Values per adapter that are sampled of a scope of so many."""
    wanted = max(min(size >> 4, SAMPLE_VALUES), min(size >> 10, SAMPLE_AT_MOST))
    return min(size if size <= SAMPLE_VALUES else wanted, SAMPLE_IN_ALL // tasks)


def held_bytes(tasks: int, size: int, room: float) -> int:
    """Of the tiles of a scope, and a score of each, if they are held."""
    taken = 2 * dtype_of(tasks, size).itemsize * tasks * size
    return taken if tasks * size <= HELD_VALUES and taken <= room else 0


class TaskVectors:
    """The task vectors of one scope: T rows of D values, seen as tiles.

    Scores and rules must give the same value for an entry whatever tile it comes in, and write into none. Where there
    is much to do and a compiler to do it, they are compiled; what differs then is how exp and tanh are rounded.

    Attributes:
        compiled: They are.
        obstacle: Why they are not, although there is much to do.
        holds: Tiles that were looked at stay in memory.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        device: torch.device | None = None,
        track: Callable[[Iterable[int]], Iterable[int]] = iter,
        processes: Processes = ALONE,
        own: Sequence[int] | None = None,
        room: float = math.inf,
    ) -> None:
        """Looks at `blocks` in this order; `track` wraps every pass over their indices, to show progress.

        Of several processes each looks at its `own` blocks, by their indices, and all learn what is found. No more than
        `room` bytes of tiles and scores stay in memory.
        """
        self.blocks = blocks
        self.device = device or torch.device("cpu")
        self.tasks = blocks[0].shape[0]
        self.size = sum(block.size for block in blocks)
        self.dtype = dtype_of(self.tasks, self.size)
        self.sample = sample_size(self.tasks, self.size)
        worth = compiling.worth_compiling(self.tasks, self.size)
        found = processes.all_gather(compiling.why_not_compiled(self.device)) if worth else []
        self.why_not_compiled = next(filter(None, found), None)
        self.compiled = worth and self.why_not_compiled is None
        self.holds = bool(held_bytes(self.tasks, self.size, room)) and not self.compiled
        self._track, self._processes, self._room = track, processes, room
        self._own = range(len(blocks)) if own is None else own
        self._held: dict[tuple[int, int], Tensor] = {}  # by block and row

    def order_statistics(self, score: Score, indices: Sequence[int]) -> Tensor:
        """The values that stand at `indices` (from 0) once the D scores of a row are sorted: exact.

        Returns:
            (K, 1, 1, len(indices)): `[..., i]` broadcasts against a tile.
        """
        fused = self.compile(score)

        def sweep(
            split: Callable[[Tensor], list[order_statistics.Part]],
        ) -> Iterator[list[order_statistics.Part]]:
            found = self._sweep(lambda tile, _: split(fused(tile).flatten(1)))
            return (parts for _, parts in found)

        values = order_statistics.order_statistics(
            self._sample(score), self.size, indices, sweep, self._processes
        )
        return values[:, None, None, :]

    def extremes(self, score: Score) -> Tensor:
        """The smallest and the largest score of each row: (K, 1, 1, 2)."""
        score = self.compile(score)

        def of_tile(tile: Tensor, _: int) -> Tensor:
            scores = score(tile)
            return torch.stack([scores.amin((1, 2)), -scores.amax((1, 2))], dim=-1)

        def least(parts: Sequence[Sequence[Tensor]]) -> Tensor:
            return torch.stack([ends for part in parts for ends in part]).amin(0)

        ends = [ends.cpu() for _, ends in self._sweep(of_tile)]
        low, high = self._processes.reduce(ends, least).to(self.device).unbind(-1)
        return torch.stack([low, -high], dim=-1)[:, None, None, :]

    def sums(self, score: Score) -> Tensor:
        """The sum of each row's scores, added in float64, row by row of a block, block by block: (K, 1, 1)."""
        score, rows = self.compile(score), dict[int, list[Tensor]]()

        def of_rows(tile: Tensor, index: int) -> Tensor:
            scores = score(tile).flatten(1).unflatten(1, (-1, self.blocks[index].shape[2]))
            return scores.sum(2, dtype=torch.float64).cpu()

        for index, part in self._sweep(of_rows):
            rows.setdefault(index, []).append(part)

        def total(parts: Sequence[Mapping[int, Tensor]]) -> Tensor:
            every = union(parts)
            return torch.stack([every[index] for index in sorted(every)]).sum(0)

        with one_thread():
            own = {index: torch.cat(parts, dim=1).sum(1) for index, parts in rows.items()}
        return self._processes.reduce(own, total).to(self.device, self.dtype)[:, None, None]

    def transformed(self, transform: Transform) -> "TaskVectors":
        """These task vectors with every tile transformed, for all that is then asked of them.

        The random numbers of an entry follow from its adapter's key and its place in the block. A transform sees whole
        rows, but for the parts of rows that are sampled, where it decides only how soon an order statistic is found.
        """
        blocks = [transformed(block, transform) for block in self.blocks]
        return TaskVectors(
            blocks,
            device=self.device,
            track=self._track,
            processes=self._processes,
            own=self._own,
            room=self._room,
        )

    def with_task_statistics(self, inform: Callable[[Sequence[Tensor]], View]) -> "TaskVectors":
        """These task vectors as `inform` lets their tiles be seen, given a block's data, one matrix per adapter."""
        blocks = [with_statistics_view(block, inform) for block in self.blocks]
        return TaskVectors(blocks, device=self.device, track=self._track)

    def combine(
        self, rule: Rule, *, whole: bool = False, weigh: Callable[[Tensor], Tensor] | None = None
    ) -> "Merged":
        """The merged blocks, each computed when it is asked for.

        Args:
            rule: How a tile is merged.
            whole: Tiles are whole blocks: for rules that are not elementwise.
            weigh: From a block's weights (T,) to what the rule gets in their place; float64, on the CPU.
        """
        return Merged(self, rule, whole, weigh)

    def compile(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """The function as it is called on tiles: compiled, or as it is."""
        return compiling.compile_tiles(function, self.device) if self.compiled else function

    def cached_per_tile(self, score: Score) -> Score:
        """The score, which a tile that is held keeps as long as it lives: then nobody may write into its values."""
        known: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

        def remembered(tile: Tensor) -> Tensor:
            if tile not in known:
                known[tile] = score(tile)
            return known[tile]

        return remembered if self.holds else score

    def tiles(
        self, index: int, whole: bool = False
    ) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
        """A block's tiles: which rows they are, and a call for (T, r, cols); to be compiled, (T, 1, r cols)."""
        block = self.blocks[index]
        opened = functools.cache(lambda: block.open(self.dtype, self.device))
        flat = self.compiled and not whole
        shape = (self.tasks, 1, -1) if flat else (self.tasks, -1, block.shape[2])
        values = TILE_VALUES if self.device.type == "cpu" else DEVICE_TILE_VALUES
        values *= 1 + self.compiled  # compiled, a tile needs less room beside it
        for rows in row_slices(block.shape[1:], block.size if whole else values // self.tasks):
            held = self._held.get((index, rows.start))
            if held is None or whole:
                part = opened()
                yield rows, lambda part=part, rows=rows: part(rows, slice(None)).reshape(shape)
            else:
                yield rows, lambda held=held: held

    def _sweep(self, function: Callable[[Tensor, int], Result]) -> Iterator[tuple[int, Result]]:
        """What `function` makes of each tile of this process and its block's index, in order, with that index."""

        def look(item: tuple[int, slice, Callable[[], Tensor]]) -> tuple[int, Result]:
            index, rows, tile = item
            values = tile()
            if self.holds:
                self._held[index, rows.start] = values
            return index, function(values, index)

        tiles = (
            (index, rows, tile)
            for index in self._track(self._own)
            for rows, tile in self.tiles(index)
        )
        return in_order(look, tiles)

    def _sample(self, score: Score) -> Tensor:
        """The scores of a part of every block, in proportion to its size; of all of it where that is little.

        A part only says where to look, and is too little to be compiled for.
        """
        share = min(1.0, self.sample / self.size)
        if share == 1:
            fused = self.compile(score)
            own = list(self._sweep(lambda tile, _: fused(tile).flatten(1)))
        else:
            own = [(index, score(self._part(index, share)).flatten(1)) for index in self._own]

        def joined(parts: Sequence[Sequence[tuple[int, Tensor]]]) -> Tensor:
            every = sorted(itertools.chain(*parts), key=lambda item: item[0])
            return torch.cat([scores for _, scores in every], dim=1)

        own = [(index, scores.cpu()) for index, scores in own]
        return self._processes.reduce(own, joined).to(self.device)

    def _part(self, index: int, share: float) -> Tensor:
        """Some rows and columns of a block, drawn without regard to any other block."""
        block, generator = self.blocks[index], torch.Generator().manual_seed(index)
        _, rows, cols = block.shape
        height = min(rows, math.ceil(math.sqrt(share * block.size)))
        width = min(cols, math.ceil(share * block.size / height))
        some_rows = torch.randperm(rows, generator=generator)[:height].to(self.device)
        some_cols = torch.randperm(cols, generator=generator)[:width].to(self.device)
        return block.open(self.dtype, self.device)(some_rows, some_cols)


@dataclasses.dataclass(slots=True)
class BlockCounts:
    """What was seen while a block was merged.

    Attributes:
        entries: How many there are.
        kept: How many of them each adapter kept; empty if the method drops none.
        conflicts: At how many entries adapters disagree on the sign.
    """

    entries: int
    kept: list[int] = dataclasses.field(default_factory=list[int])
    conflicts: int = 0


class Merged:
    """The merged blocks of a scope."""

    def __init__(
        self,
        tasks: TaskVectors,
        rule: Rule,
        whole: bool,
        weigh: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.compiled = tasks.compiled and not whole
        self._tasks, self._whole, self._weigh = tasks, whole, weigh

        def merge(tile: Tensor, weights: Tensor) -> tuple[Tensor, list[Any], Any]:
            merged = rule(tile, weights)
            merged, kept = merged if isinstance(merged, tuple) else (merged, ())
            counts = [
                order_statistics.count(order_statistics.as_numpy_on_cpu(mask) != 0) for mask in kept
            ]
            return merged, counts, disagreements(tile)

        self._merge = merge if whole else tasks.compile(merge)

    def block(self, index: int) -> tuple[Tensor, BlockCounts]:
        """The merged block (rows, cols) of that index, on the CPU, and what was counted on the way."""
        tasks, block = self._tasks, self._tasks.blocks[index]
        weights = torch.tensor(block.weights, dtype=torch.float64)
        weights = self._weigh(weights) if self._weigh else weights
        weights = weights.to(tasks.device, tasks.dtype)[:, None, None]
        result = torch.empty(block.shape[1:], dtype=tasks.dtype)

        def merge(item: tuple[slice, Callable[[], Tensor]]) -> tuple[list[int], int]:
            rows, tile = item
            merged, kept, conflicts = self._merge(tile(), weights)
            result[rows] = merged.view(-1, block.shape[2])
            return [int(number) for number in kept], int(conflicts)

        counts = BlockCounts(block.size)
        for kept, conflicts in in_order(merge, tasks.tiles(index, self._whole)):
            counts.conflicts += conflicts
            counts.kept = [a + b for a, b in zip(counts.kept or [0] * len(kept), kept, strict=True)]
        return result, counts


def disagreements(tile: Tensor) -> Any:
    """At how many entries of a tile (T, r, c) two adapters have opposite signs."""
    low, high = (
        order_statistics.as_numpy_on_cpu(tile.amin(0)),
        order_statistics.as_numpy_on_cpu(tile.amax(0)),
    )
    return order_statistics.count((low < 0) & (high > 0))
