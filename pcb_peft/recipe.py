"""A recipe: everything that is needed to make a merge again. It is the YAML file, field for field."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pcb_peft.errors import OptionError
from pcb_peft.options import did_you_mean
from pcb_peft.rank import Rank, check_rank
from pcb_peft.source import Source

FILE_NAME = "merge_recipe.yaml"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One merge, written down.

    Attributes:
        adapters: Where they are.
        weights: λ of the papers, one per adapter; default 1.0 each.
        method: Its name.
        space: Its name, or "auto": the method's own.
        scope: "global", "module", or "auto": the method's own.
        rank: As in `merge_adapters`.
        options: Of the method and the space.
        heads: What becomes of the parameters that adapters replace: "keep-each" or "refuse".
        base_model: Path or hub id, where one was given.
        seed: Of random methods.
        version: Of this package, where the recipe belongs to a result.
    """

    adapters: tuple[Source, ...]
    weights: tuple[float, ...] = ()
    method: str = "pcb"
    space: str = "auto"
    scope: str = "auto"
    rank: Rank = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    heads: str = "keep-each"
    base_model: str | None = None
    seed: int = 0
    version: str | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without reading anything."""
        if not self.adapters:
            raise OptionError("there is nothing to merge: name one adapter or more")
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * len(self.adapters))
        if len(self.weights) != len(self.adapters):
            raise OptionError(
                f"{len(self.adapters)} adapters and {len(self.weights)} weights: give one weight per adapter, in order"
            )
        for weight in self.weights:
            if (
                isinstance(weight, bool)
                or not isinstance(weight, int | float)
                or weight - weight != 0
            ):
                raise OptionError(f"weights: {weight!r} is not a finite number")
        _one_of("scope", self.scope, ("auto", "global", "module"))
        _one_of("heads", self.heads, ("keep-each", "refuse"))
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
            for source, weight in zip(self.adapters, self.weights, strict=True)
        ]
        fields |= {"adapters": adapters, "options": dict(self.options)}
        del fields["weights"]
        kept = {key: value for key, value in fields.items() if value is not None}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Relative paths of adapters are relative to the current directory.

    An adapter is a path or hub id, or a mapping with `path` and, if wanted, `revision`, `subfolder`, `sha256` and
    `weight`; the other keys are the fields of `Recipe`.

    Raises:
        OptionError: The file is not a recipe; the message names the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    content["weights"] = tuple(content.get("weights") or ())
    return Recipe(adapters=sources, **content)


def _adapters(items: Any, path: Path) -> tuple[tuple[Source, ...], list[float | None]]:
    if not isinstance(items, list):
        raise OptionError(f"{path}: adapters must be a list")
    sources, weights = [], []
    for item in items:
        entry = {"path": item} if isinstance(item, str) else dict(item)
        weights.append(entry.pop("weight", None))
        try:
            sources.append(Source(**entry))
        except TypeError:
            raise OptionError(
                f"{path}: adapter {item!r} must be a path, or a mapping with path and, if wanted, revision, "
                "subfolder, sha256 and weight"
            ) from None
    return tuple(sources), weights
