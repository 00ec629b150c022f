"""The options of methods and spaces on the command line, such as ``--density``.

They come from the signatures. Every option of every method is a flag, so that one that the chosen method does not have
can be refused with the names of those that have it; the help shows those of the chosen method.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pcb_peft.commands.parser import UsageError
from pcb_peft.commands.sources import Entry, constant, demanded, entries, find
from pcb_peft.plugins.options import Option
from pcb_peft.runtime.shown import enumerated

PREFIX = "option."  # begins the name of a parsed option
AUTO = "auto"  # no method is named
METAVARS = {bool: "true|false", int: "N", float: "NUMBER"}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every option, and a ``--help`` that shows those of the chosen method and space."""
    group = parser.add_argument_group("options of the method and the space")
    for name in option_owners():
        group.add_argument(
            flag_of(name), dest=PREFIX + name, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    parser.add_argument(
        "-h",
        "--help",
        action=_HelpOfMethod,
        help="show this help; after --method NAME, with the options of that method",
    )


class _HelpOfMethod(argparse.Action):
    def __init__(self, option_strings: Sequence[str], **words: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=words.get("help"))

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: object
    ) -> None:
        method = getattr(namespace, "method", AUTO).lower()
        owners = owners_of(method, getattr(namespace, "space", "auto").lower())
        shown = {PREFIX + option.name: (owner, option) for owner, option in _options_of(owners)}
        for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
            if action.dest in shown:
                action.help, action.metavar = _help(*shown[action.dest])
        parser.print_help()
        parser.exit()


def flag_of(name: str) -> str:
    """The flag of an option: ``--base-model`` for ``base_model``."""
    return "--" + name.replace("_", "-")


def default_methods() -> tuple[str, ...]:
    """The methods of a merge that names none, best first."""
    return constant("methods/default.py", "DEFAULT_METHODS")


def peft_aliases() -> dict[str, dict[str, Any]]:
    """PEFT's names for merges, each with what it stands for."""
    return constant("recipes/peft_aliases.py", "PEFT_ALIASES")


def owners_of(method: str, space: str) -> list[Entry]:
    """The method and the space of these names; empty if one of them is not known.

    Where no method is named, these are all methods that it may then be, each with its space.
    """
    if method == AUTO:
        return [owner for name in default_methods() for owner in owners_of(name, space)]
    chosen = find("methods", peft_aliases().get(method, {}).get("method", method))
    if chosen is None:
        return []
    coordinates = find("spaces", chosen.facts["space"] if space == "auto" else space)
    return [] if coordinates is None else [chosen, coordinates]


def option_owners() -> dict[str, list[str]]:
    """All options by name, each with the methods and spaces that have it."""
    owners: dict[str, list[str]] = {}
    for owner, option in _options_of([*entries("methods"), *entries("spaces")]):
        owners.setdefault(option.name, []).append(owner.name)
    return owners


def names_of_options(method: str, space: str) -> set[str]:
    """Names of the options that a method and a space have; empty if one of them is not known."""
    return {option.name for _, option in _options_of(owners_of(method, space))}


def check_options(names: Iterable[str], method: str, space: str) -> None:
    """Refuse options that neither the method nor the space has.

    Raises:
        OptionError: There is no such method or space.
        UsageError: The message says which methods and spaces have the option.
    """
    if method not in (AUTO, *peft_aliases()):
        demanded("methods", method)
    if space != "auto":
        demanded("spaces", space)
    owners = owners_of(method, space)
    known = names_of_options(method, space)
    for name in names:
        if owners and name not in known:
            raise UsageError(
                f"{name} belongs to {', '.join(option_owners()[name])}; "
                f"{enumerated(list(dict.fromkeys(owner.name for owner in owners)))} have no such option",
                f"pcb-peft methods {owners[0].name} lists its options",
            )


def _options_of(owners: Iterable[Entry]) -> Iterator[tuple[Entry, Option]]:
    for owner in owners:
        yield from ((owner, option) for option in owner.options.values())


def _help(owner: Entry, option: Option) -> tuple[str, str]:
    """Help text of an option, and the word for its value."""
    default = "" if option.default is None else f"; default: {option.default}"
    words = f"{owner.name}: {option.explanation.rstrip('.')} ({option.allowed}{default})"
    return words.replace("%", "%%"), METAVARS.get(option.kind, "NAME")
