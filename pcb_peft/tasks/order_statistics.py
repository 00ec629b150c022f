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
from numpy.typing import NDArray
from torch import Tensor

from pcb_peft.runtime.processes import ALONE, Processes

Part: TypeAlias = tuple[int, int, NDArray[Any]]  # see `partition`

MARGIN = 12.0  # half width of a bracket, in standard errors of as many independent values
KEPT_VALUES = 1 << 24  # how many values one bracket keeps at most
KEPT_IN_ALL = 1 << 28  # ... and all together, of thousands of streams
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
    room: int  # how many values are kept at most
    least: float = -np.inf  # it is proven to lie in [least, most]
    most: float = np.inf
    value: float | None = None  # the answer
    below: int = 0  # how many values are < low
    inside: int = 0  # how many are in [low, high]
    stride: int = 1  # one in `stride` of those inside is kept
    kept: "Buffer" = dataclasses.field(default_factory=lambda: Buffer())

    def look(self, values: Tensor) -> Part:
        """What one tile says; tiles may be looked at side by side."""
        return partition(values, self.low, self.high)

    def add(self, part: Part) -> None:
        """Takes in what one tile says."""
        below, inside, values = part
        self.below += below
        self.inside += inside
        self.kept.append(values[:: self.stride])
        if len(self.kept) > self.room:
            self.stride *= 2
            self.kept = Buffer(self.kept.values[::2].copy())

    def join(self, others: Sequence["Bracket"]) -> None:
        """Takes in what was seen of other parts of the stream."""
        parts = [self, *others]
        self.stride = max(part.stride for part in parts)
        kept = [part.kept.values[:: self.stride // part.stride] for part in parts]
        self.kept = Buffer(np.concatenate(kept))
        self.below = sum(part.below for part in parts)
        self.inside = sum(part.inside for part in parts)

    def advance(self) -> None:
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
            self.value = float(np.partition(self.kept.values, position)[position])
            self.kept = Buffer()
        else:
            self.least, self.most = self.low, self.high
            ordered, quantile = np.sort(self.kept.values), position / max(1, self.inside - 1)
            low, high = narrow_bracket(ordered, quantile, self.low, self.high)
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


@dataclasses.dataclass(slots=True)
class Extreme:
    """The search for the smallest or the largest value of one stream: one pass finds it."""

    choose: Callable[[Tensor], Tensor]  # torch.amin or torch.amax
    found: list[float] = dataclasses.field(default_factory=list[float])  # in each tile
    value: float | None = None  # the answer

    def look(self, values: Tensor) -> Part:
        """What one tile says."""
        return 0, 1, self.choose(values)[None].cpu().numpy()

    def add(self, part: Part) -> None:
        """Takes in what one tile says."""
        self.found.append(float(part[2][0]))

    def join(self, others: Sequence["Extreme"]) -> None:
        """Takes in what was seen of other parts of the stream."""
        self.found = [value for part in (self, *others) for value in part.found]

    def advance(self) -> None:
        """After the pass: reads the answer off.

        Raises:
            ValueError: There is a NaN.
        """
        self.value = float(self.choose(torch.tensor(self.found, dtype=torch.float64)))
        if np.isnan(self.value):
            raise ValueError(NO_ORDER)


Search: TypeAlias = Bracket | Extreme


class Buffer:
    """Values appended one after the other; a list of small arrays would pin the memory around each of them."""

    def __init__(self, values: NDArray[Any] | None = None) -> None:
        self._space = np.empty(0) if values is None else values
        self._used = len(self._space)

    def __len__(self) -> int:
        return self._used

    @property
    def values(self) -> NDArray[Any]:
        """All of them."""
        return self._space[: self._used]

    def append(self, values: NDArray[Any]) -> None:
        """Adds values at the end, in room that doubles when it is full."""
        end = self._used + len(values)
        if end > len(self._space):
            space = np.empty(max(1024, 2 * end), values.dtype)
            space[: self._used] = self.values
            self._space = space
        self._space[self._used : end] = values
        self._used = end


def narrow_bracket(
    ordered: Tensor | NDArray[Any], quantile: float, low: float, high: float
) -> tuple[float, float]:
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
    array = as_numpy_on_cpu(values)
    inside = array <= high
    below = 0
    if low > -np.inf:
        reached = array >= low
        below = len(array) - int(count(reached))
        inside &= reached
    if low == high:
        return below, int(count(inside)), np.empty(0)
    kept: Any = array[inside]
    return below, len(kept), kept if isinstance(kept, np.ndarray) else kept.cpu().numpy()


def as_numpy_on_cpu(values: Tensor) -> Any:
    """Numpy compares and counts several times faster than torch does on a CPU; both speak the same operators.

    In a loop that is compiled only torch does.
    """
    on_host = values.device.type == "cpu" and not torch.compiler.is_compiling()
    return values.numpy() if on_host else values


def count(mask: Any) -> Any:
    """How many of the truth values that came of something `as_numpy_on_cpu` are true: a number, or a tensor of one."""
    return np.count_nonzero(mask) if isinstance(mask, np.ndarray) else mask.sum(dtype=torch.int32)


def start_search(ordered: Tensor, size: int, index: int, room: int) -> Search:
    """How to look for the value at `index` of a stream of that size, of which `ordered` is a sample."""
    if index in (0, size - 1):
        return Extreme(torch.amax if index else torch.amin)
    low, high = narrow_bracket(ordered, index / (size - 1), -np.inf, np.inf)
    return Bracket(index, low, high, ordered.dtype, room)


def reduce_searches(parts: Sequence[Sequence[Any]]) -> list[Search]:
    """The same searches in several parts of the streams, joined: what a pass has found."""
    searches: list[Search] = []
    for one, *others in zip(*parts, strict=True):
        if others:
            one.join(others)
        one.advance()
        searches.append(one)
    return searches


def ascending(values: Tensor) -> Tensor:
    """Each row sorted. Numpy has the wide registers of a processor do it: an order of magnitude faster than torch."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


def kth_values(values: Tensor, indices: Sequence[int]) -> Tensor:
    """What would stand at `indices` of each row, if it were sorted."""
    if values.device.type != "cpu":
        return ascending(values)[:, list(indices)]
    rows, last = values.numpy(), values.shape[1] - 1

    def at(index: int) -> NDArray[Any]:
        if index in (0, last):
            return rows.max(axis=1) if index else rows.min(axis=1)
        return np.partition(rows, index, axis=1)[:, index]

    # one at a time: for several, numpy's partition does without the processor's wide registers
    return torch.from_numpy(np.stack([at(index) for index in indices], axis=1))


def order_statistics(
    sample: Tensor,
    size: int,
    indices: Sequence[int],
    sweep: Callable[[Callable[[Tensor], list[Part]]], Iterable[list[Part]]],
    processes: Processes = ALONE,
) -> Tensor:
    """The values that would stand at `indices` if each stream were sorted.

    Args:
        sample: (streams, sampled values): any part of each stream.
        size: The length of a stream.
        indices: Positions from 0 to size − 1.
        sweep: Calls a function on every tile (streams, values) of the streams and yields what it returns; of several
            processes, on the tiles of this one.
        processes: Those that search together; they have the same sample.

    Returns:
        (streams, len(indices)), in the dtype of the sample.
    """
    if sample.shape[1] == size:
        return kth_values(sample, indices)
    ordered = ascending(sample)
    places = [(stream, index) for stream in range(len(ordered)) for index in indices]
    room = min(KEPT_VALUES, KEPT_IN_ALL // len(places)) // processes.size
    searches = [start_search(ordered[stream], size, index, room) for stream, index in places]
    while pending := [place for place, one in enumerate(searches) if one.value is None]:
        own = [searches[place] for place in pending]

        def split(
            tile: Tensor, own: list[Search] = own, pending: list[int] = pending
        ) -> list[Part]:
            rows = tile.unbind()
            return [one.look(rows[places[at][0]]) for one, at in zip(own, pending, strict=True)]

        for parts in sweep(split):
            for one, part in zip(own, parts, strict=True):
                one.add(part)
        for place, one in zip(pending, processes.reduce(own, reduce_searches), strict=True):
            searches[place] = one
    values = torch.tensor([one.value for one in searches], dtype=sample.dtype, device=sample.device)
    return values.unflatten(0, (len(ordered), len(indices)))
