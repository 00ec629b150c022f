"""The merge: prepare, merge every module, set the rank, report."""

import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.loading import AdapterLike, load_adapters
from pcb_peft.adapters.saving import FileFormat
from pcb_peft.base.model import lazy_base
from pcb_peft.data.metric import Metric, Subject, open_metric
from pcb_peft.data.statistics_file import StatisticsLike, TaskStatistics, open_statistics
from pcb_peft.deltas.rank_choice import (
    EnergyFraction,
    FixedRank,
    Full,
    NetUtility,
    RankLike,
    module_rank,
)
from pcb_peft.deltas.replacements import HeadPolicy, Tied
from pcb_peft.errors import OptionError
from pcb_peft.formats import LazyDelta
from pcb_peft.merging.compatibility import AdapterSet, common_mapping, common_task, licences_of
from pcb_peft.merging.dora_or_lora import lift_to_dora
from pcb_peft.merging.finish import ModuleFinisher, PendingModule, apply_rank_budget, gather
from pcb_peft.merging.full_rank import warn_of_full_rank
from pcb_peft.merging.module_merger import Machine, MergeModule, ModuleMerger
from pcb_peft.merging.net_utility import select_by_net_utility
from pcb_peft.merging.plan import Setting, named_method
from pcb_peft.merging.prepare import Prepared, prepare, sources_of
from pcb_peft.merging.report import LOW_ENERGY, Report, ReportBuilder
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.merging.scopes import Calibrated, GlobalScope, ModuleScope, Passthrough, Truncated
from pcb_peft.methods import MergeMethod
from pcb_peft.methods.default import AUTO
from pcb_peft.recipes.overrides import OverrideLike, Scope
from pcb_peft.recipes.recipe import Recipe, read_recipe
from pcb_peft.recipes.steps import StepsLike
from pcb_peft.recipes.weights import WeightsLike
from pcb_peft.runtime.progress import Track, tracker
from pcb_peft.runtime.resources import DEFAULT_MEMORY, number_of_bytes, working_device
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits
from pcb_peft.writing.targets import existing


