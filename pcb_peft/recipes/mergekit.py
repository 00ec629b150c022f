"""mergekit's YAML files, read as recipes where this package has the method, and refused by name where it has not.

    merge_method: ties
    base_model: base
    models:
      - model: base+math-lora
        parameters: {weight: 1.0, density: 0.5}
      - model: base+code-lora
        parameters: {weight: 1.0, density: 0.5}

A model is the base model with an adapter: `base+adapter`. Entries compete as in mergekit: in ΔW, each weight by itself.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.recipes.mergekit_file import check_file
from pcb_peft.recipes.mergekit_methods import MEANINGS, OTHERS, Meaning
from pcb_peft.recipes.weights import interpolated
from pcb_peft.runtime.paths import expanded
from pcb_peft.runtime.shown import quoted, shown

METHOD = "merge_method"
KNOWN = (METHOD, "base_model", "models", "slices", "parameters")
LEFT_OUT = ("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name")
"""Keys about the files that mergekit writes, and not about numbers: a merge of adapters has no such files."""

IGNORED = ("int8_mask",)  # how much memory mergekit takes
DENSE = {"space": "dense", "scope": "module"}

MOST_KNOTS = 10_000  # of gradients over the layers: no model has so many

Gradient: TypeAlias = tuple[float, ...]
Parameters: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class _Model:
    """One of the models: an adapter, or the base model itself.

    Attributes:
        adapter: The adapter as a recipe has it; None for the base model.
        name: As it was written.
        parameters: Its own parameters.
    """

    adapter: dict[str, str] | None
    name: str
    parameters: Parameters


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Return whether a YAML file is one of mergekit's."""
    return METHOD in content


