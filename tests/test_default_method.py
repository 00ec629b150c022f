"""The method of a merge that names none: the first of the default methods that suits."""

import peft
import pytest
import torch
from conftest import Workshop
from helpers import adapters, distance, low_rank

from pcb_peft import OptionError, Recipe, merge, merge_adapters
from pcb_peft.dry_run.estimate import estimate_merge
from pcb_peft.merging.prepare import prepare
from pcb_peft.methods.default import DEFAULT_METHODS

FIRST, OTHER = DEFAULT_METHODS


def lora(**words: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj"], **words)


IA3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])


@pytest.mark.parametrize(
    ("given", "name", "why"),
    [
        ({}, FIRST, None),
        ({"rank": 3}, FIRST, None),
        ({"rank": "full"}, FIRST, None),
        ({"rank": "utility:3"}, FIRST, None),
        ({"response": 0.5}, FIRST, None),
        ({"rank": 0.9}, OTHER, "chosen by energy"),
        ({"rank": "budget:5"}, OTHER, "chosen by energy"),
        ({"density": 0.3}, OTHER, "has no option density"),
        (
            {"overrides": [{"modules": "*", "options": {"density": 0.3}}]},
            OTHER,
            "no option density",
        ),
    ],
)
def test_the_first_that_suits_the_rank_and_the_options(
    given: dict[str, object], name: str, why: str | None
):
    merged = merge_adapters(adapters(low_rank(3, 3)), **given)
    assert (merged.recipe.method, merged.report.method) == (name, name)
    notes = [note for note in merged.report.notes if "no method is named" in note]
    assert len(notes) == (why is not None)
    assert why is None or (why in notes[0] and f"it is {name}" in notes[0])


@pytest.mark.parametrize(
    ("config", "name", "why"),
    [
        (lora(), FIRST, None),
        (IA3, OTHER, "has only one"),
        (lora(use_dora=True), OTHER, "full rank"),
        (peft.LoKrConfig(r=2, target_modules=["q_proj"]), OTHER, "full rank"),
    ],
    ids=["LoRA", "(IA)³", "DoRA", "LoKr"],
)
def test_the_first_that_suits_the_adapters(
    workshop: Workshop, config: peft.PeftConfig, name: str, why: str | None
):
    paths = workshop.adapters("llama", [config, config])
    base = workshop.base("llama")
    prepared = prepare(Recipe.parse(adapters=paths, base_model=base), headers_only=True)
    assert prepared.recipe.method == name
    assert why is None or any(why in note for note in prepared.notes)


TEXTS = lora(task_type="CAUSAL_LM")
MEASURED = "what its layers see of random tokens"


def test_with_a_base_model_adapters_are_compared_by_what_its_layers_see(workshop: Workshop):
    paths, base = workshop.adapters("llama", [TEXTS, TEXTS]), workshop.base("llama")
    merged = merge_adapters(paths, base_model=base)
    named = merge_adapters(paths, FIRST, base_model=base, metric="random")
    plain = merge_adapters(paths, FIRST, base_model=base)
    (module,) = {module for module in merged.modules if "layers.0" in module}
    assert torch.equal(merged.delta(module), named.delta(module))
    assert distance(merged.delta(module), plain.delta(module)) > 1e-3
    assert any(MEASURED in note for note in merged.report.notes)
    assert merge(merged.recipe).recipe.metric == merged.recipe.metric
    assert MEASURED in estimate_merge(Recipe.parse(adapters=paths, base_model=base)).warning


@pytest.mark.parametrize(
    ("config", "given", "why"),
    [
        (lora(), {}, "do not name their task type"),
        (TEXTS, {"method": "flat"}, None),
        (TEXTS, {"density": 0.3}, None),
        (TEXTS, {"base_model": "org/not-here"}, "not on this machine"),
        (
            peft.LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
            {},
            "linear",
        ),
    ],
)
def test_a_base_model_that_tells_nothing_is_not_run(
    workshop: Workshop, config: peft.PeftConfig, given: dict[str, object], why: str | None
):
    paths = workshop.adapters("llama", [config, config])
    merged = merge_adapters(paths, **{"base_model": workshop.base("llama"), **given})
    notes = [note for note in merged.report.notes if "metric='random'" in note]
    assert merged.recipe.metric is None
    assert len(notes) == (why is not None)
    assert why is None or why in notes[0]


def test_a_large_base_model_is_run_only_on_demand(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pcb_peft.merging.default_metric.MOST_BYTES", 1000)
    paths, base = workshop.adapters("llama", [TEXTS, TEXTS]), workshop.base("llama")
    prepared = prepare(Recipe.parse(adapters=paths, base_model=base), headers_only=True)
    assert prepared.recipe.metric is None
    assert any("only if you ask for that metric" in note for note in prepared.notes)


def test_a_recipe_that_names_none_names_one_when_it_is_complete():
    made = adapters(low_rank(3, 3))
    recipe = Recipe.parse(adapters=["a", "b"])
    assert "method: auto" in recipe.to_yaml()
    assert "method: flat" in merge(recipe, made).recipe.to_yaml()


def test_an_option_that_no_default_method_has_is_refused():
    with pytest.raises(OptionError, match=r"method flat .*no option 'votes': .*consensus"):
        merge_adapters(adapters(low_rank(3, 3)), votes=2)
