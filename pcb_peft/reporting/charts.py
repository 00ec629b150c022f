"""Heat maps and curves as numbers for the page: what is drawn where, and how dark."""

import dataclasses
from collections.abc import Mapping, Sequence

from pcb_peft.runtime.units import rounded

WIDTH, HEIGHT = 640, 220
"""Size of a curve, in the units of its SVG."""
STEPS = 9
"""Shades of a heat map, from 0 for the smallest value to 8."""
WIDE = 16
"""A heat map with more columns is drawn without its numbers, which then stand in a table below it."""
TICKS = 10
"""About so many columns of a wide heat map have their heading."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a heat map.

    Attributes:
        text: Its value; empty where there is none.
        shade: From 0 to `STEPS` − 1.
    """

    text: str
    shade: int


@dataclasses.dataclass(frozen=True, slots=True)
class HeatMap:
    """A table whose cells are shaded by value; the values stand in it, so that nobody has to see colours.

    Attributes:
        title: Its heading.
        words: How to read it.
        columns: Headings of its columns.
        rows: Heading and cells of each row.
        limits: The values with the lightest and the darkest shade.
    """

    title: str
    words: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    limits: tuple[float, float]

    @classmethod
    def of(
        cls,
        title: str,
        words: str,
        values: Mapping[tuple[str, str], float],
        limits: tuple[float, float],
        style: str = ".2f",
    ) -> "HeatMap":
        """Lay out values by row and column; rows and columns stand in the order in which they come.

        Args:
            title: Its heading.
            words: How to read it.
            values: By row and column.
            limits: The values with the lightest and the darkest shade.
            style: Format of a value.
        """
        rows = list(dict.fromkeys(row for row, _ in values))
        columns = list(dict.fromkeys(column for _, column in values))
        cells = {place: _cell(value, *limits, style) for place, value in values.items()}
        empty = Cell("", 0)
        return cls(
            title,
            words,
            tuple(columns),
            tuple((row, tuple(cells.get((row, c), empty) for c in columns)) for row in rows),
            limits,
        )

    @property
    def is_wide(self) -> bool:
        """True if its cells have no room for numbers."""
        return len(self.columns) > WIDE

    @property
    def margin(self) -> int:
        """Room for the headings of the rows, in the units of its SVG, in which a cell is 10 wide and 16 high."""
        return 7 * max(len(row) for row, _ in self.rows) + 8

    @property
    def ticks(self) -> list[tuple[int, str]]:
        """Place and text of the headings that a wide heat map shows."""
        step = max(1, round(len(self.columns) / TICKS))
        return [(10 * place + 5, name) for place, name in enumerate(self.columns)][::step]


def _cell(value: float, low: float, high: float, style: str) -> Cell:
    place = min(1.0, max(0.0, (value - low) / (high - low)))
    return Cell(rounded(value, style), round(place * (STEPS - 1)))


def curve(values: Sequence[float]) -> str:
    """Return the points of an SVG polyline for values from 0 to 1, the first at the left.

    >>> curve([0.0, 1.0])
    '0.0,220.0 640.0,0.0'
    """
    step = WIDTH / max(1, len(values) - 1)
    return " ".join(
        f"{place * step:.1f},{(1 - value) * HEIGHT:.1f}" for place, value in enumerate(values)
    )
