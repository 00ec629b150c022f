"""Exact order statistics of more values than memory holds.

A sample gives, for every wanted order statistic, a bracket that very probably holds it. One pass over all values counts
what lies below the bracket and keeps what lies inside. If the counts prove that the wanted value is among those kept,
it is selected from them; otherwise the bracket moves and another pass is made. The sample decides how soon the answer
comes, never what it is.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Part: TypeAlias = tuple[int, int, Tensor]  # see `partition`

MARGIN = 12.0  # half width of a bracket, in standard errors of as many independent values
KEPT_VALUES = 1 << 24  # how many values one bracket keeps at most
NO_ORDER = "the values hold NaN, which has no place in any order"


@dataclasses.dataclass(slots=True)
class Bracket:
    """The search for the `index`-th smallest value (from 0) of one stream: it is expected in [low, high].

    No two passes look at the same bracket: each finds the value, or proves that it lies in a smaller interval.
    """

    index: int
    low: float
    high: float
    dtype: torch.dtype  # of the values
    least: float = -np.inf  # it is proven to lie in [least, most]
    most: float = np.inf
    value: float | None = None  # the answer
    below: int = 0  # how many values are < low
    inside: int = 0  # how many are in [low, high]
    stride: int = 1  # one in `stride` of those inside is kept
    kept: "Buffer" = dataclasses.field(default_factory=lambda: Buffer())

    def add(self, part: Part) -> None:
        """Takes in one tile."""
        below, inside, values = part
        self.below += below
        self.inside += inside
        self.kept.append(values[:: self.stride])
        if len(self.kept) > KEPT_VALUES:
            self.stride *= 2
            self.kept = Buffer(self.kept.values[::2].clone())

    def settle(self) -> None:
        """After a pass: reads the answer off the counts, or sets the bracket of the next pass."""
        position = self.index - self.below
        if position < 0:
            self.most = self._next(self.low, -np.inf)
            self._restart(self.least, self.most)
        elif position >= self.inside:
            self.least = self._next(self.high, np.inf)
            self._restart(self.least, self.most)
        elif self.low == self.high:
            self.value = self.low
        elif self.stride == 1:
            self.value = float(torch.kthvalue(self.kept.values, position + 1).values)
        else:
            self.least, self.most = self.low, self.high
            ordered, quantile = self.kept.values.sort().values, position / max(1, self.inside - 1)
            low, high = narrowed(ordered, quantile, self.low, self.high)
            if (low, high) == (self.low, self.high):  # of many equal values, say
                low = high = float(ordered[round(quantile * (len(ordered) - 1))])
            self._restart(low, high)

    def _next(self, value: float, towards: float) -> float:
        """The next number of the dtype.

        Raises:
            ValueError: There is none.
        """
        if value == towards:
            raise ValueError(NO_ORDER)
        ends = torch.tensor([value, towards], dtype=self.dtype)
        return float(torch.nextafter(ends[0], ends[1]))

    def _restart(self, low: float, high: float) -> None:
        if low > high:
            raise ValueError(NO_ORDER)
        self.low, self.high, self.kept, self.stride = low, high, Buffer(), 1
        self.below = self.inside = 0


class Buffer:
    """Values appended one after the other; a list of small tensors would pin the memory around each of them."""

    def __init__(self, values: Tensor | None = None) -> None:
        self._space = torch.empty(0) if values is None else values
        self._used = len(self._space)

    def __len__(self) -> int:
        return self._used

    @property
    def values(self) -> Tensor:
        """All of them."""
        return self._space[: self._used]

    def append(self, values: Tensor) -> None:
        """Adds values at the end, in room that doubles when it is full."""
        end = self._used + len(values)
        if end > len(self._space):
            space = values.new_empty(max(1024, 2 * end))
            space[: self._used] = self.values
            self._space = space
        self._space[self._used : end] = values
        self._used = end


def narrowed(ordered: Tensor, quantile: float, low: float, high: float) -> tuple[float, float]:
    """The part of [low, high] that holds a quantile of the values from which `ordered` was sampled, very probably."""
    last = len(ordered) - 1
    margin = MARGIN * max(1.0, (len(ordered) * quantile * (1 - quantile)) ** 0.5)
    first, final = int(np.floor(quantile * last - margin)), int(np.ceil(quantile * last + margin))
    return (
        float(ordered[first]) if first >= 0 else low,
        float(ordered[final]) if final <= last else high,
    )


def partition(values: Tensor, low: float, high: float) -> Part:
    """How many values are below `low`, how many in [low, high], and which (none if the interval is a single value)."""
    # numpy compares several times faster than torch does on a CPU; both speak the same operators.
    array: Any = values.numpy() if values.device.type == "cpu" else values
    reached = array >= low
    inside = reached if high == np.inf else reached & (array <= high)
    count: Any = np.count_nonzero if values.device.type == "cpu" else torch.count_nonzero
    below = 0 if low == -np.inf else len(array) - int(count(reached))
    kept = array[inside] if low < high else array[:0]
    return below, len(kept) if low < high else int(count(inside)), torch.as_tensor(kept)


def order_statistics(
    sample: Tensor,
    size: int,
    indices: Sequence[int],
    sweep: Callable[[Callable[[Tensor], list[Part]]], Iterable[list[Part]]],
) -> Tensor:
    """The values that would stand at `indices` if each stream were sorted.

    Args:
        sample: (streams, sampled values): any part of each stream.
        size: The length of a stream.
        indices: Positions from 0 to size − 1.
        sweep: Calls a function on every tile (streams, values) of the streams and yields what it returns.

    Returns:
        (streams, len(indices)), in the dtype of the sample.
    """
    ordered = sample.sort(dim=1).values
    if ordered.shape[1] == size:
        return ordered[:, list(indices)]
    brackets = [
        [
            Bracket(i, *narrowed(row, i / max(1, size - 1), -np.inf, np.inf), row.dtype)
            for i in indices
        ]
        for row in ordered
    ]
    while searches := [
        (stream, bracket)
        for stream, row in enumerate(brackets)
        for bracket in row
        if bracket.value is None
    ]:

        def split(tile: Tensor, searches: list[tuple[int, Bracket]] = searches) -> list[Part]:
            return [partition(tile[stream], b.low, b.high) for stream, b in searches]

        for parts in sweep(split):
            for (_, bracket), part in zip(searches, parts, strict=True):
                bracket.add(part)
        for _, bracket in searches:
            bracket.settle()
    values = [[b.value for b in row] for row in brackets]
    return torch.tensor(values, dtype=sample.dtype, device=sample.device)
