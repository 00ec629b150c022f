"""The cost of merging each module: bytes from shapes, seconds from a random module that is merged for a moment.

Modules of the same kinds and ranks share one probe. A module takes longer than the probe as it has more values: in its
blocks, for the passes over them; in its factors, for the way into the space; in its result, for the way out.
"""

import dataclasses
import math

import torch

from pcb_peft.deltas.delta import Dense
from pcb_peft.deltas.linalg import GROUP
from pcb_peft.deltas.rank_choice import EnergyFraction, NetUtility, RankBudget
from pcb_peft.dry_run.output_size import OutputShape
from pcb_peft.dry_run.probes import Kinds, Probe, ProbeTimes, Shape, probe_shape
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.merging.module_merger import FACTOR_BYTES, projection_bytes
from pcb_peft.merging.plan import Plan, Setting
from pcb_peft.tasks import compiling
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits

CPU = torch.device("cpu")
NEVER = 1 << 62  # values: a limit that is never reached
ENCODING_COPIES = 3  # of a module's factors and bases, while they are decomposed
DENSE_BYTES = 20  # per entry of a dense ΔW: float64 result, float32 copy, and what truncates it
BLOCK_BYTES = 24  # per value of a block in memory: float64, and two intermediate results


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleCost:
    """The cost of merging one module.

    Attributes:
        seconds: Seconds of the whole merge.
        values: Values per adapter.
        passes: Passes over them.
        output: The result.
        working: Bytes while it is merged, of all modules that are merged side by side.
        kept: Bytes that are kept between passes, if memory allows.
        encode: The part of the seconds that is the way into the space, once.
        cached: Bytes of its scope's tiles and scores that stay in memory.
        tile: Values of its smallest tile, of all adapters.
    """

    seconds: float
    values: int
    passes: int
    output: OutputShape
    working: int
    kept: int
    encode: float
    cached: int
    tile: int


def module_costs(
    adapter_set: AdapterSet, plan: Plan, setting: Setting, max_memory: int
) -> list[ModuleCost]:
    """Return the cost of each of a setting's modules.

    Args:
        adapter_set: The adapters.
        plan: How they are merged.
        setting: How these modules are merged.
        max_memory: Bytes that may be kept between passes.
    """
    probes: dict[tuple[Kinds, Shape], Probe] = {}
    by_module: dict[str, Probe] = {}
    low_rank = setting.space.low_rank_output
    for module in setting.modules:
        kinds = _kinds(adapter_set, module, in_parts=setting.in_parts)
        shape = adapter_set.modules[module].shape
        key = kinds, probe_shape(kinds, shape, low_rank_output=low_rank)
        if key not in probes:
            probes[key] = Probe(plan, setting, *key)
        by_module[module] = probes[key]
    shapes = {module: adapter_set.modules[module].shape for module in setting.modules}
    scope = sum(probe.values(shapes[module]) for module, probe in by_module.items())
    costs: list[ModuleCost] = []
    for module, probe in by_module.items():
        size, memory = scope, float(max_memory)
        if setting.scope == "module":
            size, memory = probe.values(shapes[module]), math.inf
        times = probe.times(_same_way(len(probe.kinds), size, memory))
        cached = DEFAULT_LIMITS.cached_bytes(len(probe.kinds), size, memory)
        output = _bounded(times.output, adapter_set, module, setting, plan)
        costs.append(_cost(probe, times, output, setting, plan, cached))
    compile_seconds = max(probe.compile_seconds for probe in probes.values())
    costs[0] = dataclasses.replace(costs[0], seconds=costs[0].seconds + compile_seconds)
    return costs


def _same_way(adapters: int, size: int, max_memory: float) -> Limits:
    """Return limits by which a smaller scope is computed as one of `size` values per adapter is."""
    limits = DEFAULT_LIMITS
    compiled = limits.worth_compiling(adapters, size) and not compiling.why_not_compiled(CPU)
    return dataclasses.replace(
        limits,
        double_values=NEVER if limits.dtype(adapters, size) == torch.float64 else 0,
        compile_values=0 if compiled else NEVER,
        cached_values=NEVER if limits.cached_bytes(adapters, size, max_memory) else 0,
    )


def modules_at_once(setting: Setting) -> int:
    """Return the number of modules that are merged side by side."""
    threads = torch.get_num_threads()
    return min(threads, len(setting.modules)) if setting.space.low_rank_output else 1


def _kinds(adapter_set: AdapterSet, module: str, *, in_parts: bool) -> Kinds:
    """The kind and rank of each adapter's delta; a DoRA's counts as dense where it is merged as a whole."""
    template = adapter_set.modules[module]
    entries = [adapter.modules.entries.get(module) for adapter in adapter_set.adapters]
    kinds = [(e.kind, e.rank or 0) if e else (template.kind, 1) for e in entries]
    return tuple((Dense, 0) if k.rescales and not in_parts else (k, r) for k, r in kinds)


def _bounded(
    output: OutputShape, adapter_set: AdapterSet, module: str, setting: Setting, plan: Plan
) -> OutputShape:
    """The output of a module, given its probe's: its rank is at most what the adapters and the budget allow."""
    rank, template = plan.recipe.rank, adapter_set.modules[module]
    highest = output.rank
    if highest is not None:
        bounds = [*template.shape, highest]
        if isinstance(rank, RankBudget | NetUtility):
            bounds.append(rank.total)
        if not plan.after and not (
            isinstance(rank, EnergyFraction) and not setting.space.low_rank_output
        ):
            bounds.append(adapter_set.total_rank(module, in_parts=setting.in_parts))
        highest = min(bounds)
    return dataclasses.replace(output, shape=template.shape, rank=highest, stacked=template.stacked)


def _cost(
    probe: Probe,
    times: ProbeTimes,
    output: OutputShape,
    setting: Setting,
    plan: Plan,
    cached: int,
) -> ModuleCost:
    shape, is_global = output.shape, setting.scope == "global"
    values, tasks, rank = probe.values(shape), len(probe.kinds), probe.total_rank
    surveys = sum(calibration.survey is not None for calibration in plan.after)
    factors = sum(shape) / sum(probe.shape)
    dense = not setting.space.low_rank_output
    encode = probe.encode * factors * (1 if is_global else 1 + surveys)
    merge = times.merge * values / probe.values(probe.shape)
    merge *= 1 + surveys / (times.passes if is_global else 1)
    finish = times.finish * (math.prod(shape) / math.prod(probe.shape) if dense else factors)
    working = ENCODING_COPIES * FACTOR_BYTES * rank * sum(shape)
    working += DENSE_BYTES * math.prod(shape) if dense else BLOCK_BYTES * tasks * values
    return ModuleCost(
        seconds=(encode + merge + finish) / modules_at_once(setting),
        values=values,
        passes=times.passes,
        output=output,
        working=modules_at_once(setting) * working,
        kept=projection_bytes(shape, rank, tasks) if is_global else 0,
        encode=encode / modules_at_once(setting),
        cached=cached,
        tile=GROUP * tasks * max(cols for _, cols in probe.block_shapes(shape)),
    )
