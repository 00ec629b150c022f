"""The result of a comparison of adapters, and the screen that shows it."""

import dataclasses
import math
from typing import Any

from torch import Tensor

from pcb_peft.errors import OptionError
from pcb_peft.inspection.pairs import Geometry
from pcb_peft.runtime.plots import heat_map
from pcb_peft.runtime.tables import table
from pcb_peft.runtime.units import format_size, rounded

NOT_PREDICTED = (
    "None of these numbers tells which task a merge will lose: run texts, with pcb-peft evaluate."
)


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """Several adapters side by side. ``print`` it for one screen.

    Attributes:
        names: The adapters.
        geometry: Norms, cosines and shared directions; None where the adapters do not fit.
        problems: Why they cannot be merged, in words; empty where they can.
        merged_rank: Highest rank of a merge without loss; adapters that share directions need less. None for (IA)³.
        merged_bytes: Size of its tensors in float32.
        duplicates: Pairs that make the same change, or a multiple of it.
        shared_initialisation: True if some of them were trained from the same lora_A.
        notes: Decisions about names and base models.
        advice: What to do about it, each with its reason.
    """

    names: tuple[str, ...]
    geometry: Geometry | None = None
    problems: tuple[str, ...] = ()
    merged_rank: int | None = None
    merged_bytes: int = 0
    duplicates: tuple[tuple[str, str], ...] = ()
    shared_initialisation: bool = False
    notes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON; angles that are not known are null."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        if self.geometry is not None:
            numbers = dataclasses.fields(self.geometry)
            fields["geometry"] = {
                one.name: _plain(getattr(self.geometry, one.name)) for one in numbers
            }
        return fields

    def plot_cosines(self) -> Any:
        """Draw the cosine of ΔW of each pair of adapters.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            OptionError: The adapters do not fit each other.
            UnsupportedError: matplotlib is not installed.

        Example:
            compare_adapters(["math-lora", "code-lora"]).plot_cosines().savefig("cosines.png")
        """
        if self.geometry is None:
            raise OptionError(
                "these adapters cannot be merged, so there is nothing to draw: see problems"
            )
        rows = zip(self.names, self.geometry.cosines.tolist(), strict=True)
        cosines = {name: dict(zip(self.names, line, strict=True)) for name, line in rows}
        return heat_map("Cosine of ΔW", cosines, (0.0, 1.0))

    def __str__(self) -> str:
        if self.geometry is None:
            return "\n".join(["These adapters cannot be merged:", *self.problems])
        blocks = [_title(self), _strengths(self, self.geometry), *_matrices(self, self.geometry)]
        if self.geometry.conflicts_chance:
            blocks.append(_signs(self.geometry))
        blocks.append("\n".join([*self.notes, *self.advice, NOT_PREDICTED]))
        return "\n\n".join(blocks)

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.names)}>"


def _title(comparison: Comparison) -> str:
    size = format_size(comparison.merged_bytes)
    rank = comparison.merged_rank
    what = f"rank {rank} at most, {size}" if rank is not None else size
    count = len(comparison.names)
    return f"These {count} adapters can be merged. Without loss the merge has {what}."


def _strengths(comparison: Comparison, geometry: Geometry) -> str:
    total = math.fsum(geometry.norms) or 1.0
    rows = [
        (name, f"{norm:.4g}", f"{norm / total:.0%}")
        for name, norm in zip(comparison.names, geometry.norms, strict=True)
    ]
    return table(("adapter", "norm", "share"), rows)


def _matrices(comparison: Comparison, geometry: Geometry) -> list[str]:
    titles = {
        "cosine of ΔW": geometry.cosines,
        f"shared inputs (random: {geometry.inputs_chance:.2f})": geometry.inputs,
        f"shared outputs (random: {geometry.outputs_chance:.2f})": geometry.outputs,
    }
    return [
        _matrix(title, comparison.names, values)
        for title, values in titles.items()
        if not values.triu(1).isnan().any()
    ]


def _matrix(title: str, names: tuple[str, ...], values: Tensor) -> str:
    header = (title, *(str(number) for number in range(1, len(names) + 1)))
    rows = [
        (f"{number} {name}", *(_cosine(float(value)) for value in line))
        for number, (name, line) in enumerate(zip(names, values, strict=True), 1)
    ]
    return table(header, rows)


def _cosine(value: float) -> str:
    return "-" if math.isnan(value) else rounded(value)


def _signs(geometry: Geometry) -> str:
    return (
        f"signs differ at {geometry.conflicts:.1%} of the entries; of random signs it would be "
        f"{geometry.conflicts_chance:.1%}"
    )


def _plain(value: object) -> Any:
    if isinstance(value, Tensor):
        return [[None if math.isnan(x) else x for x in line] for line in value.tolist()]
    return None if isinstance(value, float) and math.isnan(value) else value