def merge_adapters(  # noqa: PLR0913  (every choice of a merge, by name)
    adapters: Sequence[AdapterLike],
    method: str | MergeMethod = AUTO,
    weights: WeightsLike | None = None,
    space: str = "auto",
    scope: Scope = "auto",
    rank: RankLike = None,
    base_model: str | Path | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool | None = None,
    *,
    scale: float = 1.0,
    overrides: Sequence[OverrideLike] = (),
    before: StepsLike = (),
    after: StepsLike = (),
    heads: HeadPolicy = "keep-each",
    head: str | None = None,
    companions: str = "agree",
    tied: Tied = "refuse",
    chain: bool = False,
    max_memory: int | str = DEFAULT_MEMORY,
    statistics: Sequence[StatisticsLike] = (),
    metric: str | Path | None = None,
    dequantize: bool = False,
    format: FileFormat | None = None,  # noqa: A002  (as save_pretrained calls it)
    **options: Any,
) -> MergedAdapter:
    """Merge adapters of one base model into one adapter.

    Args:
        adapters: Directories, hub ids, (PeftModel, adapter name) or loaded adapters; one or more.
        method: A name from `list_methods()`, one of PEFT's (`cat`, `svd`, `ties_svd` …), or a `MergeMethod`. "auto":
            `flat`, with `metric="random"` if `base_model` is given; `pcb` for (IA)³ adapters, if some deltas have full
            rank (DoRA, full fine-tunes), or if `rank` is a fraction of the energy or a budget.
        weights: The λ of the papers, one per adapter; default 1.0 each. A list of numbers instead of one is a gradient
            from the first layer to the last.
        space: The coordinates in which the adapters are merged: a name from `list_spaces()`; "auto": the method's own.
        scope: Where the method takes its statistics: "global" (the whole adapter, as in the papers), "module" (each
            weight alone), or "auto": the method's own.
        rank: Rank of the result: an integer; a fraction in (0, 1) of the energy to keep; "budget:N": N ranks,
            distributed over all modules (save with ``rank_pattern=True``); "utility:N": the N directions of the
            adapters with the best benefit-to-interference score, chosen before the merge; "full": dense, for folding;
            None: lossless where the space allows it, else the sum of the adapters' ranks.
        base_model: Path or hub id of the base model. Needed where a delta depends on W (DoRA, PiSSA, (IA)³ among
            LoRAs), and where the adapters name different base models.
        device: Where tiles are computed, such as "cuda"; default: the CPU.
        seed: Seed of random methods.
        progress: Show progress bars; default: on a terminal.
        scale: The number by which the merged deltas are multiplied at the end, as by `scaled`.
        overrides: What some modules do differently, such as ``{"modules": "*.mlp.*", "method": "ties", "options":
            {"density": 0.3}}``; the first override that matches a module wins. See `Override`.
        before: Calibrations of the adapters, in this order: names, or name to options (`list_calibrations`).
        after: Calibrations of the merge, such as "svc" or {"exponent": {"power": 0.5}}, likewise.
        heads: What happens to fully trained layers (modules_to_save, embeddings, token rows) that differ between
            adapters: "keep-each" (a file per adapter), "average" (by weight), "first" or "refuse". A layer that only
            one adapter holds, or all alike, is part of the result.
        companions: Whose tokenizer, chat template, generation and processor files the result gets: "agree" (those that
            all adapters which have them have alike), "none", or the name of an adapter.
        tied: How the result is folded when only one of two tied matrices changes: "refuse", "untie" or "both".
        chain: Each adapter was trained on top of those before it, not on the bare base model.
        max_memory: Limit of what is cached between passes, in bytes or as "1G": it changes only how long a merge takes.
            Peak memory is roughly this, the largest module and the result.
        statistics: For methods that need data: one file per adapter, from `collect_statistics` or `pcb-peft collect`.
        metric: The directions of a module's inputs that count when adapters are compared, and when the rank is set:
            "random" (those of random tokens in `base_model`, measured once), a ``.jsonl`` file of texts, a file of
            moments, or "statistics" (the mean of `statistics` of kind gram). None: all inputs count alike; see method.
        dequantize: Take a quantised base model (NF4, INT8, GPTQ, AWQ, FP8 …); W is computed from its codes.
        format: Format of the saved result: "peft", "diffusers", "kohya" or "comfyui"; None: as the adapters came.
        **options: Options of the method and the space, such as `density` of `pcb`.

    Returns:
        The merged adapter. Its `report` says what was decided and what it cost.

    Raises:
        OptionError: A value is not allowed.
        AdapterError: An adapter cannot be read, or holds something that is not supported.
        MismatchError: The adapters do not fit each other.

    Example:
        merged = merge_adapters(["math-lora", "code-lora"], "ties", [1.0, 0.5], density=0.3)
        merged.save_pretrained("merged")
    """
    _refuse_one_adapter(adapters)
    chosen = method if isinstance(method, MergeMethod) else named_method(method)
    loaded = load_adapters(adapters, base_model=lazy_base(base_model, dequantize=dequantize))
    opened = [open_statistics(one) for one in statistics]
    what = {"weights": weights, "space": space, "scope": scope, "rank": rank, "options": options}
    how = {"scale": scale, "overrides": overrides, "before": before, "after": after, "seed": seed}
    where = {"base_model": base_model, "dequantize": dequantize, "metric": metric, "format": format}
    beside = {"heads": heads, "head": head, "companions": companions, "tied": tied, "chain": chain}
    recipe = _recipe_of(loaded, opened, method, **what, **how, **where, **beside)
    return merge(
        recipe, loaded, chosen, opened, device=device, progress=progress, max_memory=max_memory
    )


def _recipe_of(
    adapters: Sequence[Adapter],
    statistics: Sequence[TaskStatistics],
    method: str | MergeMethod,
    **given: Any,
) -> Recipe:
    """The recipe of a merge of what is open; `given` are its other fields."""
    return Recipe.parse(
        adapters=sources_of(adapters),
        statistics=sources_of(statistics),
        method=method if isinstance(method, str) else method.name,
        **given,
    )


def _refuse_one_adapter(given: object) -> None:
    """Raises OptionError for something that is not a list."""
    if isinstance(given, str | Path) or not isinstance(given, Sequence):
        shown = str(given) if isinstance(given, Path) else given
        raise OptionError(f"adapters is {shown!r}; it must be a list: [{shown!r}]")


