"""Heat maps and curves as numbers for the page: what is drawn where, and how dark."""

import dataclasses
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 640, 220
"""Size of a curve, in the units of its SVG."""
STEPS = 9
"""Shades of a heat map, from 0 for the smallest value to 8."""


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
    """

    title: str
    words: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

    @classmethod
    def of(
        cls,
        title: str,
        words: str,
        values: Mapping[tuple[str, str], float],
        limits: tuple[float, float],
    ) -> "HeatMap":
        """Lay out values by row and column; rows and columns stand in the order in which they come.

        Args:
            title: Its heading.
            words: How to read it.
            values: By row and column.
            limits: The values with the lightest and the darkest shade.
        """
        rows = list(dict.fromkeys(row for row, _ in values))
        columns = list(dict.fromkeys(column for _, column in values))
        cells = {place: _cell(value, *limits) for place, value in values.items()}
        empty = Cell("", 0)
        return cls(
            title,
            words,
            tuple(columns),
            tuple((row, tuple(cells.get((row, c), empty) for c in columns)) for row in rows),
        )


def _cell(value: float, low: float, high: float) -> Cell:
    place = min(1.0, max(0.0, (value - low) / (high - low)))
    return Cell(f"{value:.2f}", round(place * (STEPS - 1)))


def curve(values: Sequence[float]) -> str:
    """Return the points of an SVG polyline for values from 0 to 1, the first at the left.

    >>> curve([0.0, 1.0])
    '0.0,220.0 640.0,0.0'
    """
    step = WIDTH / max(1, len(values) - 1)
    return " ".join(
        f"{place * step:.1f},{(1 - value) * HEIGHT:.1f}" for place, value in enumerate(values)
    )
