"""The report of a merge as one self-contained HTML page: tables, heat maps, spectra, the recipe."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapters
from pcb_peft.base.model import lazy_base
from pcb_peft.base.paths import distinct_targets, layer_labels
from pcb_peft.files.json_text import first_bytes
from pcb_peft.inspection.compare import compare_adapters
from pcb_peft.inspection.comparison import Comparison
from pcb_peft.inspection.geometry import has_factors, singular_values
from pcb_peft.merging.report import ModuleReport, Report, least_share, report_lines, title
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.recipes.weights import plain
from pcb_peft.reporting.charts import HEIGHT, HeatMap, curve
from pcb_peft.reporting.in_short import in_short
from pcb_peft.reporting.merge_record import MergeRecord, record_of
from pcb_peft.runtime.progress import Track, tracker
from pcb_peft.runtime.units import format_duration
from pcb_peft.version import __version__
from pcb_peft.writing.atomic import write_file_atomically
from pcb_peft.writing.targets import Overwrite

TEMPLATE = "page.html"
SHARES = (0.9, 0.99, 0.999)
"""Fractions of the energy for which the page tells the rank that holds them."""
Terms = Callable[[ModuleReport], tuple[float, float] | None]
"""From a module's line to the numerator and the denominator of a fraction; None where it has none."""
MARK = b"<!-- pcb_peft report -->"
OTHER = "other"
"""Column of a heat map for modules outside of all layers."""
_NUMBER = re.compile(r"\.\d+\.")


@dataclasses.dataclass(frozen=True, slots=True)
class Spectrum:
    """The strength of a change's directions, over all modules.

    Attributes:
        energies: Share of ‖ΔW‖² in the strongest k directions of every module, for k from 1.
        ranks: The smallest k that holds 90, 99 and 99.9 % of it.
    """

    energies: Sequence[float]
    ranks: Mapping[str, int]


def write_report(
    merged: MergedAdapter | str | Path,
    path: str | Path,
    adapters: Sequence[Any] | None = None,
    *,
    evaluation: Any = None,
    overwrite: Overwrite = False,
    progress: bool | None = None,
) -> None:
    """Write the report of a merge as one HTML page that needs no network.

    It shows, per layer and target, the share of each adapter and the sign conflicts; how much the adapters have in
    common; the energy of the merge by rank; the recipe, without local paths; and an evaluation, if there is one.

    Args:
        merged: The merge, or the directory in which it was saved, or folded into its base model.
        path: File to write, such as "report.html".
        adapters: Those that went into it; default: read again from where the recipe says.
        evaluation: What `evaluate` returned for this merge; default: what it wrote into the merge's directory.
        overwrite: Replace a file that exists: True, if it is such a report; "all", whatever it is.
        progress: Show a bar; default: on a terminal.

    Raises:
        AdapterError: An adapter is no longer where the recipe says; or the directory holds no report of a merge.
        OutputError: The file cannot be written.

    Example:
        >>> from pcb_peft import merge_adapters, write_report
        >>> write_report(merge_adapters(["math-lora", "code-lora"]), "report.html")
    """
    track = tracker(progress)
    record = record_of(merged, evaluation)
    sources = adapters or record.recipe.adapters
    base = lazy_base(record.recipe.base_model, dequantize=record.recipe.dequantize)
    loaded = load_adapters(sources, base_model=base)
    text = render(record.public(), loaded, track)
    write_file_atomically(
        Path(path),
        lambda file: file.write_text(text, "utf-8"),
        overwrite=overwrite,
        is_ours=is_report,
    )


def is_report(path: Path) -> bool:
    """True for a file that `write_report` wrote."""
    return MARK in first_bytes(path, len(MARK) + 64)


