"""Adapters that do not fit each other are refused by name, with the way out."""

import re
from pathlib import Path

import pytest
import torch
from helpers import ia3, lora
from torch import nn

from pcb_peft import BaseModelError, MismatchError, load_adapter, merge_adapters

# PEFT 0.21 asks transformers 5.23 for it


def adapters_on(workshop, *bases):
    """One per name of a base model."""
    return [
        workshop.adapter("mlp", lora(), f"adapter{seed}", seed=seed, base=base)
        for seed, base in enumerate(bases, 1)
    ]


# --------------------------------------------------------------------------------------- base models


@pytest.mark.parametrize(
    "bases",
    [
        ("org/one", "org/two"),
        ("org/one", "org/one-instruct"),
        ("org/one", "/models/two"),
        ("org/one", None, "org/two"),
        ("org/one", "org/one", "org/two"),
    ],
    ids=str,
)
def test_different_base_models_are_refused_with_names_and_the_way_out(workshop, bases):
    directories = adapters_on(workshop, *bases)
    with pytest.raises(MismatchError) as raised:
        merge_adapters(directories, "linear")
    message = str(raised.value)
    for directory, base in zip(directories, bases, strict=True):
        assert (f"{directory.name} has {base}" in message) is (base is not None)
    assert "base_model=" in message
    assert "--base-model" in message


def test_a_stated_base_model_settles_it(workshop):
    directories = adapters_on(workshop, "org/one", "org/two")
    merged = merge_adapters(directories, "linear", base_model="org/three")
    assert merged.base_model == "org/three"
    assert merged.recipe.base_model == "org/three"


SAME = {  # names of one base model, and the one that is kept
    ("org/one", "org/one"): "org/one",
    ("org/one", None): "org/one",
    (None, None): None,
    ("/models/one", "org/one"): "org/one",
    ("org/one", "/models/one/"): "org/one",
    ("./one", "org/One"): "org/One",
    ("org/one", "other/one"): "org/one",
    ("/models/one", "/elsewhere/one"): "/models/one",
}


@pytest.mark.parametrize("bases", SAME, ids=str)
def test_one_base_model_under_several_names_is_accepted(workshop, bases):
    directories = adapters_on(workshop, *bases)
    merged = merge_adapters(directories, "linear")
    assert merged.base_model == SAME[bases]
    names = {base for base in bases if base}
    noted = [note for note in merged.report.notes if "taken for one base model" in note]
    assert len(noted) == (len(names) > 1)
    assert all(name in note for note in noted for name in names)


@pytest.mark.parametrize(
    ("revisions", "kept"), [(("v1", "v1"), "v1"), (("v1", "v2"), None), (("v1", None), None)]
)
def test_a_revision_is_kept_where_all_have_it(workshop, revisions, kept):
    directories = [
        workshop.adapter("mlp", lora(revision=revision), f"a{i}", base="org/one")
        for i, revision in enumerate(revisions)
    ]
    merged = merge_adapters(directories, "linear")
    assert merged.revision == kept
    assert any("revision is left open" in note for note in merged.report.notes) is (kept is None)


@pytest.mark.parametrize("modules", [["q_proj"], ["v_proj"]])
def test_names_of_two_classes_of_one_model_are_refused_if_nothing_says_that_they_are(
    workshop, modules
):
    """PEFT would load one of the two, and not say a word."""
    whole = workshop.adapter("llama", lora(target_modules=["q_proj"]), "whole")
    bare = workshop.adapter(workshop.model("llama").model, lora(target_modules=modules), "bare")
    words = r"they may be one weight under two names.*give the base model"
    for some in ([whole, bare], [bare, whole]):
        with pytest.raises(MismatchError, match=words):
            merge_adapters(some, "linear")
    merge_adapters([bare], "linear")


def test_names_of_two_classes_are_one_weight_beside_the_base_model(workshop):
    whole = workshop.adapter("llama", lora(target_modules=["q_proj"]), "whole")
    bare = workshop.adapter(workshop.model("llama").model, lora(target_modules=["q_proj"]), "bare")
    merged = merge_adapters([whole, bare], "linear", base_model=workshop.base("llama"))
    assert set(merged.modules) == set(load_adapter(whole).modules)
    for module in merged.modules:
        parts = load_adapter(whole).delta(module), load_adapter(bare).delta(module[len("model.") :])
        torch.testing.assert_close(merged.delta(module), parts[0] + parts[1])
    assert any("have other names today: layers.0" in note for note in merged.report.notes)


def test_a_module_that_is_not_in_the_base_model_is_refused_by_name(workshop):
    adapter = workshop.adapter(
        workshop.model("llama").model.layers, lora(target_modules=["q_proj"]), "odd"
    )
    with pytest.raises(MismatchError, match=r"odd: 0\.self_attn\.q_proj.* not in the base model"):
        merge_adapters([adapter], "linear", base_model=workshop.base("llama"))


def test_a_base_model_that_is_not_here_is_said(workshop):
    adapter = workshop.adapter("llama", lora(target_modules=["q_proj"]), "one")
    merged = merge_adapters([adapter], "linear", base_model="org/not-here")
    assert any("no module was looked up" in note for note in merged.report.notes)


# -------------------------------------------------------------------------------------- shapes, kinds