def fields_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the recipe that a file of mergekit stands for.

    What differs from mergekit's numbers is said in a warning.

    Args:
        content: The file's content.

    Raises:
        OptionError: A key holds what mergekit does not know, the method or a parameter has no counterpart here, or a
            model is no adapter.

    >>> models = [{"model": f"base+{name}", "parameters": {"weight": 0.5}} for name in ("math", "code")]
    >>> fields_of({"merge_method": "task_arithmetic", "base_model": "base", "models": models})["weights"]
    [0.5, 0.5]
    """
    check_file(content)
    meaning = _meaning(content)
    unknown = [key for key in content if key not in (*KNOWN, *LEFT_OUT)]
    if unknown:
        raise OptionError(
            f"mergekit's {quoted(unknown[0])} has no counterpart here; give models, {METHOD}, parameters and base_model"
        )
    base, base_adapter = _split(str(content.get("base_model") or ""))
    models = _models(content, base, meaning)
    settings = _Settings(meaning, models, content.get("parameters") or {})
    weights, options = settings.weights(None), settings.options(None)
    adapters = [model.adapter for model in models if model.adapter]
    if base_adapter is not None:
        adapters, weights = _on_top(meaning, base_adapter, adapters, weights, settings)
    settings.warn(weights)
    base = base or _common_base(content)
    fields = {
        "adapters": adapters,
        "weights": [_plain(weight) for weight in weights],
        "method": meaning.method,
        "base_model": base or None,
        "options": options,
        "overrides": settings.overrides(weights, options),
        "scale": settings.scale,
        **({} if meaning.exact_in_any_space else DENSE),
    }
    return {key: value for key, value in fields.items() if value not in (None, [], {})}


@dataclasses.dataclass(frozen=True, slots=True)
class _Settings:
    """The parameters of all models, as they apply to the modules that match a filter."""

    meaning: Meaning
    models: Sequence[_Model]
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
                if name not in known or (name in self.meaning.off and value):
                    raise OptionError(
                        f"mergekit's parameter {quoted(name)} has no counterpart in {self.meaning.method}"
                        f"{did_you_mean(name, known)}; understood are {', '.join(known)}"
                    )

    @property
    def normalised(self) -> bool:
        """True if the weights are divided by their sum."""
        return bool(self.common.get("normalize", self.meaning.normalised))

    @property
    def scale(self) -> float:
        """The number by which the merge is multiplied."""
        value = self.common.get("lambda", 1.0)
        if not isinstance(value, int | float):
            raise OptionError(f"mergekit's lambda is {quoted(value)}; it must be one number here")
        return float(value)

    def filters(self) -> list[str]:
        """All filters, in order."""
        found: dict[str, None] = {}
        for parameters in (*(model.parameters for model in self.models), self.common):
            for conditions in filter(_is_conditional, parameters.values()):
                wanted = [one.get("filter") for one in conditions]
                found |= dict.fromkeys(str(one) for one in wanted if one not in (None, "*"))
        return list(found)

    def weights(self, where: str | None) -> list[Gradient]:
        """The weights of the adapters among the modules that match a filter."""
        given = [self._weight(model, where) for model in self.models]
        knots = math.lcm(*(len(weight) - 1 for weight in given if len(weight) > 1)) + 1
        if knots > MOST_KNOTS:
            raise OptionError(
                "mergekit: the weights are lists of such different lengths that they meet in no layers; give lists of "
                "one length"
            )
        if len({len(weight) for weight in given}) > 1:
            given = [_resampled(weight, knots) for weight in given]
        rows = list(zip(*given, strict=True))
        if self.normalised:
            rows = [_normalised(row, self.meaning) for row in rows]
        elif self.meaning.counts_base and any(abs(sum(row) - 1) > 1e-6 for row in rows):
            raise OptionError(
                "mergekit's linear with normalize: false and weights whose sum is not 1 scales the base model itself; "
                "task_arithmetic adds to it"
            )
        columns = list(zip(*rows, strict=True))
        return [w for w, model in zip(columns, self.models, strict=True) if model.adapter]

    def _weight(self, model: _Model, where: str | None) -> Gradient:
        if self.meaning.turns and (turn := self._turn(where)) is not None:
            first = model is self.models[0]
            return tuple(2 * (1 - t) if first else 2 * t for t in turn)
        value = self._value("weight", model, where)
        if value is None and self.meaning.weighted and model.adapter:
            raise OptionError(f"{shown(model.name)}: mergekit's {self.meaning.name} needs a weight")
        if value is None:
            return (0.0,) if self.meaning.weighted else (1.0,)
        return _gradient("weight", value)

    def _turn(self, where: str | None) -> Gradient | None:
        value = self._value("t", None, where)
        return None if value is None else _gradient("t", value)

    def options(self, where: str | None) -> dict[str, Any]:
        """The options of the method among the modules that match a filter."""
        options: dict[str, Any] = {}
        for name, (option, factor, default) in self.meaning.options.items():
            if option is None:  # it becomes weights
                continue
            given = [self._value(name, model, where) for model in self.models if model.adapter]
            values = [default if value is None else value for value in given]
            if any(value != values[0] for value in values) or isinstance(values[0], list):
                raise OptionError(
                    f"mergekit's {name} differs from model to model or from layer to layer ({values}); "
                    f"{self.meaning.method} has one {option} for all: give one number"
                )
            options[option] = values[0] if isinstance(values[0], bool) else values[0] * factor
        return options

    def overrides(self, weights: Sequence[Gradient], options: Parameters) -> list[dict[str, Any]]:
        """The overrides of the modules that match a filter."""
        found: list[dict[str, Any]] = []
        for where in self.filters():
            own, changed = self.weights(where), self.options(where)
            if (own, changed) != (list(weights), options):
                pattern = f"*{where.removesuffix('.weight')}*"
                plain = [_plain(weight) for weight in own]
                found.append({"modules": pattern, "weights": plain, "options": changed})
        return found

    def _value(self, name: str, model: _Model | None, where: str | None) -> Any:
        for parameters in (model.parameters if model else {}, self.common):
            if (value := _applied(parameters.get(name), where)) is not None:
                return value
        return None

    def warn(self, weights: Sequence[Gradient]) -> None:
        """Say what differs from mergekit's numbers."""
        differences = [self.meaning.difference] if self.meaning.difference else []
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


def _meaning(content: Mapping[str, Any]) -> Meaning:
    """The meaning of mergekit's method here.

    Raises:
        OptionError: There is none.
    """
    name = str(content[METHOD])
    if name in MEANINGS:
        return MEANINGS[name]
    understood = f"understood are {', '.join(MEANINGS)}"
    if name in OTHERS:
        raise OptionError(
            f"mergekit's {name} ({OTHERS[name]}) is not among the methods here; {understood}"
        )
    raise OptionError(
        f"{METHOD}: mergekit has no method {quoted(name)} that is known here{did_you_mean(name, MEANINGS)}; "
        f"{understood}"
    )


