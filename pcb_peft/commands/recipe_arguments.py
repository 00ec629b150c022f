"""Arguments that describe a merge: flags for a recipe's fields, for the options of methods and spaces, and ``--set``.

A command line gives a recipe, or changes one that it reads from a file. Options such as ``--density`` come from the
signatures of the methods and spaces.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcb_peft.commands.arguments import in_known_case, parse_step, parse_value, parse_weights
from pcb_peft.commands.fold import tied_help
from pcb_peft.commands.parser import UsageError
from pcb_peft.commands.sources import Entry, constant, entries, find
from pcb_peft.plugins.options import Option, did_you_mean

if TYPE_CHECKING:
    from pcb_peft.recipes.recipe import Recipe

OPTION = "option."  # begins the name of a parsed option of a method or a space
DEFAULT_METHOD = "pcb"
SCOPES = ("auto", "global", "module")
METAVARS = {bool: "true|false", int: "N", float: "NUMBER"}
REPLACEMENTS = "deltas/replacements.py"


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """A field of a recipe on the command line.

    Attributes:
        name: Its name in the recipe.
        help: What it means.
        parse: Its value from the words after its flag.
        metavar: The word for its value in the help; None: it is a switch.
        many: Whether it takes several words.
    """

    name: str
    help: str
    parse: Callable[[Sequence[str]], Any]
    metavar: str | None
    many: bool = False

    @property
    def flag(self) -> str:
        return flag_of(self.name)


def flag_of(name: str) -> str:
    """The flag of a field or an option: ``--base-model`` for ``base_model``."""
    return "--" + name.replace("_", "-")


def recipe_fields() -> list[Field]:
    """The fields of a recipe that the command line can give."""
    methods = [*(method.name for method in entries("methods")), *peft_aliases()]
    spaces = ["auto", *(space.name for space in entries("spaces"))]
    heads = constant(REPLACEMENTS, "POLICIES")
    return [
        Field("method", f"{', '.join(methods)} (default: pcb)", _name(methods), "NAME"),
        Field("weights", "one per adapter (default: 1 each)", parse_weights, "WEIGHT", many=True),
        Field(
            "space", f"{', '.join(spaces)} (default: auto, the method's own)", _name(spaces), "NAME"
        ),
        Field(
            "scope",
            "statistics over the whole adapter (global), each weight alone (module), or as the method has it (default: auto)",
            _name(SCOPES),
            "SCOPE",
        ),
        Field(
            "rank",
            "rank of the result: a number; a fraction of the energy to keep, such as 0.95; budget:N or utility:N, a "
            "total over all modules; full: dense, for --fold (default: no truncation where the space allows it)",
            lambda words: parse_value(words[0]),
            "RANK",
        ),
        *_calibration_fields(),
        Field(
            "base_model",
            "directory or hub id; needed where the weights themselves matter",
            _text,
            "MODEL",
        ),
        Field("statistics", "files of pcb-peft collect, one per adapter", list, "FILE", many=True),
        Field(
            "heads",
            "what to do with heads, embeddings and token rows that several adapters replace: "
            f"{', '.join(heads)} (default: {heads[0]}, a file per adapter)",
            _name(heads),
            "POLICY",
        ),
        Field("tied", tied_help(), _text, "POLICY"),
        Field("chain", "each adapter was trained on top of those before it", _switch, None),
        Field(
            "seed", "seed of random methods (default: 0)", lambda words: parse_value(words[0]), "N"
        ),
    ]


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a recipe's fields, ``--set``, and the options of all methods and spaces."""
    group = parser.add_argument_group("recipe")
    for field in recipe_fields():
        words: dict[str, Any] = {"nargs": "+"} if field.many else {}
        words |= {"action": "store_true"} if field.metavar is None else {"metavar": field.metavar}
        group.add_argument(
            field.flag, dest=field.name, default=argparse.SUPPRESS, help=field.help, **words
        )
    group.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="fields and options by name, such as method=ties density=0.3; they override those of a recipe file",
    )
    options = parser.add_argument_group("options of the method and the space")
    for name in _owners():
        options.add_argument(
            flag_of(name), dest=OPTION + name, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    parser.register("action", "help", _HelpOfMethod)
    parser.add_argument(
        "-h", "--help", action="help", help="show this help; after --method, with its options"
    )


class _HelpOfMethod(argparse.Action):
    """Shows the help with the options of the method and the space that were named before."""

    def __init__(self, option_strings: Sequence[str], **words: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=words.get("help"))

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object
    ) -> None:
        method = find(
            "methods", _method_behind(getattr(namespace, "method", DEFAULT_METHOD).lower())
        )
        method = method or find("methods", DEFAULT_METHOD)
        space = getattr(namespace, "space", "auto").lower()
        owners = [
            method,
            find("spaces", method.facts["space"] if method and space == "auto" else space),
        ]
        shown = {option.name: (owner, option) for owner, option in _options_of(owners)}
        for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
            if (name := action.dest.removeprefix(OPTION)) != action.dest and name in shown:
                action.help, action.metavar = _option_help(*shown[name])
        parser.print_help()
        parser.exit()


