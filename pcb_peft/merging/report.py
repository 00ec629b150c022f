"""The report of a merge: what it decided, what became of each adapter, and what it cost.

A `ReportBuilder` collects lines and notes while a merge runs; the `Report` that it builds does not change any more.
"""

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pcb_peft.base.paths import layer_labels, target_of
from pcb_peft.merging.module_report import (
    AdapterReport,
    ModuleReport,
    adapter_report,
    mean_conflicts,
)
from pcb_peft.runtime.plots import heat_map
from pcb_peft.runtime.shown import counted
from pcb_peft.runtime.tables import table

LOW_ENERGY = 0.9
CLEARLY_LOSSLESS = 0.99995
USUAL_SHARE_FACTOR = 1.5
"""A merge whose share is this many times smaller or larger than usual is said to be weak or strong."""
NEVER_STRONG = 0.75
"""A share that is not too large for any number of adapters: merges with equally strong directions keep most at 0.7."""


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Report:
    """A merge as a whole.

    Attributes:
        method: The method's name.
        space: The space's name.
        scope: "global" or "module".
        modules: One line per module that is merged.
        notes: What was decided on the way, in words.
        seconds: How long the merge took; 0 where that is not known, as for a report that was read from its file.
        pending: The number of modules that are merged when they are read or folded (rank "full").
        names: The adapters, in the order of the merge.
    """

    method: str
    space: str
    scope: str
    modules: Mapping[str, ModuleReport] = dataclasses.field(default_factory=dict[str, ModuleReport])
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    pending: int = 0
    names: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """Retained fraction of the merged ‖ΔW‖²_F over all modules."""
        retained = math.fsum(module.norm**2 for module in self.modules.values())
        merged = math.fsum(
            module.norm**2 / module.energy for module in self.modules.values() if module.energy
        )
        return retained / merged if merged else 1.0

    @property
    def rank(self) -> int | None:
        """The highest rank of a module; None where no module has one."""
        ranks = [module.rank for module in self.modules.values() if module.rank is not None]
        return max(ranks, default=None)

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

    @property
    def conflicts_chance(self) -> float:
        """The same for as many adapters with random signs."""
        return self._mean([module.conflicts_chance for module in self.modules.values()])

    @property
    def adapters(self) -> dict[str, AdapterReport]:
        """The adapters in the merge, by name, in the order of the merge."""
        found = dict.fromkeys(n for line in self.modules.values() for n in line.adapter_norms)
        names = dict.fromkeys((*self.names, *found)) if found else {}
        kept = self.kept
        layers = layer_labels(self.modules)
        return {name: adapter_report(self.modules, layers, name, kept.get(name)) for name in names}

    @property
    def share(self) -> float | None:
        """The mean share of the adapters' own changes that the merge makes; None if it is not known."""
        shares = [one.share for one in self.adapters.values() if one.share is not None]
        return math.fsum(shares) / len(shares) if shares else None

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        totals = ("energy", "rank", "kept", "conflicts", "conflicts_chance", "share")
        adapters = {name: dataclasses.asdict(one) for name, one in self.adapters.items()}
        summary = {name: getattr(self, name) for name in totals}
        return {**dataclasses.asdict(self), **summary, "adapters": adapters}

    def __str__(self) -> str:
        return report_text(self)

    def __repr__(self) -> str:
        return f"<Report: {title(self)}>"

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """The report as HTML, as notebooks show it."""
        return report_html(self)

    def plot_shares(self) -> Any:
        """Draw the share of each adapter by layer.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            UnsupportedError: matplotlib is not installed.

        Example:
            merged.report.plot_shares().savefig("shares.png")
        """
        layers = dict.fromkeys(layer_labels(self.modules).values())
        shares = {
            name: {layer_name(layer): one.by_layer.get(layer, math.nan) for layer in layers}
            for name, one in self.adapters.items()
        }
        return heat_map("Share of each adapter's change that the merge makes", shares)

    def plot_conflicts(self) -> Any:
        """Draw the fraction of entries at which signs differ, by target and layer; chance is in the title.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        groups: dict[str, dict[str, list[ModuleReport]]] = {}
        labels = layer_labels(self.modules)
        for module in dict.fromkeys((*labels, *self.modules)):
            place = layer_name(labels[module]) if module in labels else "other"
            row = groups.setdefault(target_of(module), {})
            row.setdefault(place, []).append(self.modules[module])
        conflicts = {
            target: {place: mean_conflicts(lines) for place, lines in row.items()}
            for target, row in groups.items()
        }
        return heat_map(f"Sign conflicts; chance: {self.conflicts_chance:.2f}", conflicts)

    def _mean(self, values: Sequence[float]) -> float:
        sizes = [math.prod(module.shape) for module in self.modules.values()]
        return math.fsum(s * v for s, v in zip(sizes, values, strict=True)) / max(1, sum(sizes))


def title(report: Report) -> str:
    """Return one line: method, space, scope, and the number of modules."""
    count = len(report.modules) + report.pending
    rank = "" if report.rank is None else f", rank {report.rank}"
    return f"{report.method} in {report.space} space, {report.scope} scope: {counted(count, 'module')}{rank}"


def report_text(report: Report) -> str:
    """Return the report for a terminal."""
    cells = _adapter_cells(report)
    blocks = [table(*cells)] if cells else []
    return "\n".join([title(report) + _duration(report, ", in"), *blocks, *report_lines(report)])


def report_html(report: Report) -> str:
    """Return the report as HTML, for notebooks."""
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in report_lines(report))
    cells = _adapter_cells(report)
    adapters = _html_table(*cells) if cells else ""
    rows = [
        (
            name,
            f"{line.shape[0]} × {line.shape[1]}",
            "" if line.rank is None else str(line.rank),
            f"{line.energy:.4f}",
        )
        for name, line in report.modules.items()
    ]
    modules = _html_table(("module", "shape", "rank", "energy"), rows) if rows else ""
    return (
        f"<b>{html.escape(title(report))}</b>{_duration(report, ' in')}{adapters}<ul>{lines}</ul>"
        f"<details><summary>modules</summary>{modules}</details>"
    )


def _duration(report: Report, before: str) -> str:
    return f"{before} {report.seconds:.1f} s" if report.seconds else ""


def _html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{heads}</tr>{body}</table>"


def _adapter_cells(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """The table of the adapters; None where there is nothing to tell of them. Columns that say nothing are left out."""
    adapters = report.adapters.values()
    kept = ["-" if one.kept is None else f"{one.kept:.1%}" for one in adapters]
    columns = [
        ("adapter", list(report.adapters)),
        ("norm", [f"{one.norm:.4g}" for one in adapters]),
        ("share", ["-" if one.share is None else f"{one.share:.2f}" for one in adapters]),
        ("kept", kept if len(set(kept)) > 1 else []),  # else one line says it
        ("least share in", [least_share(one) for one in adapters]),
    ]
    shown = [(name, cells) for name, cells in columns if any(cell != "-" for cell in cells)]
    if not shown:
        return None
    return tuple(name for name, _ in shown), list(zip(*(c for _, c in shown), strict=True))


def layer_name(label: str) -> str:
    """Return the words for a layer: "layer 3", or "encoder 3" where the model has several lists of layers."""
    return f"layer {label}" if label.isdecimal() else label


def least_share(adapter: AdapterReport) -> str:
    """Return the target and the layer in which the merge makes the smallest part of an adapter's change."""
    targets, layers = adapter.by_target, adapter.by_layer
    parts: list[str] = []
    if len(targets) > 1:
        target = min(targets, key=targets.__getitem__)
        parts.append(f"{target} {targets[target]:.2f}")
    if len(layers) > 1:
        layer = min(layers, key=layers.__getitem__)
        parts.append(f"{layer_name(layer)} {layers[layer]:.2f}")
    return ", ".join(parts) or "-"


