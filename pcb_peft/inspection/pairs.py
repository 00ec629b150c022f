"""Geometry of adapters side by side: cosines, shared directions, sign conflicts."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.delta import Delta, Diagonal
from pcb_peft.deltas.inner import inner
from pcb_peft.inspection.geometry import (
    blocks,
    has_factors,
    overlap,
    principal_cosines,
    products,
    sampled_signs,
    spans,
)
from pcb_peft.runtime.progress import Track

ROWS_SAMPLED = 16
"""Rows of each module at which signs are compared; a fixed sample, evenly spread."""

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Several adapters side by side. Matrices are (T, T), in the order of the adapters.

    Attributes:
        norms: ‖ΔW‖ of each adapter; of an (IA)³ ‖l − 1‖, of a DoRA that of its low-rank part.
        cosines: ⟨ΔW_s, ΔW_t⟩ / ‖ΔW_s‖‖ΔW_t‖ over all modules.
        inputs: Overlap of the row spaces, from 0 to 1: the median over the modules that both change; NaN where there
            is none.
        inputs_chance: Overlap of random spans of these sizes.
        outputs: Overlap of the column spaces.
        outputs_chance: Overlap of random spans of these sizes.
        initial: Median principal cosine of the rows of lora_A, the median over modules.
        conflicts: Fraction of the sampled entries, changed by two adapters or more, at which their signs differ.
        conflicts_chance: The same for adapters with random signs.
        has_common_modules: True if two adapters change one module.
    """

    norms: tuple[float, ...]
    cosines: Tensor
    inputs: Tensor
    inputs_chance: float
    outputs: Tensor
    outputs_chance: float
    initial: Tensor
    conflicts: float
    conflicts_chance: float
    has_common_modules: bool


class _Sums:
    """Sums over the modules seen so far."""

    def __init__(self, count: int) -> None:
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.inputs, self.outputs, self.initial = _Values(count), _Values(count), _Values(count)
        self.conflicts = self.expected = self.entries = 0.0
        self.has_common_modules = False

    def add(self, deltas: Mapping[int, Delta]) -> None:
        self.has_common_modules |= len(deltas) > 1
        factors = {
            i: delta.low_rank_part.factors() for i, delta in deltas.items() if has_factors(delta)
        }
        self._add_products(deltas, factors)
        self._add_signs([_signs(delta, factors.get(i)) for i, delta in deltas.items()], deltas)
        bases = {i: spans(deltas[i], pair) for i, pair in factors.items()}
        self.outputs.add({i: one.outputs for i, one in bases.items()}, overlap)
        self.inputs.add({i: one.inputs for i, one in bases.items()}, overlap)
        initial = {i: one.initial for i, one in bases.items() if one.initial is not None}
        self.initial.add(initial, _median_cosine)

    def _add_products(
        self, deltas: Mapping[int, Delta], factors: Mapping[int, tuple[Tensor, Tensor]]
    ) -> None:
        places = list(factors)
        for i, row in zip(places, products(list(factors.values())) if factors else [], strict=True):
            for j, product in zip(places, row, strict=True):
                self.products[i, j] += product
        for i, j in itertools.combinations_with_replacement(deltas, 2):
            if not (i in factors and j in factors):
                product = inner(deltas[i].low_rank_part, deltas[j].low_rank_part)
                self.products[i, j] += product
                self.products[j, i] += product if i != j else 0.0

    def _add_signs(self, signs: Sequence[Tensor], deltas: Mapping[int, Delta]) -> None:
        """Count entries with both signs, and those that random signs would give, in proportion to the module's size."""
        if len(signs) < 2:
            return
        stacked = torch.stack(list(signs))
        present = stacked.abs().sum(0)
        weight = math.prod(next(iter(deltas.values())).shape) / present.numel()
        conflict = (stacked.amax(0) > 0) & (stacked.amin(0) < 0)
        counts = torch.bincount(present.flatten(), minlength=2)[2:]
        chances = 1 - 2.0 ** -torch.arange(1, len(counts) + 1, dtype=torch.float64)
        self.conflicts += weight * float(conflict.sum())
        self.expected += weight * float((counts * chances).sum())
        self.entries += weight * float(counts.sum())

    def geometry(self) -> Geometry:
        """Return the sums as cosines, medians and fractions."""
        norms = self.products.diagonal().clamp(min=0).sqrt()
        lengths = norms[:, None] * norms
        entries = max(self.entries, 1.0)
        return Geometry(
            norms=tuple(norms.tolist()),
            cosines=torch.where(lengths > 0, self.products / lengths, 0.0),
            inputs=self.inputs.medians(),
            inputs_chance=self.inputs.chance(),
            outputs=self.outputs.medians(),
            outputs_chance=self.outputs.chance(),
            initial=self.initial.medians(),
            conflicts=self.conflicts / entries,
            conflicts_chance=self.expected / entries,
            has_common_modules=self.has_common_modules,
        )


class _Values:
    """A number for each pair of adapters and module, and the number that chance would give."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values: dict[Pair, list[float]] = {}
        self.chances: list[float] = []

    def add(self, bases: Mapping[int, Tensor], measure: Callable[[Tensor], float]) -> None:
        """Add a number for each pair of spans, unless one is empty.

        Args:
            bases: Orthonormal bases, by the adapter's place.
            measure: From XᵀY of two of them to the number.
        """
        spanned = {i: basis for i, basis in bases.items() if basis.shape[1]}
        if len(spanned) < 2:
            return
        grid = blocks(list(spanned.values()))
        for (row, i), (column, j) in itertools.combinations(enumerate(spanned), 2):
            block = grid[row][column]
            self.values.setdefault((i, j), []).append(measure(block))
            self.chances.append(math.sqrt(max(block.shape) / len(spanned[i])))

    def medians(self) -> Tensor:
        """Return the median over modules (T, T); 1 on the diagonal, NaN for a pair without a module in common."""
        matrix = torch.full((self.count, self.count), math.nan, dtype=torch.float64)
        for (i, j), values in self.values.items():
            matrix[i, j] = matrix[j, i] = median(values)
        return matrix.fill_diagonal_(1.0)

    def chance(self) -> float:
        """Return the median of what chance gives; NaN if there is nothing."""
        return median(self.chances) if self.chances else math.nan


def geometry_of(adapters: Sequence[Adapter], track: Track) -> Geometry:
    """Compare adapters module by module, from their factors.

    Args:
        adapters: Two or more that fit each other.
        track: Shows progress.

    Returns:
        Their geometry.

    Raises:
        MismatchError: A module has other shapes in two of them, or is a LoRA here and an (IA)³ there.
    """
    sums = _Sums(len(adapters))
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    for module in track(modules, "comparing"):
        sums.add({i: a.modules[module] for i, a in enumerate(adapters) if module in a.modules})
    return sums.geometry()


def _signs(delta: Delta, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the signs of a sample of the delta's entries; of an (IA)³, of l − 1."""
    if isinstance(delta, Diagonal):
        return (delta.l.double() - 1).sign().to(torch.int8)
    return sampled_signs(factors or delta.low_rank_part.factors(), ROWS_SAMPLED)


def _median_cosine(block: Tensor) -> float:
    return float(principal_cosines(block).median())
