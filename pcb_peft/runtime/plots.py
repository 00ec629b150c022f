"""Figures of matplotlib, which is an extra: ``pip install 'pcb-peft[plots]'``."""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pcb_peft.errors import UnsupportedError
from pcb_peft.runtime.units import rounded

COLOURS = "cividis"
"""A colour map that is as clear in grey, and to people who do not tell red from green."""
INCHES_PER_CELL = 0.55
WIDE = 24
"""A heat map with more columns has narrow cells without numbers, and a scale beside it."""
INCHES_PER_NARROW_CELL = 0.14
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
    is_wide = len(columns) > WIDE
    width = (INCHES_PER_NARROW_CELL if is_wide else INCHES_PER_CELL) * len(columns)
    figure = figure_of((2.5 + width, 1.2 + INCHES_PER_CELL * len(values)), layout="tight")
    axes = figure.add_subplot()
    image = axes.imshow(numbers, cmap=COLOURS, vmin=low, vmax=high, aspect="auto")
    step = math.ceil(len(columns) / WIDE)
    axes.set_xticks(range(0, len(columns), step), columns[::step], rotation=45, ha="right")
    axes.set_yticks(range(len(values)), [_plain(name) for name in values])
    axes.set_title(_plain(title))
    if is_wide:
        figure.colorbar(image, ax=axes)
    else:
        _write_numbers(axes, numbers, low, high)
    return figure


def _write_numbers(axes: Any, numbers: Sequence[Sequence[float]], low: float, high: float) -> None:
    """Write each number into its cell, in black or white."""
    for y, row in enumerate(numbers):
        for x, number in enumerate(row):
            if not math.isnan(number):
                bright = high > low and (number - low) / (high - low) > DARK
                colour = "black" if bright else "white"
                axes.text(x, y, rounded(number), ha="center", va="center", color=colour, fontsize=8)


def _plain(text: str) -> str:
    """Return a text of which matplotlib reads nothing as mathematics."""
    return text.replace("$", r"\$")


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
