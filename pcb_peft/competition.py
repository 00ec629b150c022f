"""Space meets method: from the deltas of a module to the merged one, over a scope."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from pcb_peft.alignment import Alignment
from pcb_peft.delta import Delta
from pcb_peft.progress import Track
from pcb_peft.spaces import Projection
from pcb_peft.statistics import Block, BlockCounts, Merged, TaskVectors


@dataclasses.dataclass(frozen=True, slots=True)
class Competition:
    """What is needed to merge any module.

    Attributes:
        alignment: The adapters side by side.
        weights: One per adapter.
        encode: A space with its options bound.
        method: A method with its options bound.
        device: Where tiles are computed.
        track: Shows progress.
        max_memory: Bytes of projections that may be kept between passes.
    """

    alignment: Alignment
    weights: Sequence[float]
    encode: Callable[[Sequence[Delta], Sequence[float]], Projection]
    method: Callable[[TaskVectors], Merged]
    device: torch.device
    track: Track
    max_memory: int

    def none(self) -> Callable[[str], tuple[Delta, list[BlockCounts]]]:
        """A single adapter: its deltas times its weight."""

        def scale(module: str) -> tuple[Delta, list[BlockCounts]]:
            (delta,), (weight,) = self.alignment.deltas(module), self.weights
            return (delta if weight == 1 else delta.scaled(weight)), []

        return scale

    def each_module(self) -> Callable[[str], tuple[Delta, list[BlockCounts]]]:
        """Scope "module": every block of every module is a competition of its own."""

        def merge(module: str) -> tuple[Delta, list[BlockCounts]]:
            projection = self._project(module)
            results = [
                self.method(TaskVectors([block], device=self.device)).block(0)
                for block in projection.blocks
            ]
            return projection.decode([values for values, _ in results]), [
                counts for _, counts in results
            ]

        return merge

    def whole_model(self) -> Callable[[str], tuple[Delta, list[BlockCounts]]]:
        """Scope "global": all blocks of all modules are one competition, whose statistics are taken here."""
        projections = _Kept(self._project, self._size, self.max_memory)
        blocks: list[Block] = []
        places: dict[str, range] = {}
        for module in self.track(self.alignment.modules, "encode"):
            own = projections(module).blocks
            places[module] = range(len(blocks), len(blocks) + len(own))
            blocks += [_reopened(projections, module, i, block) for i, block in enumerate(own)]
        tasks = TaskVectors(
            blocks, device=self.device, track=lambda some: self.track(some, "statistics")
        )
        merged = self.method(tasks)

        def merge(module: str) -> tuple[Delta, list[BlockCounts]]:
            results = [merged.block(i) for i in places[module]]
            delta = projections(module).decode([values for values, _ in results])
            return delta, [counts for _, counts in results]

        return merge

    def _project(self, module: str) -> Projection:
        return self.encode(self.alignment.deltas(module), self.weights)

    def _size(self, module: str) -> int:
        """Bytes that a module's projection holds, at most: factors, bases and cores."""
        rows, cols = self.alignment.modules[module].shape
        rank = self.alignment.total_rank(module)
        return 12 * rank * (rows + cols) + 8 * len(self.weights) * rank * rank


class _Kept:
    """A function of a module whose results are kept as long as the budget lasts, and else computed again."""

    def __init__(
        self, function: Callable[[str], Projection], size: Callable[[str], int], budget: int
    ) -> None:
        self._function, self._size, self._budget = function, size, budget
        self._kept: dict[str, Projection] = {}

    def __call__(self, module: str) -> Projection:
        if module in self._kept:
            return self._kept[module]
        projection = self._function(module)
        if self._size(module) <= self._budget:
            self._budget -= self._size(module)
            self._kept[module] = projection
        return projection


def _reopened(
    projections: Callable[[str], Projection], module: str, index: int, block: Block
) -> Block:
    """The same block, whose data is asked of `projections` each time instead of being held."""
    return dataclasses.replace(
        block, open=lambda dtype, device: projections(module).blocks[index].open(dtype, device)
    )
