"""The plan of a merge: for each module how it is merged, decided and checked before a tensor is read."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pcb_peft.base.model import BaseModel
from pcb_peft.calibrations import Calibration, bound
from pcb_peft.data.metric import STATISTICS, check_source
from pcb_peft.deltas.delta import Delta, Diagonal, Rescaled
from pcb_peft.deltas.rank_choice import (
    LOSSLESS,
    EnergyFraction,
    FixedRank,
    RankBudget,
    RankChoice,
)
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.merging.default_metric import with_default_metric
from pcb_peft.methods import MergeMethod, get_method, list_methods
from pcb_peft.methods.default import AUTO, default_method
from pcb_peft.plugins.options import RANK, bind, did_you_mean
from pcb_peft.recipes.overrides import Override
from pcb_peft.recipes.peft_aliases import method_of
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.recipes.weights import Weight, weights_by_module
from pcb_peft.spaces import Projection, Space, get_space, in_parts, list_spaces
from pcb_peft.tasks.task_vectors import Merged
from pcb_peft.version import __version__

KEYWORDS = {
    *(field.name for field in dataclasses.fields(Recipe)),
    *("device", "max_memory", "progress"),
}
"""The arguments of `merge_adapters`, among which a misspelt option may be meant."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """A setting: how some modules are merged.

    Attributes:
        method: The method.
        space: The space.
        scope: "global" (over these modules) or "module".
        options: All options of both.
        weights: One per adapter.
        rank: The rank of the result, if it is an integer.
        modules: The modules that are merged so.
    """

    method: MergeMethod
    space: Space
    scope: str
    options: Mapping[str, Any]
    weights: tuple[Weight, ...]
    rank: int | None = None
    modules: tuple[str, ...] = ()

    @property
    def decide(self) -> Callable[..., Merged]:
        """The method with its options."""
        options = {name: self.options[name] for name in self.method.options}
        known = {RANK: self.rank} if self.method.knows_rank else {}
        return functools.partial(self.method, **options, **known)

    @property
    def in_parts(self) -> bool:
        """True if the parts of a DoRA's delta are merged side by side.

        They are not where the method must see ΔW as one matrix.
        """
        return self.space.low_rank_output and not (
            self.method.whole_matrix or self.method.needs_statistic
        )

    @property
    def encode(self) -> Callable[..., Projection]:
        """The space with its options."""
        options = {name: self.options[name] for name in self.space.options}
        space = in_parts(self.space) if self.in_parts else self.space
        return functools.partial(space, **options)

    def weights_in(self, modules: Iterable[str]) -> Callable[[str], tuple[float, ...]]:
        """Return a function from a module to its weights, in a model whose layers are those of all `modules`."""
        return weights_by_module(self.weights, modules)


class Plan(NamedTuple):
    """A merge as it was decided.

    Attributes:
        recipe: The recipe with every default written out.
        settings: Each with its modules; every module is in one of them.
        before: Calibrations of the adapters.
        after: Calibrations of the merge.
        notes: What was decided, for the report.
    """

    recipe: Recipe
    settings: Sequence[Setting]
    before: Sequence[Calibration]
    after: Sequence[Calibration]
    notes: Sequence[str] = ()


def named_method(name: str) -> MergeMethod | None:
    """Return the method of a name, or of PEFT's name for it; None for "auto", which the plan decides.

    Raises:
        OptionError: There is no method of that name.
    """
    return None if name == AUTO else get_method(method_of(name))


def unnamed_method(recipe: Recipe, adapter_set: AdapterSet) -> tuple[MergeMethod, Sequence[str]]:
    """Return the method of a recipe that names none, and notes on why it is not the first of the default ones."""
    inherited = [override.options for override in recipe.overrides if override.method is None]
    return default_method(
        {name for options in (recipe.options, *inherited) for name in options},
        full_rank=adapter_set.has_full_rank,
        vectors=adapter_set.has_only_vectors,
        by_energy=isinstance(recipe.rank, EnergyFraction | RankBudget),
    )


def plan(
    recipe: Recipe,
    method: MergeMethod | None,
    adapter_set: AdapterSet,
    statistic: str | None = None,
    base: Callable[[], BaseModel] | None = None,
) -> Plan:
    """Decide how each module is merged.

    Args:
        recipe: As it was given.
        method: Its method; None if it names none.
        adapter_set: Its adapters.
        statistic: The kind of the statistics that are given, if there are any.
        base: The base model, if one was given.

    Raises:
        OptionError: A value is not allowed; an override matches nothing; a rank is given for what has none.
    """
    notes: Sequence[str] = ()
    if method is None:
        method, notes = unnamed_method(recipe, adapter_set)
        if not notes:  # it is the first of the default ones
            recipe, notes = with_default_metric(recipe, adapter_set, base)
    main = _setting(method, recipe.space, recipe.scope, recipe.options, recipe.weights, adapter_set)
    if all(kind.multiplies for kind in main.space.accepts) and recipe.rank != LOSSLESS:
        raise OptionError(
            f"rank is {recipe.rank.as_given!r}, but an (IA)³ adapter is a vector and has no rank: leave it out"
        )
    others = [_overridden(recipe, main, override, adapter_set) for override in recipe.overrides]
    rank = _rank_known_to([main, *others], recipe.rank)
    main, *others = (dataclasses.replace(setting, rank=rank) for setting in (main, *others))
    _check_metric(recipe, [main, *others], adapter_set.kinds, statistic)
    _check_statistics([main, *others], None if of_statistics(recipe) else statistic)
    before, complete_before = bound("before", recipe.before, adapter_set.kinds)
    after, complete_after = bound("after", recipe.after, adapter_set.kinds)
    complete = dataclasses.replace(
        recipe,
        method=method.name,
        space=main.space.name,
        scope=main.scope,
        options=main.options,
        overrides=tuple(map(_complete, recipe.overrides, others)),
        before=complete_before,
        after=complete_after,
        version=__version__,
    )
    owners = list(zip(recipe.overrides, others, strict=True))
    return Plan(complete, _distributed(main, owners, adapter_set), before, after, notes)


def _distributed(
    main: Setting, overrides: Sequence[tuple[Override, Setting]], adapter_set: AdapterSet
) -> list[Setting]:
    """Each setting with its modules; the first override that matches a module wins."""
    for override, _ in overrides:
        if not override.optional and not any(map(override.matches, adapter_set.modules)):
            example = next(iter(adapter_set.modules), "none: the adapters hold no deltas")
            raise OptionError(
                f"overrides: {override.modules!r} matches no module; one of them is {example}"
            )
    modules: dict[int, list[str]] = {}
    settings = [main, *(setting for _, setting in overrides)]
    for module in adapter_set.modules:
        matching = (n for n, (override, _) in enumerate(overrides, 1) if override.matches(module))
        modules.setdefault(next(matching, 0), []).append(module)
    return [
        dataclasses.replace(settings[number], modules=tuple(modules[number]))
        for number in sorted(modules)
    ]


def _overridden(
    recipe: Recipe, main: Setting, override: Override, adapter_set: AdapterSet
) -> Setting:
    """The setting of an override; what it leaves open is the recipe's, if the method is the same."""
    same = override.method in (None, main.method.name)
    inherited = {name: value for name, value in recipe.options.items() if same}
    return _setting(
        main.method if same else get_method(str(override.method)),
        override.space or (recipe.space if same else "auto"),
        override.scope or (recipe.scope if same else "auto"),
        inherited | dict(override.options),
        main.weights if override.weights is None else override.weights,
        adapter_set,
    )


