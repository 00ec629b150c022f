"""Space meets method: from the deltas of a module to the merged one, over a scope."""

import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.calibrations import Calibration, prepared
from pcb_peft.deltas.delta import Delta
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.runtime.processes import Processes, current, union
from pcb_peft.runtime.progress import Track
from pcb_peft.runtime.threads import in_order, one_thread
from pcb_peft.spaces import Projection
from pcb_peft.tasks import counter_rng
from pcb_peft.tasks.blocks import Block, Index
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits
from pcb_peft.tasks.task_vectors import BlockCounts, Merged, TaskVectors

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, slots=True)
class MergedModule:
    """What became of a module.

    Attributes:
        delta: The merged one.
        counts: What was counted in each block.
        energy: Fraction of Σ_t ‖λ_t ΔW_t‖²_F that the space holds.
    """

    delta: Delta
    counts: Sequence[BlockCounts] = ()
    energy: float = 1.0


MergeModule: TypeAlias = Callable[[str], MergedModule]
"""From a module to what became of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleMerger:
    """What is needed to merge any module.

    Attributes:
        alignment: The adapters side by side.
        weights: From a module to the adapters' weights there.
        encode: A space with its options bound.
        method: A method with its options bound.
        device: Where tiles are computed.
        track: Shows progress.
        max_memory: Bytes of projections, and of tiles, that may be kept between passes.
        seed: Of random methods.
        before: What is done to the adapters' deltas first, in this order.
        after: What is done to the merged delta, in this order.
        data: The statistic that the method asks for, by name, and from a module to what was measured, per adapter.
        side_by_side: A merged module takes little memory, so that several may be merged at a time.
        in_parts: The low-rank part of a delta that has one is encoded by itself.
        processes: Those that merge together.
        limits: How many values are looked at, computed and kept at a time.
    """

    alignment: AdapterSet
    weights: Callable[[str], Sequence[float]]
    encode: Callable[[Sequence[Delta], Sequence[float]], Projection]
    method: Callable[[TaskVectors], Merged]
    device: torch.device
    track: Track
    max_memory: int
    seed: int
    before: Sequence[Calibration] = ()
    after: Sequence[Calibration] = ()
    data: tuple[str, Callable[[str], Sequence[Tensor]]] | None = None
    side_by_side: bool = False
    in_parts: bool = False
    processes: Processes = dataclasses.field(default_factory=current)
    limits: Limits = DEFAULT_LIMITS

    @property
    def own(self) -> Sequence[str]:
        """The modules that are this process's to merge."""
        modules = self.alignment.modules
        return self.processes.partition(
            list(modules), lambda module: math.prod(modules[module].shape)
        )

    def each(self, function: Callable[[str], Result], description: str) -> Iterator[Result]:
        """What a function makes of each of this process's modules, in order; several at a time if they are small."""
        most = self.max_memory // (6 * max(map(self._size, self.alignment.modules)))
        workers = max(1, most) if self.side_by_side else 1
        return in_order(function, self.track(self.own, description), workers)

    def passthrough(self) -> MergeModule:
        """A single adapter: its deltas times its weight."""

        def scale(module: str) -> MergedModule:
            (delta,), (weight,) = self._deltas(module), self.weights(module)
            return MergedModule(delta if weight == 1 else delta.scaled(weight))

        return scale

    def per_module(self) -> MergeModule:
        """Scope "module": every block of every module is a competition of its own."""

        def merge(module: str) -> MergedModule:
            projection = self._project(module)
            return _decoded(
                projection,
                [
                    self.method(TaskVectors([block], device=self.device, limits=self.limits)).block(
                        0
                    )
                    for block in projection.blocks
                ],
            )

        return merge

    def global_scope(self, note: Callable[[str], None]) -> MergeModule:
        """Scope "global": all blocks of all modules are one competition, whose statistics are taken here.

        Args:
            note: Takes what is worth saying of it.
        """
        projections = _Kept(self._project, self._size, self.max_memory)

        def encode(module: str) -> list[Block]:
            return [_closed(block) for block in projections(module).blocks]

        own = dict(zip(self.own, self.each(encode, "encode"), strict=True))
        known = union(self.processes.all_gather(own))
        blocks: list[Block] = []
        places: dict[str, range] = {}
        for module in self.alignment.modules:
            places[module] = range(len(blocks), len(blocks) + len(known[module]))
            opened = (_reopened(projections, module, i, b) for i, b in enumerate(known[module]))
            blocks += opened
        tasks = TaskVectors(
            blocks,
            device=self.device,
            track=lambda some: self.track(some, "statistics"),
            processes=self.processes,
            block_indices=[place for module in own for place in places[module]],
            max_bytes=projections.room,
            limits=self.limits,
        )
        merged = self.method(tasks)
        if merged.compiled:
            note("the arithmetic was compiled, which rounds exp and tanh in another way")
        elif tasks.why_not_compiled:
            note(
                f"the arithmetic was not compiled and took the longer for it: {tasks.why_not_compiled}"
            )

        def merge(module: str) -> MergedModule:
            return _decoded(projections(module), [merged.block(i) for i in places[module]])

        return merge

    def calibrated(self, produce: MergeModule) -> MergeModule:
        """What `produce` makes, calibrated afterwards."""
        for calibration in self.after:
            produce = self._calibrated(produce, calibration)
        return produce

    def _calibrated(self, produce: MergeModule, calibration: Calibration) -> MergeModule:
        whole = self._survey(produce, calibration)

        def calibrate(module: str) -> MergedModule:
            outcome = produce(module)
            with one_thread():
                delta = calibration(outcome.delta, self._weighted(module), *whole)
            return dataclasses.replace(outcome, delta=delta)

        return calibrate

    def _survey(self, produce: MergeModule, calibration: Calibration) -> Sequence[Tensor]:
        """What a calibration wants to know of the whole model, if anything."""
        if calibration.survey is None:
            return ()
        survey = one_thread()(calibration.survey)

        def ask(module: str) -> Tensor:
            return survey(produce(module).delta, self._weighted(module))

        own = dict(zip(self.own, self.each(ask, "survey"), strict=True))

        def total(parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
            every = union(parts)
            return torch.stack([every[module] for module in self.alignment.modules]).sum(0)

        return (self.processes.reduce(own, total),)

    def _deltas(self, module: str) -> Sequence[Delta]:
        """What enters the competition."""
        return prepared(self.alignment.deltas(module), self.before)

    def _weighted(self, module: str) -> list[Delta]:
        """The adapters' own deltas, times their weights."""
        pairs = zip(self.alignment.deltas(module), self.weights(module), strict=True)
        return [delta.scaled(weight) for delta, weight in pairs]

    @one_thread()
    def _project(self, module: str) -> Projection:
        """The module's projection; its random numbers depend on seed, adapter, module and block, on no order."""
        projection = self.encode(self._deltas(module), self.weights(module))
        blocks = tuple(
            dataclasses.replace(
                block,
                keys=self._keys(module, index),
                task_statistics=self._shown(projection, module),
            )
            for index, block in enumerate(projection.blocks)
        )
        return dataclasses.replace(projection, blocks=blocks)

    def _shown(self, projection: Projection, module: str) -> Callable[[], Sequence[Tensor]] | None:
        """What was measured of the module, in the projection's coordinates; read when it is asked for."""
        if self.data is None:
            return None
        (kind, read), show = self.data, projection.project_statistic
        return lambda: [show[kind](values) for values in read(module)]

    def _keys(self, module: str, block: int) -> tuple[int, ...]:
        adapters = self.alignment.adapters
        return tuple(counter_rng.key(self.seed, _identity(a), module, block) for a in adapters)

    def _size(self, module: str) -> int:
        """Bytes that a module's projection holds, at most: factors, bases and cores."""
        rows, cols = self.alignment.modules[module].shape
        rank = self.alignment.total_rank(module, in_parts=self.in_parts)
        return 12 * rank * (rows + cols) + 8 * len(self.alignment.adapters) * rank * rank


def _decoded(projection: Projection, results: Sequence[tuple[Tensor, BlockCounts]]) -> MergedModule:
    delta = projection.decode([values for values, _ in results])
    return MergedModule(delta, [counts for _, counts in results], projection.energy)


def _identity(adapter: Adapter) -> str:
    """What an adapter is known by wherever it stands among others: the hash of its tensors' file, or else its name."""
    digest = adapter.source.sha256 if adapter.source else None
    return digest or adapter.name


class _Kept:
    """A function of a module whose results are kept as long as there is room, and else computed again."""

    def __init__(
        self, function: Callable[[str], Projection], size: Callable[[str], int], room: int
    ) -> None:
        self._function, self._size, self.room = function, size, room
        self._kept: dict[str, Projection] = {}
        self._lock = threading.Lock()

    def __call__(self, module: str) -> Projection:
        if module in self._kept:
            return self._kept[module]
        projection = self._function(module)
        with self._lock:
            if self._size(module) <= self.room:
                self.room -= self._size(module)
                self._kept[module] = projection
        return projection


def _closed(block: Block) -> Block:
    """What another process has to know of a block."""
    statistics = block.task_statistics and _unmeasured
    return dataclasses.replace(block, open=_nothing, task_statistics=statistics)


def _unmeasured() -> Sequence[Tensor]:
    raise TypeError("the block is closed: what was measured is not here")


def _nothing(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
    raise TypeError(f"the block is closed: there is nothing to read as {dtype} on {device}")


def _reopened(
    projections: Callable[[str], Projection], module: str, index: int, block: Block
) -> Block:
    """The same block, whose values are asked of `projections` each time instead of being held."""

    def reopen(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
        return projections(module).blocks[index].open(dtype, device)

    def data() -> Sequence[Tensor]:
        again = projections(module).blocks[index].task_statistics
        return () if again is None else again()

    statistics = data if block.task_statistics else None
    return dataclasses.replace(block, open=reopen, task_statistics=statistics)
