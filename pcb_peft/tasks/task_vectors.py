"""Task vectors: all blocks of one scope, as a merge method sees them.

Shape legend, in addition to that of blocks.py: D is the number of values per adapter in all blocks of the scope.
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
from pcb_peft.tasks.blocks import Block, Transform, View, transformed, viewed_with_statistics
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits

Score: TypeAlias = Callable[[Tensor], Tensor]
"""A function of a tile (T, r, c) to (K, r, c), elementwise in r and c, for any K."""

Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
"""A function of a tile (T, r, cols) and the weights (T, 1, 1) to the merged tile (r, cols). A method that drops entries
also returns a tensor (T, r, cols), not 0 where it kept them; the report counts these."""

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

CPU = torch.device("cpu")


@dataclasses.dataclass(eq=False, repr=False)
class TaskVectors:
    """The task vectors of one scope: T adapters with D values each, read tile by tile.

    Scores and rules must give the same value for an entry whatever tile it comes in, and must not write into a tile.
    Large scopes are compiled where there is a compiler; this changes only how exp and tanh are rounded.

    Attributes:
        blocks: The task vectors of the scope's modules.
        device: The device that computes tiles.
        track: Wraps every pass over the blocks' indices, to show progress.
        processes: The processes that merge together; each reads its own blocks, and all learn every statistic.
        block_indices: Indices of the blocks that this process reads; None: all.
        max_bytes: Memory that tiles and scores may take between passes.
        limits: How many values are looked at, computed and kept at a time.
        tasks: T, the number of adapters.
        size: D, the number of values per adapter.
        dtype: Dtype of the tiles.
        sample: Number of values per adapter that are sampled before an order statistic is searched.
        compiled: Whether scores and rules are compiled.
        why_not_compiled: Why they are not, although the scope is large enough; None otherwise.
        caches_tiles: Whether tiles stay in memory after the first pass.
    """

    blocks: Sequence[Block]
    _: dataclasses.KW_ONLY
    device: torch.device = CPU
    track: Callable[[Iterable[int]], Iterable[int]] = iter
    processes: Processes = ALONE
    block_indices: Sequence[int] | None = None
    max_bytes: float = math.inf
    limits: Limits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        self.tasks = self.blocks[0].shape[0]
        self.size = sum(block.size for block in self.blocks)
        self.dtype = self.limits.dtype(self.tasks, self.size)
        self.sample = self.limits.sample_size(self.tasks, self.size)
        worth = self.limits.worth_compiling(self.tasks, self.size)
        obstacle = compiling.why_not_compiled(self.device) if worth else None
        obstacles = self.processes.all_gather(obstacle) if worth else []
        self.why_not_compiled = next(filter(None, obstacles), None)
        self.compiled = worth and self.why_not_compiled is None
        cached = self.limits.cached_bytes(self.tasks, self.size, self.max_bytes)
        self.caches_tiles = cached > 0 and not self.compiled
        self._tiles: dict[tuple[int, int], Tensor] = {}  # cached, by block and first row

    def __repr__(self) -> str:
        return f"TaskVectors({self.tasks} adapters, {len(self.blocks)} blocks, {self.size:,} values each)"

    def order_statistics(self, score: Score, indices: Sequence[int]) -> Tensor:
        """Return the exact values that would be at some positions if the D scores of each row were sorted.

        Args:
            score: A function of a tile to K scores per entry.
            indices: Positions from 0 to D − 1.

        Returns:
            (K, 1, 1, len(indices)): `[..., i]` broadcasts against a tile.
        """
        compiled_score = self.compile(score)

        def sweep(
            scan: Callable[[Tensor], list[order_statistics.TileCounts]],
        ) -> Iterator[list[order_statistics.TileCounts]]:
            passed = self._sweep(lambda tile, _: scan(compiled_score(tile).flatten(1)))
            return (counts for _, counts in passed)

        values = order_statistics.order_statistics(
            self._sample(score), self.size, indices, sweep, self.processes, self.limits
        )
        return values[:, None, None, :]

    def extremes(self, score: Score) -> Tensor:
        """Return the smallest and the largest score of each row: (K, 1, 1, 2)."""
        score = self.compile(score)

        def of_tile(tile: Tensor, _: int) -> Tensor:
            scores = score(tile)
            return torch.stack([scores.amin((1, 2)), -scores.amax((1, 2))], dim=-1)

        def smallest(parts: Sequence[Sequence[Tensor]]) -> Tensor:
            return torch.stack([ends for part in parts for ends in part]).amin(0)

        ends = [ends.cpu() for _, ends in self._sweep(of_tile)]
        low, negated_high = self.processes.reduce(ends, smallest).to(self.device).unbind(-1)
        return torch.stack([low, -negated_high], dim=-1)[:, None, None, :]

    def sums(self, score: Score) -> Tensor:
        """Return the sum of each row's scores: (K, 1, 1).

        It is added in float64, row by row of a block and block by block, so that tiles and processes change nothing.
        """
        score, row_sums = self.compile(score), dict[int, list[Tensor]]()

        def of_rows(tile: Tensor, index: int) -> Tensor:
            scores = score(tile).flatten(1).unflatten(1, (-1, self.blocks[index].shape[2]))
            return scores.sum(2, dtype=torch.float64).cpu()

        for index, sums in self._sweep(of_rows):
            row_sums.setdefault(index, []).append(sums)

        def total(parts: Sequence[Mapping[int, Tensor]]) -> Tensor:
            by_block = union(parts)
            return torch.stack([by_block[index] for index in sorted(by_block)]).sum(0)

        with one_thread():
            block_sums = {i: torch.cat(sums, dim=1).sum(1) for i, sums in row_sums.items()}
        total_sum = self.processes.reduce(block_sums, total)
        return total_sum.to(self.device, self.dtype)[:, None, None]

    def transformed(self, transform: Transform) -> "TaskVectors":
        """Return these task vectors with every tile transformed.

        The random numbers of an entry follow from its adapter's key and its place in the block. A transform is called
        on whole rows, except for the sample, which decides only how soon an order statistic is found.
        """
        return self.with_blocks([transformed(block, transform) for block in self.blocks])

    def with_task_statistics(self, make_view: Callable[[Sequence[Tensor]], View]) -> "TaskVectors":
        """Return these task vectors with every tile changed by its block's task statistics.

        Args:
            make_view: A function of a block's statistics, one matrix per adapter, to a function of a tile and its row
                and column indices that returns the new tile.

        Raises:
            ValueError: A block has no task statistics.
        """
        return self.with_blocks([viewed_with_statistics(block, make_view) for block in self.blocks])

    def with_blocks(self, blocks: Sequence[Block]) -> "TaskVectors":
        """Return task vectors of other blocks, with the same device, processes, limits and everything else."""
        return dataclasses.replace(self, blocks=blocks)

    def combine(
        self, rule: Rule, *, whole: bool = False, weigh: Callable[[Tensor], Tensor] | None = None
    ) -> "Merged":
        """Return the merged blocks, each computed when it is asked for.

        Args:
            rule: How a tile is merged.
            whole: Tiles are whole blocks: for rules that are not elementwise.
            weigh: A function of a block's weights (T,), float64 on the CPU, to the weights that the rule gets instead.
        """
        return Merged(self, rule, whole, weigh)

    def compile(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return a function of tiles compiled, if this scope is compiled, or as it is."""
        return compiling.compile_tiles(function, self.device) if self.compiled else function

    def cached_per_tile(self, score: Score) -> Score:
        """Return a score that is computed once per tile, if tiles are cached; nobody may write into its values."""
        if not self.caches_tiles:
            return score
        known: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

        def cached(tile: Tensor) -> Tensor:
            if tile not in known:
                known[tile] = score(tile)
            return known[tile]

        return cached

    def tiles(
        self, index: int, whole: bool = False
    ) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
        """Yield a block's tiles: their rows, and a function that computes (T, r, c); to be compiled, (T, 1, r cols)."""
        block = self.blocks[index]
        opened = functools.cache(lambda: block.open(self.dtype, self.device))
        flat = self.compiled and not whole
        shape = (self.tasks, 1, -1) if flat else (self.tasks, -1, block.shape[2])
        values = self.limits.tile_size(self.device, compiled=self.compiled)
        for rows in row_slices(block.shape[1:], block.size if whole else values // self.tasks):
            cached = self._tiles.get((index, rows.start))
            if cached is None or whole:
                part = opened()
                yield rows, lambda part=part, rows=rows: part(rows, slice(None)).reshape(shape)
            else:
                yield rows, lambda cached=cached: cached

    def _own_blocks(self) -> Sequence[int]:
        """The indices of this process's blocks."""
        return range(len(self.blocks)) if self.block_indices is None else self.block_indices

    def _sweep(self, function: Callable[[Tensor, int], Result]) -> Iterator[tuple[int, Result]]:
        """Make a pass over this process's blocks: call a function on every tile and its block's index.

        Yields:
            The block's index and the result, in the order of the tiles.
        """

        def visit(item: tuple[int, slice, Callable[[], Tensor]]) -> tuple[int, Result]:
            index, rows, tile = item
            values = tile()
            if self.caches_tiles:
                self._tiles[index, rows.start] = values
            return index, function(values, index)

        tiles = (
            (index, rows, tile)
            for index in self.track(self._own_blocks())
            for rows, tile in self.tiles(index)
        )
        return in_order(visit, tiles)

    def _sample(self, score: Score) -> Tensor:
        """The scores of a part of every block, in proportion to its size, or of all values if there are few.

        A part is too small to compile the score for it.
        """
        fraction = min(1.0, self.sample / self.size)
        if fraction == 1:
            compiled_score = self.compile(score)
            scored = list(self._sweep(lambda tile, _: compiled_score(tile).flatten(1)))
        else:
            scored = [
                (index, score(self._part(index, fraction)).flatten(1))
                for index in self._own_blocks()
            ]

        def concatenated(parts: Sequence[Sequence[tuple[int, Tensor]]]) -> Tensor:
            in_block_order = sorted(itertools.chain(*parts), key=lambda item: item[0])
            return torch.cat([scores for _, scores in in_block_order], dim=1)

        on_cpu = [(index, scores.cpu()) for index, scores in scored]
        return self.processes.reduce(on_cpu, concatenated).to(self.device)

    def _part(self, index: int, fraction: float) -> Tensor:
        """A fraction of a block, about: random rows and columns that depend on the block's index alone."""
        block, generator = self.blocks[index], torch.Generator().manual_seed(index)
        _, rows, cols = block.shape
        height = min(rows, math.ceil(math.sqrt(fraction * block.size)))
        width = min(cols, math.ceil(fraction * block.size / height))
        sampled_rows = torch.randperm(rows, generator=generator)[:height].to(self.device)
        sampled_cols = torch.randperm(cols, generator=generator)[:width].to(self.device)
        return block.open(self.dtype, self.device)(sampled_rows, sampled_cols)


@dataclasses.dataclass(slots=True)
class BlockCounts:
    """Counts that were taken while a block was merged.

    Attributes:
        entries: Number of entries of the block.
        kept: How many of them each adapter kept; empty if the method drops none.
        conflicts: At how many entries adapters have opposite signs.
    """

    entries: int
    kept: list[int] = dataclasses.field(default_factory=list[int])
    conflicts: int = 0


class Merged:
    """The merged blocks of a scope; each is computed when it is asked for."""

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
            return merged, counts, sign_conflicts(tile)

        self._merge = merge if whole else tasks.compile(merge)

    def block(self, index: int) -> tuple[Tensor, BlockCounts]:
        """Return the merged block (rows, cols) of that index, on the CPU, and its counts."""
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


def sign_conflicts(tile: Tensor) -> Any:
    """Count the entries of a tile (T, r, c) at which two adapters have opposite signs."""
    low = order_statistics.as_numpy_on_cpu(tile.amin(0))
    high = order_statistics.as_numpy_on_cpu(tile.amax(0))
    return order_statistics.count((low < 0) & (high > 0))
