"""Names and options of methods, spaces and calibrations, read from their source files.

Importing a method imports torch, which takes seconds. A help text needs only the signature and the docstring, so the
files are parsed, and everything that needs torch is left out:

    >>> [entry.name for entry in entries("spaces")]
    ['core', 'ctm', 'dense', 'factor', 'knots', 'vector']

Where another package adds entries of its own, which have no file here, they are all imported.
"""

import ast
import builtins
import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pcb_peft.errors import OptionError
from pcb_peft.plugins.registry import Plugin, unknown

PACKAGE = Path(__file__).resolve().parents[1]
LIGHT = ("typing", "collections.abc", "dataclasses", "math", "pcb_peft.plugins.options")

Kind: TypeAlias = Literal["methods", "spaces", "calibrations"]
NOUNS: dict[Kind, str] = {
    "methods": "merge method",
    "spaces": "space",
    "calibrations": "calibration",
}
DECORATORS: dict[Kind, tuple[str, ...]] = {
    "methods": ("merge_method",),
    "spaces": ("space",),
    "calibrations": ("before", "after"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Entry(Plugin):
    """A method, a space or a calibration, with a function that has its docstring and options, and does nothing.

    Attributes:
        facts: What its registration says, such as {"paper": "arXiv:2306.01708"}; of a calibration also "when".
    """

    facts: Mapping[str, Any]

    @property
    def document(self) -> str:
        """Its docstring."""
        return inspect.getdoc(self.function) or ""


@functools.cache
def entries(kind: Kind) -> tuple[Entry, ...]:
    """Return all entries of a kind, by name."""
    if f"pcb_peft.{kind}" in _entry_point_groups():
        found = _imported(kind)
    else:
        defaults = _defaults(kind)
        files = sorted((PACKAGE / kind).glob("*.py"))
        found = (entry for file in files for entry in _declared(file, defaults))
    return tuple(sorted(found, key=lambda entry: entry.name))


def find(kind: Kind, name: str) -> Entry | None:
    """Return the first entry of that name, if there is one."""
    return next((entry for entry in entries(kind) if entry.name == name), None)


def demanded(kind: Kind, name: str) -> Entry:
    """Return the first entry of that name.

    Raises:
        OptionError: There is none; the message suggests a similar name and lists all.
    """
    entry = find(kind, name)
    if entry is None:
        raise OptionError(unknown(NOUNS[kind], name, [entry.name for entry in entries(kind)]))
    return entry


@functools.cache
def constant(file: str, name: str) -> Any:
    """Read a constant of a module of this package without importing it.

    >>> constant("deltas/replacements.py", "TIES")
    ('refuse', 'untie', 'both')
    """
    return _light_names(ast.parse((PACKAGE / file).read_text("utf-8")))[name]


@functools.cache
def _entry_point_groups() -> frozenset[str]:
    """Groups of the entry points of all installed packages."""
    return frozenset(importlib.metadata.entry_points().groups)


def _imported(kind: Kind) -> Iterator[Entry]:
    """Entries of the registry itself."""
    package: Any = importlib.import_module(f"pcb_peft.{kind}")
    if kind == "calibrations":
        known = [
            (w, one) for w in DECORATORS[kind] for one in package.list_calibrations(w).values()
        ]
    else:
        known = [(None, one) for one in getattr(package, f"list_{kind}")().values()]
    for when, plugin in known:
        facts = {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin)}
        yield Entry(plugin.name, plugin.function, {"when": when, **facts})


def _defaults(kind: Kind) -> dict[str, dict[str, Any]]:
    """Default facts of the decorators that register entries of a kind."""
    tree = ast.parse((PACKAGE / kind / "registry.py").read_text("utf-8"))
    return {
        node.name: {
            word.arg: ast.literal_eval(default)
            for word, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            if default is not None
        }
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in DECORATORS[kind]
    }


def _declared(file: Path, defaults: Mapping[str, Mapping[str, Any]]) -> Iterator[Entry]:
    """Entries that a file registers by decorators with these default facts."""
    tree = ast.parse(file.read_text("utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = _light_names(tree) if any(node.decorator_list for node in functions) else {}
    for node in functions:
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func) in defaults:
                when = ast.unparse(call.func)
                said = {word.arg: _value(word.value, names) for word in call.keywords if word.arg}
                facts = {"when": when, **defaults[when], **said}
                yield Entry(str(_value(call.args[0], names)), _skeleton(node, names), facts)


def _light_names(tree: ast.Module) -> dict[str, Any]:
    """Names that a module defines without torch: light imports, constants, aliases of types."""
    names: dict[str, Any] = {"__builtins__": builtins}
    for node in tree.body:
        light = isinstance(node, ast.ImportFrom) and node.module in LIGHT
        light = light or (isinstance(node, ast.Import) and node.names[0].name in LIGHT)
        if light or isinstance(node, ast.Assign | ast.AnnAssign):
            with contextlib.suppress(NameError):  # it needs a name that was left out
                _run([_without_annotation(node)], names)
    return names


def _without_annotation(node: ast.stmt) -> ast.stmt:
    """An assignment without its annotation, which may need torch."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return ast.copy_location(ast.Assign([node.target], node.value), node)
    return node


def _skeleton(node: ast.FunctionDef, names: dict[str, Any]) -> Callable[..., Any]:
    """A function with the options and the docstring of another, which does nothing."""
    bare = copy.copy(node)
    bare.args = ast.arguments([], [], None, node.args.kwonlyargs, node.args.kw_defaults, None, [])
    bare.body = [*node.body[: ast.get_docstring(node) is not None], ast.Pass()]
    bare.decorator_list, bare.returns = [], None
    scope = dict(names)
    _run([bare], scope)
    return scope[node.name]


def _run(statements: list[ast.stmt], names: dict[str, Any]) -> None:
    module = ast.fix_missing_locations(ast.Module(statements, []))
    exec(compile(module, "<without torch>", "exec"), names)


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression; its source where it needs a name that was left out."""
    try:
        return eval(compile(ast.Expression(node), "<fact>", "eval"), names)
    except NameError:
        return ast.unparse(node)
