"""Exact order statistics of more values than memory holds.

An order statistic is the value at some position of a sorted stream, such as a quantile. Example: the value at position
900 of 1000. A sample of 100 values says that it probably lies in the bracket [1.5, 2.0]. One pass over all values
counts those below 1.5 and keeps those inside. If 880 lie below and 50 inside, the answer is the value at position 20 of
the 50. If the counts prove that it lies elsewhere, the bracket moves and another pass is made. So the sample decides
how many passes are needed, never the answer.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcb_peft.runtime.processes import ALONE, Processes
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits

TileCounts: TypeAlias = tuple[int, int, NDArray[Any]]
"""Number of values below a bracket, number inside it, and the values inside: see `partition`."""

HAS_NAN = "the values contain NaN, so they cannot be ordered"


@dataclasses.dataclass(slots=True)
class Bracket:
    """The search for the `index`-th smallest value (from 0) of one stream, which probably lies in [low, high].

    No two passes use the same bracket: each finds the value, or proves that it lies in a smaller interval.

    Attributes:
        index: The position to find.
        low: Lower end of the bracket, included.
        high: Upper end, included.
        dtype: Dtype of the stream.
        capacity: How many values are kept at most.
        margin: Half the width of the next bracket, in standard errors: `Limits.bracket_margin`.
        proven_low: The value is not below it.
        proven_high: The value is not above it.
        value: The answer, once it is known.
        below: How many values of this pass are < low.
        inside: How many values of this pass are in [low, high].
        stride: One in `stride` of the values inside is kept.
        kept: These values.
    """

    index: int
    low: float
    high: float
    dtype: torch.dtype
    capacity: int
    margin: float = DEFAULT_LIMITS.bracket_margin
    proven_low: float = -np.inf
    proven_high: float = np.inf
    value: float | None = None
    below: int = 0
    inside: int = 0
    stride: int = 1
    kept: "Buffer" = dataclasses.field(default_factory=lambda: Buffer())

    def scan(self, values: Tensor) -> TileCounts:
        """Compare one tile with the bracket; changes nothing, so that threads may scan tiles side by side."""
        return partition(values, self.low, self.high)

    def add(self, counts: TileCounts) -> None:
        """Add what `scan` found in one tile."""
        below, inside, values = counts
        self.below += below
        self.inside += inside
        self.kept.append(values[:: self.stride])
        if len(self.kept) > self.capacity:
            self.stride *= 2
            self.kept = Buffer(self.kept.values[::2].copy())

    def merge(self, others: Sequence["Bracket"]) -> None:
        """Add what the same search found in other parts of the stream."""
        parts = [self, *others]
        self.stride = max(part.stride for part in parts)
        kept = [part.kept.values[:: self.stride // part.stride] for part in parts]
        self.kept = Buffer(np.concatenate(kept))
        self.below = sum(part.below for part in parts)
        self.inside = sum(part.inside for part in parts)

    def advance(self) -> None:
        """Finish a pass: set `value` if the counts prove it, else set the bracket of the next pass.

        Raises:
            ValueError: The stream contains NaN.
        """
        position = self.index - self.below  # of the value, among those inside
        if position < 0:
            self.proven_high = self._next_number(self.low, -np.inf)
            self._restart(self.proven_low, self.proven_high)
        elif position >= self.inside:
            self.proven_low = self._next_number(self.high, np.inf)
            self._restart(self.proven_low, self.proven_high)
        elif self.low == self.high:
            self.value = self.low
        elif self.stride == 1:
            self.value = float(np.partition(self.kept.values, position)[position])
            self.kept = Buffer()
        else:
            self.proven_low, self.proven_high = self.low, self.high
            self._restart(*self._narrowed(position))

    def _narrowed(self, position: int) -> tuple[float, float]:
        """A smaller bracket, from the one in `stride` values inside that were kept."""
        ordered, quantile = np.sort(self.kept.values), position / max(1, self.inside - 1)
        low, high = narrow_bracket(ordered, quantile, self.low, self.high, self.margin)
        if (low, high) == (self.low, self.high):  # if many values are equal, for example
            low = high = float(ordered[round(quantile * (len(ordered) - 1))])
        return low, high

    def _next_number(self, value: float, towards: float) -> float:
        """The next number of the dtype.

        Raises:
            ValueError: There is none.
        """
        if value == towards:
            raise ValueError(HAS_NAN)
        ends = torch.tensor([value, towards], dtype=self.dtype)
        return float(torch.nextafter(ends[0], ends[1]))

    def _restart(self, low: float, high: float) -> None:
        if low > high:
            raise ValueError(HAS_NAN)
        self.low, self.high, self.kept, self.stride = low, high, Buffer(), 1
        self.below = self.inside = 0


@dataclasses.dataclass(slots=True)
class Extreme:
    """The search for the smallest or the largest value of one stream: one pass finds it.

    Attributes:
        reduce: `torch.amin` or `torch.amax`.
        per_tile: The extreme of each tile.
        value: The answer, once it is known.
    """

    reduce: Callable[[Tensor], Tensor]
    per_tile: list[float] = dataclasses.field(default_factory=list[float])
    value: float | None = None

    def scan(self, values: Tensor) -> TileCounts:
        """Find the extreme of one tile."""
        return 0, 1, self.reduce(values)[None].cpu().numpy()

    def add(self, counts: TileCounts) -> None:
        """Add what `scan` found in one tile."""
        self.per_tile.append(float(counts[2][0]))

    def merge(self, others: Sequence["Extreme"]) -> None:
        """Add what the same search found in other parts of the stream."""
        self.per_tile = [value for part in (self, *others) for value in part.per_tile]

    def advance(self) -> None:
        """Finish the pass: set `value`.

        Raises:
            ValueError: The stream contains NaN.
        """
        self.value = float(self.reduce(torch.tensor(self.per_tile, dtype=torch.float64)))
        if np.isnan(self.value):
            raise ValueError(HAS_NAN)


Search: TypeAlias = Bracket | Extreme


class Buffer:
    """An array that grows by appending; a list of slices would keep the whole tile around each of them in memory."""

    def __init__(self, values: NDArray[Any] | None = None) -> None:
        self._storage = np.empty(0) if values is None else values
        self._length = len(self._storage)

    def __len__(self) -> int:
        return self._length

    @property
    def values(self) -> NDArray[Any]:
        """All values, as a view."""
        return self._storage[: self._length]

    def append(self, values: NDArray[Any]) -> None:
        """Append values; the storage at least doubles when it is full."""
        end = self._length + len(values)
        if end > len(self._storage):
            storage = np.empty(max(1024, 2 * end), values.dtype)
            storage[: self._length] = self.values
            self._storage = storage
        self._storage[self._length : end] = values
        self._length = end


def narrow_bracket(
    ordered: Tensor | NDArray[Any],
    quantile: float,
    low: float,
    high: float,
    margin: float = DEFAULT_LIMITS.bracket_margin,
) -> tuple[float, float]:
    """Return the part of [low, high] that very probably contains a quantile of a stream.

    Args:
        ordered: A sorted sample of the stream's values in [low, high].
        quantile: From 0 (the smallest of these values) to 1.
        low: Lower end.
        high: Upper end.
        margin: Half the width of the bracket, in standard errors of the sampled quantile.
    """
    last = len(ordered) - 1
    standard_error = max(1.0, (len(ordered) * quantile * (1 - quantile)) ** 0.5)  # in positions
    first = int(np.floor(quantile * last - margin * standard_error))
    final = int(np.ceil(quantile * last + margin * standard_error))
    return (
        float(ordered[first]) if first >= 0 else low,
        float(ordered[final]) if final <= last else high,
    )


def partition(values: Tensor, low: float, high: float) -> TileCounts:
    """Count the values below `low` and those in [low, high], and return the latter (none if low = high)."""
    array = as_numpy_on_cpu(values)
    inside = array <= high
    below = 0
    if low > -np.inf:
        not_below = array >= low
        below = len(array) - int(count(not_below))
        inside &= not_below
    if low == high:
        return below, int(count(inside)), np.empty(0)
    selected: Any = array[inside]
    return (
        below,
        len(selected),
        selected if isinstance(array, np.ndarray) else selected.cpu().numpy(),
    )


def as_numpy_on_cpu(values: Tensor) -> Any:
    """Return a CPU tensor as a numpy array, which compares and counts several times faster; others as they are.

    Both have the same operators. While a function is being compiled, the tensor stays one: the compiler knows torch
    only.
    """
    plain = values.device.type == "cpu" and not torch.compiler.is_compiling()
    return values.numpy() if plain else values


def count(mask: Any) -> Any:
    """Return the number of true values in a mask that came from `as_numpy_on_cpu`: a number, or a tensor of one."""
    return np.count_nonzero(mask) if isinstance(mask, np.ndarray) else mask.sum(dtype=torch.int32)


def start_search(
    ordered: Tensor,
    size: int,
    index: int,
    capacity: int,
    margin: float = DEFAULT_LIMITS.bracket_margin,
) -> Search:
    """Return the search for the value at position `index` of a stream.

    Args:
        ordered: A sorted sample of the stream.
        size: Length of the stream.
        index: The position, from 0.
        capacity: How many values it may keep.
        margin: See `Limits.bracket_margin`.
    """
    if index == 0:
        return Extreme(torch.amin)
    if index == size - 1:
        return Extreme(torch.amax)
    low, high = narrow_bracket(ordered, index / (size - 1), -np.inf, np.inf, margin)
    return Bracket(index, low, high, ordered.dtype, capacity, margin)


def reduce_searches(parts: Sequence[Sequence[Any]]) -> list[Search]:
    """Merge what each process found in a pass, and advance every search.

    Args:
        parts: The searches of each process, in the same order.
    """
    searches: list[Search] = []
    for search, *others in zip(*parts, strict=True):
        if others:
            search.merge(others)
        search.advance()
        searches.append(search)
    return searches


def ascending(values: Tensor) -> Tensor:
    """Sort each row. On a CPU numpy does it, ten times faster than torch because it uses vector instructions."""
    if values.device.type != "cpu":
        return values.sort(dim=1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


def kth_values(values: Tensor, indices: Sequence[int]) -> Tensor:
    """Return the values that would be at `indices` of each row if it were sorted."""
    if values.device.type != "cpu":
        return ascending(values)[:, list(indices)]
    rows, last = values.numpy(), values.shape[1] - 1

    def kth(index: int) -> NDArray[Any]:
        if index == 0:
            return rows.min(axis=1)
        if index == last:
            return rows.max(axis=1)
        return np.partition(rows, index, axis=1)[:, index]

    # one index at a time: for several, numpy's partition uses no vector instructions
    return torch.from_numpy(np.stack([kth(index) for index in indices], axis=1))


def order_statistics(
    sample: Tensor,
    size: int,
    indices: Sequence[int],
    sweep: Callable[[Callable[[Tensor], list[TileCounts]]], Iterable[list[TileCounts]]],
    processes: Processes = ALONE,
    limits: Limits = DEFAULT_LIMITS,
) -> Tensor:
    """Return the values that would be at `indices` of each stream if it were sorted.

    Args:
        sample: (streams, sampled values): any part of each stream; the same in every process.
        size: Length of a stream.
        indices: Positions from 0 to size − 1.
        sweep: Makes a pass: calls a function on every tile (streams, values) of this process's part of the streams, and
            yields what it returns.
        processes: The processes that search together.
        limits: How many values are kept in a pass.

    Returns:
        (streams, len(indices)), in the dtype of the sample.

    Raises:
        ValueError: A stream contains NaN.
    """
    if sample.shape[1] == size:
        return kth_values(sample, indices)
    ordered = ascending(sample)
    wanted = [(stream, index) for stream in range(len(ordered)) for index in indices]
    capacity = limits.bracket_size(len(wanted)) // processes.size
    searches = [
        start_search(ordered[stream], size, index, capacity, limits.bracket_margin)
        for stream, index in wanted
    ]
    while pending := [number for number, search in enumerate(searches) if search.value is None]:
        active = [(wanted[number][0], searches[number]) for number in pending]  # with their streams

        def scan(tile: Tensor, active: list[tuple[int, Search]] = active) -> list[TileCounts]:
            rows = tile.unbind()
            return [search.scan(rows[stream]) for stream, search in active]

        for tile_counts in sweep(scan):
            for (_, search), counts in zip(active, tile_counts, strict=True):
                search.add(counts)
        advanced = processes.reduce([search for _, search in active], reduce_searches)
        for number, search in zip(pending, advanced, strict=True):
            searches[number] = search
    values = [search.value for search in searches]
    found = torch.tensor(values, dtype=sample.dtype, device=sample.device)
    return found.unflatten(0, (len(ordered), len(indices)))
