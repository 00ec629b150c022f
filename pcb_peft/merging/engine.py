"""The merge: check, let the adapters compete, set the rank, report."""

import dataclasses
import functools
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter, DeltaMapping
from pcb_peft.adapters.loading import load_adapters
from pcb_peft.adapters.source import IN_MEMORY, Source
from pcb_peft.base.model import BaseModel, lazy_base
from pcb_peft.data.statistics_file import (
    StatisticsLike,
    TaskStatistics,
    check_statistics,
    open_statistics,
)
from pcb_peft.deltas.rank import Rank, budget_of
from pcb_peft.errors import OptionError, ProcessError
from pcb_peft.formats import LazyDelta
from pcb_peft.merging.compatibility import AdapterSet, common_base, refuse_other_names
from pcb_peft.merging.dora_or_lora import fall_back_to_lora, lift_to_dora
from pcb_peft.merging.finish import ModuleFinalizer, apply_rank_budget
from pcb_peft.merging.heads import merge_heads
from pcb_peft.merging.module_merger import MergeModule, ModuleMerger
from pcb_peft.merging.net_utility import select_by_net_utility
from pcb_peft.merging.plan import Setting, calibrations_of, plan
from pcb_peft.merging.report import LOW_ENERGY, Report
from pcb_peft.merging.resolve_base import chain_on_base, resolve_against_base
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.methods import MergeMethod, get_method
from pcb_peft.recipes.overrides import Override, read_overrides, read_weights
from pcb_peft.recipes.peft_aliases import method_of, resolve_peft_alias
from pcb_peft.recipes.recipe import Recipe, Step, steps
from pcb_peft.runtime.processes import Processes, current
from pcb_peft.runtime.progress import Track, tracker
from pcb_peft.runtime.resources import number_of_bytes, working_device
from pcb_peft.spaces import get_space
from pcb_peft.version import __version__

DEFAULT_MEMORY = 2 << 30


def merge_adapters(  # noqa: PLR0913  (every choice of a merge, by name)
    adapters: Sequence[str | Path | Source | tuple[Any, str] | Adapter],
    method: str | MergeMethod = "pcb",
    weights: Sequence[float | Sequence[float]] | None = None,
    space: str = "auto",
    scope: str = "auto",
    rank: Rank = None,
    base_model: str | Path | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool | None = None,
    *,
    overrides: Sequence[Override | Mapping[str, Any]] = (),
    before: Step | Sequence[Step] = (),
    after: Step | Sequence[Step] = (),
    heads: str = "keep-each",
    tied: str = "refuse",
    chain: bool = False,
    max_memory: int | str = DEFAULT_MEMORY,
    statistics: Sequence[StatisticsLike] = (),
    **options: Any,
) -> MergedAdapter:
    """Merges adapters of one base model into one adapter.

    Args:
        adapters: Directories, hub ids, (PeftModel, adapter name) or loaded adapters; one or more.
        method: A name from `list_methods()`, one of PEFT's (`cat`, `svd`, `ties_svd` …), or a `MergeMethod`.
        weights: The λ of the papers, one per adapter; default 1.0 each. A list of numbers instead of one is a gradient
            from the first layer to the last.
        space: Where the adapters compete: a name from `list_spaces()`; "auto": the method's own.
        scope: Of the statistics: "global", "module" (each weight alone) or "auto": the method's own.
        rank: Of the result: an integer; a fraction in (0, 1) of the energy to keep; "budget:N": N ranks, shared out by
            energy over all modules (save with ``rank_pattern=True``); "utility:N": the N directions of the adapters
            that help their own task more than they disturb the others, chosen before the merge;
            "full": dense, for folding; None: lossless where the space allows it, else the sum of the adapters' ranks.
        base_model: Path or hub id; settles which base model it is where the adapters' names for it differ.
        device: Where tiles are computed; default: the CPU.
        seed: Of random methods.
        progress: Show bars; default: on a terminal.
        overrides: What some modules do differently, such as ``{"modules": "*.mlp.*", "method": "ties", "options":
            {"density": 0.3}}``; the first that matches a module has it. See `Override`.
        before: Calibrations of the adapters, in this order: names, or name to options (`list_calibrations`).
        after: Calibrations of the merge, such as "svc" or {"exponent": {"power": 0.5}}, likewise.
        heads: What becomes of what several adapters replace by different values (modules_to_save, embeddings, token
            rows): "keep-each" (a file per adapter), "average" (by weight), "first" or "refuse". What only one replaces,
            or all alike, is part of the result.
        tied: What a fold of the result does with tied weights that do not change alike: "refuse", "untie" or "both".
        chain: Each adapter was trained on top of those before it, not on the bare base model.
        max_memory: Bytes that the merge may hold on to between its passes, beside one module and the result: a number,
            or "1G". It changes how long a merge takes, never what comes out.
        statistics: For methods that need data: one file per adapter, from `collect_statistics` or `pcb-peft collect`.
        **options: Of the method and the space, as `density` for `pcb`.

    Raises:
        OptionError: A value that is not allowed.
        AdapterError: An adapter that cannot be read, or holds what is not supported.
        MismatchError: Adapters that do not fit each other.
    """
    if isinstance(adapters, str | Path):
        raise OptionError(f"adapters is {str(adapters)!r}; it must be a list: [{str(adapters)!r}]")
    chosen = method if isinstance(method, MergeMethod) else get_method(method_of(method))
    loaded = load_adapters(adapters, base_model=lazy_base(base_model))
    measured = [open_statistics(one) for one in statistics]
    recipe = Recipe(
        adapters=_sources(loaded),
        weights=None if weights is None else read_weights(weights),
        method=method if isinstance(method, str) else method.name,
        space=space,
        scope=scope,
        rank=rank,
        options=options,
        overrides=read_overrides(overrides),
        before=steps("before", before),
        after=steps("after", after),
        heads=heads,
        tied=tied,
        chain=chain,
        base_model=None if base_model is None else str(base_model),
        seed=seed,
        statistics=_sources(measured),
    )
    return merge(
        recipe, loaded, chosen, measured, device=device, progress=progress, max_memory=max_memory
    )