def _complete(override: Override, setting: Setting) -> Override:
    return dataclasses.replace(
        override,
        method=setting.method.name,
        space=setting.space.name,
        scope=setting.scope,
        weights=setting.weights,
        options=setting.options,
    )


def _setting(
    method: MergeMethod,
    space_name: str,
    scope: str,
    options: Mapping[str, Any],
    weights: tuple[Weight, ...],
    adapter_set: AdapterSet,
) -> Setting:
    _check_count(method, len(adapter_set.adapters))
    space = _space_for(space_name, method, adapter_set.kinds)
    known, owner = (
        {**space.options, **method.options},
        f"method {method.name} in space {space.name}",
    )
    _refuse_unknown(options, known, owner)
    complete = bind(known, options, owner)
    return Setting(method, space, method.scope if scope == "auto" else scope, complete, weights)


def _refuse_unknown(given: Iterable[str], known: Collection[str], owner: str) -> None:
    """Raises OptionError for an option that is neither the method's nor the space's, with what may be meant."""
    for name in (name for name in given if name not in known):
        users = [
            m.name for m in (*list_methods().values(), *list_spaces().values()) if name in m.options
        ]
        meant = did_you_mean(name, [*known, *KEYWORDS])
        hint = f": it is an option of {', '.join(users)}" if users else meant
        allowed = f"its options are {', '.join(known)}" if known else "it has no options"
        raise OptionError(f"{owner} has no option {name!r}{hint}; {allowed}")