def merge(
    recipe: Recipe | str | Path,
    adapters: Sequence[Adapter] | None = None,
    method: MergeMethod | None = None,
    statistics: Sequence[TaskStatistics] | None = None,
    *,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    max_memory: int | str = DEFAULT_MEMORY,
    limits: Limits = DEFAULT_LIMITS,
) -> MergedAdapter:
    """Make the merge that a recipe describes.

    Args:
        recipe: A recipe, or the path of a recipe file.
        adapters: The recipe's adapters, if they are loaded already.
        method: The recipe's method, if it has no registered name.
        statistics: The recipe's statistics, if they are open already.
        device: As `merge_adapters` takes it.
        progress: Likewise.
        max_memory: Likewise.
        limits: How many values are looked at, computed and kept at a time; for measurements and tests.

    Returns:
        The merged adapter.

    Raises:
        PcbPeftError: What `merge_adapters` raises.

    Example:
        merge("recipe.yaml").save_pretrained("merged")
    """
    started = time.perf_counter()
    asked = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    machine = Machine(
        working_device(device), tracker(progress), number_of_bytes(max_memory), limits
    )
    prepared = prepare(asked, adapters, method, statistics)
    report = ReportBuilder(prepared.notes)
    warn_of_full_rank(prepared, report)
    prepared, metric = _with_metric(prepared, machine, report)
    chosen = _choose_directions(prepared, machine.track, report)
    merged: dict[str, LazyDelta] = {}
    pending: dict[str, PendingModule] = {}
    for setting in prepared.plan.settings:
        merger = _merger(setting, chosen, prepared, machine, metric)
        modules = merger.adapter_set.modules
        if not modules:
            continue  # no direction of these modules was kept
        finish = _finisher(merger, setting, prepared, report)
        if finish.rank == Full():
            pending |= {module: PendingModule(finish, module) for module in modules}
        else:
            merged |= gather(finish, report)
    merged |= {module: one.entry for module, one in pending.items()}
    lifted = lift_to_dora(merged, prepared.base, prepared.adapter_set.adapters, report)
    entries = apply_rank_budget(lifted, prepared.recipe.rank, prepared.adapter_set, report)
    made_from = () if isinstance(recipe, Recipe) else (recipe,)
    result = _result(entries, pending, prepared, report, started)
    return dataclasses.replace(result, inputs=existing(*made_from, *_inputs(prepared)))


def _inputs(prepared: Prepared) -> Iterator[object]:
    """Yield the files and directories that a merge reads, and names of what is in no file."""
    yield prepared.recipe.base_model
    for source in (*prepared.recipe.adapters, *prepared.recipe.statistics):
        yield source.directory
    for adapter in prepared.adapter_set.adapters:
        yield from adapter.inputs


def _with_metric(
    prepared: Prepared, machine: Machine, report: ReportBuilder
) -> tuple[Prepared, Metric | None]:
    """Open the metric that the recipe names, and write its hash into the recipe."""
    recipe, adapter_set = prepared.recipe, prepared.adapter_set
    if recipe.metric is None:
        return prepared, None
    shapes = {name: entry.shape for name, entry in adapter_set.modules.items()}
    task_type = adapter_set.adapters[0].task_type
    subject = Subject(recipe.base_model, recipe.dequantize, task_type, shapes, prepared.statistics)
    metric = open_metric(recipe.metric, subject, machine.device, machine.track)
    if recipe.metric.sha256 not in (None, metric.sha256):
        report.note("the metric was measured anew, and differs in its last bits from the recipe's")
    if metric.unmeasured:
        report.note(
            f"the metric knows nothing of {len(metric.unmeasured)} modules, such as {metric.unmeasured[0]}, which are "
            "no linear layers of the base model: their inputs count alike"
        )
    source = dataclasses.replace(recipe.metric, sha256=metric.sha256)
    return dataclasses.replace(prepared, recipe=dataclasses.replace(recipe, metric=source)), metric


def _choose_directions(prepared: Prepared, track: Track, report: ReportBuilder) -> AdapterSet:
    """The adapters, or with a budget of net utility the part of them that it keeps.

    Raises:
        OptionError: It keeps nothing.
    """
    rank, adapter_set = prepared.recipe.rank, prepared.adapter_set
    if not isinstance(rank, NetUtility):
        return adapter_set
    weights: dict[str, tuple[float, ...]] = {}
    for setting in prepared.plan.settings:
        weights_of = setting.weights_in(adapter_set.modules)
        weights |= {module: weights_of(module) for module in setting.modules}
    chosen = AdapterSet(select_by_net_utility(adapter_set, weights, rank.total, track))
    if not chosen.modules:
        raise OptionError(
            f"rank is {rank.as_given!r}, but no direction helps its own task more than it disturbs the others: the "
            f"adapters are too much alike; 'budget:{rank.total}' distributes the ranks by energy"
        )
    counts = {
        adapter.name: sum(entry.rank or 0 for entry in adapter.modules.entries.values())
        for adapter in chosen.adapters
    }
    kept = ", ".join(f"{count} of {name}" for name, count in counts.items())
    report.note(f"directions of positive net utility that were kept: {kept}")
    return chosen