class Wider(nn.Module):
    """The small model's first layer, with another width."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 12)


class Taller(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 10)


@pytest.mark.parametrize(
    ("other", "shape"), [(Wider, (12, 6)), (Taller, (10, 8))], ids=["out", "in"]
)
@pytest.mark.parametrize("config", [lora, ia3])
def test_other_shapes_are_refused_with_both_adapters_the_module_and_both_shapes(
    workshop, config, other, shape
):
    options = {"feedforward_modules": ["up"]} if config is ia3 and other is Taller else {}
    one, two = (
        workshop.adapter(model, config(target_modules=r"up", **options), name, base=f"org/{name}")
        for model, name in (("mlp", "one"), (other(), "two"))
    )
    shapes = [(10, 6), shape]
    if config is ia3:
        shapes = [(1, s[1]) if options else (s[0], 1) for s in shapes]
    with pytest.raises(MismatchError) as raised:
        merge_adapters([one, two], "linear")
    message = str(raised.value)
    assert message.startswith("up: ")
    assert message.endswith("one was trained on org/one, two on org/two")
    for words in map(str, shapes):
        assert words in message


def test_transposed_layers_of_one_shape_do_not_fit_others(workshop):
    """GPT-2's c_attn, (in, out) = (16, 48), against a Linear that goes the other way."""
    gpt2 = workshop.adapter("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True), "gpt2")
    model = workshop.model("gpt2")
    for block in model.transformer.h:
        block.attn.c_attn = nn.Linear(48, 16)
    other = workshop.adapter(model, lora(target_modules=["c_attn"]), "linear")
    with pytest.raises(MismatchError, match=re.escape("(48, 16)") + ".*" + re.escape("(16, 48)")):
        merge_adapters([gpt2, other], "linear")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(lora(), ia3(), id="on one module"),
        pytest.param(
            lora(target_modules=["up"]), ia3(target_modules=["mix"]), id="on different modules"
        ),
    ],
)
def test_a_lora_and_an_ia3_are_refused(workshop, first, second):
    one, two = workshop.adapters("mlp", [first, second])
    with pytest.raises(BaseModelError, match=r"\(IA\)³ and LoRA"):
        merge_adapters([one, two], "linear")


def test_a_lora_and_an_ia3_of_one_shape_are_refused(workshop):
    """Of a layer with a single input, a LoRA's ΔW and the vector of an (IA)³ are both (out, 1)."""
    layer = nn.Sequential(nn.Linear(1, 5))
    one = workshop.adapter(layer, lora(target_modules=["0"], r=1), "one")
    two = workshop.adapter(nn.Sequential(nn.Linear(1, 5)), ia3(target_modules=["0"]), "two")
    with pytest.raises(BaseModelError, match=r"\(IA\)³ and LoRA"):
        merge_adapters([one, two], "linear")


def test_ia3s_that_scale_the_input_and_the_output_of_a_layer_are_refused(workshop):
    one, two = workshop.adapters("mlp", [ia3(), ia3(feedforward_modules=r"up|mix")])
    with pytest.raises(MismatchError, match=r"up: adapter1 .*\(10, 1\).*adapter2 .*\(1, 6\)"):
        merge_adapters([one, two], "linear")


def test_ia3s_of_a_square_layer_that_scale_different_sides_are_refused(workshop):
    """The vectors are of one length; they cannot be added for all that."""
    one, two = workshop.adapters("mlp", [ia3(), ia3(feedforward_modules=["mix"])])
    with pytest.raises(MismatchError, match=r"mix: .*input of its feedforward_modules"):
        merge_adapters([one, two], "linear")


# ------------------------------------------------------------------------------ given the base model


@pytest.mark.parametrize("config", [lora, ia3])
def test_a_base_model_of_another_shape_is_refused(workshop, config):
    other = workshop.adapter(Wider(), config(target_modules=["up"]), "other")
    with pytest.raises(MismatchError, match=r"up: .*12.*10, 6"):
        load_adapter(other).delta("up", workshop.base("mlp"))
    with pytest.raises(MismatchError, match=r"up: .*12.*10, 6"):
        load_adapter(other).fold(workshop.base("mlp"), workshop.directory / "out")
    assert not (workshop.directory / "out").exists()


def test_a_module_that_the_base_model_does_not_have_is_refused(workshop):
    model = workshop.model("mlp")
    model.extra = nn.Linear(3, 3)
    adapter = load_adapter(workshop.adapter(model, lora(target_modules=["extra"])))
    with pytest.raises(MismatchError, match="extra is not in the base model"):
        adapter.delta("extra", workshop.base("mlp"))


# --------------------------------------------------------------------------------------------- names


def test_adapters_of_one_name_are_told_apart_in_the_report(workshop):
    paths = [workshop.adapter("mlp", lora(), f"{name}/lora") for name in ("math", "code")]
    merged = merge_adapters(paths, "ties", density=0.5)
    assert set(merged.report.kept) == {"lora-1", "lora-2"}
    assert [Path(source.path) for source in merged.recipe.adapters] == paths


def test_one_adapter_twice_counts_twice(workshop):
    directory = workshop.adapter("mlp", lora())
    merged = merge_adapters([directory, load_adapter(directory)], "linear")
    workshop.assert_deltas(
        merged, {m: 2 * d for m, d in workshop.deltas("mlp", directory).items()}, 1e-5
    )


def test_the_order_of_adapters_does_not_matter_to_a_sum(workshop):
    one, two = workshop.adapters("mlp", [lora(), lora(r=5)])
    there = merge_adapters([one, two], "linear", [1, -2])
    back = merge_adapters([two, one], "linear", [-2, 1])
    assert all(torch.allclose(there.delta(m), back.delta(m), atol=1e-5) for m in there.modules)
