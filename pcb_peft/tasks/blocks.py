"""Blocks: the task vectors of one module in some space, read part by part.

Shape legend: T adapters. A block is the stack (T, rows, cols) of one module's task vectors in some space. A tile is
some rows of a block: (T, r, cols).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pcb_peft.tasks import counter_rng

Index: TypeAlias = slice | Tensor

Transform: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A function of a tile (T, r, c) and of independent random numbers in [0, 1), float64, of that shape, to a new tile."""

View: TypeAlias = Callable[[Tensor, Index, Index], Tensor]
"""A function of a tile (T, r, c) and of its row and column indices in the block, to a new tile."""


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One module's task vectors in some space.

    Attributes:
        shape: (T, rows, cols).
        weights: λ of the papers, one per adapter, as this space uses them.
        open: A function of dtype and device, to a function of row and column indices that returns this part (T, r, c).
        keys: Keys of random numbers, one per adapter; empty if the block has no random numbers.
        task_statistics: Reads the task statistics of the module, one matrix per adapter, in this space's coordinates;
            None if no statistics were given.
    """

    shape: tuple[int, int, int]
    weights: tuple[float, ...]
    open: Callable[[torch.dtype, torch.device], Callable[[Index, Index], Tensor]]
    keys: tuple[int, ...] = ()
    task_statistics: Callable[[], Sequence[Tensor]] | None = None

    @property
    def size(self) -> int:
        """Values per adapter."""
        return self.shape[1] * self.shape[2]


def stacked(values: Tensor, weights: Sequence[float]) -> Block:
    """Return a block of values (T, rows, cols) that are in memory."""

    def open_(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
        stack = values.to(device, dtype)
        return lambda rows, cols: stack[:, rows][:, :, cols]

    tasks, rows, cols = values.shape
    return Block((tasks, rows, cols), tuple(weights), open_)


def products(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Block:
    """Return a block of matrix products; each tile is computed when it is asked for.

    Args:
        factors: Two factors per adapter, (rows, r) and (r, cols), for any r.
        weights: One per adapter.
    """
    rows, cols = factors[0][0].shape[0], factors[0][1].shape[1]

    def open_(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
        pairs = [(b.to(device, dtype), a.to(device, dtype)) for b, a in factors]

        def tile(rows: Index, cols: Index) -> Tensor:
            parts = [(b[rows], a[:, cols]) for b, a in pairs]
            height, width = len(parts[0][0]), parts[0][1].shape[1]
            stack = torch.empty(len(parts), height, width, dtype=dtype, device=device)
            for product, (b, a) in zip(stack, parts, strict=True):
                torch.mm(b, a, out=product)
            return stack

        return tile

    return Block((len(factors), rows, cols), tuple(weights), open_)


def transformed(block: Block, transform: Transform) -> Block:
    """Return the same block with every tile transformed when it is asked for.

    Raises:
        ValueError: The block has no keys for random numbers.
    """
    if len(block.keys) != block.shape[0]:
        raise ValueError(f"{len(block.keys)} keys for {block.shape[0]} adapters: no random numbers")

    def open_(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
        part = block.open(dtype, device)
        keys = torch.tensor(block.keys, device=device)
        _, height, width = block.shape
        row_starts = torch.arange(0, height * width, width, device=device)
        columns = torch.arange(width, device=device)

        def tile(rows: Index, cols: Index) -> Tensor:
            positions = row_starts[rows][:, None] + columns[cols]
            return transform(part(rows, cols), counter_rng.uniform(keys, positions))

        return tile

    return dataclasses.replace(block, open=open_)


def viewed_with_statistics(block: Block, make_view: Callable[[Sequence[Tensor]], View]) -> Block:
    """Return the same block with every tile changed by the view that `make_view` makes of the block's task statistics.

    Raises:
        ValueError: The block has no task statistics.
    """
    read = block.task_statistics
    if read is None:
        raise ValueError("this block has no task statistics")

    def open_(dtype: torch.dtype, device: torch.device) -> Callable[[Index, Index], Tensor]:
        part = block.open(dtype, device)
        view = make_view([matrix.to(device) for matrix in read()])
        return lambda rows, cols: view(part(rows, cols), rows, cols)

    return dataclasses.replace(block, open=open_)
