"""Ways to merge a module: alone in its scope, with all others, or not at all. Each way can be pickled."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pcb_peft.calibrations import Calibration
from pcb_peft.deltas.rank import at_rank
from pcb_peft.deltas.rank_choice import Truncation
from pcb_peft.merging.module_merger import MergedModule, MergeModule, ModuleMerger, decoded
from pcb_peft.runtime.processes import union
from pcb_peft.runtime.threads import one_thread
from pcb_peft.spaces import Projection
from pcb_peft.tasks.blocks import Block, Index
from pcb_peft.tasks.task_vectors import Merged, TaskVectors


@dataclasses.dataclass(frozen=True, slots=True)
class Passthrough:
    """The merge of a single adapter: its deltas times its weight."""

    merger: ModuleMerger

    def __call__(self, module: str) -> MergedModule:
        (delta,), (weight,) = self.merger.deltas(module), self.merger.weights(module)
        return MergedModule(delta if weight == 1 else delta.scaled(weight))


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleScope:
    """Scope "module": statistics are taken over each block of each module alone."""

    merger: ModuleMerger

    def __call__(self, module: str) -> MergedModule:
        projection = self.merger.project(module)
        device, limits = self.merger.machine.device, self.merger.machine.limits
        scopes = (TaskVectors([block], device=device, limits=limits) for block in projection.blocks)
        return decoded(projection, [self.merger.method(scope).block(0) for scope in scopes])


@dataclasses.dataclass(frozen=True)
class GlobalScope:
    """Scope "global": statistics are taken over the blocks of all modules together.

    They are taken when `notes` or a module is first asked for; a pickled copy takes them again.
    """

    merger: ModuleMerger

    def __call__(self, module: str) -> MergedModule:
        projections, ranges, _, merged = self._state
        return decoded(projections(module), [merged.block(i) for i in ranges[module]])

    def __getstate__(self) -> dict[str, Any]:
        return {"merger": self.merger}

    @property
    def notes(self) -> list[str]:
        """Notes on how the statistics were taken, for the report."""
        _, _, tasks, merged = self._state
        if merged.compiled:
            return ["the arithmetic was compiled, which rounds exp and tanh in another way"]
        if tasks.why_not_compiled:
            return [
                f"the arithmetic was not compiled and took longer for it: {tasks.why_not_compiled}"
            ]
        return []

    @functools.cached_property
    def _state(self) -> tuple["_Projections", Mapping[str, range], TaskVectors, Merged]:
        """The projections, each module's blocks by number, the task vectors, and what the method made of them."""
        merger = self.merger
        projections = _Projections(merger)

        def describe(module: str) -> list[BlockSpec]:
            return [spec_of(block) for block in projections(module).blocks]

        own = dict(zip(merger.own, merger.each(describe, "encode"), strict=True))
        specs = union(merger.processes.all_gather(own))
        blocks: list[Block] = []
        ranges: dict[str, range] = {}
        for module in merger.adapter_set.modules:
            ranges[module] = range(len(blocks), len(blocks) + len(specs[module]))
            blocks += [spec.block(projections, module, i) for i, spec in enumerate(specs[module])]
        tasks = TaskVectors(
            blocks,
            device=merger.machine.device,
            track=lambda items: merger.machine.track(items, "statistics"),
            processes=merger.processes,
            block_indices=[number for module in own for number in ranges[module]],
            max_bytes=projections.free,
            limits=merger.machine.limits,
        )
        return projections, ranges, tasks, merger.method(tasks)


@dataclasses.dataclass(frozen=True, slots=True)
class Truncated:
    """A merge whose modules are truncated in a metric, or before they are calibrated: no calibration raises a rank."""

    merge: MergeModule
    merger: ModuleMerger
    rank: Truncation

    def __call__(self, module: str) -> MergedModule:
        merged, metric = self.merge(module), self.merger.metric_of(module)
        if metric is None:
            delta, energy = at_rank(merged.delta, self.rank)
        else:
            delta, energy = at_rank(metric.enter(merged.delta), self.rank)
            delta = metric.leave(delta)
        return dataclasses.replace(merged, delta=delta, energy=merged.energy * energy)


class Calibrated:
    """A merge whose modules are calibrated afterwards, by one calibration."""

    def __init__(self, merge: MergeModule, merger: ModuleMerger, calibration: Calibration) -> None:
        self._merge, self._merger, self._calibration = merge, merger, calibration
        self._totals = self._survey()

    def __call__(self, module: str) -> MergedModule:
        merged = self._merge(module)
        with one_thread():
            deltas = self._merger.weighted_deltas(module)
            delta = self._calibration(merged.delta, deltas, *self._totals)
        return dataclasses.replace(merged, delta=delta)

    def _survey(self) -> Sequence[Tensor]:
        """The total over the model that the calibration needs, if it needs one."""
        if self._calibration.survey is None:
            return ()
        survey = one_thread()(self._calibration.survey)

        def ask(module: str) -> Tensor:
            return survey(self._merge(module).delta, self._merger.weighted_deltas(module))

        own = dict(zip(self._merger.own, self._merger.each(ask, "survey"), strict=True))

        def total(parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
            answers = union(parts)
            modules = self._merger.adapter_set.modules
            return torch.stack([answers[module] for module in modules]).sum(0)

        return (self._merger.processes.reduce(own, total),)


class BlockSpec(NamedTuple):
    """A block without its values: what another process has to know of it. The fields are `Block`'s."""

    shape: tuple[int, int, int]
    weights: tuple[float, ...]
    keys: tuple[int, ...]
    has_statistic: bool

    def block(self, projections: Callable[[str], Projection], module: str, index: int) -> Block:
        """The block again; its values are asked of `projections` each time instead of being held."""
        return Block(
            self.shape,
            self.weights,
            functools.partial(_open, projections, module, index),
            self.keys,
            functools.partial(_statistic, projections, module, index)
            if self.has_statistic
            else None,
        )


def spec_of(block: Block) -> BlockSpec:
    """The description of a block."""
    return BlockSpec(block.shape, block.weights, block.keys, block.task_statistics is not None)


def _open(
    projections: Callable[[str], Projection],
    module: str,
    index: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[Index, Index], Tensor]:
    return projections(module).blocks[index].open(dtype, device)


def _statistic(
    projections: Callable[[str], Projection], module: str, index: int
) -> Sequence[Tensor]:
    read = projections(module).blocks[index].task_statistics
    return () if read is None else read()


class _Projections:
    """The projections of all modules, kept while there is memory, and else computed again.

    Attributes:
        free: The bytes that are left for others.
    """

    def __init__(self, merger: ModuleMerger) -> None:
        self._merger, self.free = merger, merger.machine.max_memory
        self._kept: dict[str, Projection] = {}
        self._lock = threading.Lock()

    def __call__(self, module: str) -> Projection:
        if module in self._kept:
            return self._kept[module]
        projection = self._merger.project(module)
        size = self._merger.projection_bytes(module)
        with self._lock:
            if size <= self.free:
                self.free -= size
                self._kept[module] = projection
        return projection
