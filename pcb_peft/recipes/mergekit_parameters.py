"""The parameters of mergekit's YAML files: numbers, gradients over the layers, and filters for some modules."""

import dataclasses
import glob
import itertools
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.recipes.mergekit_methods import WHOLE, Meaning
from pcb_peft.recipes.weights import interpolated
from pcb_peft.runtime.shown import quoted, shown

IGNORED = ("int8_mask",)  # how much memory mergekit takes
MOST_KNOTS = 10_000  # of gradients over the layers: no model has so many
MOST_SELECTIONS = 10_000  # of filters, one of each list
ALMOST_NOTHING = 1e-6  # the weight of a model that must be there, if only for its length

WEIGHT = ".weight"
"""The end of a tensor's name, which the path of its module lacks."""

Gradient: TypeAlias = tuple[float, ...]
Parameters: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """One of the models: an adapter, or the base model itself.

    Attributes:
        adapter: The adapter as a recipe has it; None for the base model.
        name: As it was written.
        parameters: Its own parameters.
    """

    adapter: dict[str, str] | None
    name: str
    parameters: Parameters


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The parameters of all models, as they apply to the modules that match a filter."""

    meaning: Meaning
    models: Sequence[Model]
    common: Parameters

    def __post_init__(self) -> None:
        """Raises OptionError for a parameter that has no counterpart."""
        known = (
            "weight",
            "normalize",
            "lambda",
            *self.meaning.options,
            *IGNORED,
            *self.meaning.off,
        )
        for parameters in (self.common, *(model.parameters for model in self.models)):
            for name, value in parameters.items():
                if name in self.meaning.off and value:
                    raise OptionError(
                        f"mergekit's parameter {name} is {quoted(value)}, which {self.meaning.method} cannot do here; "
                        "leave it out"
                    )
                if name not in known:
                    raise OptionError(
                        f"mergekit's parameter {quoted(name)} has no counterpart in {self.meaning.method}"
                        f"{did_you_mean(name, known)}; understood are {', '.join(known)}"
                    )

    @property
    def normalised(self) -> bool:
        """True if the weights are divided by their sum."""
        value = self.common.get("normalize", self.meaning.normalised)
        if value not in (True, False):
            raise OptionError(
                f"mergekit's normalize is {quoted(value)}; it must be true or false here"
            )
        return bool(value)

    @property
    def scale(self) -> float:
        """The number by which the merge is multiplied."""
        value = self.common.get("lambda", 1.0)
        if not isinstance(value, int | float):
            raise OptionError(f"mergekit's lambda is {quoted(value)}; it must be one number here")
        return float(value)

    def selections(self) -> list[frozenset[str]]:
        """Filters that a module may meet, such that the first selection it meets says what applies to it.

        A parameter takes the first of its filters that a module meets: one of each parameter makes a selection.
        """
        lists: dict[tuple[str, ...], None] = {}
        for parameters in (*(model.parameters for model in self.models), self.common):
            for conditions in filter(_is_conditional, map(_listed, parameters.values())):
                wanted = [one.get("filter") for one in conditions]
                lists[tuple(str(one) for one in wanted if not _is_met_by_all(one))] = None
        if math.prod(len(one) + 1 for one in lists) > MOST_SELECTIONS:
            raise OptionError(
                "mergekit: the filters of the parameters are too many, each list with others; give one list to all"
            )
        chosen = itertools.product(*([*one, None] for one in lists))
        return list(dict.fromkeys(frozenset(filter(None, one)) for one in chosen))

    def weights(self, met: Collection[str]) -> list[Gradient]:
        """The weights of the adapters among the modules that meet some filters."""
        given = [self._weight(model, met) for model in self.models]
        knots = math.lcm(*(len(weight) - 1 for weight in given if len(weight) > 1)) + 1
        if knots > MOST_KNOTS:
            raise OptionError(
                "mergekit: the weights are lists of such different lengths that they meet in no layers; give lists of "
                "one length"
            )
        if len({len(weight) for weight in given}) > 1:
            given = [_resampled(weight, knots) for weight in given]
        rows = list(zip(*given, strict=True))
        if self.meaning.on_sphere:
            rows = [tuple(weight or ALMOST_NOTHING for weight in row) for row in rows]
        if self.normalised:
            rows = [_normalised(row, self.meaning) for row in rows]
        elif self.meaning.counts_base and any(abs(sum(row) - 1) > 1e-6 for row in rows):
            raise OptionError(
                "mergekit's linear with normalize: false and weights whose sum is not 1 scales the base model itself; "
                "task_arithmetic adds to it"
            )
        columns = list(zip(*rows, strict=True))
        return [w for w, model in zip(columns, self.models, strict=True) if model.adapter]

    def _weight(self, model: Model, met: Collection[str]) -> Gradient:
        if self.meaning.turns and (turn := self._turn(met)) is not None:
            first = model is self.models[0]
            return tuple(2 * (1 - t) if first else 2 * t for t in turn)
        value = self._value("weight", model, met)
        if value is None and self.meaning.weighted and model.adapter:
            raise OptionError(f"{shown(model.name)}: mergekit's {self.meaning.name} needs a weight")
        if value is None:
            return (0.0,) if self.meaning.weighted else (1.0,)
        return _gradient("weight", value)

    def _turn(self, met: Collection[str]) -> Gradient | None:
        value = self._value("t", None, met)
        return None if value is None else _gradient("t", value)

    def options(self, met: Collection[str]) -> dict[str, Any]:
        """The options of the method among the modules that meet some filters."""
        options: dict[str, Any] = {}
        for name, (option, factor, default) in self.meaning.options.items():
            if option is None:  # it becomes weights
                continue
            given = [self._value(name, model, met) for model in self.models if model.adapter]
            values = [default if value is None else value for value in given]
            if any(value != values[0] for value in values) or isinstance(values[0], list):
                raise OptionError(
                    f"mergekit's {name} differs from model to model or from layer to layer ({values}); "
                    f"{self.meaning.method} has one {option} for all: give one number"
                )
            options[option] = values[0] if isinstance(values[0], bool) else values[0] * factor
        return options

    def overrides(self, weights: Sequence[Gradient], options: Parameters) -> list[dict[str, Any]]:
        """The overrides of the modules that meet some filters."""
        found: list[dict[str, Any]] = []
        main = [plain_weight(weight) for weight in weights], options
        for met in filter(None, self.selections()):
            plain = [plain_weight(weight) for weight in self.weights(met)]
            changed = {"weights": plain, "options": self.options(met), "optional": True}
            found.append({"modules": _pattern(met), **changed})
        while found and (found[-1]["weights"], found[-1]["options"]) == main:
            found.pop()
        return found

    def _value(self, name: str, model: Model | None, met: Collection[str]) -> Any:
        for parameters in (model.parameters if model else {}, self.common):
            if (value := _applied(parameters.get(name), met)) is not None:
                return value
        return None

    def _varies(self) -> bool:
        """True if the weights are lists whose sum changes from layer to layer."""
        for met in self.selections():
            given = [self._weight(model, met) for model in self.models]
            ends = max(map(len, given))
            sums = [sum(interpolated(w, n / max(1, ends - 1)) for w in given) for n in range(ends)]
            if not math.isclose(min(sums), max(sums), abs_tol=1e-6):
                return True
        return False

    def warn(self, weights: Sequence[Gradient], *, based: bool) -> None:
        """Say what differs from mergekit's numbers.

        Args:
            weights: Those of the adapters.
            based: Whether the file names a base model.
        """
        differences = [self.meaning.difference] if self.meaning.difference else []
        if self.meaning.whole_without_base and not based:
            differences.append(WHOLE)
        if self.normalised and self._varies():
            differences.append(
                "mergekit divides by the sum of the weights in each layer, and here in even steps "
                "between the values of a list"
            )
        equal = len(set(weights)) == 1
        if self.meaning.averages and not self.normalised:
            differences.append(
                "mergekit adds the entries that agree on a sign (normalize: false), and here they are averaged"
            )
        elif self.meaning.averages and not equal:
            differences.append(
                "mergekit divides by the weights of the entries that agree on a sign, and here they are counted"
            )
        if differences:
            name = self.meaning.name
            warnings.warn(f"mergekit's {name}: {'; '.join(differences)}", stacklevel=4)


def _listed(value: Any) -> Any:
    """One condition as a list of it; other values as they are."""
    return [value] if isinstance(value, Mapping) else value


def _pattern(met: Collection[str]) -> str:
    """The pattern of the modules that meet all of some filters: mergekit looks for them in names of tensors."""
    parts = sorted(name.removesuffix(WEIGHT) for name in met)
    return " & ".join(f"*{glob.escape(part)}*" for part in parts)


def _is_conditional(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _is_met_by_all(wanted: Any) -> bool:
    """True for a filter that every weight meets."""
    return wanted in (None, "*") or str(wanted) in WEIGHT


def _applied(value: Any, met: Collection[str]) -> Any:
    """The value of a parameter among modules that match a filter: the first condition that they meet."""
    value = _listed(value)
    if not _is_conditional(value):
        return value
    for condition in value:
        wanted = condition.get("filter")
        if _is_met_by_all(wanted) or str(wanted) in met:
            return condition.get("value")
    return None


def _gradient(name: str, value: Any) -> Gradient:
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise OptionError(
            f"mergekit's {name} is {quoted(value)}; it must be a number or a list of them"
        )
    return tuple(map(float, values))


def _resampled(values: Gradient, knots: int) -> Gradient:
    """The same gradient with so many values."""
    return tuple(interpolated(values, place / max(1, knots - 1)) for place in range(knots))


def _normalised(row: Sequence[float], meaning: Meaning) -> tuple[float, ...]:
    """Weights whose sum is 1, or whose mean is 1 where the method averages."""
    total = sum(row)
    if abs(total) < 1e-8:
        raise OptionError("mergekit: the weights add up to 0 and cannot be normalised")
    factor = (1 if meaning.is_sum else sum(weight != 0 for weight in row)) / total
    return tuple(weight * factor for weight in row)


def plain_weight(weight: Gradient) -> float | list[float]:
    """A weight as plain data: a number, or a list of them."""
    return weight[0] if len(weight) == 1 else list(weight)