def merge(
    recipe: Recipe,
    adapters: Sequence[Adapter] | None = None,
    method: MergeMethod | None = None,
    statistics: Sequence[TaskStatistics] | None = None,
    *,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
) -> MergedAdapter:
    """Makes what a recipe describes; arguments and errors as those of `merge_adapters`."""
    started, base = time.perf_counter(), lazy_base(recipe.base_model)
    method, track = method or get_method(method_of(recipe.method)), tracker(progress)
    adapters, notes = fall_back_to_lora(load_and_resolve(recipe, adapters, base), base)
    notes = [*_of_another_version(recipe), *notes]
    recipe, measured = _with_sources(resolve_peft_alias(recipe, adapters), adapters, statistics)
    alignment, common = AdapterSet(adapters), common_base(adapters, recipe.base_model)
    recipe, settings = plan(recipe, method, alignment, measured[0].kind if measured else None)
    recipe, before, after = calibrations_of(recipe, alignment)
    merged_heads = merge_heads(adapters, recipe.weights or (), recipe.heads)
    notes = [*merged_heads.notes, *notes, *common.notes]
    report = Report(recipe.method, recipe.space, recipe.scope, notes=notes)
    left = _useful(alignment, settings, recipe.rank, report, track)
    compete = functools.partial(
        _competition,
        device=working_device(device),
        track=track,
        max_memory=number_of_bytes(max_memory),
        seed=recipe.seed,
        before=before,
        after=after,
    )
    entries: dict[str, LazyDelta] = {}
    for setting in settings:
        entries |= _entries(compete(setting, alignment, left, measured), setting, recipe, report)
    entries = apply_rank_budget(lift_to_dora(entries, base, adapters, report), recipe.rank, report)
    report.seconds = time.perf_counter() - started
    _warn_of_lost_energy(report)
    return MergedAdapter(
        name="merged",
        modules=DeltaMapping(entries),
        base=base,
        base_model=common.name,
        revision=common.revision,
        task_type=_common_task(adapters),
        head=merged_heads.head,
        tied=recipe.tied,
        heads=merged_heads.kept,
        recipe=dataclasses.replace(recipe, scale=1.0),
        report=report,
    ).scaled(recipe.scale)


def _competition(
    setting: Setting,
    alignment: AdapterSet,
    left: AdapterSet,
    measured: Sequence[TaskStatistics],
    **common: Any,
) -> ModuleMerger:
    """Of the modules of a setting, as far as they are left."""
    return ModuleMerger(
        left.only(setting.modules),
        setting.weights_in(alignment.modules),
        setting.encode,
        setting.decide,
        data=_data(setting.method, measured, alignment),
        side_by_side=setting.space.low_rank_output,
        in_parts=setting.in_parts,
        **common,
    )


def _of_another_version(recipe: Recipe) -> list[str]:
    """A note on a recipe that belongs to a result of another version of this package."""
    if recipe.version in (None, __version__):
        return []
    return [
        f"the recipe belongs to a result of pcb_peft {recipe.version}, and this is {__version__}: bytes may differ"
    ]


def load_and_resolve(
    recipe: Recipe, adapters: Sequence[Adapter] | None, base: Callable[[], BaseModel] | None
) -> list[Adapter]:
    """The adapters, by different names, and read beside the base model where that is needed."""
    loaded = adapters or load_adapters(recipe.adapters, base_model=base)
    asked = None if recipe.space == "auto" else get_space(recipe.space)
    loaded = _named_apart(loaded)
    _refuse_other_files(loaded, current())
    refuse_other_names(loaded, base)
    return resolve_against_base(
        chain_on_base(loaded, base) if recipe.chain else loaded, base, asked
    )


def _refuse_other_files(adapters: Sequence[Adapter], processes: Processes) -> None:
    """Raises ProcessError where processes do not read the same adapters."""
    own = [(a.name, a.source and (a.source.sha256, a.source.config_sha256)) for a in adapters]
    first, *others = processes.all_gather(own)
    for rank, theirs in enumerate(others, 1):
        if theirs != first:
            names = ", ".join(sorted({name for name, _ in set(first) ^ set(theirs)}))
            raise ProcessError(
                f"processes 0 and {rank} read different files under the name of {names}; let all processes see the "
                "same adapters"
            )


