"""Exact order statistics of more values than memory holds.

A sample gives, for every wanted order statistic, a bracket that very probably holds it. One pass over all values counts
what lies below the bracket and keeps what lies inside. If the counts prove that the wanted value is among those kept, it
is selected from them; otherwise the bracket moves and another pass is made. The sample decides how soon the answer
comes, never what it is.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Part: TypeAlias = tuple[int, int, int, Tensor]  # see `partition`

MARGIN = 12.0  # half width of a bracket, in standard errors of as many independent values
KEPT_VALUES = 1 << 24  # how many values one bracket keeps at most


@dataclasses.dataclass(slots=True)
class Bracket:
    """The search for the `index`-th smallest value (from 0) of one stream: it lies in [low, high], if anywhere."""

    index: int
    low: float
    high: float
    value: float | None = None  # the answer
    below: int = 0  # how many values are < low
    at_low: int = 0  # ... are = low
    at_high: int = 0  # ... are = high
    inside: int = 0
    stride: int = 1  # one in `stride` of the values inside is kept
    kept: list[Tensor] = dataclasses.field(default_factory=list[Tensor])

    def add(self, part: Part) -> None:
        """Takes in one tile."""
        below, at_low, at_high, inner = part
        self.below += below
        self.at_low += at_low
        self.at_high += at_high
        self.inside += len(inner)
        self.kept.append(inner[:: self.stride])
        if sum(map(len, self.kept)) > KEPT_VALUES:
            self.stride *= 2
            self.kept = [torch.cat(self.kept)[::2]]

    def settle(self) -> None:
        """After a pass: reads the answer off the counts, or sets the bracket of the next pass."""
        position = self.index - self.below
        if position < 0:
            self._restart(-np.inf, self.low)
        elif position < self.at_low:
            self.value = self.low
        elif position < self.at_low + self.inside:
            self._select(torch.cat(self.kept), position - self.at_low)
        elif position < self.at_low + self.inside + self.at_high:
            self.value = self.high
        else:
            self._restart(self.high, np.inf)

    def _select(self, inner: Tensor, position: int) -> None:
        if self.stride == 1:
            self.value = float(torch.kthvalue(inner, position + 1).values)
        else:
            quantile = position / max(1, self.inside - 1)
            self._restart(*narrowed(inner.sort().values, quantile, self.low, self.high))

    def _restart(self, low: float, high: float) -> None:
        self.low, self.high, self.kept, self.stride = low, high, [], 1
        self.below = self.at_low = self.at_high = self.inside = 0


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
    """How many values are below `low`, how many equal either end, and those strictly inside."""
    # numpy compares several times faster than torch does on a CPU; both speak the same operators.
    on_cpu = values.device.type == "cpu"
    array = values.numpy() if on_cpu else values
    count = np.count_nonzero if on_cpu else torch.count_nonzero
    below = int(count(array < low))
    at_low = int(count(array == low))
    at_high = int(count(array == high)) if high > low else 0
    inner = array[(array > low) & (array < high)]
    return below, at_low, at_high, torch.as_tensor(inner)


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
        [Bracket(i, *narrowed(row, i / max(1, size - 1), -np.inf, np.inf)) for i in indices]
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
