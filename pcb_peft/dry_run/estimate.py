"""An estimate of what a merge takes and writes, before a tensor is read.

Bytes follow from shapes. Seconds are those of random modules that are merged for a moment (`module_cost`).
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import load_adapters
from pcb_peft.base.files import bytes_of
from pcb_peft.base.model import lazy_base
from pcb_peft.data.metric import is_measured
from pcb_peft.deltas.dtypes import parse_dtype
from pcb_peft.deltas.rank_choice import Full
from pcb_peft.dry_run.module_cost import ModuleCost, module_costs, modules_at_once
from pcb_peft.dry_run.output_size import adapter_bytes, folded_bytes, head_bytes
from pcb_peft.dry_run.probes import best_of
from pcb_peft.merging.finish import check_writable
from pcb_peft.merging.full_rank import full_rank_warning
from pcb_peft.merging.plan import Setting
from pcb_peft.merging.prepare import Prepared, prepare
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.runtime.resources import DEFAULT_MEMORY, number_of_bytes
from pcb_peft.runtime.units import format_count, format_duration, format_size
from pcb_peft.tasks.limits import DEFAULT_LIMITS

PROCESS_BYTES = 250 << 20  # of Python with torch and this package
TILES_IN_WORK = 10  # tiles that a method's intermediate results take, per thread
READS = 2  # of an adapter's file: for its hash, and for its tensors


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of a merge in one process.

    Attributes:
        modules: Number of modules.
        values: Values per adapter, in the spaces in which they are merged.
        passes: Passes over these values, the last of which merges; the most that a part of the model needs.
        read: Bytes that are read of the adapters' tensors, as often as they are read.
        written: Bytes of the tensors that are written; an upper bound where the data tells the rank, or whether heads
            are the same.
        memory: Bytes that are resident at the peak. Pages of the adapters' files are among them, which a system that is
            short of memory takes back.
        seconds: Seconds on this machine as it is now, without the disk.
        rank: Highest rank of a module in the result, at most; None where it has no ranks.
        warning: What is to be known before the merge is made; empty where nothing is.
    """

    modules: int
    values: int
    passes: int
    read: int
    written: int
    memory: int
    seconds: float
    rank: int | None = None
    warning: str = ""

    def __str__(self) -> str:
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        return (
            f"{self.modules} modules, {format_count(self.values)} values per adapter, {passes} over them\n"
            f"reads {format_size(self.read)}, writes {format_size(self.written)}\n"
            f"peak memory about {format_size(self.memory)}, time about {format_duration(self.seconds)} in one process, "
            "as fast as this machine is now"
            + ("" if self.rank is None else f"\nrank {self.rank} at most")
            + (f"\n{self.warning}" if self.warning else "")
        )


def estimate_merge(
    recipe: Recipe,
    *,
    max_memory: int | str = DEFAULT_MEMORY,
    dtype: torch.dtype | str = torch.float32,
    rank_pattern: bool = False,
    fold: bool = False,
) -> Estimate:
    """Estimate what `merge` and `save_pretrained`, or `fold`, will take. Only headers and token rows are read.

    Args:
        recipe: The merge.
        max_memory: As `merge` takes it.
        dtype: Dtype of the tensors written, as `save_pretrained` takes it.
        rank_pattern: As `save_pretrained` takes it.
        fold: True to estimate a fold into the recipe's base model instead of an adapter.

    Returns:
        Time, memory and sizes.

    Raises:
        PcbPeftError: The merge would be refused, and the headers tell so.

    Example:
        print(estimate_merge(read_recipe("recipe.yaml")))
    """
    check_writable(recipe, fold=fold)
    memory, file_dtype = number_of_bytes(max_memory), parse_dtype(dtype)
    base = lazy_base(recipe.base_model, dequantize=recipe.dequantize)
    given = load_adapters(recipe.adapters, base_model=base, hashed=False)
    prepared = prepare(recipe, given, headers_only=True)
    by_setting = [
        (setting, module_costs(prepared.adapter_set, prepared.plan, setting, memory))
        for setting in prepared.plan.settings
    ]
    costs = [cost for _, some in by_setting for cost in some]
    stored = sum(map(_stored_bytes, given))
    kept, passes = sum(cost.kept for cost in costs), max((cost.passes for cost in costs), default=0)
    again = max(0.0, 1 - memory / kept) * (2 * passes) if kept else 0.0
    written = _written_bytes(prepared, costs, file_dtype, rank_pattern, fold)
    memory_of_merge = (
        PROCESS_BYTES
        + stored
        + min(memory, kept)
        + max((cost.working for cost in costs), default=0)
        + _result_bytes(prepared, costs, file_dtype, rank_pattern, fold)
        + max((_statistics_bytes(*some) for some in by_setting), default=0)
    )
    return Estimate(
        modules=len(prepared.adapter_set.modules),
        values=sum(cost.values for cost in costs),
        passes=passes,
        read=int(stored * (READS + again)),
        written=written,
        memory=max(memory_of_merge, PROCESS_BYTES + _base_bytes(prepared)),
        seconds=sum(cost.seconds + again * cost.encode for cost in costs)
        + stored * _seconds_per_byte_hashed(),
        rank=max((cost.output.rank for cost in costs if cost.output.rank), default=None),
        warning="\n".join(filter(None, [full_rank_warning(prepared), *prepared.plan.notes])),
    )


