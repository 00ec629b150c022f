"""The examples in docstrings run as they stand, on adapters of a tiny model that have the names in the examples."""

import doctest
import inspect
import shutil

import peft
import pytest

import pcb_peft

NAMES = ("Adapter", "extract_adapter", "fold_adapter", "load_adapter")


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)


@pytest.fixture
def in_a_folder_of_adapters(workshop, monkeypatch):
    folder = workshop.directory / "folder"
    for seed, name in enumerate(("math-lora", "code-lora")):
        workshop.adapter("llama", lora(), f"folder/{name}", seed=seed)
    shutil.copytree(workshop.base("llama"), folder / "base-model")
    monkeypatch.chdir(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("in_a_folder_of_adapters")
def test_the_examples_of_loading_folding_and_extracting_run():
    names = {name: getattr(pcb_peft, name) for name in pcb_peft.__all__}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    order = (
        "load_adapter",
        "fold_adapter",
        "extract_adapter",
        "Adapter",
    )  # a fold, then its inverse
    assert set(order) == set(NAMES)
    for name in order:
        for example in finder.find(names[name], name, globs=dict(names)):
            runner.run(example)
    assert runner.failures == 0
    assert runner.tries >= len(NAMES)


def test_an_adapter_shows_itself_on_one_line(workshop):
    adapter = pcb_peft.load_adapter(workshop.adapter("llama", lora(), "math-lora"))
    assert repr(adapter) == "<Adapter 'math-lora': LoRA, 4 modules>"


@pytest.mark.parametrize("name", NAMES)
def test_a_public_function_has_an_example(name):
    public = getattr(pcb_peft, name)
    members = [public] if inspect.isfunction(public) else [public.delta, public.save_pretrained]
    assert all(">>> " in (inspect.getdoc(member) or "") for member in members)
