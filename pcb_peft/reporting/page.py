"""The report of a merge as one self-contained HTML page: tables, heat maps, spectra, the recipe."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapters
from pcb_peft.base.model import lazy_base
from pcb_peft.base.paths import layer_of, target_of
from pcb_peft.inspection.geometry import has_factors, singular_values
from pcb_peft.inspection.pairs import Geometry, geometry_of
from pcb_peft.merging.report import ModuleReport, report_lines, title
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.recipes.weights import plain
from pcb_peft.reporting.charts import HeatMap, curve
from pcb_peft.runtime.progress import Track, tracker
from pcb_peft.runtime.units import format_duration
from pcb_peft.version import __version__
from pcb_peft.writing.atomic import write_file_atomically
from pcb_peft.writing.targets import Overwrite

TEMPLATE = "page.html"
SHARE_WORDS = (
    "The part of the adapter's own change that the merge makes: a stronger colour is more."
)
Terms = Callable[[ModuleReport], tuple[float, float] | None]
"""From a module's line to the numerator and the denominator of a fraction; None where it has none."""
MARK = b"<!-- pcb_peft report -->"
OTHER = "other"
"""Row of a heat map for modules outside of all layers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Spectrum:
    """The strength of a merge's directions, over all modules.

    Attributes:
        energies: Share of ‖ΔW‖² in the strongest k directions of every module, for k from 1.
        ranks: The smallest k that holds 90, 99 and 99.9 % of it.
    """

    energies: Sequence[float]
    ranks: Mapping[str, int]


def write_report(
    merged: MergedAdapter,
    path: str | Path,
    adapters: Sequence[Any] | None = None,
    *,
    evaluation: Any = None,
    overwrite: Overwrite = False,
    progress: bool | None = None,
) -> None:
    """Write the report of a merge as one HTML page that needs no network.

    It shows, per layer and target, the share of each adapter and the sign conflicts; how much the adapters have in
    common; the energy of the merge by rank; the recipe; and an evaluation, if there is one.

    Args:
        merged: The merge.
        path: File to write, such as "report.html".
        adapters: Those that went into it; default: read again from where the recipe says.
        evaluation: What `evaluate` returned for this merge.
        overwrite: Replace a file that exists: True, if it is such a report; "all", whatever it is.
        progress: Show a bar; default: on a terminal.

    Raises:
        AdapterError: An adapter is no longer where the recipe says.
        OutputError: The file cannot be written.

    Example:
        >>> from pcb_peft import merge_adapters, write_report
        >>> write_report(merge_adapters(["math-lora", "code-lora"]), "report.html")
    """
    track = tracker(progress)
    sources = adapters or merged.recipe.adapters
    loaded = load_adapters(sources, base_model=lazy_base(merged.recipe.base_model))
    text = render(merged, loaded, evaluation, track)

    def write(file: Path) -> None:
        file.write_text(text, "utf-8")

    write_file_atomically(Path(path), write, overwrite=overwrite, is_ours=is_report)


def is_report(path: Path) -> bool:
    """True for a file that `write_report` wrote."""
    with path.open("rb") as file:
        return MARK in file.read(len(MARK) + 64)


def render(
    merged: MergedAdapter, adapters: Sequence[Adapter], evaluation: Any, track: Track
) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("pcb_peft.reporting", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    report = merged.report
    return environment.get_template(TEMPLATE).render(
        title=title(report),
        base_model=merged.base_model,
        lines=report_lines(report),
        seconds=format_duration(report.seconds),
        adapters=_adapters(merged),
        heat_maps=_heat_maps(report.modules, list(report.adapters)),
        matrices=_matrices(adapters, track),
        spectrum=_spectrum_chart(spectrum_of(merged, track), report.rank),
        evaluation=evaluation,
        recipe=merged.recipe.to_yaml(),
        version=__version__,
    )


def spectrum_of(merged: Adapter, track: Track) -> Spectrum | None:
    """Return how the energy of a merge grows with its rank; None for dense merges and (IA)³ vectors."""
    squares: list[Tensor] = []
    for module in track(list(merged.modules), "spectra"):
        if merged.modules.entries[module].rank is None:
            return None
        delta = merged.modules[module]
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
        for share in (0.9, 0.99, 0.999)
    }
    return Spectrum(energies, ranks)


def _adapters(merged: MergedAdapter) -> list[dict[str, Any]]:
    """One row per adapter: what is known of it."""
    weights = plain(merged.recipe.weights)
    names = list(merged.report.adapters) or [source.name for source in merged.recipe.adapters]
    rows: list[dict[str, Any]] = []
    for name, source, weight in zip(names, merged.recipe.adapters, weights, strict=True):
        line = merged.report.adapters.get(name)
        rows.append({"name": name, "path": source.path, "weight": weight, "line": line})
    return rows


def _heat_maps(modules: Mapping[str, ModuleReport], adapters: Sequence[str]) -> list[HeatMap]:
    """Layer by target: the share of each adapter, all on one scale, and how far signs agree."""
    shares = {name: _cells(modules, functools.partial(_share_terms, name)) for name in adapters}
    largest = max((value for cells in shares.values() for value in cells.values()), default=0.0)
    maps = [
        HeatMap.of(f"Share of {name}", SHARE_WORDS, cells, (0.0, max(largest, 1e-9)))
        for name, cells in shares.items()
    ]
    agreement = HeatMap.of(
        "Agreement of signs",
        "By how much less often signs differ than random ones do: 0 is chance, a stronger colour is more agreement.",
        _cells(modules, _agreement_terms),
        (0.0, 0.25),
    )
    return [one for one in [*maps, agreement] if one.rows]


def _share_terms(name: str, line: ModuleReport) -> tuple[float, float] | None:
    if name not in line.products:
        return None
    return line.products[name], line.adapter_norms[name] ** 2


def _agreement_terms(line: ModuleReport) -> tuple[float, float] | None:
    size = math.prod(line.shape)
    agreement = line.conflicts_chance - line.conflicts
    return (agreement * size, size) if len(line.adapter_norms) > 1 else None


def _cells(modules: Mapping[str, ModuleReport], terms: Terms) -> dict[tuple[str, str], float]:
    """Σ numerator / Σ denominator over the modules of each layer and target."""
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for module, line in modules.items():
        if (pair := terms(line)) is None:
            continue
        layer = layer_of(module)
        place = OTHER if layer is None else str(layer), target_of(module)
        above, below = sums.get(place, (0.0, 0.0))
        sums[place] = above + pair[0], below + pair[1]
    return {place: above / below if below else 0.0 for place, (above, below) in sums.items()}


def _matrices(adapters: Sequence[Adapter], track: Track) -> list[HeatMap]:
    """Adapter by adapter: cosines and shared directions."""
    if len(adapters) < 2:
        return []
    geometry: Geometry = geometry_of(adapters, track)
    names = [adapter.name for adapter in adapters]
    matrices = [
        ("Cosine of ΔW", "1: the same change; 0: nothing in common.", geometry.cosines),
        (
            "Shared inputs",
            f"Overlap of the row spaces; random ones have {geometry.inputs_chance:.2f}.",
            geometry.inputs,
        ),
        (
            "Shared outputs",
            f"Overlap of the column spaces; random ones have {geometry.outputs_chance:.2f}.",
            geometry.outputs,
        ),
    ]
    return [
        HeatMap.of(name, words, _matrix_cells(names, values), (0.0, 1.0))
        for name, words, values in matrices
        if not values.isnan().any()
    ]


def _matrix_cells(names: Sequence[str], values: Tensor) -> dict[tuple[str, str], float]:
    """The lower triangle: row and column of each pair; columns are numbered as the rows are."""
    return {
        (f"{i} {names[i - 1]}", str(j)): float(values[i - 1, j - 1])
        for i in range(2, len(names) + 1)
        for j in range(1, i)
    }


def _spectrum_chart(spectrum: Spectrum | None, rank: int | None) -> dict[str, Any] | None:
    if spectrum is None or len(spectrum.energies) < 2:
        return None
    return {"points": curve(spectrum.energies), "ranks": spectrum.ranks, "rank": rank}