def _with_sources(
    recipe: Recipe, adapters: Sequence[Adapter], given: Sequence[TaskStatistics] | None
) -> tuple[Recipe, Sequence[TaskStatistics]]:
    """The recipe with the hashes of its adapters and statistics, and the statistics, checked.

    Raises:
        OptionError: There is not one for each adapter.
        MismatchError: One belongs to another adapter.
    """
    statistics = given or [open_statistics(source) for source in recipe.statistics]
    if statistics:
        check_statistics(statistics, adapters)
    sources = {"adapters": _sources(adapters), "statistics": _sources(statistics)}
    return dataclasses.replace(recipe, **sources), statistics


def _sources(some: Sequence[Adapter] | Sequence[TaskStatistics]) -> tuple[Source, ...]:
    """Where they are; those that are in no file have a name only."""
    return tuple(one.source or Source(f"{IN_MEMORY}{one.name}") for one in some)


def _data(
    method: MergeMethod, statistics: Sequence[TaskStatistics], alignment: AdapterSet
) -> tuple[str, Callable[[str], Sequence[Tensor]]] | None:
    """What a competition hands to the method of what was measured."""
    if method.needs_statistic is None:
        return None

    def read(module: str) -> Sequence[Tensor]:
        return [some.of(module, alignment.modules[module].shape) for some in statistics]

    return method.needs_statistic, read


def _entries(
    competition: ModuleMerger, setting: Setting, recipe: Recipe, report: Report
) -> dict[str, LazyDelta]:
    """The result of a competition, by module; nothing where there is none to decide on."""
    if not competition.alignment.modules:
        return {}
    produce = competition.calibrated(_contest(competition, setting, report))
    rank = None if isinstance(recipe.rank, str) and recipe.rank != "full" else recipe.rank
    finalizer = ModuleFinalizer(
        competition.alignment, produce, rank, setting.space.low_rank_output, report
    )
    if rank == "full":
        return {module: finalizer.lazy(module) for module in competition.alignment.modules}
    own = dict(zip(competition.own, competition.each(finalizer.finalize, "merge"), strict=True))
    return finalizer.gather(own, competition.processes)


def _contest(competition: ModuleMerger, setting: Setting, report: Report) -> MergeModule:
    """The competition over the scope, or none where the method keeps an adapter that is alone."""
    adapters = competition.alignment.adapters
    if len(adapters) == 1 and setting.method.identity_on_one:
        name = adapters[0].name
        report.note(f"{name} is alone: without a competitor it is only scaled by its weight")
        return competition.passthrough()
    if setting.scope == "module":
        return competition.per_module()
    return competition.global_scope(report.note)


def _useful(
    alignment: AdapterSet, settings: Sequence[Setting], rank: Rank, report: Report, track: Track
) -> AdapterSet:
    """The same adapters, or what a budget of net utility leaves of them.

    Raises:
        OptionError: It leaves nothing.
    """
    total = budget_of(rank, "utility")
    if total is None:
        return alignment
    rules = {
        m: setting.weights_in(alignment.modules) for setting in settings for m in setting.modules
    }
    left = AdapterSet(
        select_by_net_utility(alignment, lambda module: rules[module](module), total, track)
    )
    ranks = {
        adapter.name: sum(e.rank or 0 for e in adapter.modules.entries.values())
        for adapter in left.adapters
    }
    if not left.modules:
        raise OptionError(
            f"rank is {rank!r}, but no direction helps its own task more than it disturbs the others: the adapters are "
            f"too much alike; 'budget:{total}' shares the ranks out by energy"
        )
    kept = ", ".join(f"{count} of {name}" for name, count in ranks.items())
    report.note(f"directions of positive net utility that were kept: {kept}")
    return left


def _named_apart(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The same adapters, numbered where two have the same name."""
    total = Counter(adapter.name for adapter in adapters)
    taken = {name for name, count in total.items() if count == 1}
    named: list[Adapter] = []
    for adapter in adapters:
        numbered = (f"{adapter.name}-{number}" for number in itertools.count(1))
        single = total[adapter.name] == 1
        name = adapter.name if single else next(n for n in numbered if n not in taken)
        taken.add(name)
        named.append(dataclasses.replace(adapter, name=name))
    return named


def _common_task(adapters: Sequence[Adapter]) -> str | None:
    tasks = {adapter.task_type for adapter in adapters}
    return tasks.pop() if len(tasks) == 1 else None


def _warn_of_lost_energy(report: Report) -> None:
    if report.energy < LOW_ENERGY:
        worst = min(report.modules, key=lambda module: report.modules[module].energy)
        message = (
            f"the merged adapter retains {report.energy:.1%} of the merged energy (least in {worst}: "
            f"{report.modules[worst].energy:.1%}); a higher rank, a lossless space or rank='full' and a fold keep more"
        )
        report.note(message)
        warnings.warn(message, stacklevel=4)
