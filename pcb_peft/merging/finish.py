"""The last step of a merge: the rank of what leaves, and what the report says of it."""

import dataclasses
import functools
import math
from collections.abc import Mapping

from pcb_peft.deltas.delta import Delta, Dense, Diagonal, LowRank, Rescaled
from pcb_peft.deltas.rank import (
    Rank,
    budget_of,
    energy_of_whole,
    truncate,
    truncate_low_rank_part,
)
from pcb_peft.deltas.rank_budget import within_budget
from pcb_peft.errors import OptionError
from pcb_peft.formats import LazyDelta, format_for
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.merging.module_merger import MergeModule
from pcb_peft.merging.report import ModuleReport, Report
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.runtime.processes import Processes, current, union


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleFinalizer:
    """The last step of each module: its rank, its line in the report, its entry in the result."""

    alignment: AdapterSet
    produce: MergeModule
    rank: Rank
    low_rank_output: bool
    report: Report

    def lazy(self, module: str) -> LazyDelta:
        """What is dense is computed when it is asked for, and not kept."""
        return LazyDelta(Dense, self.alignment.modules[module].shape, lambda: self.finalize(module))

    def gather(self, own: Mapping[str, Delta], processes: Processes) -> dict[str, LazyDelta]:
        """The result, of what each process made; the first holds all of it, the others make again what they lack."""
        held, lines = processes.gather_dict(own), self.report.modules
        known = {m: (type(delta), rank_of(delta), lines[m]) for m, delta in own.items()}
        known = union(processes.all_gather(known))

        def load(module: str) -> Delta:
            return held[module] if module in held else self.finalize(module)

        entries: dict[str, LazyDelta] = {}
        for module, template in self.alignment.modules.items():
            lines.pop(module, None)  # in the order of modules, whichever was first
            kind, rank, lines[module] = known[module]
            loader = functools.partial(load, module)
            entries[module] = dataclasses.replace(
                template, kind=kind, load=loader, rank=rank, missing=""
            )
        return entries

    def finalize(self, module: str) -> Delta:
        """The merged delta; its line goes into the report."""
        outcome = self.produce(module)
        delta, energy, norm = self._ranked(module, outcome.delta)
        counts = outcome.counts
        entries = max(1, sum(count.entries for count in counts))
        names = [adapter.name for adapter in self.alignment.adapters]
        columns = [count.kept or [count.entries] * len(names) for count in counts]
        dropping = any(count.kept for count in counts)
        kept = [sum(column) / entries for column in zip(*columns, strict=True) if dropping]
        self.report.modules[module] = ModuleReport(
            shape=delta.shape,
            rank=rank_of(delta),
            energy=energy * outcome.energy,
            norm=norm,
            kept=dict(zip(names, kept, strict=False)),
            conflicts=sum(count.conflicts for count in counts) / entries,
        )
        return delta

    def _ranked(self, module: str, delta: Delta) -> tuple[Delta, float, float]:
        """The delta at the rank that was asked for, the energy that it retains, and its norm."""
        if isinstance(self.rank, str):  # "full"
            delta = Dense(delta.matrix(), layout=delta.layout)
            return delta, 1.0, delta.norm()
        if isinstance(delta, Rescaled):
            delta, energy = truncate_low_rank_part(delta, self.rank)
            return delta, energy, delta.norm()
        if isinstance(delta, Diagonal) or (isinstance(delta, LowRank) and self.rank is None):
            return delta, 1.0, delta.norm()
        rescaling_as_dense = self.rank is None and not self.low_rank_output
        cut, energy = truncate(
            delta, self.alignment.total_rank(module) if rescaling_as_dense else self.rank
        )
        return cut, energy, math.sqrt(energy) * delta.norm()


def check_writable(recipe: Recipe, *, fold: bool) -> None:
    """Raises PcbPeftError where what a recipe makes cannot be written so."""
    if fold and recipe.base_model is None:
        raise OptionError(
            "a fold writes the base model with the merge in it: give base_model too (--base-model)"
        )
    if not fold and recipe.rank == "full":
        format_for(Dense)


def apply_rank_budget(
    entries: dict[str, LazyDelta], rank: Rank, report: Report
) -> dict[str, LazyDelta]:
    """The same entries, at their shares of a total rank if the rank is one."""
    budget = budget_of(rank)
    if budget is None:
        return entries

    def shared_out(_: object) -> dict[str, tuple[LowRank, float, float]]:
        added = {module: entry.load().low_rank_part for module, entry in entries.items()}
        return {
            module: (cut, *_energy_and_norm(entries[module].load(), cut, energy))
            for module, (cut, energy) in within_budget(added, budget).items()
        }

    shares = current().reduce(None, shared_out)
    for module, (cut, energy, norm) in shares.items():
        line = report.modules[module]
        report.modules[module] = dataclasses.replace(
            line, rank=cut.rank, energy=line.energy * energy, norm=norm
        )
    return {
        module: dataclasses.replace(
            entries[module], load=functools.partial(_cut, entries[module], cut), rank=cut.rank
        )
        for module, (cut, _, _) in shares.items()
    }


def _cut(entry: LazyDelta, cut: LowRank) -> Delta:
    return entry.load().with_low_rank_part(cut) if entry.kind is Rescaled else cut


def _energy_and_norm(delta: Delta, cut: LowRank, energy: float) -> tuple[float, float]:
    """The energy that a delta retains if its low-rank part is cut, and retains `energy` of its own; and what norm."""
    left = delta.with_low_rank_part(cut)
    return energy_of_whole(delta, energy), left.norm()


def rank_of(delta: Delta) -> int | None:
    """Of a low-rank delta, or of a delta's low-rank part."""
    part = delta.low_rank_part
    return part.rank if isinstance(part, LowRank) else None
