"""Tables of names: one line per module, the original code's name of it and diffusers' name.

::

    double_blocks.#.img_attn.proj = transformer_blocks.#.attn.to_out.0
    double_blocks.#.img_attn.qkv = transformer_blocks.#.attn.{to_q,to_k,to_v}
    transformer_blocks.#.attn.(to_q|to_k)

``#`` is a number. ``(a|b)`` stands for one line with a and one with b; a second list on the line follows the first.
Braces name the parts of a matrix that diffusers keeps apart, from its first rows to its last; ``to_q*3`` has three
times the rows of the others. A line without ``=`` is the same in both. ``~`` in place of ``=`` says that diffusers has
the second half of the rows before the first (scale and shift), if there are twice as many rows as columns.
"""

import re
from collections.abc import Iterator, Sequence

from pcb_peft.errors import UnsupportedError

CHOICE = re.compile(r"\(([^()]*)\)")


def _expanded(line: str) -> Iterator[str]:
    """Yield the lines that a line with choices stands for."""
    original, found, diffusers = line.partition(" = ")
    choices = CHOICE.search(original)
    if choices is None:
        yield line
        return
    here = choices[1].split("|")
    theirs = CHOICE.search(diffusers)
    there = theirs[1].split("|") if theirs else here
    for one, other in zip(here, there, strict=True):
        left = original[: choices.start()] + one + original[choices.end() :]
        right = CHOICE.sub(other, diffusers, count=1)
        yield from _expanded(left + found + right)


def _shape(parts: Sequence[str]) -> tuple[str, ...]:
    """Return the parts of a name with # for every number."""
    return tuple("#" if part.isdecimal() else part for part in parts)


class Side:
    """One column of a table, by which names are looked up, with dots or with underscores in them."""

    def __init__(self, rows: Sequence[tuple[str, str]]) -> None:
        """Index names.

        Args:
            rows: Name to look up, and name to return, both with # for the same numbers.
        """
        self._rows: dict[str, dict[tuple[str, ...], list[tuple[list[str], str]]]] = {
            ".": {},
            "_": {},
        }
        for name, target in rows:
            for separator, index in self._rows.items():
                parts = name.replace(".", separator).split(separator)
                index.setdefault(_shape(parts), []).append((parts, target))

    def get(self, path: str, separator: str = ".") -> str | None:
        """Return the other name of a path, in which dots or underscores separate the parts; None if it has none."""
        parts = path.split(separator)
        for template, target in self._rows[separator].get(_shape(parts), ()):
            pairs = list(zip(template, parts, strict=True))
            if all(wanted in ("#", part) for wanted, part in pairs):
                for number in (part for wanted, part in pairs if wanted == "#"):
                    target = target.replace("#", number, 1)
                return target
        return None


class Rows:
    """The modules of a component of a pipeline, in the original code's names and in diffusers'."""

    def __init__(self, *texts: str) -> None:
        """Read tables.

        Args:
            texts: Tables, with one module per line.
        """
        lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
        rows: list[tuple[str, str]] = []
        exchanged: list[tuple[str, str]] = []
        for line in lines:
            for one in _expanded(line.replace(" ~ ", " = ")):
                original, _, diffusers = one.partition(" = ")
                rows.append((original, diffusers or original))
                exchanged += rows[-1:] if " ~ " in line else []
        self.exchanged = Side(exchanged)
        self.to_diffusers = Side(rows)
        self.to_original = Side([(diffusers, original) for original, diffusers in rows])
        names = list(dict.fromkeys(diffusers for _, diffusers in rows))
        self.names = names
        self.in_diffusers = Side([(part, part) for name in names for part in parts_of(name)])
        fused = [name for name in names if "{" in name]
        self.whole_of = Side([(part, name) for name in fused for part in parts_of(name)])


def parts_of(name: str) -> list[str]:
    """Return the names of a fused module's parts; the name itself of any other.

    >>> parts_of("blocks.0.attn.{to_q,to_k,to_v}")
    ['blocks.0.attn.to_q', 'blocks.0.attn.to_k', 'blocks.0.attn.to_v']
    """
    before, found, rest = name.partition("{")
    parts, _, after = rest.partition("}")
    return (
        [before + part.partition("*")[0] + after for part in parts.split(",")] if found else [name]
    )


def shares_of(name: str) -> list[int]:
    """Return how many rows the parts of a fused module have, against each other.

    >>> shares_of("attn.{to_q*3,to_k,to_v}")
    [3, 1, 1]
    """
    parts = name.partition("{")[2].partition("}")[0].split(",")
    return [int(part.partition("*")[2] or 1) for part in parts]


def rows_of_parts(name: str, shape: tuple[int, int]) -> dict[str, slice]:
    """Return the rows of each part of a fused module.

    Three parts have equally many, unless their names say otherwise. Of four (queries, keys, values and the first matrix
    of the MLP), the first three are square.

    Args:
        name: Its name, with the parts in braces.
        shape: (out, in).

    Raises:
        UnsupportedError: The shape does not fit.
    """
    parts, (out, width) = parts_of(name), shape
    if width == 1 and len(parts) > 3:  # of their biases: the MLP's has 4 d values
        width = out // 7
    shares = shares_of(name)
    if len(parts) == 3:
        sizes = [out * share // sum(shares) for share in shares]
    else:
        sizes = [width] * (len(parts) - 1)
        sizes.append(out - sum(sizes))
    if sum(sizes) != out or min(sizes) < 1:
        raise UnsupportedError(
            f"{name}: a matrix of shape {shape} cannot be split into {len(parts)} parts"
        )
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    pairs = zip(parts, starts, sizes, strict=True)
    return {part: slice(start, start + size) for part, start, size in pairs}
