"""Adapters that were trained on top of each other: one adapter that is what PEFT makes of merging them in turn."""

import copy

import peft
import pytest
import torch
from helpers import lora
from safetensors.torch import load_file

from pcb_peft import BaseModelError, Recipe, load_adapter, merge, merge_adapters, read_recipe
from pcb_peft.commands import cli

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*lora_bias=True", "ignore:Already found a `peft_config`", "ignore:.*invalid shape"
    ),
    pytest.mark.slow,
]


def ia3(**options):
    return peft.IA3Config(target_modules=["up", "mix"], feedforward_modules=["mix"], **options)


KINDS = {  # what is trained first, second, third; and in which dtype PEFT can load it
    "LoRA, LoRA": ([lora(), lora(r=2, target_modules=["mix", "head"])], torch.float64),
    "LoRA, DoRA": ([lora(), lora(use_dora=True)], torch.float64),
    "LoRA, PiSSA": ([lora(), lora(init_lora_weights="pissa")], torch.float32),
    "DoRA, DoRA, LoRA": ([lora(use_dora=True), lora(use_dora=True), lora()], torch.float64),
    "LoRA, HRA": ([lora(), peft.HRAConfig(r=4, target_modules=["up", "mix"])], torch.float64),
    "OFT, OFT": (
        [peft.OFTConfig(r=2, oft_block_size=0, target_modules=["up", "mix"])] * 2,
        torch.float64,
    ),
    "LoRA, (IA)³": ([lora(), ia3()], torch.float64),
    "(IA)³, (IA)³, LoRA": ([ia3(), ia3(), lora()], torch.float64),
    "biases, biases": ([lora(bias="lora_only"), lora(bias="lora_only")], torch.float64),
}


@pytest.fixture(params=KINDS)
def chain(request, workshop):
    """Adapters, each made on the model that those before it have changed; and what they add up to according to PEFT."""
    configs, dtype = KINDS[request.param]
    model = workshop.model("mlp")
    directories = []
    for number, config in enumerate(configs, 1):
        name = f"step{number}"
        directories.append(workshop.adapter(copy.deepcopy(model), config, name, seed=number))
        on_top = peft.PeftModel.from_pretrained(model.to(dtype), directories[-1])
        model = on_top.merge_and_unload().float()
    before, after = workshop.model("mlp").state_dict(), model.state_dict()
    changes = {name: after[name].double() - before[name].double() for name in before}
    return directories, {name: change for name, change in changes.items() if change.any()}


def assert_changes(workshop, found, wanted):
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        workshop.assert_close(found[name], change, 1e-5, name)


def test_a_chain_as_one_adapter_is_what_peft_makes_of_it_in_turn(workshop, chain):
    directories, wanted = chain
    base = workshop.base("mlp")
    merged = merge_adapters(directories, "linear", base_model=base, chain=True)
    merged.save_pretrained(workshop.directory / "out")
    assert_changes(workshop, workshop.changes("mlp", workshop.directory / "out"), wanted)
    merged.fold(base, workshop.directory / "folded")
    before, after = (
        load_file(d / "model.safetensors") for d in (base, workshop.directory / "folded")
    )
    for name, values in before.items():
        change = wanted.get(name, torch.zeros_like(values))
        workshop.assert_close(after[name], values + change, 1e-6, name)


def test_its_recipe_makes_it_again(workshop, chain):
    directories, _ = chain
    merged = merge_adapters(directories, "linear", base_model=workshop.base("mlp"), chain=True)
    merged.save_pretrained(workshop.directory / "one")
    recipe = read_recipe(workshop.directory / "one" / "merge_recipe.yaml")
    assert recipe.chain
    merge(recipe).save_pretrained(workshop.directory / "two")
    one, two = (workshop.directory / d / "adapter_model.safetensors" for d in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_command_line_has_it_too(workshop):
    on = peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True)
    paths = [workshop.adapter("llama", on, f"step{n}", seed=n) for n in (1, 2)]
    base, out = workshop.base("llama"), workshop.directory / "out"
    words = f"merge {paths[0]} {paths[1]} -o {out} --method linear --chain --base-model {base}"
    assert cli.main(words.split()) == 0
    merged = merge_adapters(paths, "linear", base_model=base, chain=True)
    for module in merged.modules:
        assert torch.equal(merged.delta(module), load_adapter(out).delta(module))


def test_a_chain_of_loras_needs_no_base_and_another_one_says_so(workshop):
    plain = [workshop.adapter("mlp", lora(), f"step{n}", seed=n) for n in (1, 2)]
    assert merge_adapters(plain, "linear", chain=True).modules
    for config in (lora(use_dora=True), ia3()):
        top = workshop.adapter("mlp", config, "top")
        with pytest.raises(BaseModelError, match="give base_model"):
            merge_adapters([plain[0], top], "linear", chain=True)


def test_a_later_head_takes_the_place_of_an_earlier_one(workshop):
    config = lora(target_modules=["query"], task_type="SEQ_CLS")
    paths = [workshop.adapter("bert", config, f"step{n}", seed=n) for n in (1, 2)]
    merged = merge_adapters(paths, "linear", chain=True)
    wanted = load_adapter(paths[1]).head.read()
    assert merged.heads == {}
    assert all(torch.equal(values, wanted[name]) for name, values in merged.head.read().items())
    assert merged.head.read().keys() == wanted.keys()


def test_a_chain_is_true_or_false():
    with pytest.raises(Exception, match="chain is 'yes'; it must be true or false"):
        Recipe.parse(adapters=("a",), chain="yes")
