"""What a merge will cost, before a tensor is read.

For modules of the same kinds and ranks stand two random ones, of which the second has more rows. Both are merged; what
grows between them is how time grows with size, whatever the method and the space do.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapters
from pcb_peft.base.model import lazy_base
from pcb_peft.deltas.dtypes import parse_dtype
from pcb_peft.deltas.rank_choice import Full
from pcb_peft.dry_run.module_cost import ModuleCost, module_costs, modules_at_once
from pcb_peft.dry_run.output_size import (
    adapter_bytes,
    folded_bytes,
    head_bytes,
)
from pcb_peft.dry_run.probes import best_of
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.merging.finish import check_writable
from pcb_peft.merging.plan import Setting
from pcb_peft.merging.prepare import prepare
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.runtime.resources import DEFAULT_MEMORY, number_of_bytes
from pcb_peft.runtime.units import format_count, format_duration, format_size
from pcb_peft.tasks.limits import DEFAULT_LIMITS

PROCESS_BYTES = 250 << 20  # Python with torch and this package
TILES_HELD = 10  # what a method makes of a tile, in tiles


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What a merge takes in one process.

    Attributes:
        modules: How many.
        values: Per adapter, in the spaces in which they compete.
        passes: Over these, the last of which merges; the most that a part of the model needs.
        read: Bytes of the adapters' tensors, as often as they are read.
        written: Bytes of tensors; at most so many where the data tells the rank, or whether heads are the same.
        memory: Bytes that are resident at the peak, pages of the adapters' files among them, which a system that is
            short of memory takes back.
        seconds: On this machine as it is now; without what the disk takes.
    """

    modules: int
    values: int
    passes: int
    read: int
    written: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        return (
            f"{self.modules} modules, {format_count(self.values)} values per adapter, {passes} over them\n"
            f"reads {format_size(self.read)}, writes {format_size(self.written)}\n"
            f"peak memory about {format_size(self.memory)}, time about {format_duration(self.seconds)} in one process, "
            "as fast as this machine is now"
        )


def estimate_merge(
    recipe: Recipe,
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    dtype: torch.dtype | str = torch.float32,
    rank_pattern: bool = False,
    fold: bool = False,
) -> Estimate:
    """What `merge` and `save_pretrained`, or `fold`, will take. Of the adapters only headers, and token rows, are read.

    Args:
        recipe: What would be merged.
        max_memory: As `merge` takes it.
        dtype: Of the tensors written, as `save_pretrained` takes it.
        rank_pattern: Likewise.
        fold: The recipe's base model is written, with the merge in it.

    Raises:
        PcbPeftError: As they do, where that can be known from the headers.
    """
    check_writable(recipe, fold=fold)
    dtype, room = parse_dtype(dtype), number_of_bytes(max_memory)
    base = lazy_base(recipe.base_model)
    given = load_adapters(recipe.adapters, base_model=base, hashed=False)
    prepared = prepare(recipe, given, headers_only=True)
    alignment, merged_heads = prepared.adapter_set, prepared.heads
    settings, (before, after) = prepared.plan.settings, prepared.plan[2:]
    costs = [
        cost
        for setting in settings
        for cost in module_costs(alignment, setting, recipe.rank, before, after, room)
    ]
    stored = sum(map(_stored_bytes, given))
    kept, passes = sum(cost.kept for cost in costs), max((cost.passes for cost in costs), default=0)
    again = max(0.0, 1 - room / kept) * (2 * passes) if kept else 0.0
    left = [cost.left for cost in costs]
    result = adapter_bytes(left, torch.float32, rank_pattern=True)
    written = adapter_bytes(left, dtype, rank_pattern=rank_pattern)
    copied = 0 if fold or written == result else written
    written += head_bytes(merged_heads, dtype)
    if fold and base:
        written = folded_bytes(base(), merged_heads, alignment.modules, recipe.tied)
    return Estimate(
        modules=len(alignment.modules),
        values=sum(cost.values for cost in costs),
        passes=passes,
        read=int(stored * (2 + again)),
        written=written,
        memory=PROCESS_BYTES
        + stored
        + min(room, kept)
        + max((cost.working for cost in costs), default=0)
        + (0 if recipe.rank == Full() else result + copied)
        + max((_statistics_bytes(alignment, setting, costs) for setting in settings), default=0),
        seconds=sum(cost.seconds + again * cost.encode for cost in costs)
        + stored * _hash_seconds(),
    )


def _stored_bytes(adapter: Adapter) -> int:
    """Of the tensors in an adapter's files."""
    if adapter.files is None:
        return 0
    tensors = adapter.files.tensors
    return sum(
        math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors.names()
    )


@functools.cache
def _hash_seconds() -> float:
    """Per byte."""
    content = bytes(1 << 22)
    return best_of(lambda: hashlib.sha256(content))[0] / len(content)


def _statistics_bytes(alignment: AdapterSet, setting: Setting, costs: Sequence[ModuleCost]) -> int:
    """Of the tiles in work, of those that are held with a score, of a sample, and of the values that brackets keep."""
    tasks = len(alignment.adapters)
    scope, held = sum(cost.values for cost in costs), max(cost.held for cost in costs)
    if setting.scope == "module":
        scope, held = max(cost.values for cost in costs), modules_at_once(setting) * held
    limits = DEFAULT_LIMITS
    width = limits.dtype(tasks, scope).itemsize
    tile = max(limits.tile_values, *(cost.tile for cost in costs))
    tiles = torch.get_num_threads() * min(tile, tasks * scope) * TILES_HELD
    sampled = limits.sample_size(tasks, scope)
    sample = 4 * tasks * min(scope, sampled)
    inside = int(scope * limits.bracket_margin / sampled**0.5)
    inside = min(limits.bracket_size(2 * tasks), inside)
    brackets = (
        4 * tasks * inside if scope > limits.sample_values else 0
    )  # two of them, with room to grow
    return held + width * (tiles + sample + brackets)
