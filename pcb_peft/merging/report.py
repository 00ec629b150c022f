"""What a merge decided and what it cost."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

LOW_ENERGY = 0.9


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module of the merge.

    Attributes:
        shape: (out, in) of ΔW.
        rank: Of what leaves, of a DoRA its low-rank part; None where it is dense, or a vector.
        energy: Retained fraction of the merged ‖ΔW‖²_F, times what a lossy space holds of the adapters'.
        norm: ‖ΔW‖_F of what leaves.
        kept: Fraction of its entries that each adapter kept, by name; empty where the method drops none.
        conflicts: Fraction of the entries at which adapters disagree on the sign.
    """

    shape: tuple[int, int]
    rank: int | None
    energy: float
    norm: float
    kept: dict[str, float]
    conflicts: float


@dataclasses.dataclass(slots=True)
class Report:
    """A merge as a whole; `modules` fills up as modules are produced (with rank "full": when they are asked for)."""

    method: str
    space: str
    scope: str
    modules: dict[str, ModuleReport] = dataclasses.field(default_factory=dict[str, ModuleReport])
    notes: list[str] = dataclasses.field(default_factory=list[str])
    seconds: float = 0.0

    def note(self, text: str) -> None:
        """Adds what is worth saying, once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def energy(self) -> float:
        """Retained fraction of the merged ‖ΔW‖²_F over all modules."""
        left = math.fsum(module.norm**2 for module in self.modules.values())
        whole = math.fsum(
            module.norm**2 / module.energy for module in self.modules.values() if module.energy
        )
        return left / whole if whole else 1.0

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
        """Plain data, for JSON."""
        totals = {"energy": self.energy, "kept": self.kept, "conflicts": self.conflicts}
        return {**dataclasses.asdict(self), **totals}

    def __str__(self) -> str:
        lines = [
            f"{self.method} in {self.space} space, {self.scope} scope: "
            f"{len(self.modules)} modules in {self.seconds:.1f} s",
            f"retained energy {self.energy:.4f}, sign conflicts {self.conflicts:.1%}",
            *(f"kept of {name}: {fraction:.1%}" for name, fraction in self.kept.items()),
            *self.notes,
        ]
        return "\n".join(lines)

    def _mean(self, values: Sequence[float]) -> float:
        sizes = [math.prod(module.shape) for module in self.modules.values()]
        return math.fsum(s * v for s, v in zip(sizes, values, strict=True)) / max(1, sum(sizes))
