"""Lines of a report: one per module, and what became of each adapter over all of them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pcb_peft.base.paths import target_of
from pcb_peft.deltas.inner import Overlap


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
        adapter_norms: ‖ΔW_t‖_F of each adapter that changes the module, by name; of an (IA)³ ‖l − 1‖, of a DoRA that
            of its low-rank part.
        products: ⟨M, ΔW_t⟩ of the result M with each of them; empty where the result is dense.
    """

    shape: tuple[int, int]
    rank: int | None
    energy: float
    norm: float
    kept: Mapping[str, float]
    conflicts: float
    adapter_norms: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    products: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])

    @property
    def conflicts_chance(self) -> float:
        """Fraction of the entries at which T adapters with random signs disagree: 1 − 2^(1 − T).

        T is the number of adapters that change anything here.
        """
        return 1 - 2.0 ** (1 - max(1, sum(norm > 0 for norm in self.adapter_norms.values())))

    def scaled(self, weight: float) -> "ModuleReport":
        """The line of the same module, times a number."""
        products = {name: weight * product for name, product in self.products.items()}
        return dataclasses.replace(self, norm=abs(weight) * self.norm, products=products)

    def beside(self, adapters: Mapping[str, Overlap]) -> "ModuleReport":
        """The same line, with what the adapters have in common with the result."""
        norms = {name: one.norm for name, one in adapters.items()}
        products = {n: one.product for n, one in adapters.items() if one.product is not None}
        return dataclasses.replace(self, adapter_norms=norms, products=products)

    @classmethod
    def from_plain(cls, fields: Mapping[str, Any]) -> "ModuleReport":
        """Return the line that `dataclasses.asdict` has made plain, perhaps by way of JSON."""
        rows, cols = fields["shape"]
        return dataclasses.replace(cls(**fields), shape=(rows, cols))


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterReport:
    """One of the adapters, in the merge.

    Attributes:
        norm: ‖ΔW_t‖ over all modules.
        share: ⟨M, ΔW_t⟩ / ‖ΔW_t‖², the part of the adapter's own change that the merge M makes; None where it is not
            known, or the adapter changes nothing.
        by_target: The same for the modules with one last name, such as q_proj.
        by_layer: The same for each layer: "0", or "encoder 0" where the model has several lists of layers.
        kept: Fraction of its entries that were kept; None where the method drops none.
    """

    norm: float
    share: float | None
    by_target: Mapping[str, float]
    by_layer: Mapping[str, float]
    kept: float | None


def adapter_report(
    modules: Mapping[str, ModuleReport],
    layer_labels: Mapping[str, str],
    name: str,
    kept: float | None,
) -> AdapterReport:
    """Sum up what became of one adapter.

    Args:
        modules: The lines of the report.
        layer_labels: Module to its layer, for those that lie in one, in the order of the layers.
        name: The adapter's.
        kept: Fraction of its entries that were kept; None where the method drops none.
    """
    lines = {m: line for m, line in modules.items() if name in line.adapter_norms}
    known = bool(lines) and all(name in line.products for line in lines.values())
    targets: dict[str, list[ModuleReport]] = {}
    layers: dict[str, list[ModuleReport]] = {}
    for module, line in lines.items() if known else ():
        targets.setdefault(target_of(module), []).append(line)
    for module, layer in layer_labels.items() if known else ():
        if module in lines:
            layers.setdefault(layer, []).append(lines[module])
    norm = math.sqrt(math.fsum(line.adapter_norms[name] ** 2 for line in lines.values()))
    return AdapterReport(
        norm=norm,
        share=_share(lines.values(), name) if known and norm else None,
        by_target=_shares(dict(sorted(targets.items())), name),
        by_layer=_shares(layers, name),
        kept=kept,
    )


def _shares(groups: Mapping[str, Sequence[ModuleReport]], name: str) -> dict[str, float]:
    """Return one adapter's share in each group of modules where it changes anything."""
    return {
        group: _share(lines, name)
        for group, lines in groups.items()
        if any(line.adapter_norms[name] for line in lines)
    }


def mean_conflicts(lines: Sequence[ModuleReport]) -> float:
    """Fraction of the entries of some modules at which signs differ."""
    sizes = [math.prod(line.shape) for line in lines]
    return math.fsum(s * line.conflicts for s, line in zip(sizes, lines, strict=True)) / sum(sizes)


def _share(lines: Iterable[ModuleReport], name: str) -> float:
    """⟨M, ΔW⟩ / ‖ΔW‖² of one adapter over some modules; 0 for one that changes nothing there."""
    some = list(lines)
    square = math.fsum(line.adapter_norms[name] ** 2 for line in some)
    return math.fsum(line.products[name] for line in some) / square if square else 0.0
