"""A recipe: everything that is needed to make a merge again. It is the YAML file, field for field."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from pcb_peft.adapters.source import Source
from pcb_peft.deltas.rank import Rank, check_rank
from pcb_peft.deltas.replacements import POLICIES, TIES
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.recipes.overrides import Override, Weight, plain, read_overrides, read_weights

FILE_NAME = "merge_recipe.yaml"
_KINDS: dict[str, tuple[Any, str]] = {  # of the fields that nothing else checks
    "method": (str, "a name"),
    "space": (str, "a name"),
    "options": (Mapping, "a mapping"),
    "base_model": (str | None, "a path or hub id"),
    "scale": (int | float, "a number"),
    "chain": (bool, "true or false"),
    "seed": (int, "an integer"),
}

Step: TypeAlias = str | Mapping[str, Mapping[str, Any] | None]
"""A calibration: its name, or {name: options}."""

Steps: TypeAlias = tuple[Mapping[str, Mapping[str, Any]], ...]
"""Calibrations in the order in which they are applied, each as {name: options}."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One merge, written down.

    Attributes:
        adapters: Where they are.
        weights: λ of the papers, one per adapter, each a number or a gradient over the layers; default 1.0 each.
        method: Its name.
        space: Its name, or "auto": the method's own.
        scope: "global", "module", or "auto": the method's own.
        rank: As in `merge_adapters`.
        scale: What the merged deltas are multiplied by at the end.
        options: Of the method and the space.
        overrides: What some modules do differently.
        before: Calibrations of the adapters.
        after: Calibrations of the merge.
        heads: What becomes of what several adapters replace: "keep-each", "average", "first" or "refuse".
        tied: What a fold does with tied weights that do not change alike: "refuse", "untie" or "both".
        base_model: Path or hub id, where one was given.
        chain: Whether each adapter was trained on top of those before it.
        seed: Of random methods.
        statistics: Files of what was measured of each adapter, for methods that need it.
        version: Of this package, where the recipe belongs to a result.
    """

    adapters: tuple[Source, ...]
    weights: tuple[Weight, ...] | None = None
    method: str = "pcb"
    space: str = "auto"
    scope: str = "auto"
    rank: Rank = None
    scale: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    overrides: tuple[Override, ...] = ()
    before: Steps = ()
    after: Steps = ()
    heads: str = "keep-each"
    tied: str = "refuse"
    base_model: str | None = None
    chain: bool = False
    seed: int = 0
    statistics: tuple[Source, ...] = ()
    version: str | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without reading anything."""
        for name, (kind, words) in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it must be {words}")
        if not self.adapters:
            raise OptionError("there is nothing to merge: name one adapter or more")
        weights = [1.0] * len(self.adapters) if self.weights is None else self.weights
        object.__setattr__(self, "weights", read_weights(weights))
        object.__setattr__(self, "overrides", read_overrides(self.overrides))
        for some in (weights, *(o.weights for o in self.overrides if o.weights is not None)):
            if len(some) != len(self.adapters):
                raise OptionError(
                    f"{len(self.adapters)} adapters and {len(some)} weights: give one weight per adapter, in order"
                )
        object.__setattr__(self, "statistics", _files(self.statistics))
        object.__setattr__(self, "before", steps("before", self.before))
        object.__setattr__(self, "after", steps("after", self.after))
        _one_of("scope", self.scope, ("auto", "global", "module"))
        _one_of("heads", self.heads, POLICIES)
        _one_of("tied", self.tied, TIES)
        check_rank(self.rank)

    def to_yaml(self) -> str:
        """The recipe file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        adapters = [
            {
                key: value
                for key, value in {**dataclasses.asdict(source), "weight": weight}.items()
                if value is not None
            }
            for source, weight in zip(self.adapters, plain(self.weights or ()), strict=True)
        ]
        fields |= {"adapters": adapters, "options": dict(self.options)}
        fields["scale"] = None if self.scale == 1 else self.scale
        files = [
            {key: value for key, value in dataclasses.asdict(file).items() if value is not None}
            for file in self.statistics
        ]
        fields["statistics"] = files or None
        fields["overrides"] = [override.as_dict() for override in self.overrides] or None
        fields |= {"before": list(self.before) or None, "after": list(self.after) or None}
        del fields["weights"]
        kept = {key: value for key, value in fields.items() if value is not None}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def steps(when: str, given: Step | Sequence[Step] | None) -> Steps:
    """One calibration or several, with or without options, as `Recipe` has them.

    Raises:
        OptionError: Something that is neither a name nor a mapping from a name to options.
    """
    some: Sequence[Any] = given if isinstance(given, list | tuple) else [given] if given else []
    return tuple(_step(when, step) for step in some)


def in_words(steps: Steps) -> str:
    """``pico, exponent (power=0.5)``."""
    words: list[str] = []
    for name, options in (item for step in steps for item in step.items()):
        set_ = [f"{option}={value}" for option, value in options.items() if value is not None]
        words.append(f"{name} ({', '.join(set_)})" if set_ else name)
    return ", ".join(words)


def _step(when: str, step: object) -> dict[str, dict[str, Any]]:
    entry: Any = {step: {}} if isinstance(step, str) else step
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, options),) = entry.items()
        if isinstance(name, str) and isinstance(options or {}, Mapping):
            return {name: dict(options or {})}
    raise OptionError(
        f"{when}: {step!r} is not a calibration; it must be a name, or {{name: {{option: value}}}}"
    )


def _files(given: Any) -> tuple[Source, ...]:
    """Files from paths, or mappings with `path` and, if wanted, `sha256`.

    Raises:
        OptionError: Anything else.
    """
    files: list[Source] = []
    for item in given if isinstance(given, list | tuple) else [given]:
        entry = item if isinstance(item, Mapping) else {"path": item}
        if isinstance(item, Source):
            files.append(item)
        elif isinstance(entry.get("path"), str) and not entry.keys() - {"path", "sha256"}:
            files.append(Source(**entry))
        else:
            raise OptionError(
                f"statistics: {item!r} is no file; it must be a path, or a mapping with path and, if wanted, sha256"
            )
    return tuple(files)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Relative paths of adapters are relative to the current directory.

    An adapter is a path or hub id, or a mapping with `path` and, if wanted, `revision`, `subfolder`, `sha256`,
    `config_sha256` and `weight`; the other keys are the fields of `Recipe`.

    Raises:
        OptionError: The file is not a recipe; the message names the key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceEach)
    except (OSError, yaml.YAMLError) as error:
        raise OptionError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{path} is not a recipe: it must be a mapping with the key adapters")
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in content:
        if key not in known:
            raise OptionError(
                f"{path}: unknown key {key!r}{did_you_mean(str(key), known)}; allowed: {', '.join(known)}"
            )
    sources, weights = _adapters(content.pop("adapters", None) or [], path)
    if "weights" in content and any(weight is not None for weight in weights):
        raise OptionError(f"{path}: give weights, or a weight with each adapter, not both")
    if any(weight is not None for weight in weights):
        content["weights"] = [1.0 if weight is None else weight for weight in weights]
    if not isinstance(content.get("weights") or [], list):
        raise OptionError(f"{path}: weights must be a list")
    content["overrides"] = content.get("overrides") or ()
    return Recipe(adapters=sources, **content)


class _OnceEach(yaml.SafeLoader):
    """Plain values only, and no key twice: of two YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice; give it once",
                    problem_mark=key.start_mark,
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _adapters(items: Any, path: Path) -> tuple[tuple[Source, ...], list[float | None]]:
    if not isinstance(items, list):
        raise OptionError(f"{path}: adapters must be a list")
    sources, weights = [], []
    known = {field.name for field in dataclasses.fields(Source)}
    for item in items:
        entry = dict(item) if isinstance(item, dict) else {"path": item}
        weights.append(entry.pop("weight", None))
        words = all(isinstance(value, str | None) for value in entry.values())
        if not words or entry.get("path") is None or entry.keys() - known:
            raise OptionError(
                f"{path}: adapter {item!r} must be a path, or a mapping with path and, if wanted, revision, "
                "subfolder, sha256, config_sha256 and weight"
            )
        sources.append(Source(**entry))
    return tuple(sources), weights
