"""The merge: check, let the adapters compete, set the rank, report."""

import dataclasses
import functools
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pcb_peft.adapter import Adapter, Head, Modules, load_adapter
from pcb_peft.alignment import Alignment, common_base
from pcb_peft.calibrations import Calibration, bound
from pcb_peft.competition import Competition, Produce
from pcb_peft.delta import Delta, Dense, Diagonal, LowRank
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.formats import Entry
from pcb_peft.merged import MergedAdapter
from pcb_peft.methods import MergeMethod, get_method
from pcb_peft.options import bind
from pcb_peft.progress import tracker
from pcb_peft.rank import Rank, truncate
from pcb_peft.recipe import Recipe, Step, steps
from pcb_peft.report import LOW_ENERGY, ModuleReport, Report
from pcb_peft.source import Source
from pcb_peft.spaces import Space, get_space, list_spaces
from pcb_peft.version import __version__

DEFAULT_MEMORY = 2 << 30


def merge_adapters(
    adapters: Sequence[str | Path | Source | tuple[Any, str] | Adapter],
    method: str | MergeMethod = "pcb",
    weights: Sequence[float] | None = None,
    space: str = "auto",
    scope: str = "auto",
    rank: Rank = None,
    base_model: str | Path | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool | None = None,
    *,
    before: Step | Sequence[Step] = (),
    after: Step | Sequence[Step] = (),
    heads: str = "keep-each",
    max_memory: int = DEFAULT_MEMORY,
    **options: Any,
) -> MergedAdapter:
    """Merges adapters of one base model into one adapter.

    Args:
        adapters: Directories, hub ids, (PeftModel, adapter name) or loaded adapters; one or more.
        method: A name from `list_methods()`, or a `MergeMethod`.
        weights: One float per adapter, the λ of the papers; default 1.0 each.
        space: Where the adapters compete: a name from `list_spaces()`; "auto": the method's own.
        scope: Over how much of the model statistics are taken: "global", "module" (each weight alone) or "auto": the
            method's own.
        rank: Of the result: an integer; a fraction in (0, 1) of the energy to keep; "full": dense, for folding; None:
            lossless where the space allows it, else the sum of the adapters' ranks.
        base_model: Path or hub id; settles which base model it is where the adapters' names for it differ.
        device: Where tiles are computed; default: the CPU.
        seed: Of random methods.
        progress: Show bars; default: on a terminal.
        before: Calibrations of the adapters, such as "pico": names, or name to options, from
            `list_calibrations("before")`; in this order.
        after: Calibrations of the merge, such as "svc" or {"exponent": {"power": 0.5}}, likewise.
        heads: What becomes of parameters that adapters replace (modules_to_save). "keep-each": a head that only one
            adapter has is part of the result, heads that several have are kept in a file per adapter; "refuse".
        max_memory: Bytes that the merge may hold on to between its passes, beside one module and the result. It changes
            how long a merge takes, never what comes out.
        **options: Of the method and the space, as `density` for `pcb`.

    Raises:
        OptionError: A value that is not allowed.
        AdapterError: An adapter that cannot be read, or holds what is not supported.
        MismatchError: Adapters that do not fit each other.
    """
    chosen = get_method(method)
    loaded = [load_adapter(adapter) for adapter in adapters]
    recipe = Recipe(
        adapters=tuple(adapter.source or Source(adapter.name) for adapter in loaded),
        weights=tuple(float(weight) for weight in weights or ()),
        method=chosen.name,
        space=space,
        scope=scope,
        rank=rank,
        options=options,
        before=steps("before", before),
        after=steps("after", after),
        heads=heads,
        base_model=None if base_model is None else str(base_model),
        seed=seed,
    )
    return merge(recipe, loaded, chosen, device=device, progress=progress, max_memory=max_memory)


def merge(
    recipe: Recipe,
    adapters: Sequence[Adapter] | None = None,
    method: MergeMethod | None = None,
    *,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    max_memory: int = DEFAULT_MEMORY,
) -> MergedAdapter:
    """Makes what a recipe describes; arguments and errors as those of `merge_adapters`."""
    started = time.perf_counter()
    method = method or get_method(recipe.method)
    adapters = _named_apart(adapters or [load_adapter(source) for source in recipe.adapters])
    alignment = Alignment(adapters)
    base, revision = common_base(adapters, recipe.base_model)
    space = _space_for(recipe.space, method, alignment)
    recipe, method_options, space_options = _complete(recipe, method, space, adapters)
    recipe, before, after = _calibrations(recipe, alignment)
    head, heads = _heads(adapters, recipe.heads)
    competition = Competition(
        alignment,
        recipe.weights,
        functools.partial(space, **space_options),
        functools.partial(method, **method_options),
        torch.device(device or "cpu"),
        tracker(progress),
        max_memory,
        recipe.seed,
        before,
        after,
    )
    report = Report(recipe.method, recipe.space, recipe.scope)
    produce = competition.calibrated(_contest(competition, method, report))
    departure = _Departure(alignment, produce, recipe.rank, space.lossless, report)
    entries = {
        module: departure.entry(module) for module in competition.track(alignment.modules, "merge")
    }
    report.seconds = time.perf_counter() - started
    _warn_of_lost_energy(report)
    return MergedAdapter(
        name="merged",
        modules=Modules(entries),
        base_model=base,
        revision=revision,
        task_type=_common_task(adapters),
        head=head,
        heads=heads,
        recipe=recipe,
        report=report,
    )


def _contest(competition: Competition, method: MergeMethod, report: Report) -> Produce:
    """The competition over the scope, or none where the method keeps an adapter that is alone."""
    adapters = competition.alignment.adapters
    if len(adapters) == 1 and method.keeps_one:
        report.notes.append(
            f"{adapters[0].name} is alone: without a competitor it is only scaled by its weight"
        )
        return competition.none()
    return competition.each_module() if report.scope == "module" else competition.whole_model()


