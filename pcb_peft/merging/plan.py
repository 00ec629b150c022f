"""What a merge will do to each module: decided, and checked, before a tensor is read."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pcb_peft.calibrations import Calibration, bound
from pcb_peft.deltas.delta import Delta, Diagonal
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.methods import MergeMethod, get_method, list_methods
from pcb_peft.plugins.options import bind
from pcb_peft.recipes.overrides import Override, Weight, at_depth, layer_of
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.spaces import Projection, Space, get_space, in_parts, list_spaces
from pcb_peft.tasks.task_vectors import Merged
from pcb_peft.version import __version__


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """How some modules are merged.

    Attributes:
        method: Who wins.
        space: In which coordinates.
        scope: "global" (over these modules) or "module".
        options: Of both, complete.
        weights: One per adapter.
        modules: Those that are merged so.
    """

    method: MergeMethod
    space: Space
    scope: str
    options: Mapping[str, Any]
    weights: tuple[Weight, ...]
    modules: tuple[str, ...] = ()

    @property
    def decide(self) -> Callable[..., Merged]:
        """The method with its options."""
        return functools.partial(
            self.method, **{name: self.options[name] for name in self.method.options}
        )

    @property
    def in_parts(self) -> bool:
        """Whether the parts of a delta compete side by side: not where the method wants to see ΔW as a matrix."""
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
        """The weights of a module, in a model whose layers are those of all `modules`."""
        layers = 1 + max((layer_of(module) or 0 for module in modules), default=0)
        return lambda module: at_depth(self.weights, module, layers)


def plan(
    recipe: Recipe, method: MergeMethod, alignment: AdapterSet, data: str | None = None
) -> tuple[Recipe, list[Setting]]:
    """The settings, each with its modules, and the recipe with every default written out.

    Args:
        recipe: As it was given.
        method: Its method.
        alignment: Of its adapters.
        data: The kind of the statistics that are there.

    Raises:
        OptionError: A value that is not allowed; an override that matches nothing; a rank for what has none.
    """
    weights = recipe.weights or ()
    base = _setting(method, recipe.space, recipe.scope, recipe.options, weights, alignment)
    if base.space.accepts == (Diagonal,) and recipe.rank is not None:
        raise OptionError(
            f"rank is {recipe.rank!r}, but an (IA)³ adapter is a vector and has no rank: leave it out"
        )
    settings = [_overridden(recipe, base, override, alignment) for override in recipe.overrides]
    _check_data([base, *settings], data)
    complete = dataclasses.replace(
        recipe,
        method=method.name,
        space=base.space.name,
        scope=base.scope,
        options=base.options,
        overrides=tuple(map(_complete, recipe.overrides, settings)),
        version=__version__,
    )
    return complete, _shared_out(
        base, list(zip(recipe.overrides, settings, strict=True)), alignment
    )


def _shared_out(
    base: Setting, overrides: Sequence[tuple[Override, Setting]], alignment: AdapterSet
) -> list[Setting]:
    """Each setting with its modules; the first override that matches a module has it."""
    owners: dict[str, Setting] = {}
    for override, setting in overrides:
        matched = [module for module in alignment.modules if override.matches(module)]
        if not matched:
            example = next(iter(alignment.modules), "none: the adapters hold no deltas")
            raise OptionError(
                f"overrides: {override.modules!r} matches no module; one of them is {example}"
            )
        owners = {**dict.fromkeys(matched, setting), **owners}
    settings = [base, *(setting for _, setting in overrides)]
    shares = [
        dataclasses.replace(
            setting, modules=tuple(m for m in alignment.modules if owners.get(m, base) is setting)
        )
        for setting in settings
    ]
    return [setting for setting in shares if setting.modules]


def _overridden(
    recipe: Recipe, base: Setting, override: Override, alignment: AdapterSet
) -> Setting:
    same = override.method in (None, base.method.name)
    method = base.method if same else get_method(str(override.method))
    inherited = {name: value for name, value in recipe.options.items() if same}
    return _setting(
        method,
        override.space or (recipe.space if same else "auto"),
        override.scope or (recipe.scope if same else "auto"),
        inherited | dict(override.options),
        base.weights if override.weights is None else override.weights,
        alignment,
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
    alignment: AdapterSet,
) -> Setting:
    _check_count(method, len(alignment.adapters))
    space = _space_for(space_name, method, alignment.kinds)
    owner = f"method {method.name} in space {space.name}"
    complete = bind({**space.options, **method.options}, options, owner)
    return Setting(method, space, method.scope if scope == "auto" else scope, complete, weights)


def _check_count(method: MergeMethod, count: int) -> None:
    """Raises OptionError where the method merges another number of adapters."""
    if not method.accepts_count(count):
        able = ", ".join(m.name for m in list_methods().values() if m.accepts_count(count))
        raise OptionError(
            f"{method.name} takes {method.arity} adapters, and there are {count}; methods that can take these: {able}"
        )


def _check_data(settings: Sequence[Setting], given: str | None) -> None:
    """Raises OptionError where a method lacks statistics, its space cannot show them, or nobody asks for them."""
    for setting in settings:
        needed, name = setting.method.needs_statistic, setting.method.name
        if needed is not None and needed != given:
            found = f"those given are of kind {given}" if given else "there are none"
            raise OptionError(
                f"{name} needs statistics of kind {needed} of each adapter, and {found}: `pcb-peft collect ADAPTER "
                f"--kind {needed} …` or collect_statistics() takes them, statistics=[…] or --statistics hands them over"
            )
        if needed is not None and needed not in setting.space.statistics:
            able = ", ".join(s.name for s in list_spaces().values() if needed in s.statistics)
            raise OptionError(
                f"{name} cannot work in space {setting.space.name}, which does not show the {needed} of a module; it "
                f"can in {able}, with LoRA adapters"
            )
    if given and not any(setting.method.needs_statistic for setting in settings):
        raise OptionError(
            f"statistics of kind {given} are given, and method {settings[0].method.name} asks for none: leave them out"
        )


def _space_for(name: str, method: MergeMethod, kinds: set[type[Delta]]) -> Space:
    """The space that was asked for, or the method's own if it can take the deltas, or the first that can.

    Raises:
        OptionError: The space cannot take deltas of these kinds.
        UnsupportedError: No space can.
    """
    able = [space for space in list_spaces().values() if kinds <= set(space.accepts)]
    found = " and ".join(sorted(kind.__name__ for kind in kinds))
    if not able:
        raise UnsupportedError(
            f"the adapters hold {found} deltas, and no space takes all of these: merge each kind by itself"
        )
    if name == "auto":
        preferred = get_space(method.space)
        return preferred if preferred in able else able[0]
    space = get_space(name)
    if space not in able:
        allowed = ", ".join(space.name for space in able)
        raise OptionError(
            f"space {name!r} cannot take {found} deltas; allowed here: auto, {allowed}"
        )
    return space


def calibrations_of(
    recipe: Recipe, alignment: AdapterSet
) -> tuple[Recipe, list[Calibration], list[Calibration]]:
    """The recipe with every default of its calibrations written out, and those before and after.

    Raises:
        OptionError: An unknown name or option, or a calibration that cannot take these adapters.
    """
    before, complete_before = bound("before", recipe.before, alignment.kinds)
    after, complete_after = bound("after", recipe.after, alignment.kinds)
    recipe = dataclasses.replace(recipe, before=complete_before, after=complete_after)
    return recipe, before, after
