"""The search space: the knobs, and the recipe that belongs to a position of them."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.calibrations import get_calibration, list_calibrations
from pcb_peft.errors import OptionError
from pcb_peft.merging.compatibility import AdapterSet
from pcb_peft.merging.plan import unnamed_method
from pcb_peft.methods import get_method, list_methods
from pcb_peft.methods.default import AUTO
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.recipes.overrides import Override
from pcb_peft.recipes.peft_aliases import method_of
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.recipes.weights import Weight
from pcb_peft.searching.knobs import STEPS, Candidate, Choice, Knob, Values, knob_of
from pcb_peft.spaces import get_space, list_spaces

WEIGHTS, ALL = "weights", "all"
FIELDS = ("method", "space", "scope", "rank", *STEPS, "seed")
"""Fields of a recipe that a search may choose; other names are options of the method or the space."""

DEFAULT_VARY: Mapping[str, Values] = {WEIGHTS: (0.4, 2.5)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """All recipes that a search may come to.

    Attributes:
        recipe: Where it starts.
        names: The names of the adapters, in order.
        layers: How many weights an adapter has, from the first layer to the last.
        knobs: What may change, by name.
    """

    recipe: Recipe
    names: tuple[str, ...]
    layers: int
    knobs: Mapping[str, Knob]

    def start(self) -> Candidate:
        """Return the candidate that is the recipe itself, or what is nearest to it among the values."""
        recipe = self.recipe
        known: dict[str, Any] = {
            **_defaults(recipe),
            **recipe.options,
            **{name: getattr(recipe, name) for name in FIELDS},
            **{when: list(getattr(recipe, when)) for when in STEPS},
            "rank": recipe.rank.as_given,
        }
        for when in STEPS:
            for step in getattr(recipe, when):
                for name, options in step.items():
                    known |= {f"{when}.{name}.{key}": value for key, value in options.items()}
        for name, weight in zip(self.names, recipe.weights, strict=True):
            known |= _spread(_weight_knobs(name, self.layers), weight)
        return {name: knob.nearest(known.get(name)) for name, knob in self.knobs.items()}

    def recipe_of(
        self,
        candidate: Candidate,
        scale: float = 1.0,
        members: Collection[str] | None = None,
    ) -> Recipe:
        """Return the recipe of a candidate; options that the chosen method does not have are left out.

        Args:
            candidate: A value for each knob.
            scale: What the recipe's own scale is multiplied by.
            members: The adapters that are merged; None: all.

        Raises:
            OptionError: A value is not allowed.
        """
        recipe = self.recipe
        fields = {name: value for name, value in candidate.items() if name in FIELDS}
        weights = [
            self._weight(candidate, name, weight)
            for name, weight in zip(self.names, recipe.weights, strict=True)
        ]
        changed = recipe.changed(**fields, weights=weights, scale=recipe.scale * scale)
        known = _defaults(changed)
        given = {**recipe.options, **candidate}
        options = {name: value for name, value in given.items() if name in known}
        steps = {when: _with_options(when, getattr(changed, when), candidate) for when in STEPS}
        complete = dataclasses.replace(changed, options=options, **steps)
        return complete if members is None else _only(complete, self.names, members)

    @property
    def size(self) -> float:
        """Number of candidates; infinite if a knob is an interval."""
        knobs = self.knobs.values()
        return math.prod(len(k.values) if isinstance(k, Choice) else math.inf for k in knobs)

    def key(self, candidate: Candidate) -> str:
        """Return a text that is the same for candidates that make the same recipe."""
        try:
            return repr(self.recipe_of(candidate))
        except OptionError:
            return repr(candidate)

    def untried(self, tried: Collection[str]) -> Candidate | None:
        """Return the first candidate whose key is not among these.

        None if there is none, and if there are endlessly many candidates.
        """
        if self.size == math.inf:
            return None
        values = [knob.values for knob in self.knobs.values() if isinstance(knob, Choice)]
        every = (
            dict(zip(self.knobs, chosen, strict=True)) for chosen in itertools.product(*values)
        )
        return next((candidate for candidate in every if self.key(candidate) not in tried), None)

    def _weight(self, candidate: Candidate, name: str, weight: Weight) -> Weight:
        knobs = _weight_knobs(name, self.layers)
        if knobs[0] not in candidate:
            return weight
        values = tuple(float(candidate[knob]) for knob in knobs)
        return values if self.layers > 1 else values[0]


def search_space(
    vary: Mapping[str, Values] | str | None,
    recipe: Recipe,
    adapters: Sequence[Adapter],
    layers: int = 1,
) -> SearchSpace:
    """Return the search space that a user's words stand for.

    Args:
        vary: By name: values to choose from, or (low, high); "all" for everything that these adapters allow; None for
            the weights.
        recipe: Where the search starts; if it names no method, with the one that a merge would take.
        adapters: Its adapters, by different names.
        layers: How many weights an adapter has, from the first layer to the last: a gradient.

    Raises:
        OptionError: A name that nothing here has, or values that are none.

    Example:
        >>> search_space({"density": (0.05, 0.5), "method": ["pcb", "ties"]}, recipe, adapters).knobs
        {'density': Interval(low=0.05, high=0.5), 'method': Choice(values=('pcb', 'ties'))}
    """
    recipe = _with_method(recipe, adapters, vary if isinstance(vary, Mapping) else {})
    names = tuple(adapter.name for adapter in adapters)
    if layers < 1:
        raise OptionError(f"layers is {layers}; it must be 1 or more")
    if isinstance(vary, str):
        if vary != ALL:
            raise OptionError(f"vary is {vary!r}; it must be {ALL!r}, or values by name")
        vary = everything(recipe, adapters)
    vary = DEFAULT_VARY if vary is None else vary
    _check_names(vary, recipe)
    knobs: dict[str, Knob] = {}
    for name, values in vary.items():
        knob = knob_of(name, values)
        several = [_weight_knobs(adapter, layers) for adapter in names] if name == WEIGHTS else []
        knobs |= dict.fromkeys([knob for own in several for knob in own] or [name], knob)
    return SearchSpace(recipe=recipe, names=names, layers=layers, knobs=knobs)


def _with_method(recipe: Recipe, adapters: Sequence[Adapter], vary: Mapping[str, Values]) -> Recipe:
    """Return the recipe with the method that a merge would take, if it names none; options that vary count as given."""
    if recipe.method != AUTO:
        return recipe
    given = dict.fromkeys(vary) | dict(recipe.options)
    tried = dataclasses.replace(recipe, options=given)
    method, _ = unnamed_method(tried, AdapterSet(adapters))
    return dataclasses.replace(recipe, method=method.name)


def everything(recipe: Recipe, adapters: Sequence[Adapter]) -> dict[str, Values]:
    """Return all that can be varied for these adapters: weights, methods, spaces, scopes, calibrations, densities.

    Left out are methods that need data of the tasks, and results that are not adapters.
    """
    kinds = {entry.kind for adapter in adapters for entry in adapter.modules.entries.values()}
    methods = [
        name
        for name, method in list_methods().items()
        if method.needs_statistic is None and method.accepts_count(len(adapters))
    ]
    spaces = [
        name
        for name, space in list_spaces().items()
        if space.low_rank_output and all(issubclass(kind, space.accepts) for kind in kinds)
    ]
    steps: dict[str, Values] = {}
    for when in STEPS:
        fitting = [
            name
            for name, calibration in list_calibrations(when).items()  # type: ignore[arg-type]
            if all(issubclass(kind, calibration.accepts) for kind in kinds)
        ]
        if fitting:
            steps[when] = [None, *fitting]
    return {
        **DEFAULT_VARY,
        "method": list(dict.fromkeys([recipe.method, *methods])),
        "space": list(dict.fromkeys([recipe.space, "auto", *spaces])),
        "scope": ["auto", "module", "global"],
        "density": (0.02, 0.9),
        **steps,
    }


def _check_names(vary: Mapping[str, Values], recipe: Recipe) -> None:
    """Raises OptionError for a name that neither a recipe has, nor a method, space or calibration of the search."""
    known = [WEIGHTS, *FIELDS, *_options(vary, recipe), *_step_options(vary, recipe)]
    for name in vary:
        if name not in known:
            raise OptionError(
                f"vary: {name!r} is neither a field of a recipe nor an option of the methods, spaces and calibrations "
                f"searched{did_you_mean(name, known)}; there are {', '.join(known)}"
            )


def _options(vary: Mapping[str, Values], recipe: Recipe) -> list[str]:
    """The options of all methods and spaces that a search may come to."""
    methods, spaces = vary.get("method") or [recipe.method], vary.get("space") or [recipe.space]
    names: dict[str, None] = {}
    for method in methods:
        for space in spaces:
            tried = dataclasses.replace(recipe, method=str(method), space=str(space))
            names |= dict.fromkeys(_defaults(tried))
    return list(names)


def _step_options(vary: Mapping[str, Values], recipe: Recipe) -> list[str]:
    """The options of all calibrations that a search may come to, such as after.exponent.power."""
    names: dict[str, None] = {}
    for when in STEPS:
        own = [getattr(recipe, when)]
        if when in vary:
            knob: Any = knob_of(when, vary[when])
            own = list(knob.values)
        for name in (name for steps in own for step in steps for name in step):
            options = get_calibration(when, name).options  # type: ignore[arg-type]
            names |= dict.fromkeys(f"{when}.{name}.{option}" for option in options)
    return list(names)


def _defaults(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe's method and space, with their defaults."""
    method = get_method(method_of(recipe.method))
    space = get_space(method.space if recipe.space == "auto" else recipe.space)
    both = {**method.options, **space.options}
    return {name: option.default for name, option in both.items()}