@dataclasses.dataclass(frozen=True, slots=True)
class _Departure:
    """The last step of each module: its rank, its line in the report, its entry in the result."""

    alignment: Alignment
    produce: Produce
    rank: Rank
    lossless: bool
    report: Report

    def entry(self, module: str) -> Entry:
        """What is low-rank is computed now; what is dense is computed when it is asked for, and not kept."""
        template = self.alignment.modules[module]
        if self.rank == "full":
            return Entry(Dense, template.shape, lambda: self._leave(module))
        delta = self._leave(module)
        return Entry(type(delta), template.shape, lambda: delta, rank=_rank_of(delta))

    def _leave(self, module: str) -> Delta:
        outcome = self.produce(module)
        delta, energy = self._ranked(module, outcome.delta)
        counts = outcome.counts
        entries = max(1, sum(count.entries for count in counts))
        kept = [
            sum(column) / entries for column in zip(*(count.kept for count in counts), strict=True)
        ]
        names = [adapter.name for adapter in self.alignment.adapters]
        self.report.modules[module] = ModuleReport(
            shape=delta.shape,
            rank=_rank_of(delta),
            energy=energy * outcome.energy,
            norm=delta.norm(),
            kept=dict(zip(names, kept, strict=False)),
            conflicts=sum(count.conflicts for count in counts) / entries,
        )
        return delta

    def _ranked(self, module: str, delta: Delta) -> tuple[Delta, float]:
        """The delta at the rank that was asked for, and the energy that it retains."""
        if self.rank == "full":
            return Dense(delta.matrix(), fan_in_fan_out=delta.fan_in_fan_out), 1.0
        if isinstance(delta, Diagonal) or (isinstance(delta, LowRank) and self.rank is None):
            return delta, 1.0
        if self.rank is None and not self.lossless:
            return truncate(delta, self.alignment.total_rank(module))
        return truncate(delta, self.rank)


def _rank_of(delta: Delta) -> int | None:
    return delta.rank if isinstance(delta, LowRank) else None


def _named_apart(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The same adapters, numbered where two have the same name."""
    total, seen = Counter(adapter.name for adapter in adapters), Counter[str]()
    named: list[Adapter] = []
    for adapter in adapters:
        seen[adapter.name] += 1
        name = f"{adapter.name}-{seen[adapter.name]}" if total[adapter.name] > 1 else adapter.name
        named.append(dataclasses.replace(adapter, name=name))
    return named


def _space_for(name: str, method: MergeMethod, alignment: Alignment) -> Space:
    """The space that was asked for, or the method's own if it can take the deltas, or the first that can.

    Raises:
        OptionError: The space cannot take deltas of these kinds.
    """
    kinds = alignment.kinds
    able = [space for space in list_spaces().values() if kinds <= set(space.accepts)]
    if name == "auto":
        preferred = get_space(method.space)
        return preferred if preferred in able else able[0]
    space = get_space(name)
    if space not in able:
        raise OptionError(
            f"space {name!r} cannot take {_kind_names(kinds)} deltas; "
            f"allowed here: auto, {', '.join(space.name for space in able)}"
        )
    return space


def _kind_names(kinds: set[type[Delta]]) -> str:
    return " and ".join(sorted(kind.__name__ for kind in kinds))


def _complete(
    recipe: Recipe, method: MergeMethod, space: Space, adapters: Sequence[Adapter]
) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
    """The recipe with every default written out, and its options shared out to method and space.

    Raises:
        OptionError: An option that neither has, or a rank for what has none.
    """
    if space.accepts == (Diagonal,) and recipe.rank is not None:
        raise OptionError(
            f"rank is {recipe.rank!r}, but an (IA)³ adapter is a vector and has no rank: leave it out"
        )
    owner = f"method {method.name} in space {space.name}"
    options = bind({**space.options, **method.options}, recipe.options, owner)
    recipe = dataclasses.replace(
        recipe,
        adapters=tuple(adapter.source or Source(adapter.name) for adapter in adapters),
        method=method.name,
        space=space.name,
        scope=method.scope if recipe.scope == "auto" else recipe.scope,
        options=options,
        version=__version__,
    )
    return (
        recipe,
        {name: options[name] for name in method.options},
        {name: options[name] for name in space.options},
    )


def _calibrations(
    recipe: Recipe, alignment: Alignment
) -> tuple[Recipe, list[Calibration], list[Calibration]]:
    """The recipe with every default of its calibrations written out, and those before and after.

    Raises:
        OptionError: An unknown name or option, or a calibration that cannot take these adapters.
    """
    before, complete_before = bound("before", recipe.before, alignment.kinds)
    after, complete_after = bound("after", recipe.after, alignment.kinds)
    recipe = dataclasses.replace(recipe, before=complete_before, after=complete_after)
    return recipe, before, after


def _heads(adapters: Sequence[Adapter], policy: str) -> tuple[Head, dict[str, Head]]:
    """The head of the result, and the heads that are kept beside it, by adapter.

    Raises:
        UnsupportedError: The policy refuses them.
    """
    holders = {adapter.name: adapter.head for adapter in adapters if adapter.head.parameters}
    if holders and policy == "refuse":
        raise UnsupportedError(
            f"{', '.join(holders)} replace parameters of the base model (modules_to_save) and heads='refuse'; "
            "heads='keep-each' keeps them in a file per adapter"
        )
    if len(holders) == 1:
        return next(iter(holders.values())), {}
    return Head(), holders


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
        report.notes.append(message)
        warnings.warn(message, stacklevel=3)