def report_lines(report: Report) -> list[str]:
    """Return sentences on signs, kept entries, energy and strength, and the notes."""
    lines: list[str] = []
    lines += [
        f"{n} changes nothing: was it trained?" for n, a in report.adapters.items() if not a.norm
    ]
    if report.conflicts_chance:
        where = f" in {report.space} space" if report.space else ""
        lines.append(
            f"signs differ at {report.conflicts:.1%} of the entries{where}; of random signs it would be "
            f"{report.conflicts_chance:.1%}"
        )
    if len(kept := {f"{fraction:.1%}" for fraction in report.kept.values()}) == 1:
        lines.append(f"each adapter kept {kept.pop()} of its entries")
    if report.energy < CLEARLY_LOSSLESS:
        lines.append(f"retained energy {report.energy:.1%}")
    if report.pending:
        lines.append(
            f"{report.pending} modules have a dense ΔW, which is computed when it is read or folded; sign conflicts "
            "and kept entries are counted by fold() and counted()"
        )
    return [*lines, *_on_strength(report), *report.notes]


def _on_strength(report: Report) -> list[str]:
    """A sentence for a merge that is weaker or stronger than those that keep most."""
    count = sum(one.share is not None for one in report.adapters.values())
    share = report.share
    if count < 2 or share is None or share <= 0:
        return []
    usual = count ** (-1 / 3)
    if usual / USUAL_SHARE_FACTOR <= share <= max(usual * USUAL_SHARE_FACTOR, NEVER_STRONG):
        return []
    word = "weak" if share < usual else "strong"
    return [
        f"the merge is {word}: it makes {share:.2f} of each adapter's own change, and merges of {count} keep most at "
        f"about {usual:.2f}; try {usual / share:.2g} times its scale (merged.scaled({usual / share:.2g}), or --set "
        f"scale={usual / share:.2g} where the recipe has none) and measure both with pcb-peft evaluate"
    ]


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

    def build(self, method: str, space: str, scope: str, seconds: float, **more: Any) -> Report:
        """The report of what was collected; `more` are its other fields."""
        notes = tuple(self._notes)
        return Report(method, space, scope, dict(self.modules), notes, seconds, **more)
