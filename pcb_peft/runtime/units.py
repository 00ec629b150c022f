"""Numbers as people say them: "about 22 min", "1.3 GiB", "10.6 million"."""

DURATIONS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))
SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
COUNTS = (("trillion", 1e12), ("billion", 1e9), ("million", 1e6))


def format_duration(seconds: float) -> str:
    """Format a duration, rounded to what a person would say.

    >>> format_duration(1300), format_duration(5400), format_duration(2.54), format_duration(0.0312)
    ('22 min', '1.5 h', '2.5 s', '31 ms')
    """
    for unit, length in DURATIONS:
        if float(f"{seconds / length:.2g}") >= 1:
            return f"{_short(seconds / length)} {unit}"
    return "0 ms" if seconds < 0.0005 else "1 ms"


def format_size(count: float) -> str:
    """Format a number of bytes.

    >>> format_size(999), format_size(1_400_000_000), format_size(180 * 2**20)
    ('999 B', '1.3 GiB', '180 MiB')
    """
    for unit in SIZES[:-1]:
        if count < 999.5:
            return f"{_short(count)} {unit}"
        count /= 1024
    return f"{_short(count)} {SIZES[-1]}"


def format_count(count: int) -> str:
    """Format a number of things.

    >>> format_count(2304), format_count(10_616_832), format_count(1_240_000_000)
    ('2,304', '10.6 million', '1.24 billion')
    """
    for word, size in COUNTS:
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def rounded(value: float, style: str = ".2f") -> str:
    """Format a number, and what rounds to zero without a sign.

    >>> rounded(-0.001), rounded(-0.2), rounded(-0.0001, ".1%")
    ('0.00', '-0.20', '0.0%')
    """
    text = f"{value:{style}}"
    return text if any(digit in text for digit in "123456789") else text.lstrip("-")


def _short(number: float) -> str:
    """Two significant digits, or all digits before the point."""
    return f"{number:.0f}" if number >= 9.95 else f"{number:.2g}"
