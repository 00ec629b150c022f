"""Figures of matplotlib, which is an extra: ``pip install 'pcb-peft[plots]'``."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

from pcb_peft.errors import UnsupportedError

COLOURS = "cividis"
"""A colour map that is as clear in grey, and to people who do not tell red from green."""
INCHES_PER_CELL = 0.55
DARK = 0.5


def heat_map(
    title: str,
    values: Mapping[str, Mapping[str, float]],
    limits: tuple[float, float] | None = None,
) -> Any:
    """Draw values by row and column, each with its number.

    Args:
        title: Heading of the figure.
        values: Row to column to value; a column that a row lacks stays empty.
        limits: The values of the darkest and the lightest colour; default: the smallest and the largest.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    columns = list(dict.fromkeys(column for row in values.values() for column in row))
    numbers = [[row.get(column, float("nan")) for column in columns] for row in values.values()]
    present = [number for row in numbers for number in row if not math.isnan(number)]
    low, high = limits or (min(present, default=0.0), max(present, default=1.0))
    size = (2.5 + INCHES_PER_CELL * len(columns), 1.2 + INCHES_PER_CELL * len(values))
    figure = figure_of(size)
    axes = figure.add_subplot()
    axes.imshow(numbers, cmap=COLOURS, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_title(title)
    for y, row in enumerate(numbers):
        for x, number in enumerate(row):
            if not math.isnan(number):
                bright = high > low and (number - low) / (high - low) > DARK
                colour = "black" if bright else "white"
                axes.text(x, y, f"{number:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.tight_layout()
    return figure


def figure_of(size: tuple[float, float], **options: Any) -> Any:
    """Return a new figure that belongs to no window.

    Args:
        size: Width and height in inches.
        **options: Further options of `matplotlib.figure.Figure`.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        module: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UnsupportedError(
            f"figures need matplotlib ({error}): pip install 'pcb-peft[plots]'; write_report and --report do without"
        ) from error
    return module.Figure(figsize=size, **options)
