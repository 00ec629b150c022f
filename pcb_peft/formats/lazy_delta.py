"""Deltas and tensors by name whose values are read, or made, when they are asked for."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, Dense, LowRank
from pcb_peft.deltas.layout import LINEAR, Layout
from pcb_peft.deltas.replacements import ReplacedParameter, TokenRows
from pcb_peft.formats.checkpoint import SAFETENSORS
from pcb_peft.images.names import ImageLora

Config: TypeAlias = Mapping[str, Any]
"""The content of ``adapter_config.json``."""


@dataclasses.dataclass(frozen=True, slots=True)
class LazyDelta:
    """The delta of one module, before its values are read.

    Attributes:
        kind: Type of the delta.
        shape: (out, in), as `Delta.shape`.
        load: Reads the delta. It can be pickled, so that an adapter can.
        rank: Rank of a low-rank delta, or of a delta's low-rank part.
        missing: Why the delta cannot be read without the base model; empty where it can.
        stacked: True where the weight is one of several in a parameter (an expert's).
        parameter: True where PEFT targets the weight as a parameter: its layer is none that PEFT wraps (a router).
    """

    kind: type[Delta]
    shape: tuple[int, int]
    load: Callable[[], Delta]
    rank: int | None = None
    missing: str = ""
    stacked: bool = False
    parameter: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterContents:
    """Everything that an adapter holds.

    Attributes:
        modules: Module path in the base model to its delta.
        saved: Parameter path to the values that replace the base model's (PEFT's modules_to_save).
        rows: Module path to the rows that replace rows of its weight (PEFT's trainable tokens).
        copies: Module to the module that it was tied to, whose rows are stored for it too.
        image: What a file of an image model says beside its deltas; None for adapters of PEFT.
    """

    modules: dict[str, LazyDelta]
    saved: dict[str, ReplacedParameter]
    rows: dict[str, TokenRows] = dataclasses.field(default_factory=dict[str, TokenRows])
    copies: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    image: ImageLora | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The contents of an adapter's files.

    Attributes:
        config: Content of ``adapter_config.json``; empty where the form has no such file.
        tensors: Name to values.
        file: Name of the file that the tensors go into.
        metadata: Metadata in that file.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    file: str = SAFETENSORS
    metadata: dict[str, str] = dataclasses.field(default_factory=dict[str, str])


def as_dense(entry: LazyDelta) -> LazyDelta:
    """Return the entry; a DoRA's as the matrix that it adds to the W that it was trained on."""
    if not entry.kind.rescales:
        return entry
    load = functools.partial(_load_dense, entry)
    return dataclasses.replace(entry, kind=Dense, load=load, rank=None)


def _load_dense(entry: LazyDelta) -> Dense:
    delta = entry.load()
    return Dense(delta.matrix(), layout=delta.layout)


def only_rows(entry: LazyDelta, rows: slice | Tensor, count: int) -> LazyDelta:
    """Return the entry of some rows of a low-rank or dense delta.

    Args:
        entry: The whole delta.
        rows: Which of its rows, as a slice or as indices.
        count: How many these are.
    """
    load = functools.partial(_load_rows, entry, rows)
    return dataclasses.replace(entry, shape=(count, entry.shape[1]), load=load)


def _load_rows(entry: LazyDelta, rows: slice | Tensor) -> LowRank | Dense:
    delta = entry.load()
    return lora_rows(delta, rows) if isinstance(delta, LowRank) else Dense(delta.matrix()[rows])


def lora_rows(delta: LowRank, rows: slice | Tensor) -> LowRank:
    """Return the LoRA of some rows: the same lora_A, and those rows of lora_B."""
    lora_B = delta.lora_B[rows]
    layout = Layout(shape=(len(lora_B),)) if is_vector(delta) else LINEAR
    return LowRank(delta.lora_A, lora_B, delta.scaling, layout=layout)


def scaled(entry: LazyDelta, weight: float) -> LazyDelta:
    """Return the entry of a delta multiplied by a number."""
    return dataclasses.replace(entry, load=functools.partial(_load_scaled, entry, weight))


def _load_scaled(entry: LazyDelta, weight: float) -> Delta:
    return entry.load().scaled(weight)


def in_memory(delta: Delta) -> LazyDelta:
    """Return the entry of a delta that is in memory already."""
    rank = delta.rank if isinstance(delta, LowRank) else None
    return LazyDelta(type(delta), delta.shape, functools.partial(_same, delta), rank)


def _same(delta: Delta) -> Delta:
    return delta


def vector_delta(values: Tensor) -> LowRank:
    """Return the change of a parameter (n,), such as a bias, as a matrix (n, 1) of rank 1."""
    return LowRank(torch.ones(1, 1), values[:, None], layout=Layout(shape=tuple(values.shape)))


def is_vector(delta: Delta) -> bool:
    """Return whether a delta changes a parameter (n,), such as a bias."""
    return delta.layout.shape is not None and len(delta.layout.shape) == 1
