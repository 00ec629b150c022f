"""The package's structure, read from its source: who imports whom, who knows which name, and how long is too long."""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pcb_peft
from pcb_peft.calibrations import list_calibrations
from pcb_peft.methods import list_methods
from pcb_peft.spaces import list_spaces

# From the bottom: an import points to a lower line, or stays in the importer's room.
LEVELS = (
    {"errors", "version"},
    {"runtime"},
    {"plugins"},
    {"deltas"},
    {"files", "images"},
    {"base", "tasks"},
    {"formats", "writing", "methods", "spaces", "calibrations"},
    {"adapters"},
    {"recipes", "data", "consumers"},
    {"merging"},
    {"extraction", "distillation", "dry_run", "evaluation", "inspection"},
    {"reporting", "searching", "exporting"},
    {"commands"},
    {"__init__", "__main__", "cli"},
)
# Folders of which nobody knows what lies there, and the calls that put something there.
SHELVES = {"calibrations", "formats", "methods", "spaces"}
REGISTER = {"after", "before", "merge_method", "register", "space"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 50

ROOT = Path(pcb_peft.__file__).parent
SOURCES = {
    file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in ROOT.rglob("*.py")
}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}


def unit(path: str) -> str:
    """The folder that a file is in, or the file itself."""
    return path.split("/")[0].removesuffix(".py")


def module_file(name: str) -> str | None:
    """The file that holds ``package.module`` or ``package.module.name``; None outside of this package."""
    top, *parts = name.split(".")
    if top != "pcb_peft":
        return None
    stems = ("".join(f"{part}/" for part in parts[:end]) for end in (len(parts), len(parts) - 1))
    candidates = (file for stem in stems for file in (f"{stem[:-1]}.py", f"{stem}__init__.py"))
    return next((file for file in candidates if file in TREES), "__init__.py")


@functools.cache
def imports(path: str) -> tuple[str, ...]:
    """The files of this package that a file imports, be it inside a function."""
    return tuple(_imports(path))


def _imports(path: str) -> Iterator[str]:
    for node in ast.walk(TREES[path]):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (file for file in map(module_file, names) if file)


def test_imports_point_down():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    assert not level.keys() ^ {unit(path) for path in TREES}
    edges = {(path, target) for path in TREES for target in imports(path)}
    sideways = {(a, b) for a, b in edges if level[unit(a)] <= level[unit(b)] and unit(a) != unit(b)}
    assert not sideways


def test_no_import_cycle():
    graph = {path: set(imports(path)) for path in TREES}
    for shelf in SHELVES:  # its __init__ imports whatever lies there
        graph[f"{shelf}/__init__.py"] |= {path for path in TREES if unit(path) == shelf}
        graph[f"{shelf}/__init__.py"].remove(f"{shelf}/__init__.py")
    graphlib.TopologicalSorter(graph).prepare()


def test_nobody_imports_what_is_on_a_shelf():
    offered = {
        path
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if unit(path) in SHELVES and isinstance(node, ast.Call)
        if ast.unparse(node.func) in REGISTER
    }
    assert {unit(path) for path in offered} == SHELVES
    assert not {(path, target) for path in TREES for target in imports(path) if target in offered}


def branched_on(node: ast.AST) -> list[ast.expr | None]:
    """What a comparison, a case of a match, or a table compares with."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.MatchValue):
        return [node.value]
    return node.keys if isinstance(node, ast.Dict) else []


def test_nobody_branches_on_a_name_from_a_shelf():
    calibrations = {*list_calibrations("before"), *list_calibrations("after")}
    names = calibrations | {*list_methods(), *list_spaces()}
    branches = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        for value in branched_on(node)
        if unit(path) not in SHELVES and value is not None
        if any(isinstance(x, ast.Constant) and x.value in names for x in ast.walk(value))
    ]
    assert not branches


def test_files_and_functions_are_short():
    long = {path: n for path, s in SOURCES.items() if (n := len(s.splitlines())) > LONGEST_FILE}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
                if lines > LONGEST_FUNCTION:
                    long[f"{path}:{node.name}"] = lines
    assert not long


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, pcb_peft; print({'peft', 'transformers', 'accelerate'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_nothing_but_the_public_face_lies_at_the_top():
    top = {path for path in TREES if "/" not in path}
    assert top == {"__init__.py", "__main__.py", "cli.py", "errors.py", "version.py"}
    assert (ROOT / "py.typed").is_file()


def test_a_public_name_has_a_docstring_of_its_own():
    """Not one that an exception inherits, nor the signature that a dataclass writes."""
    for name in {*pcb_peft.__all__} - {"__version__"}:
        documented = getattr(pcb_peft, name)
        text = (
            vars(documented).get("__doc__") if isinstance(documented, type) else documented.__doc__
        )
        assert text
        assert not text.startswith(f"{name}(")
