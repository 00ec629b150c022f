"""The report of a merge: what it decided and what it cost.

A `ReportBuilder` collects lines and notes while a merge runs; the `Report` that it builds does not change any more.
"""

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LOW_ENERGY = 0.9


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module of the merge.

    Attributes:
        shape: (out, in) of ΔW.
        rank: Rank of the result, of a DoRA its low-rank part; None where it is dense, or a vector.
        energy: Retained fraction of the merged ‖ΔW‖²_F, times what a lossy space holds of the adapters'.
        norm: ‖ΔW‖_F of the result.
        kept: Fraction of its entries that each adapter kept, by name; empty where the method drops none.
        conflicts: Fraction of the entries at which adapters disagree on the sign.
    """

    shape: tuple[int, int]
    rank: int | None
    energy: float
    norm: float
    kept: Mapping[str, float]
    conflicts: float

    def scaled(self, weight: float) -> "ModuleReport":
        """The line of the same module, times a number."""
        return dataclasses.replace(self, norm=abs(weight) * self.norm)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Report:
    """A merge as a whole.

    Attributes:
        method: The method's name.
        space: The space's name.
        scope: "global" or "module".
        modules: One line per module that is merged.
        notes: What was decided on the way, in words.
        seconds: How long the merge took.
        pending: The number of modules that are merged when they are read or folded (rank "full").
    """

    method: str
    space: str
    scope: str
    modules: Mapping[str, ModuleReport] = dataclasses.field(default_factory=dict[str, ModuleReport])
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    pending: int = 0

    @property
    def energy(self) -> float:
        """Retained fraction of the merged ‖ΔW‖²_F over all modules."""
        retained = math.fsum(module.norm**2 for module in self.modules.values())
        merged = math.fsum(
            module.norm**2 / module.energy for module in self.modules.values() if module.energy
        )
        return retained / merged if merged else 1.0

    @property
    def kept(self) -> dict[str, float]:
        """Fraction of its entries that each adapter kept, over all modules (weighted by ΔW's size)."""
        names = sorted({name for module in self.modules.values() for name in module.kept})
        return {
            name: self._mean([m.kept.get(name, 1.0) for m in self.modules.values()])
            for name in names
        }

    @property
    def conflicts(self) -> float:
        """Fraction of entries in sign conflict, over all modules (weighted by ΔW's size)."""
        return self._mean([module.conflicts for module in self.modules.values()])

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        totals = {"energy": self.energy, "kept": self.kept, "conflicts": self.conflicts}
        return {**dataclasses.asdict(self), **totals}

    def __str__(self) -> str:
        return "\n".join([f"{self._title} in {self.seconds:.1f} s", *self._totals, *self.notes])

    def __repr__(self) -> str:
        return f"<Report: {self._title}>"

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """The report as HTML, as notebooks show it."""
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in (*self._totals, *self.notes))
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{line.shape[0]} × {line.shape[1]}</td>"
            f"<td>{'' if line.rank is None else line.rank}</td><td>{line.energy:.4f}</td></tr>"
            for name, line in self.modules.items()
        )
        heads = "".join(f"<th>{head}</th>" for head in ("module", "shape", "rank", "energy"))
        table = f"<table><tr>{heads}</tr>{rows}</table>" if rows else ""
        return (
            f"<b>{html.escape(self._title)}</b> in {self.seconds:.1f} s<ul>{lines}</ul>"
            f"<details><summary>modules</summary>{table}</details>"
        )

    @property
    def _title(self) -> str:
        count = len(self.modules) + self.pending
        return f"{self.method} in {self.space} space, {self.scope} scope: {count} modules"

    @property
    def _totals(self) -> list[str]:
        totals: list[str] = []
        if self.modules:
            totals = [
                f"retained energy {self.energy:.4f}, sign conflicts {self.conflicts:.1%}",
                *(f"kept of {name}: {fraction:.1%}" for name, fraction in self.kept.items()),
            ]
        if self.pending:
            totals.append(
                f"{self.pending} modules have a dense ΔW, which is computed when it is read or folded; sign conflicts "
                "and kept entries are counted by fold() and counted()"
            )
        return totals

    def _mean(self, values: Sequence[float]) -> float:
        sizes = [math.prod(module.shape) for module in self.modules.values()]
        return math.fsum(s * v for s, v in zip(sizes, values, strict=True)) / max(1, sum(sizes))


class ReportBuilder:
    """Collects what a report will say.

    Attributes:
        modules: One line per module, so far.
    """

    def __init__(self, notes: Iterable[str] = ()) -> None:
        self.modules: dict[str, ModuleReport] = {}
        self._notes = dict.fromkeys(notes)

    def note(self, text: str) -> None:
        """Add a sentence, once."""
        self._notes[text] = None

    def build(
        self, method: str, space: str, scope: str, seconds: float, pending: int = 0
    ) -> Report:
        """The report of what was collected."""
        return Report(
            method, space, scope, dict(self.modules), tuple(self._notes), seconds, pending
        )
