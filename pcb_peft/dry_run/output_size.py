"""The bytes that a merge writes, from the shapes of its result."""

import dataclasses
import math
from collections.abc import Collection, Iterable

import torch

from pcb_peft.base.model import BaseModel
from pcb_peft.base.names import split_parameter_name
from pcb_peft.deltas.replacements import ReplacedParameter
from pcb_peft.merging.heads import MergedHeads

FLOAT = torch.float32.itemsize  # of magnitudes, and of the files beside the weights


@dataclasses.dataclass(frozen=True, slots=True)
class OutputShape:
    """The merged delta of a module, without its values.

    Attributes:
        shape: (out, in).
        rank: Upper bound of the rank; None for a vector, or a dense ΔW.
        rescales: True if W is rescaled, too (DoRA).
        stacked: True if it is one of several matrices that are stored as one.
    """

    shape: tuple[int, int]
    rank: int | None
    rescales: bool = False
    stacked: bool = False

    @property
    def vector(self) -> bool:
        """True if it is stored without factors."""
        return self.rank is None or self.shape[1] == 1


def adapter_bytes(
    outputs: Collection[OutputShape], dtype: torch.dtype, *, rank_pattern: bool
) -> int:
    """Return the bytes of deltas as an adapter: all factors have one rank, unless each has its own.

    If one module rescales W, all do.
    """
    matrices = [one for one in outputs if not one.vector]
    highest = max((one.rank or 0 for one in matrices), default=0)
    values = sum(math.prod(one.shape) for one in outputs if one.vector)
    for one in matrices:
        rank = one.rank or 0 if rank_pattern and not one.stacked else highest
        values += rank * sum(one.shape)
    rescales = any(one.rescales for one in matrices)
    magnitudes = sum(one.shape[0] for one in matrices) if rescales else 0
    return values * dtype.itemsize + magnitudes * FLOAT


def head_bytes(merged_heads: MergedHeads, dtype: torch.dtype) -> int:
    """Return the bytes of what is replaced, in the adapter and in the files beside it."""
    head = merged_heads.head
    rows = [*head.rows.values(), *(head.rows[of] for of in head.copies.values())]
    values = sum(one.load().numel() for one in rows) + _values(head.parameters.values())
    return values * dtype.itemsize + _kept_bytes(merged_heads)


def folded_bytes(
    base: BaseModel, merged_heads: MergedHeads, modules: Iterable[str], tied: str
) -> int:
    """Return the bytes of the base model with the merge in it.

    Args:
        base: The base model.
        merged_heads: What is replaced.
        modules: The modules that change.
        tied: Policy for tied weights; a weight that is untied is stored twice.
    """
    sizes = {name: span.end - span.begin for name, span in base.tensors.items()}
    total = sum(sizes.values()) + _kept_bytes(merged_heads)
    head = merged_heads.head
    weights = {f"{module}.weight" for module in (*modules, *head.rows)} | head.parameters.keys()
    for name, new in head.parameters.items():
        stored = next(filter(None, map(base.names.in_files, (name, *base.names.tied(name)))), None)
        if stored is None:
            total += _values([new]) * FLOAT
            weights.discard(name)
        else:
            total += _grown(sizes[stored], base.tensors[stored].shape, new.shape)
    if tied == "untie":
        ends = {base.parameter(*split_parameter_name(n)) for n in weights if base.names.tied(n)}
        total += sum(sizes[name] for name in ends)
    return total


def _kept_bytes(merged_heads: MergedHeads) -> int:
    """Bytes of the files beside the weights."""
    return FLOAT * sum(_values(head.parameters.values()) for head in merged_heads.kept.values())


def _values(parameters: Iterable[ReplacedParameter]) -> int:
    return sum(math.prod(new.shape) for new in parameters)


def _grown(size: int, old: tuple[int, ...], new: tuple[int, ...]) -> int:
    """Bytes that are added when a tensor is resized."""
    return size // math.prod(old) * math.prod(new) - size
