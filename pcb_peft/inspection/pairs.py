"""Geometry of adapters side by side: cosines, shared directions, sign conflicts."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.delta import Delta, Diagonal
from pcb_peft.deltas.inner import inner
from pcb_peft.inspection.geometry import (
    has_factors,
    initial_span,
    overlap,
    principal_cosines,
    sampled_rows,
    spans,
)
from pcb_peft.runtime.progress import Track

ROWS_SAMPLED = 32
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
        for i, j in itertools.combinations_with_replacement(deltas, 2):
            self.products[i, j] += inner(deltas[i].low_rank_part, deltas[j].low_rank_part)
        self._add_signs([_signs(delta) for delta in deltas.values()], deltas)
        low_rank = {i: delta for i, delta in deltas.items() if has_factors(delta)}
        bases = {i: spans(delta) for i, delta in low_rank.items()}
        initial = {i: initial_span(delta) for i, delta in low_rank.items()}
        for pair in itertools.combinations(low_rank, 2):
            columns, rows = zip(bases[pair[0]], bases[pair[1]], strict=True)
            self.outputs.add(pair, *columns)
            self.inputs.add(pair, *rows)
            first, second = initial[pair[0]], initial[pair[1]]
            if first is not None and second is not None:
                cosine = float(principal_cosines(first, second).median())
                self.initial.values.setdefault(pair, []).append(cosine)

    def _add_signs(self, signs: Sequence[Tensor], deltas: Mapping[int, Delta]) -> None:
        """Count entries with both signs, and those that random signs would give, in proportion to the module's size."""
        if len(signs) < 2:
            return
        stacked = torch.stack(list(signs))
        present = (stacked != 0).sum(0)
        weight = math.prod(next(iter(deltas.values())).shape) / stacked[0].numel()
        conflict = (stacked > 0).any(0) & (stacked < 0).any(0)
        shared = present[present > 1].double()
        self.conflicts += weight * float(conflict.sum())
        self.expected += weight * float((1 - 2 ** (1 - shared)).sum())
        self.entries += weight * len(shared)

    def geometry(self) -> Geometry:
        """Return the sums as cosines, medians and fractions."""
        norms = self.products.diagonal().clamp(min=0).sqrt()
        products = self.products.triu() + self.products.triu(1).T
        lengths = norms[:, None] * norms
        entries = max(self.entries, 1.0)
        return Geometry(
            norms=tuple(norms.tolist()),
            cosines=torch.where(lengths > 0, products / lengths, 0.0),
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

    def add(self, pair: Pair, first: Tensor, second: Tensor) -> None:
        """Add the overlap of two spans, unless one is empty."""
        sizes = first.shape[1], second.shape[1]
        if min(sizes):
            self.values.setdefault(pair, []).append(overlap(first, second))
            self.chances.append(math.sqrt(max(sizes) / len(first)))

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


def _signs(delta: Delta) -> Tensor:
    """Return the signs of a sample of the delta's entries; of an (IA)³, of l − 1."""
    if isinstance(delta, Diagonal):
        return (delta.l.double() - 1).sign()
    return sampled_rows(delta, ROWS_SAMPLED).sign()
