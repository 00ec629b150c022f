"""The package is imported without torch, and its names are there all the same, also for type checkers."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import pcb_peft
from pcb_peft.commands import arguments, sources
from pcb_peft.runtime import units

TREE = ast.parse(Path(pcb_peft.__file__).read_text("utf-8"))


def imported_for_type_checkers():
    """Name to module, of the imports that only a type checker sees, and of the version."""
    return {
        alias.name: node.module
        for node in ast.walk(TREE)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("pcb_peft.")
        for alias in node.names
    }


def test_type_checkers_see_what_python_imports():
    checked = imported_for_type_checkers()
    assert checked.pop("__version__") == "pcb_peft.version"
    assert checked == pcb_peft._MODULES
    assert sorted([*checked, "__version__"]) == pcb_peft.__all__


def test_a_public_name_is_there():
    for name in pcb_peft.__all__:
        scope = {}
        exec(f"from pcb_peft import {name}", scope)
        assert scope[name] is getattr(pcb_peft, name)
        assert name in dir(pcb_peft)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pcb_peft' has no attribute 'merge_adapter'"):
        _ = pcb_peft.merge_adapter
    with pytest.raises(ImportError):
        exec("from pcb_peft import merge_adapter")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, pcb_peft; print({'torch', 'numpy', 'peft'} & {*sys.modules}, len(dir(pcb_peft)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("set() ")


@pytest.mark.parametrize("module", [units, arguments, sources])
def test_the_examples_in_docstrings_are_true(module):
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 ms"),
        (0.0007, "1 ms"),
        (0.9996, "1 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (61, "1 min"),
        (3540, "59 min"),
        (86400 * 3, "3 d"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, said):
    assert units.format_duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (1000, "0.98 KiB"), (1 << 20, "1 MiB"), (3 << 50, "3072 TiB")]
)
def test_sizes_are_said_in_powers_of_two(count, said):
    assert units.format_size(count) == said
