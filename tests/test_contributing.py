"""What CONTRIBUTING.md shows works as it stands there: every block is pasted into the package and tested."""

import importlib.util
import re
import sys
from pathlib import Path

import definitions
import helpers
import numpy as np
import pytest
import test_elementwise
import test_laws
import test_registered
from helpers import LOW_RANK, lora

from pcb_peft import list_methods, list_spaces
from pcb_peft.commands import cli
from pcb_peft.methods import registry as methods
from pcb_peft.spaces import registry as spaces

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")
BLOCKS = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
REGISTRIES = (methods._REGISTRY, spaces._REGISTRY)


@pytest.fixture
def paste(tmp_path, monkeypatch):
    """Imports a block as the file of the package that its first line names, until the test is over."""
    for registry in REGISTRIES:
        for name in ("_entries", "_definitions"):
            monkeypatch.setattr(registry, name, dict(getattr(registry, name)))

    def paste(path):
        file = tmp_path / Path(path).name
        file.write_text(BLOCKS[path], "utf-8")
        name = path.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return paste


def test_every_block_is_pasted_by_a_test():
    assert len(BLOCKS) == PAGE.count("```python")
    assert {str(Path(path).parent) for path in BLOCKS} == {
        *("pcb_peft/methods", "pcb_peft/spaces", "pcb_peft/commands", "tests")
    }


def obeys_the_laws(cases, monkeypatch):
    for case in cases:
        test_laws.test_the_laws_are_obeyed(case)
        with monkeypatch.context() as patch:
            test_laws.test_another_call_gives_the_same_bytes_whatever_tiles_threads_and_memory(
                case, patch
            )
        test_laws.test_whatever_comes_in_what_comes_out_is_finite_and_the_input_is_not_touched(
            case=case
        )


@pytest.mark.slow
def test_the_method_obeys_the_laws_and_agrees_with_its_definition(paste, monkeypatch):
    paste("pcb_peft/methods/trimmed_mean.py")
    cases = [case for case in test_laws.cases() if case.method == "trimmed_mean"]
    assert len(cases) == 2
    obeys_the_laws(cases, monkeypatch)
    for case in cases:
        test_laws.test_at_a_density_of_one_every_method_leaves_an_adapter_as_it_is(case)

    namespace = vars(definitions).copy()
    exec(BLOCKS["tests/definitions.py"], namespace)
    monkeypatch.setitem(definitions.ELEMENTWISE, "trimmed_mean", namespace["trimmed_mean"])
    for options in ({}, {"density": 0.7}):
        test_elementwise.test_agrees_with_the_definition("trimmed_mean", options)
    monkeypatch.setattr(test_registered, "PUBLISHED", list_methods())
    monkeypatch.setattr(test_registered, "EVERYTHING", list_methods())
    test_registered.test_it_names_its_source("trimmed_mean")
    test_registered.test_it_says_what_it_does_and_explains_every_option("trimmed_mean")
    test_registered.test_every_method_has_a_definition_that_it_is_compared_with()


def test_a_method_without_a_definition_is_noticed(paste):
    paste("pcb_peft/methods/trimmed_mean.py")
    with pytest.raises(AssertionError):
        test_registered.test_every_method_has_a_definition_that_it_is_compared_with()


@pytest.mark.slow
def test_the_space_obeys_the_laws_and_loses_nothing(paste, monkeypatch):
    paste("pcb_peft/spaces/right.py")
    monkeypatch.setitem(LOW_RANK, "right", list_spaces()["right"])
    cases = [case for case in test_laws.cases() if case.space == "right"]
    assert {case.method for case in cases} == {*test_laws.IN_EVERY_SPACE}
    obeys_the_laws(cases, monkeypatch)
    for scope in ("global", "module"):
        test_laws.test_linear_is_the_weighted_sum_in_every_space_that_loses_nothing("right", scope)
    pairs = helpers.low_rank(3, 4, 2, shape=(5, 12))  # more directions than rows
    merged = helpers.merged(pairs, space="right")
    assert np.allclose(merged.delta("m"), sum(helpers.dense(pairs)), atol=1e-5)
    assert merged.modules["m"].rank <= 5


def test_the_command_runs(paste, monkeypatch, workshop, capsys):
    paste("pcb_peft/commands/modules.py")
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, "modules"))
    adapter = workshop.adapter("mlp", lora("head"))
    assert cli.main(["modules", str(adapter)]) == 0
    assert capsys.readouterr().out == "head\n"
    assert cli.main(["modules", "nowhere"]) == 2