def _base_bytes(prepared: Prepared) -> int:
    """Bytes of the base model, which a metric that is measured on it loads once; 0 without one."""
    metric = prepared.recipe.metric
    if metric is None or prepared.base is None or not is_measured(metric.path):
        return 0
    return bytes_of(prepared.base().tensors)


def _written_bytes(
    prepared: Prepared,
    costs: Sequence[ModuleCost],
    dtype: torch.dtype,
    rank_pattern: bool,
    fold: bool,
) -> int:
    """Bytes of the tensors in the output's files."""
    if fold and prepared.base:
        tied, modules = prepared.recipe.tied, prepared.adapter_set.modules
        return folded_bytes(prepared.base(), prepared.heads, modules, tied)
    outputs = [cost.output for cost in costs]
    adapter = adapter_bytes(outputs, dtype, rank_pattern=rank_pattern)
    return adapter + head_bytes(prepared.heads, dtype)


def _result_bytes(
    prepared: Prepared,
    costs: Sequence[ModuleCost],
    dtype: torch.dtype,
    rank_pattern: bool,
    fold: bool,
) -> int:
    """Bytes of the merged deltas in memory, and of their copies in another dtype or rank for the file."""
    if prepared.recipe.rank == Full():
        return 0  # they are merged one by one, when they are folded
    outputs = [cost.output for cost in costs]
    result = adapter_bytes(outputs, torch.float32, rank_pattern=True)
    in_file = adapter_bytes(outputs, dtype, rank_pattern=rank_pattern)
    return result if fold or in_file == result else result + in_file


def _stored_bytes(adapter: Adapter) -> int:
    """Bytes of the tensors in an adapter's files."""
    if adapter.files is None:
        return 0
    tensors = adapter.files.tensors
    return sum(
        math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors.names()
    )


@functools.cache
def _seconds_per_byte_hashed() -> float:
    """Seconds that SHA-256 takes per byte on this machine."""
    content = bytes(1 << 22)
    return best_of(lambda: hashlib.sha256(content))[0] / len(content)


def _statistics_bytes(setting: Setting, costs: Sequence[ModuleCost]) -> int:
    """Bytes that a setting's statistics take: cached tiles and scores, tiles in work, samples, and brackets."""
    scope, cached = sum(cost.values for cost in costs), max(cost.cached for cost in costs)
    if setting.scope == "module":
        scope = max(cost.values for cost in costs)
        cached *= modules_at_once(setting)
    tasks, limits = len(setting.weights), DEFAULT_LIMITS
    tile = max(limits.tile_values, *(cost.tile for cost in costs))
    tiles = torch.get_num_threads() * min(tile, tasks * scope) * TILES_IN_WORK
    sampled = limits.sample_size(tasks, scope)
    sample = 4 * tasks * min(scope, sampled)
    brackets = 0
    if scope > limits.sample_values:
        inside = int(scope * limits.bracket_margin / math.sqrt(sampled))
        inside = min(limits.bracket_size(2 * tasks), inside)
        brackets = 4 * tasks * inside  # two of them, with room to grow
    return cached + limits.dtype(tasks, scope).itemsize * (tiles + sample + brackets)
