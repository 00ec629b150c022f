"""The last step of a merge: each module at the rank that was asked for, with its line in the report."""

import dataclasses
import functools
import math
from typing import NamedTuple, TypeVar

from pcb_peft.deltas.delta import Delta, Dense, LowRank, Rescaled
from pcb_peft.deltas.inner import overlaps
from pcb_peft.deltas.rank import (
    energy_of_whole,
    truncate,
    truncate_low_rank_part,
)
from pcb_peft.deltas.rank_budget import within_budget
from pcb_peft.deltas.rank_choice import (
    LOSSLESS,
    FixedRank,
    Full,
    RankBudget,
    RankChoice,
    Truncation,
)
from pcb_peft.errors import OptionError
from pcb_peft.formats import LazyDelta, format_for
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.merging.module_merger import MergedModule, MergeModule, ModuleMerger
from pcb_peft.merging.report import ModuleReport, ReportBuilder
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.runtime.processes import current, union

Item = TypeVar("Item")


class FinishedModule(NamedTuple):
    """A merged module at its rank, and its line in the report."""

    delta: Delta
    line: ModuleReport

    def scaled(self, weight: float) -> "FinishedModule":
        """The same module, times a number."""
        return FinishedModule(self.delta.scaled(weight), self.line.scaled(weight))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ModuleFinisher:
    """Merges a module, sets its rank, and reports on it.

    Attributes:
        merger: What the modules of one setting need.
        adapters: The adapters as they were given, for the report.
        merge: Merges a module.
        rank: The rank to set.
        low_rank_output: True if the space's results have a low rank without truncation.
    """

    merger: ModuleMerger
    adapters: AdapterSet
    merge: MergeModule
    rank: Truncation | Full
    low_rank_output: bool

    def __call__(self, module: str) -> FinishedModule:
        merged = self.merge(module)
        delta, energy, norm = self._ranked(module, merged.delta)
        line = self._line(merged, delta, energy, norm)
        factored = merged.delta if isinstance(delta, Dense) else delta
        return FinishedModule(delta, line.beside(overlaps(factored, self.adapters.present(module))))

    def _line(self, merged: MergedModule, delta: Delta, energy: float, norm: float) -> ModuleReport:
        counts = merged.counts
        entries = max(1, sum(count.entries for count in counts))
        names = [adapter.name for adapter in self.merger.adapter_set.adapters]
        kept: dict[str, float] = {}
        if any(count.kept for count in counts):
            by_block = [count.kept or [count.entries] * len(names) for count in counts]
            by_adapter = zip(*by_block, strict=True)
            kept = {n: sum(some) / entries for n, some in zip(names, by_adapter, strict=True)}
        return ModuleReport(
            shape=delta.shape,
            rank=rank_of(delta),
            energy=energy * merged.energy,
            norm=norm,
            kept=kept,
            conflicts=sum(count.conflicts for count in counts) / entries,
        )

    def _ranked(self, module: str, delta: Delta) -> tuple[Delta, float, float]:
        """The delta at the rank that was asked for, the energy that it retains, and its norm."""
        if isinstance(self.rank, Full):
            dense = Dense(delta.matrix(), layout=delta.layout)
            return dense, 1.0, dense.norm()
        if isinstance(delta, Rescaled):
            cut, energy = truncate_low_rank_part(delta, self.rank)
            return cut, energy, cut.norm()
        lossless = self.rank == LOSSLESS
        if delta.multiplies or (isinstance(delta, LowRank) and lossless):
            return delta, 1.0, delta.norm()
        rank = self.rank
        if lossless and not self.low_rank_output:
            rank = FixedRank(self.merger.adapter_set.total_rank(module))
        cut, energy = truncate(delta, rank)
        return cut, energy, math.sqrt(energy) * delta.norm()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PendingModule:
    """A module that is merged when it is asked for, and not kept; it can be pickled without being merged."""

    finish: ModuleFinisher
    module: str
    weight: float = 1.0

    def __call__(self) -> FinishedModule:
        done = self.finish(self.module)
        return done if self.weight == 1 else done.scaled(self.weight)

    def scaled(self, weight: float) -> "PendingModule":
        """The same module, times a number."""
        return dataclasses.replace(self, weight=self.weight * weight)

    def delta(self) -> Delta:
        """The merged delta."""
        return self().delta

    @property
    def entry(self) -> LazyDelta:
        """The module in the result."""
        return LazyDelta(
            Dense, self.finish.merger.adapter_set.modules[self.module].shape, self.delta
        )


