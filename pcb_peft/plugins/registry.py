"""Registries: the methods, spaces, calibrations and formats that this installation knows, by name.

A function is registered by being imported: its decorator adds it. All files of a built-in package are imported with the
package. Other installed packages name their modules in an entry point, for example::

    [project.entry-points."pcb_peft.methods"]
    my_methods = "my_package.merge_methods"

These are imported when a name is asked for that is not built in, or when all names are listed.
"""

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import Option, did_you_mean, options_of

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A named function whose signature and docstring describe it to users.

    Attributes:
        name: Its name in recipes and on the command line.
        function: The function. Its keyword-only parameters are its options.
    """

    name: str
    function: Callable[..., Any]

    @property
    def options(self) -> dict[str, Option]:
        """The options by name, read from the signature and the ``Args`` section."""
        return options_of(self.function)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def paragraph(self, heading: str) -> str:
        """The text after ``heading:`` in the docstring, on one line; empty if there is no such paragraph."""
        pattern = rf"^{heading}: (.+(?:\n.+)*)"
        match = re.search(pattern, inspect.getdoc(self.function) or "", re.MULTILINE)
        return " ".join(match[1].split()) if match else ""


class Registry(Generic[Entry]):
    """Entries of one kind by name, such as all merge methods.

    Example:
        >>> planets = Registry[str]("planet")
        >>> planets.add("mars", "the red one", defined_by=print)
        >>> planets.get("mars")
        'the red one'
        >>> planets.get("Mars")
        Traceback (most recent call last):
            ...
        pcb_peft.errors.OptionError: no planet 'Mars'; did you mean 'mars'?; there are mars
    """

    def __init__(self, noun: str, *, entry_points: str | None = None, prefix: str = "") -> None:
        """Make an empty registry.

        Args:
            noun: The kind of entry, for messages: "merge method".
            entry_points: The group of entry points by which other packages add entries, such as "pcb_peft.methods";
                None: they cannot.
            prefix: Text before every message, such as "after: ".
        """
        self._noun, self._group, self._prefix = noun, entry_points, prefix
        self._entries: dict[str, Entry] = {}
        self._definitions: dict[str, Callable[..., Any]] = {}

    def add(self, name: str, entry: Entry, *, defined_by: Callable[..., Any]) -> None:
        """Add an entry under a new name.

        A function that is defined again, as in a notebook cell that is run twice, replaces its older self.

        Args:
            name: The name.
            entry: What `get` returns for it.
            defined_by: The function that the entry was made of; messages say where it stands.

        Raises:
            OptionError: Another function has that name already; the message names the places of both.
        """
        other = self._definitions.get(name)
        if other is not None and _identity(other) != _identity(defined_by):
            raise OptionError(
                f"{self._prefix}two definitions of {self._noun} {name!r}: {place_of(other)} and "
                f"{place_of(defined_by)}; give one of them another name"
            )
        self._entries[name], self._definitions[name] = entry, defined_by

    def find(self, name: str) -> Entry | None:
        """Return the entry of that name, or None; other packages are imported if it is not built in."""
        if name not in self._entries:
            self._load_entry_points()
        return self._entries.get(name)

    def get(self, name: str) -> Entry:
        """Return the entry of that name.

        Raises:
            OptionError: There is none; the message suggests a similar name and lists all.
        """
        entry = self.find(name)
        if entry is None:
            raise OptionError(self._prefix + unknown(self._noun, name, self._entries))
        return entry

    def list(self) -> dict[str, Entry]:
        """Return all entries by name, in alphabetical order, those of other packages included."""
        self._load_entry_points()
        return dict(sorted(self._entries.items()))

    def _load_entry_points(self) -> None:
        if self._group is not None:
            import_entry_points(self._group)


def unknown(noun: str, name: str, names: Iterable[str]) -> str:
    """Say that no entry has a name; suggest a similar one, and list all."""
    known = sorted(names)
    return f"no {noun} {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"


def import_files(path: Iterable[str], package: str) -> None:
    """Import every file of a package, so that what they define is registered.

    Args:
        path: The package's ``__path__``.
        package: The package's ``__name__``.
    """
    for module in pkgutil.iter_modules(path, f"{package}."):
        importlib.import_module(module.name)


@functools.cache
def import_entry_points(group: str) -> None:
    """Import what other installed packages name in a group of entry points, once per process.

    One that cannot be imported is left out with a warning: it must not stop merges that do not need it.
    """
    for point in importlib.metadata.entry_points(group=group):
        _import_entry_point(point)


def _import_entry_point(point: importlib.metadata.EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:  # noqa: BLE001  (code of others may raise anything)
        package = point.dist.name if point.dist else "an installed package"
        warnings.warn(
            f"{package}: its entry point {point.name} = {point.value} in {point.group} cannot be loaded and is left "
            f"out: {type(error).__name__}: {error}",
            stacklevel=2,
        )


def place_of(function: Callable[..., Any]) -> str:
    """Return the place of a function's definition, ``file:line``, or its qualified name if it has no source."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ".".join(_identity(function))


def _identity(function: Callable[..., Any]) -> tuple[str, str]:
    """Module and qualified name; for an object without them, those of its type."""
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return named.__module__, named.__qualname__