def recipe_of(parsed: argparse.Namespace) -> "tuple[Recipe, list[str]]":
    """Make the recipe that the command line gives, or reads and changes.

    Returns:
        The recipe, and notes on what the command line changed in a recipe file.

    Raises:
        UsageError: The command line contradicts itself, or names an option that the method and the space do not have.
    """
    fields, options = _given(parsed)
    first, *others = parsed.adapters
    if not first.endswith((".yaml", ".yml")):
        _check_owners(options, fields.get("method", DEFAULT_METHOD), fields.get("space", "auto"))
        return _new_recipe(parsed.adapters, fields, options), []
    if others:
        raise UsageError(
            f"a recipe names its adapters itself: leave out {', '.join(others)}, or write it into {first}"
        )
    return _changed_recipe(Path(first), fields, options)


def _given(parsed: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and options that the command line gives, by flags or by ``--set``."""
    known = {field.name: field for field in recipe_fields()}
    said: dict[str, Any] = {}
    for name, value in vars(parsed).items():
        if name in known or name.startswith(OPTION):
            said[name.removeprefix(OPTION)] = value if isinstance(value, list) else [value]
    for pair in parsed.set or ():
        name, equals, value = pair.partition("=")
        name = name.removeprefix("options.").replace("-", "_")
        if not equals:
            raise UsageError(
                f"--set: {pair!r} is not KEY=VALUE", "for example --set method=ties density=0.3"
            )
        if name not in known and name not in _owners():
            suggestion = did_you_mean(name, [*known, *_owners()])
            raise UsageError(f"--set: no field or option {name!r}{suggestion}")
        said[name] = [value]
    fields = {name: known[name].parse(words) for name, words in said.items() if name in known}
    return fields, {n: parse_value(words[0]) for n, words in said.items() if n not in known}


def _new_recipe(
    adapters: Sequence[str], fields: dict[str, Any], options: dict[str, Any]
) -> "Recipe":
    from pcb_peft.adapters.source import Source
    from pcb_peft.recipes.recipe import Recipe

    return Recipe(adapters=tuple(map(Source, adapters)), options=options, **fields)


def _changed_recipe(
    file: Path, fields: dict[str, Any], options: dict[str, Any]
) -> "tuple[Recipe, list[str]]":
    from pcb_peft.recipes.recipe import read_recipe

    recipe = read_recipe(file)
    method, space = fields.get("method", recipe.method), fields.get("space", recipe.space)
    _check_owners(options, method, space)
    kept = dict(recipe.options)
    if (method, space) != (recipe.method, recipe.space) and (owners := _known(method, space)):
        mine = {option.name for _, option in _options_of(owners)}
        kept = {name: value for name, value in kept.items() if name in mine}
    notes: list[str] = []
    if changed := [*fields, *options]:
        notes.append(f"changed on the command line, against {file}: {', '.join(changed)}")
    if dropped := [name for name in recipe.options if name not in kept and name not in options]:
        notes.append(
            f"options of {file} that {method} does not have, left out: {', '.join(dropped)}"
        )
    return dataclasses.replace(recipe, options=kept | options, **fields), notes


def _check_owners(options: Iterable[str], method: str, space: str) -> None:
    """Refuse an option that neither the method nor the space has, and say which have it."""
    owners = _known(method, space)
    mine = {option.name for _, option in _options_of(owners)}
    for name in options:
        if owners and name not in mine:
            where = owners[-1].name
            raise UsageError(
                f"{name} belongs to {', '.join(_owners()[name])}; {method} has no such option, nor has the space {where}",
                f"pcb-peft methods {method} lists its options",
            )


def _known(method: str, space: str) -> list[Entry]:
    """The method and the space of these names; empty if one of them is not known."""
    chosen = find("methods", _method_behind(method))
    if chosen is None:
        return []
    where = find("spaces", chosen.facts["space"] if space == "auto" else space)
    return [] if where is None else [chosen, where]


def _owners() -> dict[str, list[str]]:
    """Options by name, each with the methods and spaces that have it."""
    owners: dict[str, list[str]] = {}
    for owner, option in _options_of([*entries("methods"), *entries("spaces")]):
        owners.setdefault(option.name, []).append(owner.name)
    return owners


def _options_of(owners: Iterable[Entry | None]) -> Iterator[tuple[Entry, Option]]:
    for owner in owners:
        if owner is not None:
            yield from ((owner, option) for option in owner.options.values())


def _option_help(owner: Entry, option: Option) -> tuple[str, str]:
    """Help text of an option, and the word for its value."""
    facts = (
        option.allowed if option.default is None else f"{option.allowed}; default: {option.default}"
    )
    words = f"{owner.name}: {option.explanation.rstrip('.')} ({facts})"
    return words.replace("%", "%%"), METAVARS.get(option.kind, "NAME")


def peft_aliases() -> dict[str, dict[str, Any]]:
    """PEFT's names for merges."""
    return constant("recipes/peft_aliases.py", "PEFT_ALIASES")


def _method_behind(name: str) -> str:
    return peft_aliases().get(name, {}).get("method", name)


def _calibration_fields() -> Iterator[Field]:
    for when, what in (("before", "adapters"), ("after", "merged adapter")):
        names = [entry.name for entry in entries("calibrations") if entry.facts["when"] == when]
        yield Field(
            when,
            f"calibrate the {what}: {', '.join(names)}; with an option: exponent:power=0.5",
            lambda words: [parse_step(word) for word in words],
            "STEP",
            many=True,
        )


def _name(known: Sequence[str]) -> Callable[[Sequence[str]], str]:
    """A parser of one of these names, in any case."""
    return lambda words: in_known_case(words[0], known)


def _text(words: Sequence[str]) -> str:
    return words[0]


def _switch(words: Sequence[Any]) -> Any:
    return parse_value(words[0]) if isinstance(words[0], str) else words[0]