def gather(finish: ModuleFinisher, report: ReportBuilder) -> dict[str, LazyDelta]:
    """Merge all modules, each in one of the processes, and tell all processes of the results.

    The first process gets all deltas; the others merge again those that they are asked for and lack.

    Args:
        finish: Merges a module.
        report: Gets a line per module.
    """
    merger, processes = finish.merger, finish.merger.processes
    own = dict(zip(merger.own, merger.each(finish, "merge"), strict=True))
    deltas = processes.gather_dict({module: done.delta for module, done in own.items()})
    facts = {m: (type(done.delta), rank_of(done.delta), done.line) for m, done in own.items()}
    known = union(processes.all_gather(facts))
    entries: dict[str, LazyDelta] = {}
    for module, template in merger.adapter_set.modules.items():
        kind, rank, report.modules[module] = known[module]
        load = (
            functools.partial(_given, deltas[module])
            if module in deltas
            else PendingModule(finish, module).delta
        )
        entries[module] = dataclasses.replace(template, kind=kind, load=load, rank=rank, missing="")
    return entries


def _given(value: Item) -> Item:
    return value


def check_writable(recipe: Recipe, *, fold: bool) -> None:
    """Raises PcbPeftError where the result of a recipe cannot be written in this form."""
    if fold and recipe.base_model is None:
        raise OptionError(
            "a fold writes the base model with the merge in it: give base_model too (--base-model)"
        )
    if not fold and recipe.rank == Full():
        format_for(Dense)


def apply_rank_budget(
    entries: dict[str, LazyDelta], rank: RankChoice, adapters: AdapterSet, report: ReportBuilder
) -> dict[str, LazyDelta]:
    """Truncate all modules to their shares of a total rank; without such a budget they stay as they are."""
    if not isinstance(rank, RankBudget):
        return entries

    def distributed(_: object) -> dict[str, tuple[LowRank, float, float]]:
        parts = {module: entry.load().low_rank_part for module, entry in entries.items()}
        return {
            module: (cut, *_energy_and_norm(entries[module].load(), cut, energy))
            for module, (cut, energy) in within_budget(parts, rank.total).items()
        }

    shares = current().reduce(None, distributed)
    for module, (cut, energy, norm) in shares.items():
        line = report.modules[module]
        line = dataclasses.replace(line, rank=cut.rank, energy=line.energy * energy, norm=norm)
        report.modules[module] = line.beside(overlaps(cut, adapters.present(module)))
    return {
        module: dataclasses.replace(
            entries[module], load=functools.partial(_cut, entries[module], cut), rank=cut.rank
        )
        for module, (cut, _, _) in shares.items()
    }


def _cut(entry: LazyDelta, cut: LowRank) -> Delta:
    return entry.load().with_low_rank_part(cut) if entry.kind.rescales else cut


def _energy_and_norm(delta: Delta, cut: LowRank, energy: float) -> tuple[float, float]:
    """The energy and the norm of a delta with another low-rank part, which retains `energy` of the old one."""
    return energy_of_whole(delta, energy), delta.with_low_rank_part(cut).norm()


def rank_of(delta: Delta) -> int | None:
    """The rank of a low-rank delta, or of a delta's low-rank part; None where there is none."""
    part = delta.low_rank_part
    return part.rank if isinstance(part, LowRank) else None
