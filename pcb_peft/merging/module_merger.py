"""Space meets method: the merge of one module, and what all scopes need for it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.calibrations import Calibration, prepared
from pcb_peft.deltas.delta import Delta
from pcb_peft.deltas.metric import ModuleMetric
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.runtime.processes import ALONE, Processes, current
from pcb_peft.runtime.progress import Track, silent
from pcb_peft.runtime.threads import in_order, one_thread
from pcb_peft.spaces import Projection, in_metric
from pcb_peft.tasks import counter_rng
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits
from pcb_peft.tasks.task_vectors import BlockCounts, Merged, TaskVectors

Result = TypeVar("Result")

FACTOR_BYTES = 12
"""Bytes per value of a module's factors: lora_A or lora_B in float32, and a basis in float64."""
CORE_BYTES = 8  # per value of its cores, in float64


class Machine(NamedTuple):
    """The resources of a merge, and how it shows its progress.

    Attributes:
        device: Where tiles are computed.
        track: Shows progress.
        max_memory: Bytes of projections, and of tiles, that may be kept between passes.
        limits: How many values are looked at, computed and kept at a time.
    """

    device: torch.device
    track: Track
    max_memory: int
    limits: Limits = DEFAULT_LIMITS


@dataclasses.dataclass(frozen=True, slots=True)
class MergedModule:
    """The merge of one module.

    Attributes:
        delta: The merged delta.
        counts: What was counted in each block.
        energy: Fraction of Σ_t ‖λ_t ΔW_t‖²_F that the space holds.
    """

    delta: Delta
    counts: Sequence[BlockCounts] = ()
    energy: float = 1.0


MergeModule: TypeAlias = Callable[[str], MergedModule]
"""Merges a module, given its path."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ModuleMerger:
    """All that is needed to merge any module of a setting.

    Attributes:
        adapter_set: The adapters side by side.
        weights: From a module to the adapters' weights there.
        encode: A space with its options bound.
        method: A method with its options bound.
        machine: What the merge may use.
        seed: Seed of random methods.
        before: Calibrations of the adapters' deltas, in this order.
        statistic: The statistic that the method needs: its name, and from a module to one matrix per adapter.
        side_by_side: True if a merged module takes little memory, so that several may be merged at a time.
        in_parts: True if the low-rank part of a delta that has one is encoded by itself.
        metric: From a module to the metric in which its deltas are compared; None: all inputs count alike.
        processes: The processes that merge together.
    """

    adapter_set: AdapterSet
    weights: Callable[[str], Sequence[float]]
    encode: Callable[[Sequence[Delta], Sequence[float]], Projection]
    method: Callable[[TaskVectors], Merged]
    machine: Machine
    seed: int
    before: Sequence[Calibration] = ()
    statistic: tuple[str, Callable[[str], Sequence[Tensor]]] | None = None
    side_by_side: bool = False
    in_parts: bool = False
    metric: Callable[[str], ModuleMetric | None] | None = None
    processes: Processes = dataclasses.field(default_factory=current)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the terminal and the other processes: a copy merges alone, and in silence."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        here = {"machine": self.machine._replace(track=silent), "processes": ALONE}
        return functools.partial(ModuleMerger, **fields | here), ()

    @property
    def own(self) -> Sequence[str]:
        """The modules that are this process's to merge."""
        modules = self.adapter_set.modules
        return self.processes.partition(
            list(modules), lambda module: math.prod(modules[module].shape)
        )

    def each(self, function: Callable[[str], Result], description: str) -> Iterator[Result]:
        """Call a function on each of this process's modules; yield its results in order.

        Several modules are worked on at a time if they are small.
        """
        most = self.machine.max_memory // (
            6 * max(map(self.projection_bytes, self.adapter_set.modules))
        )
        workers = max(1, most) if self.side_by_side else 1
        return in_order(function, self.machine.track(self.own, description), workers)

    @one_thread()
    def project(self, module: str) -> Projection:
        """The module's projection; its random numbers depend on seed, adapter, module and block, on no order."""
        metric = self.metric_of(module)
        encode = self.encode if metric is None else in_metric(self.encode, metric)
        projection = encode(self.deltas(module), self.weights(module))
        statistic = self._projected_statistic(projection, module)
        blocks = tuple(
            dataclasses.replace(block, keys=self._keys(module, index), task_statistics=statistic)
            for index, block in enumerate(projection.blocks)
        )
        return dataclasses.replace(projection, blocks=blocks)

    def deltas(self, module: str) -> Sequence[Delta]:
        """The adapters' deltas as they are merged, after the calibrations before."""
        return prepared(self.adapter_set.deltas(module), self.before)

    def metric_of(self, module: str) -> ModuleMetric | None:
        """The metric of a module; None: all inputs count alike."""
        return None if self.metric is None else self.metric(module)

    def weighted_deltas(self, module: str) -> list[Delta]:
        """The adapters' own deltas, times their weights."""
        pairs = zip(self.adapter_set.deltas(module), self.weights(module), strict=True)
        return [delta.scaled(weight) for delta, weight in pairs]

    def projection_bytes(self, module: str) -> int:
        """Upper bound of the bytes that a module's projection holds: factors, bases and cores."""
        rank = self.adapter_set.total_rank(module, in_parts=self.in_parts)
        shape = self.adapter_set.modules[module].shape
        return projection_bytes(shape, rank, len(self.adapter_set.adapters))

    def _projected_statistic(
        self, projection: Projection, module: str
    ) -> Callable[[], Sequence[Tensor]] | None:
        """The module's statistic in the projection's coordinates; read when it is asked for."""
        if self.statistic is None:
            return None
        (kind, read), project = self.statistic, projection.project_statistic
        return lambda: [project[kind](values) for values in read(module)]

    def _keys(self, module: str, block: int) -> tuple[int, ...]:
        adapters = self.adapter_set.adapters
        return tuple(counter_rng.key(self.seed, _identity(a), module, block) for a in adapters)


def projection_bytes(shape: tuple[int, int], rank: int, tasks: int) -> int:
    """Upper bound of the bytes of a projection of a module of this shape and total rank."""
    return FACTOR_BYTES * rank * sum(shape) + CORE_BYTES * tasks * rank * rank


def decoded(projection: Projection, results: Sequence[tuple[Tensor, BlockCounts]]) -> MergedModule:
    """The merged module of a projection's merged blocks."""
    delta = projection.decode([values for values, _ in results])
    return MergedModule(delta, [counts for _, counts in results], projection.energy)


def _identity(adapter: Adapter) -> str:
    """The name by which random numbers know an adapter in any company: its tensors' hash, or else its name."""
    digest = adapter.source.sha256 if adapter.source else None
    return digest or adapter.name