def _check_count(method: MergeMethod, count: int) -> None:
    """Raises OptionError where the method merges another number of adapters."""
    if not method.accepts_count(count):
        able = ", ".join(m.name for m in list_methods().values() if m.accepts_count(count))
        raise OptionError(
            f"{method.name} takes {method.arity} adapters, and there are {count}; methods that can take these: {able}"
        )


def _check_statistics(settings: Sequence[Setting], given: str | None) -> None:
    """Raises OptionError where a method lacks statistics, its space cannot use them, or no method needs them."""
    for setting in settings:
        needed, name = setting.method.needs_statistic, setting.method.name
        if needed is not None and needed != given:
            found = f"those given are of kind {given}" if given else "there are none"
            raise OptionError(
                f"{name} needs statistics of kind {needed} of each adapter, and {found}: `pcb-peft collect ADAPTER "
                f"--kind {needed} …` or collect_statistics() collects them, statistics=[…] or --statistics passes them "
                "to the merge"
            )
        if needed is not None and needed not in setting.space.statistics:
            able = ", ".join(s.name for s in list_spaces().values() if needed in s.statistics)
            raise OptionError(
                f"{name} cannot work in space {setting.space.name}, which has no {needed} of a module; it can in "
                f"{able}, with LoRA adapters"
            )
    if given and not any(setting.method.needs_statistic for setting in settings):
        raise OptionError(
            f"statistics of kind {given} are given, and method {settings[0].method.name} needs none: leave them out"
        )


def of_statistics(recipe: Recipe) -> bool:
    """True if the metric is that of the adapters' own statistics."""
    return recipe.metric is not None and recipe.metric.path == STATISTICS


def _check_metric(
    recipe: Recipe, settings: Sequence[Setting], kinds: set[type[Delta]], statistic: str | None
) -> None:
    """Raises OptionError where a metric of a layer's inputs says nothing of what is merged."""
    if recipe.metric is None:
        return
    check_source(recipe.metric, recipe.base_model, statistic)
    if kinds & {Diagonal, Rescaled}:
        raise OptionError(
            "metric compares what LoRA adapters do to a layer's inputs, and some of these are (IA)³ or DoRA adapters: "
            "leave metric out"
        )
    informed = next((one.method.name for one in settings if one.method.needs_statistic), None)
    if informed:
        raise OptionError(f"{informed} knows the inputs from its statistics: leave metric out")


def _rank_known_to(settings: Sequence[Setting], rank: RankChoice) -> int | None:
    """Return the rank of the result if it is an integer.

    Raises:
        OptionError: The directions to keep would be chosen by their strength, after a method made all of them alike.
    """
    flat = next((one.method.name for one in settings if one.method.knows_rank), None)
    if flat and isinstance(rank, EnergyFraction | RankBudget):
        raise OptionError(
            f"rank is {rank.as_given!r}, but {flat} makes all directions of the merge equally strong, and none of them "
            "has more energy to be kept for; give an integer rank, which the method takes into account, or none; or "
            "take a method that tells strong from weak directions, such as linear or pcb"
        )
    return rank.rank if isinstance(rank, FixedRank) else None


def _space_for(name: str, method: MergeMethod, kinds: set[type[Delta]]) -> Space:
    """The space that was asked for; for "auto" the method's own if it can take the deltas, or the first that can.

    Raises:
        OptionError: The space cannot take deltas of these kinds.
        UnsupportedError: No space can.
    """
    able = [space for space in list_spaces().values() if kinds <= set(space.accepts)]
    found = " and ".join(sorted(kind.kind_name for kind in kinds))
    if not able:
        raise UnsupportedError(
            f"the adapters are of kinds {found}, which no space can merge together: merge each kind by itself"
        )
    if name == "auto":
        preferred = get_space(method.space)
        return preferred if preferred in able else able[0]
    space = get_space(name)
    if space not in able:
        allowed = ", ".join(space.name for space in able)
        raise OptionError(
            f"space {name!r} cannot take adapters of kind {found}; allowed here: auto, {allowed}"
        )
    return space