def _weight_knobs(name: str, layers: int) -> list[str]:
    """The names of an adapter's weights: one, or one per step from the first layer to the last."""
    if layers == 1:
        return [f"{WEIGHTS}[{name}]"]
    return [f"{WEIGHTS}[{name}][{step}]" for step in range(1, layers + 1)]


def _spread(knobs: Sequence[str], weight: Weight) -> dict[str, float]:
    """A weight, or the gradient nearest to it, on so many knobs."""
    values = weight if isinstance(weight, tuple) else (weight,)
    last = max(1, len(knobs) - 1)
    places = [round(place / last * (len(values) - 1)) for place in range(len(knobs))]
    return {knob: values[place] for knob, place in zip(knobs, places, strict=True)}


def _with_options(when: str, steps: Sequence[Any], candidate: Candidate) -> tuple[Any, ...]:
    """Calibrations with the options that a candidate gives them."""

    def changed(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        begin = f"{when}.{name}."
        own = {k.removeprefix(begin): v for k, v in candidate.items() if k.startswith(begin)}
        return {**options, **own}

    return tuple({name: changed(name, options) for name, options in s.items()} for s in steps)


def _only(recipe: Recipe, names: Sequence[str], members: Collection[str]) -> Recipe:
    """The recipe with some of its adapters."""

    def those(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(v for v, name in zip(values, names, strict=True) if name in members)

    def weighed(override: Override) -> Override:
        weights = override.weights and those(override.weights)
        return dataclasses.replace(override, weights=weights)

    return dataclasses.replace(
        recipe,
        adapters=those(recipe.adapters),
        weights=those(recipe.weights),
        statistics=those(recipe.statistics) if recipe.statistics else (),
        overrides=tuple(map(weighed, recipe.overrides)),
    )
