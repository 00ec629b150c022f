import importlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import pcb_peft
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.plugins.registry import Registry
from pcb_peft.plugins.renamed import renamed_keywords
from pcb_peft.spaces.registry import space

METHOD = """
    from pcb_peft import merge_method

    @merge_method("{name}", paper="none")
    def {name}(tasks):
        '''Add half of every task vector.'''
        return tasks.combine(lambda x, weights: (weights * x).sum(0) / 2)
"""


def first() -> None: ...
def second() -> None: ...


def test_entries_come_back_by_name_and_in_order():
    registry = Registry[int]("number")
    registry.add("two", 2, defined_by=second)
    registry.add("one", 1, defined_by=first)
    assert registry.get("one") == registry.find("one") == 1
    assert registry.find("three") is None
    assert list(registry.list().items()) == [("one", 1), ("two", 2)]


def test_a_name_is_given_once_and_the_error_says_where():
    registry = Registry[int]("number", prefix="here: ")
    registry.add("one", 1, defined_by=first)
    lines = [f"{Path(__file__)}:{f.__code__.co_firstlineno}" for f in (first, second)]
    message = f"here: two definitions of number 'one': {lines[0]} and {lines[1]}; "
    with pytest.raises(OptionError) as error:
        registry.add("one", 2, defined_by=second)
    assert str(error.value).startswith(message)
    assert registry.get("one") == 1


def test_a_function_that_is_defined_again_replaces_itself():
    registry = Registry[int]("number")
    for value in (1, 2):

        def cell() -> None: ...

        registry.add("one", value, defined_by=cell)
    assert registry.get("one") == 2


@pytest.mark.parametrize("word", ["TIES", "Ties", "tise", "TISE"])
def test_a_similar_name_is_suggested_in_any_case(word: str):
    assert did_you_mean(word, ["linear", "ties"]) == "; did you mean 'ties'?"


def test_an_upper_case_name_is_suggested_too():
    assert did_you_mean("lora", ["IA3", "LORA"]) == "; did you mean 'LORA'?"


def test_nothing_is_suggested_for_an_unlike_name():
    assert did_you_mean("quicksort", ["linear", "ties"]) == ""


@pytest.mark.parametrize(
    ("decorator", "arguments"),
    [
        ("pcb_peft.merge_method", ("linear", {"paper": "none"})),
        ("pcb_peft.spaces.space", ("core", {"accepts": (), "low_rank_output": True})),
        ("pcb_peft.calibrations.before", ("pico", {"paper": "none", "accepts": ()})),
        ("pcb_peft.calibrations.after", ("svc", {"paper": "none", "accepts": ()})),
    ],
)
def test_a_decorator_refuses_a_taken_name(decorator, arguments):
    *path, function = decorator.split(".")
    name, keywords = arguments
    with pytest.raises(OptionError, match=rf"two definitions of .* '{name}'.*{name}\.py:.*test_"):
        getattr(importlib.import_module(".".join(path)), function)(name, **keywords)(first)


def test_a_decorator_returns_the_function_itself():
    assert (
        pcb_peft.get_method("ties").function
        is importlib.import_module("pcb_peft.methods.ties").ties
    )


def installed(folder: Path, name: str, source: str, group: str = "methods") -> Path:
    """A package that is installed in a folder, as an installer leaves it."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source), "utf-8")
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[pcb_peft.{group}]\n{name} = {name}\n")
    return folder


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(Path(pcb_peft.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )


@pytest.mark.slow
def test_another_package_brings_a_method(tmp_path: Path):
    installed(tmp_path, "halved", METHOD.format(name="halved"))
    ran = python(
        "import sys, pcb_peft; pcb_peft.get_method('ties'); print('halved' in sys.modules);"
        "print(pcb_peft.get_method('halved').summary, 'halved' in pcb_peft.list_methods())",
        tmp_path,
    )
    assert ran.stdout == "False\nAdd half of every task vector. True\n", ran.stderr


@pytest.mark.slow
def test_another_package_cannot_take_a_name_of_this_one(tmp_path: Path):
    installed(tmp_path, "ties", METHOD.format(name="ties"))
    ran = python("import pcb_peft; print(pcb_peft.list_methods()['ties'].paper)", tmp_path)
    assert ran.stdout == "arXiv:2306.01708\n", ran.stderr
    assert "two definitions of merge method 'ties'" in ran.stderr


@pytest.mark.slow
def test_a_package_that_breaks_is_left_out_with_a_warning(tmp_path: Path):
    installed(tmp_path, "broken", "1 / 0", group="spaces")
    ran = python("import pcb_peft; print('core' in pcb_peft.list_spaces())", tmp_path)
    assert ran.stdout == "True\n", ran.stderr
    assert "broken: its entry point broken = broken in pcb_peft.spaces cannot be" in ran.stderr


@pytest.mark.slow
def test_a_wrong_option_of_a_method_is_seen_by_a_type_checker(tmp_path: Path):
    pytest.importorskip("pyright")
    (tmp_path / "call.py").write_text(
        "from pcb_peft.methods.pcb import pcb\n"
        "from pcb_peft.tasks.task_vectors import TaskVectors\n"
        "def right(tasks: TaskVectors) -> None: pcb(tasks, density=0.1)\n"
        "def wrong(tasks: TaskVectors) -> None: pcb(tasks, densty=0.1)\n"
    )
    (tmp_path / "pyrightconfig.json").write_text(
        f'{{"extraPaths": ["{Path(pcb_peft.__file__).parents[1].as_posix()}"]}}'
    )
    checker = shutil.which("pyright") or "pyright"
    ran = subprocess.run(
        [checker, "-p", str(tmp_path), "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert 'No parameter named "densty"' in ran.stdout
    assert "1 error" in ran.stdout, ran.stdout


@pytest.mark.slow
def test_the_examples_of_registries_statistics_and_processes_run(tmp_path: Path):
    """In a process of their own: one of them registers a method."""
    modules = (
        "plugins.registry",
        "methods.registry",
        "spaces.registry",
        "calibrations.registry",
        "data.statistics_file",
        "runtime.processes",
    )
    code = (
        "import doctest, importlib\n"
        f"for name in {modules}:\n"
        "    result = doctest.testmod(importlib.import_module(f'pcb_peft.{name}'))\n"
        "    print(name, result.failed, result.attempted > 0)"
    )
    ran = python(code, tmp_path)
    assert ran.stdout == "".join(f"{name} 0 True\n" for name in modules), ran.stdout + ran.stderr


def test_former_names_of_keywords_are_understood_for_one_release():
    @renamed_keywords(colour="color")
    def paint(*, color="none"):
        return color

    with pytest.warns(DeprecationWarning, match="colour.*color"):
        assert paint(colour="red") == "red"
    assert paint(color="red") == "red"
    with pytest.raises(TypeError, match="colours"):
        paint(colours="red")


def test_merge_method_and_space_take_their_former_keywords():
    with pytest.warns(DeprecationWarning, match="keeps_one.*identity_on_one"):
        register = pcb_peft.merge_method("pcb", paper="none", keeps_one=True)
    with pytest.raises(OptionError, match="pcb"):  # the name is taken
        register(first)
    with pytest.warns(DeprecationWarning, match="lossless.*low_rank_output"):
        space("core", accepts=(), lossless=True)


def test_former_public_names_are_understood_for_one_release():
    with pytest.warns(DeprecationWarning, match="TaskStatistics"):
        former = pcb_peft.Statistics
    assert former is pcb_peft.TaskStatistics