def _merger(
    setting: Setting,
    chosen: AdapterSet,
    prepared: Prepared,
    machine: Machine,
    metric: Metric | None,
) -> ModuleMerger:
    """Collect what the modules of a setting need to be merged."""
    modules = prepared.adapter_set.modules
    kind = setting.method.needs_statistic
    shapes = {module: entry.shape for module, entry in modules.items()}
    read = functools.partial(_read, prepared.statistics, shapes)
    return ModuleMerger(
        chosen.only(setting.modules),
        setting.weights_in(modules),
        setting.encode,
        setting.decide,
        machine,
        prepared.recipe.seed,
        before=prepared.plan.before,
        statistic=None if kind is None else (kind, read),
        side_by_side=setting.space.low_rank_output,
        in_parts=setting.in_parts,
        metric=metric,
    )


def _read(
    statistics: Sequence[TaskStatistics], shapes: Mapping[str, tuple[int, int]], module: str
) -> Sequence[Tensor]:
    """One statistic of a module per adapter."""
    return [one.of(module, shapes[module]) for one in statistics]


def _finisher(
    merger: ModuleMerger, setting: Setting, prepared: Prepared, report: ReportBuilder
) -> ModuleFinisher:
    """Prepare to merge modules one by one; a global scope takes its statistics here."""
    merge, rank = _in_scope(merger, setting, report), module_rank(prepared.recipe.rank)
    early = prepared.plan.after or merger.metric is not None
    if early and isinstance(rank, FixedRank | EnergyFraction):
        merge = Truncated(merge, merger, rank)
    for calibration in prepared.plan.after:
        merge = Calibrated(merge, merger, calibration)
    return ModuleFinisher(merger, prepared.adapter_set, merge, rank, setting.space.low_rank_output)


def _in_scope(merger: ModuleMerger, setting: Setting, report: ReportBuilder) -> MergeModule:
    """Choose the scope; a method that keeps an adapter that is alone is not run on it."""
    adapters = merger.adapter_set.adapters
    if len(adapters) == 1 and setting.method.identity_on_one:
        report.note(
            f"{adapters[0].name} is the only adapter: it is scaled by its weight, and otherwise unchanged"
        )
        return Passthrough(merger)
    if setting.scope == "module":
        return ModuleScope(merger)
    scope = GlobalScope(merger)
    for note in scope.notes:
        report.note(note)
    return scope


def _result(
    entries: Mapping[str, LazyDelta],
    pending: Mapping[str, PendingModule],
    prepared: Prepared,
    report: ReportBuilder,
    started: float,
) -> MergedAdapter:
    recipe, adapters = prepared.recipe, prepared.adapter_set.adapters
    how = (recipe.method, recipe.space, recipe.scope, time.perf_counter() - started)
    built = report.build(*how, pending=len(pending), names=tuple(a.name for a in adapters))
    if (warning := _warning_of_lost_energy(built)) is not None:
        built = dataclasses.replace(built, notes=(*built.notes, warning))
        warnings.warn(warning, stacklevel=4)
    stated = prepared.heads.head.task.task_type if recipe.head else None
    return MergedAdapter(
        name="merged",
        modules=DeltaMapping(entries),
        base=prepared.base,
        base_model=prepared.common.name,
        revision=prepared.common.revision,
        task_type=stated or common_task(adapters),
        auto_mapping=common_mapping(adapters),
        head=prepared.heads.head,
        tied=recipe.tied,
        image=prepared.image,
        heads=prepared.heads.kept,
        companions=prepared.companions,
        licences=licences_of(adapters),
        recipe=dataclasses.replace(recipe, scale=1.0, format=prepared.format),
        report=built,
        pending=pending,
    ).scaled(recipe.scale)


def _warning_of_lost_energy(report: Report) -> str | None:
    if report.energy >= LOW_ENERGY:
        return None
    worst = min(report.modules, key=lambda module: report.modules[module].energy)
    return (
        f"the merged adapter retains {report.energy:.1%} of the merged energy (least in {worst}: "
        f"{report.modules[worst].energy:.1%}); a higher rank, a lossless space or rank='full' and a fold keep more"
    )
