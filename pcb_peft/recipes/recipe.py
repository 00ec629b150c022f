"""A recipe: everything that is needed to make a merge again. It is the YAML file, field for field."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml

from pcb_peft.adapters.saving import RECIPE_FILE
from pcb_peft.adapters.source import Source
from pcb_peft.deltas.rank_choice import LOSSLESS, RankChoice, parse_rank
from pcb_peft.deltas.replacements import POLICIES, TIES, HeadPolicy, Tied
from pcb_peft.errors import OptionError
from pcb_peft.files.json_text import read_text
from pcb_peft.files.yaml_text import dump_yaml, load_yaml
from pcb_peft.methods.default import AUTO
from pcb_peft.recipes.fields import (
    a_mapping,
    a_name,
    a_number,
    a_truth,
    an_integer,
    one_of,
    parse_fields,
    refuse_unknown_fields,
    unnamed,
)
from pcb_peft.recipes.mergekit import fields_of, is_mergekit
from pcb_peft.recipes.overrides import SCOPES, Override, Scope, read_overrides
from pcb_peft.recipes.steps import Steps, read_steps
from pcb_peft.recipes.weights import Weight, plain, read_weights
from pcb_peft.runtime.shown import quoted, shown

FILE_NAME = RECIPE_FILE
MOST_BYTES = 1 << 20  # of a recipe; one with thousands of overrides is smaller
_ADAPTER_KEYS = tuple(one.name for one in dataclasses.fields(Source))
_FILE_KEYS = ("path", "sha256")


def _adapters(_: str, given: Sequence[Any]) -> tuple[Source, ...]:
    return tuple(_source("adapter", item, _ADAPTER_KEYS) for item in given)


def _statistics(_: str, given: Any) -> tuple[Source, ...]:
    files = given if isinstance(given, list | tuple) else [given]
    return tuple(_source("statistics", item, _FILE_KEYS) for item in files)


def _metric(_: str, given: Any) -> Source:
    return _source("metric", given, _FILE_KEYS)


def _path(name: str, given: Any) -> str:
    if not isinstance(given, str | Path):
        raise OptionError(f"{name} is {quoted(given)}; it must be a path or hub id")
    return str(given)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One merge, written down; made by `Recipe.parse` or `read_recipe`, which check and convert.

    The fields are the arguments of `merge_adapters`, which explains them.

    Attributes:
        adapters: Where the adapters are.
        weights: λ of the papers, one per adapter: a number, or a gradient over the layers.
        method: A method's name, or "auto": the first of `DEFAULT_METHODS` that suits.
        space: A space's name, or "auto": the method's own.
        scope: "global", "module", or "auto": the method's own.
        rank: Rank of the result.
        scale: The number by which the merged deltas are multiplied at the end.
        options: Options of the method and the space.
        overrides: What some modules do differently.
        before: Calibrations of the adapters.
        after: Calibrations of the merge.
        heads: What the merge does with parameters that several adapters replace.
        head: The adapter whose head the result gets, where several have one.
        companions: Whose tokenizer, chat template and processor files the result gets.
        tied: What a fold does with tied weights that would change differently.
        base_model: Path or hub id, where one was given.
        dequantize: True if the base model may be quantised; its weights are then computed from their codes.
        chain: True if each adapter was trained on top of those before it.
        seed: Seed of random methods.
        statistics: One file per adapter, for methods that need data.
        metric: The directions of a module's inputs that count: "random", texts, or a file of moments.
        format: Format of the file that is written; None: the one that the adapters came in.
        version: The version of this package that completed the recipe, where it belongs to a result.
    """

    adapters: Annotated[tuple[Source, ...], _adapters]
    weights: Annotated[tuple[Weight, ...], unnamed(read_weights)]
    method: Annotated[str, a_name] = AUTO
    space: Annotated[str, a_name] = "auto"
    scope: Annotated[Scope, one_of(SCOPES)] = "auto"
    rank: Annotated[RankChoice, unnamed(parse_rank)] = LOSSLESS
    scale: Annotated[float, a_number] = 1.0
    options: Annotated[Mapping[str, Any], a_mapping] = dataclasses.field(
        default_factory=dict[str, Any]
    )
    overrides: Annotated[tuple[Override, ...], unnamed(read_overrides)] = ()
    before: Annotated[Steps, read_steps] = ()
    after: Annotated[Steps, read_steps] = ()
    heads: Annotated[HeadPolicy, one_of(POLICIES)] = "keep-each"
    head: Annotated[str | None, a_name] = None
    companions: Annotated[str, a_name] = "agree"
    tied: Annotated[Tied, one_of(TIES)] = "refuse"
    base_model: Annotated[str | None, _path] = None
    dequantize: Annotated[bool, a_truth] = False
    chain: Annotated[bool, a_truth] = False
    seed: Annotated[int, an_integer] = 0
    statistics: Annotated[tuple[Source, ...], _statistics] = ()
    metric: Annotated[Source | None, _metric] = None
    format: Annotated[str | None, a_name] = None
    version: Annotated[str | None, a_name] = None

    @classmethod
    def parse(cls, **given: Any) -> "Recipe":
        """Make a recipe of values as users write them; nothing is read yet.

        Args:
            **given: Fields of `Recipe`, as in a recipe file: an adapter is a path or hub id, or a mapping with `path`
                and, if wanted, `revision`, `subfolder`, `sha256`, `config_sha256` and `weight`. None is the default.

        Returns:
            The recipe, with every field in its own type.

        Raises:
            OptionError: A field is unknown, or its value is not allowed.

        >>> Recipe.parse(adapters=["math-lora", "code-lora"], weights=[1, 0.5], rank=16).rank
        FixedRank(rank=16)
        """
        refuse_unknown_fields(cls, given)
        adapters, weights = _weighed(given.get("adapters"), given.get("weights"))
        fields = parse_fields(cls, {**given, "adapters": adapters, "weights": weights})
        overrides: Sequence[Override] = fields.get("overrides", ())
        for some in (fields["weights"], *(o.weights for o in overrides if o.weights is not None)):
            if len(some) != len(adapters):
                raise OptionError(
                    f"{len(adapters)} adapters and {len(some)} weights: give one weight per adapter, in order"
                )
        return cls(**fields)

    def changed(self, **given: Any) -> "Recipe":
        """Return the recipe with some fields changed, given as for `parse`.

        Raises:
            OptionError: A field is unknown, or its value is not allowed.
        """
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return Recipe.parse(**(fields | given))

    def to_yaml(self) -> str:
        """The text of the recipe file, which `read_recipe` reads."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        weights = plain(fields.pop("weights"))
        adapters = [
            _plain_source(source) | {"weight": weight}
            for source, weight in zip(self.adapters, weights, strict=True)
        ]
        fields |= {
            "adapters": adapters,
            "rank": self.rank.as_given,
            "scale": None if self.scale == 1 else self.scale,
            "dequantize": self.dequantize or None,
            "options": dict(self.options),
            "overrides": [override.as_dict() for override in self.overrides] or None,
            "before": list(self.before) or None,
            "after": list(self.after) or None,
            "statistics": list(map(_plain_source, self.statistics)) or None,
            "metric": self.metric and _plain_source(self.metric),
        }
        return dump_yaml({key: value for key, value in fields.items() if value is not None})


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file. Relative paths of adapters are relative to the current directory.

    A file of mergekit is understood where this package has its method; what differs is said in a warning.

    Args:
        path: The file. Its keys are those of `Recipe.parse`, or mergekit's.

    Returns:
        The recipe, checked; no adapter is read yet.

    Raises:
        OptionError: The file is not a recipe; the message names the key.
    """
    try:
        content = load_yaml(
            read_text(_file(path), OptionError, "give the YAML file of a merge", MOST_BYTES)
        )
    except yaml.YAMLError as error:
        raise OptionError(f"{path} cannot be read as YAML: {shown(error)}") from error
    if not isinstance(content, dict):
        raise OptionError(f"{path} is not a recipe: it must be a mapping with the key adapters")
    try:
        fields = fields_of(content) if is_mergekit(content) else content
        return Recipe.parse(**{str(key): value for key, value in fields.items()})
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error


