"""A recipe from the command line: from flags, or from a file that flags and ``--set`` change."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pcb_peft.commands.arguments import parse_value
from pcb_peft.commands.method_options import (
    AUTO,
    PREFIX,
    add_method_options,
    check_options,
    names_of_options,
    option_owners,
)
from pcb_peft.commands.parser import UsageError
from pcb_peft.commands.recipe_fields import recipe_fields
from pcb_peft.plugins.options import did_you_mean

if TYPE_CHECKING:
    from pcb_peft.recipes.recipe import Recipe


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a recipe's fields, ``--set``, and the options of all methods and spaces."""
    group = parser.add_argument_group("recipe")
    for field in recipe_fields():
        words: dict[str, Any] = {"nargs": "+"} if field.many else {}
        words |= {"action": "store_true"} if field.metavar is None else {"metavar": field.metavar}
        action: Any = group.add_argument(
            field.flag, dest=field.name, default=argparse.SUPPRESS, help=field.help, **words
        )
        if field.names:
            action.completer = completer(field.names)
    group.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="fields and options by name, such as method=ties density=0.3",
    )
    add_method_options(parser)


def completer(names: Sequence[str]) -> Callable[..., list[str]]:
    """Make what argcomplete calls for the words that an argument may be."""

    def complete(prefix: str, **_: Any) -> list[str]:
        return [name for name in names if name.startswith(prefix.lower())]

    return complete


def recipe_of(parsed: argparse.Namespace) -> "tuple[Recipe, list[str]]":
    """Make the recipe that the command line gives, or reads and changes.

    Returns:
        The recipe, and notes on what the command line changed in a recipe file.

    Raises:
        UsageError: The command line contradicts itself, or gives an option that the method and the space do not have.
    """
    fields, options = _given(parsed)
    first, *others = parsed.adapters
    if not first.endswith((".yaml", ".yml")):
        check_options(options, fields.get("method", AUTO), fields.get("space", "auto"))
        return _new_recipe(parsed.adapters, fields, options), []
    if others:
        raise UsageError(
            f"a recipe names its adapters itself: leave out {', '.join(others)}, or write it into {first}"
        )
    return _changed_recipe(Path(first), fields, options)


def _given(parsed: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and options that the command line gives, by flags or by ``--set``."""
    known = {field.name: field for field in recipe_fields()}
    given: dict[str, Any] = {}
    for name, value in vars(parsed).items():
        if name in known or name.startswith(PREFIX):
            given[name.removeprefix(PREFIX)] = value if isinstance(value, list) else [value]
    given |= {name: [value] for name, value in _pairs(parsed.set or (), [*known, *option_owners()])}
    fields = {name: known[name].parse(words) for name, words in given.items() if name in known}
    return fields, {n: parse_value(words[0]) for n, words in given.items() if n not in known}


def _pairs(words: Sequence[str], known: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values that ``--set`` gives."""
    pairs: list[tuple[str, str]] = []
    for word in words:
        key, equals, value = word.partition("=")
        name = key.removeprefix("options.").replace("-", "_")
        if not equals:
            hint = "for example --set method=ties density=0.3"
            raise UsageError(f"--set: {word!r} is not KEY=VALUE", hint)
        if name not in known:
            raise UsageError(f"--set: no field or option {key!r}{did_you_mean(name, known)}")
        pairs.append((name, value))
    return pairs


def _new_recipe(
    adapters: Sequence[str], fields: dict[str, Any], options: dict[str, Any]
) -> "Recipe":
    from pcb_peft.recipes.recipe import Recipe

    return Recipe.parse(adapters=list(adapters), options=options, **fields)


def _changed_recipe(
    file: Path, fields: dict[str, Any], options: dict[str, Any]
) -> "tuple[Recipe, list[str]]":
    """A recipe from a file, with these fields and options instead of its own."""
    from pcb_peft.recipes.recipe import read_recipe

    recipe = read_recipe(file)
    method, space = fields.get("method", recipe.method), fields.get("space", recipe.space)
    check_options(options, method, space)
    kept = dict(recipe.options)
    if (method, space) != (recipe.method, recipe.space):  # its options may be those of the other
        kept = {name: kept[name] for name in kept if name in names_of_options(method, space)}
    notes: list[str] = []
    if changed := [*fields, *options]:
        notes.append(f"changed on the command line, against {file}: {', '.join(changed)}")
    if dropped := [name for name in recipe.options if name not in {**kept, **options}]:
        notes.append(f"left out, because {method} has no such option: {', '.join(dropped)}")
    return recipe.changed(options=kept | options, **fields), notes
