"""The task vectors of one module in some space, read part by part.

Shape legend: T adapters; a block is the stack (T, rows, cols) of one module's task vectors in some space; a tile is
some rows of a block (T, r, cols).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pcb_peft.tasks import counter_rng

Index: TypeAlias = slice | Tensor

Transform: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A tile (T, r, c) and independent random numbers in [0, 1), float64, of that shape, to what stands in for the tile."""

View: TypeAlias = Callable[[Tensor, Index, Index], Tensor]
"""A tile (T, r, c), and which rows and columns of its block these are, to what stands in for the tile."""


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One module's task vectors in some space.

    Attributes:
        shape: (T, rows, cols).
        weights: λ of the papers, one per adapter, as this space has them.
        open: Given dtype and device, a function from row and column indices to that part (T, r, c) of the stack.
        keys: Of the random numbers, one per adapter; without them there are none.
        data: What was measured of the module on the texts of each adapter, in this space; None: nothing.
    """

    shape: tuple[int, int, int]
    weights: tuple[float, ...]
    open: Callable[[torch.dtype, torch.device], Callable[[Index, Index], Tensor]]
    keys: tuple[int, ...] = ()
    data: Callable[[], Sequence[Tensor]] | None = None

    @property
    def size(self) -> int:
        return self.shape[1] * self.shape[2]


def stacked(values: Tensor, weights: Sequence[float]) -> Block:
    """A block that is held in memory: values (T, rows, cols)."""

    def open_(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
        stack = values.to(device, dtype)
        return lambda rows, cols: stack[:, rows][:, :, cols]

    return Block((values.shape[0], values.shape[1], values.shape[2]), tuple(weights), open_)


def products(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Block:
    """A block of products, of which each tile is computed when it is asked for.

    Args:
        factors: Per adapter (rows, r) and (r, cols), for any r.
        weights: One per adapter.
    """
    rows, cols = factors[0][0].shape[0], factors[0][1].shape[1]

    def open_(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
        pairs = [(left.to(device, dtype), right.to(device, dtype)) for left, right in factors]

        def tile(rows: Index, cols: Index) -> Tensor:
            parts = [(left[rows], right[:, cols]) for left, right in pairs]
            height, width = len(parts[0][0]), parts[0][1].shape[1]
            stack = torch.empty(len(parts), height, width, dtype=dtype, device=device)
            for product, (left, right) in zip(stack, parts, strict=True):
                torch.mm(left, right, out=product)
            return stack

        return tile

    return Block((len(factors), rows, cols), tuple(weights), open_)


def transformed(block: Block, transform: Transform) -> Block:
    """The same block, of which each part is transformed when it is asked for.

    Raises:
        ValueError: The block has no keys.
    """
    if len(block.keys) != block.shape[0]:
        raise ValueError(f"{len(block.keys)} keys for {block.shape[0]} adapters: no random numbers")

    def open_(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
        part = block.open(dtype, device)
        keys = torch.tensor(block.keys, device=device)
        _, height, width = block.shape
        starts = torch.arange(0, height * width, width, device=device)
        columns = torch.arange(width, device=device)

        def tile(rows: Index, cols: Index) -> Tensor:
            positions = starts[rows][:, None] + columns[cols]
            return transform(part(rows, cols), counter_rng.uniform(keys, positions))

        return tile

    return dataclasses.replace(block, open=open_)


def with_statistics_view(block: Block, inform: Callable[[Sequence[Tensor]], View]) -> Block:
    """The same block, seen as `inform` makes of its data, when it is asked for.

    Raises:
        ValueError: The block has no data.
    """
    data = block.data
    if data is None:
        raise ValueError("nothing was measured of this block")

    def open_(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
        part = block.open(dtype, device)
        view = inform([matrix.to(device) for matrix in data()])
        return lambda rows, cols: view(part(rows, cols), rows, cols)

    return dataclasses.replace(block, open=open_)
