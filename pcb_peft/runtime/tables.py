"""Tables and small bar charts in plain text."""

from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words_last: bool = False) -> str:
    """Return a table: the first column flush left, the others flush right.

    Args:
        header: The heads of the columns.
        rows: As many cells each.
        words_last: The last column holds words: it is flush left, too.

    >>> print(table(("task", "kept"), [("math", "97 %"), ("translation", "8 %")]))
    task         kept
    math         97 %
    translation   8 %
    """
    lines, left = [header, *rows], {0, len(header) - 1 if words_last else 0}
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def bars(values: Sequence[float]) -> str:
    """Return one bar per value, as high as the value is beside the largest.

    >>> bars([1, 2, 4])
    '▂▄█'
    """
    largest = max(values, default=0)
    if not largest > 0:
        return BARS[0] * len(values)
    return "".join(BARS[max(0, round(value / largest * len(BARS)) - 1)] for value in values)