def _models(content: Mapping[str, Any], base: str, meaning: Meaning) -> list[_Model]:
    """The models, the first one first; for a turn from one to the other the base model is the first."""
    entries = content.get("models") or _whole_slice(content)
    models = [_model(entry, base) for entry in entries]
    if meaning.turns and "base_model" in content:
        models.sort(key=lambda model: model.name != str(content["base_model"]))
    if not any(model.adapter for model in models):
        raise OptionError("mergekit: none of the models is the base model with an adapter")
    if not meaning.counts_base:
        models = [model for model in models if model.adapter]
    return models


def _whole_slice(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models of a file with one slice of all layers.

    Raises:
        OptionError: There are several slices, or other layers.
    """
    slices: list[Any] = content.get("slices") or []
    if not slices:
        raise OptionError("mergekit: there are no models")
    sources: list[dict[str, Any]] = slices[0].get("sources") or []
    ranges = {tuple(source.get("layer_range") or (0,)) for source in sources}
    if len(slices) > 1 or len(ranges) != 1 or next(iter(ranges))[0] != 0:
        raise OptionError(
            "mergekit's slices put layers of several models one after the other; a merge of adapters leaves every "
            "layer where it is: give models"
        )
    warnings.warn(f"mergekit's layer_range {ranges} is taken for all layers", stacklevel=6)
    return [{**source, "parameters": source.get("parameters")} for source in sources]


def _model(entry: Mapping[str, Any], base: str) -> _Model:
    name = str(entry.get("model") or "")
    path, adapter = _split(name)
    parameters: Parameters = entry.get("parameters") or {}
    if adapter is not None and base in ("", path):
        return _Model(_located(adapter), name, parameters)
    if adapter is None and path == base:
        return _Model(None, name, parameters)
    if adapter is None and (expanded(path) / "adapter_config.json").is_file():
        return _Model(_located(path), name, parameters)
    other = f"it is not on the base model {shown(base)}" if adapter else "it is a whole model"
    raise OptionError(
        f"mergekit's model {quoted(name)} is no adapter of the base model: {other}. Write BASE+ADAPTER; a fine-tuned "
        f"model becomes an adapter with pcb-peft extract {shown(path or 'MODEL')} {shown(base or 'BASE')} -o ADAPTER"
    )


def _on_top(
    meaning: Meaning,
    base_adapter: str,
    adapters: list[dict[str, str]],
    weights: list[Gradient],
    settings: _Settings,
) -> tuple[list[dict[str, str]], list[Gradient]]:
    """The merge on a base model that wears an adapter itself: Δ0 + Σ w (Δ − Δ0), for a sum.

    Raises:
        OptionError: It is no sum.
    """
    own = _located(base_adapter)
    if own in adapters:  # the base model is one of the two that are mixed, or counts in a mean
        return adapters, weights
    if not meaning.exact_in_any_space or settings.scale != 1 or settings.filters():
        raise OptionError(
            f"mergekit's {meaning.name} on a base model with an adapter ({shown(base_adapter)}) takes the differences "
            "from it, which are no adapters of the base model; give the base model alone"
        )
    rest = tuple(1 - sum(row) for row in zip(*weights, strict=True))
    return ([own, *adapters], [rest, *weights]) if any(rest) else (adapters, weights)


def _common_base(content: Mapping[str, Any]) -> str:
    """The base model that all models name, where the file names none."""
    names = [str(e.get("model")) for e in content.get("models") or _whole_slice(content)]
    bases = {_split(name)[0] for name in names if "+" in name}
    return bases.pop() if len(bases) == 1 else ""


def _split(name: str) -> tuple[str, str | None]:
    """A model's path, and that of its adapter."""
    path, plus, adapter = name.partition("+")
    return path.partition("@")[0], adapter if plus else None


def _located(name: str) -> dict[str, str]:
    path, at, revision = name.partition("@")
    return {"path": path, **({"revision": revision} if at else {})}


def _is_conditional(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _applied(value: Any, where: str | None) -> Any:
    """The value of a parameter among modules that match a filter: the first condition that they meet."""
    if isinstance(value, Mapping):
        value = [value]
    if not _is_conditional(value):
        return value
    for condition in value:
        wanted = condition.get("filter")
        if wanted in (None, "*") or (where is not None and str(wanted) in where):
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
    factor = (1 if meaning.is_sum else len(row)) / total
    return tuple(weight * factor for weight in row)


def _plain(weight: Gradient) -> float | list[float]:
    return weight[0] if len(weight) == 1 else list(weight)