def render(record: MergeRecord, adapters: Sequence[Adapter], track: Track) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("pcb_peft.reporting", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    report = record.report
    comparison = _comparison(adapters, record.recipe)
    spectrum = None if record.merged is None else spectrum_of(record.merged, track)
    return environment.get_template(TEMPLATE).render(
        title=title(report),
        base_model=record.base_model,
        in_short=in_short(report, comparison, evaluated=record.evaluation is not None),
        lines=report_lines(report),
        seconds=format_duration(report.seconds) if report.seconds else "",
        adapters=_adapters(record),
        has_kept=bool(report.kept),
        shares=_share_maps(report),
        wheres=_other_maps(report),
        matrices=[] if comparison is None else _matrices(comparison),
        advice=() if comparison is None else comparison.advice,
        spectrum=_spectrum_chart(spectrum, report),
        ranks=_ranks(record, spectrum, adapters, track),
        evaluation=record.evaluation,
        recipe=record.recipe.to_yaml(),
        version=__version__,
    )


def spectrum_of(adapter: Adapter, track: Track) -> Spectrum | None:
    """Return how the energy of an adapter grows with its rank; None for dense changes and (IA)³ vectors."""
    squares: list[Tensor] = []
    for module in track(list(adapter.modules), "spectra"):
        if adapter.modules.entries[module].rank is None:
            return None
        delta = adapter.modules[module]
        if has_factors(delta):
            squares.append(singular_values(delta).square())
    longest = max((len(one) for one in squares), default=0)
    if not longest:
        return None
    total = torch.stack([torch.nn.functional.pad(s, (0, longest - len(s))) for s in squares]).sum(0)
    energies = (total.cumsum(0) / total.sum()).tolist()
    ranks = {
        f"{share:.1%}".replace(".0%", "%"): next(
            (k for k, energy in enumerate(energies, 1) if energy >= share), longest
        )
        for share in SHARES
    }
    return Spectrum(energies, ranks)


def _comparison(adapters: Sequence[Adapter], recipe: Recipe) -> Comparison | None:
    """Return the adapters side by side; None where there is one only."""
    if len(adapters) < 2:
        return None
    return compare_adapters(
        adapters, recipe.base_model, dequantize=recipe.dequantize, progress=False
    )


def _adapters(record: MergeRecord) -> list[dict[str, Any]]:
    """One row per adapter: what is known of it, and how long its bars are, in percent."""
    lines, weights = record.report.adapters, plain(record.recipe.weights)
    names = list(lines) or [source.name for source in record.recipe.adapters]
    norm = max((line.norm for line in lines.values()), default=0.0) or 1.0
    share = max([1.0, *(line.share or 0.0 for line in lines.values())])
    rows: list[dict[str, Any]] = []
    for name, source, weight in zip(names, record.recipe.adapters, weights, strict=True):
        row = {"name": name, "path": source.path, "weight": weight, "line": lines.get(name)}
        if (line := lines.get(name)) is not None:
            row["norm_bar"] = 100 * line.norm / norm
            row["share_bar"] = 100 * max(0.0, line.share or 0.0) / share
            row["least"] = least_share(line)
        rows.append(row)
    return rows


def _share_maps(report: Report) -> list[HeatMap]:
    """Return the share of each adapter, all on one scale."""
    cells = {
        name: _cells(report.modules, functools.partial(_share_terms, name))
        for name in report.adapters
    }
    largest = max((value for one in cells.values() for value in one.values()), default=0.0)
    maps = [
        HeatMap.of(name, "", values, (0.0, max(largest, 1e-9))) for name, values in cells.items()
    ]
    return [one for one in maps if one.rows]


def _other_maps(report: Report) -> list[HeatMap]:
    """Return the agreement of signs, the strength of the merge, and the energy that its rank leaves."""
    modules = report.modules
    where = f" in {report.space} space" if report.space else ""
    maps = [
        HeatMap.of(
            "Agreement of signs",
            f"How much less often signs differ{where} than random ones do. 0 is chance; a stronger colour is more "
            "agreement.",
            _cells(modules, _agreement_terms),
            (0.0, 0.25),
        )
    ]
    total = math.fsum(line.norm**2 for line in modules.values())
    strengths = _sums(modules, lambda line: (line.norm**2, 0.0))
    if total:
        parts = {place: above / total for place, (above, _) in strengths.items()}
        maps.append(
            HeatMap.of(
                "Where the merge changes the model",
                "The part of ‖ΔW‖² that lies there, of all modules.",
                parts,
                (0.0, max(parts.values())),
                ".1%",
            )
        )
    kept = _cells(modules, _energy_terms)
    if kept and min(kept.values()) < 0.9999:
        words = "The part of ‖ΔW‖² that the rank leaves. A stronger colour is less: there most is cut off."
        maps.append(HeatMap.of("Retained energy", words, kept, (1.0, min(0.5, *kept.values()))))
    return [one for one in maps if one.rows]


def _share_terms(name: str, line: ModuleReport) -> tuple[float, float] | None:
    if name not in line.products:
        return None
    return line.products[name], line.adapter_norms[name] ** 2


def _agreement_terms(line: ModuleReport) -> tuple[float, float] | None:
    size = math.prod(line.shape)
    agreement = line.conflicts_chance - line.conflicts
    return (agreement * size, size) if line.conflicts_chance else None


def _energy_terms(line: ModuleReport) -> tuple[float, float] | None:
    return (line.norm**2, line.norm**2 / line.energy) if line.energy else None


def _cells(modules: Mapping[str, ModuleReport], terms: Terms) -> dict[tuple[str, str], float]:
    """Σ numerator / Σ denominator over the modules of each target and layer, where anything changes."""
    sums = _sums(modules, terms)
    return {place: above / below for place, (above, below) in sums.items() if below}


def _sums(
    modules: Mapping[str, ModuleReport], terms: Terms
) -> dict[tuple[str, str], tuple[float, float]]:
    """Σ numerator and Σ denominator of each target and layer, in the order of the layers."""
    layers = layer_labels(modules)
    inside = {module: _NUMBER.split(module, maxsplit=1)[-1] for module in modules}
    targets = distinct_targets(inside.values())
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for module in dict.fromkeys((*layers, *modules)):
        if (pair := terms(modules[module])) is None:
            continue
        place = targets[inside[module]], layers.get(module, OTHER)
        above, below = sums.get(place, (0.0, 0.0))
        sums[place] = above + pair[0], below + pair[1]
    return sums


def _matrices(comparison: Comparison) -> list[HeatMap]:
    """Adapter by adapter: cosines, shared directions, shared initialisations."""
    geometry, names = comparison.geometry, comparison.names
    if geometry is None:
        return []
    outputs = f"Overlap of the column spaces; random ones have {geometry.outputs_chance:.2f}."
    inputs = f"Overlap of the row spaces; random ones have {geometry.inputs_chance:.2f}."
    start = "Near 1: trained from the same lora_A, which methods that solve linear systems need a ridge for."
    matrices = [
        ("Cosine of ΔW", "1: the same change; 0: nothing in common.", geometry.cosines),
        ("Shared inputs", inputs, geometry.inputs),
        ("Shared outputs", outputs, geometry.outputs),
        ("Shared initialisation", start, geometry.initial),
    ]
    maps = [
        HeatMap.of(name, words, _matrix_cells(names, values), (0.0, 1.0))
        for name, words, values in matrices
    ]
    return [one for one in maps if one.rows]


def _matrix_cells(names: Sequence[str], values: Tensor) -> dict[tuple[str, str], float]:
    """The lower triangle: row and column of each pair; columns are numbered as the rows are."""
    return {
        (f"{i} {names[i - 1]}", str(j)): float(values[i - 1, j - 1])
        for i in range(2, len(names) + 1)
        for j in range(1, i)
        if not values[i - 1, j - 1].isnan()
    }


def _spectrum_chart(spectrum: Spectrum | None, report: Report) -> dict[str, Any] | None:
    """The curve of the energy of the merge before its rank was cut, as far as it is known."""
    if spectrum is None or len(spectrum.energies) < 2:
        return None
    retained = report.energy
    return {
        "points": curve([retained * energy for energy in spectrum.energies]),
        "rank": report.rank,
        "retained": f"{retained:.1%}",
        "end": (1 - retained) * HEIGHT,
        "last": len(spectrum.energies),
    }


def _ranks(
    record: MergeRecord, spectrum: Spectrum | None, adapters: Sequence[Adapter], track: Track
) -> list[tuple[str, list[int]]]:
    """The ranks that hold 90, 99 and 99.9 % of the energy of each adapter, and of the merge."""
    names = list(record.report.adapters) or [adapter.name for adapter in adapters]
    own = {name: spectrum_of(one, track) for name, one in zip(names, adapters, strict=False)} | {
        "the merge": spectrum
    }
    return [(name, list(one.ranks.values())) for name, one in own.items() if one is not None]