def _file(given: object) -> Path:
    if not isinstance(given, str | Path):
        raise OptionError(
            f"the recipe is {quoted(given)}; it must be a Recipe, or the path of a YAML file"
        )
    return Path(given)


def _weighed(adapters: Any, weights: Any) -> tuple[list[Any], Any]:
    """The adapters without their weights, and the weights, wherever they are given; 1 each if they are not.

    Raises:
        OptionError: There are no adapters, or weights in both places.
    """
    if not isinstance(adapters, list | tuple | None):
        raise OptionError(f"adapters must be a list, and is {quoted(adapters)}")
    if not adapters:
        raise OptionError("there is nothing to merge: name one adapter or more")
    own = [item.get("weight") if isinstance(item, Mapping) else None for item in adapters]
    items = [_without_weight(item) if isinstance(item, Mapping) else item for item in adapters]
    if all(weight is None for weight in own):
        return items, [1.0] * len(items) if weights is None else weights
    if weights is not None:
        raise OptionError("give weights, or a weight with each adapter, not both")
    return items, [1.0 if weight is None else weight for weight in own]


def _without_weight(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != "weight"}


def _source(what: str, given: Any, keys: tuple[str, ...]) -> Source:
    """Parse an adapter or a file: a path, or a mapping with `path` and other keys.

    Raises:
        OptionError: It is anything else.
    """
    if isinstance(given, Source):
        return given
    entry = dict(given) if isinstance(given, Mapping) else {"path": given}
    if isinstance(entry.get("path"), Path):
        entry["path"] = str(entry["path"])
    texts = all(isinstance(value, str | None) for value in entry.values())
    if not texts or entry.get("path") is None or entry.keys() - set(keys):
        others = ", ".join(keys[1:]) + (" and weight" if keys is _ADAPTER_KEYS else "")
        raise OptionError(
            f"{what} {quoted(given)} must be a path, or a mapping with path and, if wanted, {others}"
        )
    return Source(**entry)


def _plain_source(source: Source) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(source).items() if value is not None}
