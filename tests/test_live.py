"""Merging inside a live PeftModel: PEFT's names, PEFT's rejected cases, in the space of deltas."""

import copy
import inspect

import peft
import pytest
import torch
from peft.tuners.lora import LoraModel

from pcb_peft import OptionError, PcbPeftError, UnsupportedError, add_weighted_adapter

PLAIN = peft.LoraConfig(r=4, target_modules="all-linear")
AWKWARD = (
    peft.LoraConfig(  # ranks, patterns and targets that PEFT's own method refuses, or gets wrong
        r=2,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 6},
        alpha_pattern={"q_proj": 3},
        use_rslora=True,
    )
)
DORA = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=True)
PISSA = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
TRAINED_BIAS = peft.LoraConfig(r=3, target_modules=["q_proj"], bias="all")
IA3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])


def model_with(workshop, configs):
    model = "llama"
    for seed, (name, config) in enumerate(configs.items(), 1):
        model = workshop.peft_model(model, config, seed=seed, name=name)
    return model


def changes(workshop, model, name):
    """ΔW of one adapter of a live Llama."""
    return alone(workshop, "llama", model, name)


def alone(workshop, kind, model, name):
    """ΔW of one adapter of a live model, as PEFT merges it."""
    single = copy.deepcopy(model)
    single.set_adapter(name)
    return workshop.changes(kind, single)


@pytest.mark.slow
@pytest.mark.parametrize("combination_type", ["linear", "cat"])
@pytest.mark.parametrize(
    "configs",
    [
        {"math": PLAIN, "code": AWKWARD},
        {"math": AWKWARD, "code": PLAIN},
        {"math": IA3, "code": IA3},
        {"math": PLAIN, "code": DORA},
        {"math": PISSA, "code": PISSA},
        {"math": TRAINED_BIAS, "code": PLAIN},
    ],
)
def test_a_weighted_adapter_is_the_weighted_sum_of_what_peft_merges(
    workshop, combination_type, configs
):
    if configs["math"] is IA3 and combination_type == "cat":
        combination_type = "linear"
    model = model_with(workshop, configs)
    first, second = changes(workshop, model, "math"), changes(workshop, model, "code")
    add_weighted_adapter(model, ["math", "code"], [1.5, -0.5], "merged", combination_type)
    found = changes(workshop, model, "merged")
    assert set(found) == set(first) | set(second)
    for name, change in found.items():
        zero = torch.zeros_like(change)
        wanted = 1.5 * first.get(name, zero) - 0.5 * second.get(name, zero)
        workshop.assert_close(change, wanted, 1e-5, name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize(
    "combination_type", ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "pcb"]
)
def test_every_name_works_on_adapters_of_different_ranks(workshop, combination_type):
    model = model_with(workshop, {"math": PLAIN, "code": AWKWARD})
    options = {} if combination_type == "svd" else {"density": 0.5}
    add_weighted_adapter(
        model, ["math", "code"], [1.0, 1.0], "merged", combination_type, svd_rank=5, **options
    )
    assert model.peft_config["merged"].r == 5
    assert changes(workshop, model, "merged")


def test_nothing_is_added_where_something_is_wrong(workshop):
    model = model_with(workshop, {"math": PLAIN, "code": PLAIN})
    for name, arguments, message in (
        ("math", {}, "already"),
        ("merged", {"combination_type": "ties", "density": 7.0}, "density"),
        ("merged", {"weights": [1.0]}, "2 adapters and 1 weights"),
    ):
        weights = arguments.pop("weights", [1.0, 1.0])
        with pytest.raises(OptionError, match=message):
            add_weighted_adapter(model, ["math", "code"], weights, name, **arguments)
    assert set(model.peft_config) == {"math", "code"}


def test_arguments_stand_where_peft_has_them(workshop):
    model = model_with(workshop, {"math": PLAIN, "code": AWKWARD})
    theirs = list(inspect.signature(LoraModel.add_weighted_adapter).parameters.values())[1:]
    ours = list(inspect.signature(add_weighted_adapter).parameters.values())[1:-1]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]
    positional = ["svd", 5, None, False, "gesvd", None, "total"]
    add_weighted_adapter(model, ["math", "code"], [1.0, 1.0], "merged", *positional)
    assert model.peft_config["merged"].r == 5


REFUSED = {  # arguments, words of the message
    "svd_clamp": ({"svd_clamp": 0.9}, "svd_clamp is 0.9, and only None is supported"),
    "svd_driver": ({"svd_driver": "x"}, "svd_driver is 'x'; it must be one of None, gesvd"),
    "svd_full_matrices": ({"svd_full_matrices": 3}, "svd_full_matrices is 3; it must be True"),
    "majority_sign_method": (
        {"majority_sign_method": "frequency"},
        "majority_sign_method is 'frequency'; only 'total'",
    ),
    "combination_type": (
        {"combination_type": "tise"},
        "no merge method 'tise'; did you mean 'ties'",
    ),
    "an unknown argument": ({"svd_clmp": 1}, "has no option 'svd_clmp'"),
    "an unknown adapter": ({"adapters": ["mth"]}, "no adapter 'mth'; did you mean 'math'"),
    "a name": ({"adapters": "math"}, r"adapters is 'math'; it must be a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name_and_is_a_value_error_as_in_peft(workshop, case):
    changed, words = REFUSED[case]
    arguments = {"adapters": ["math"], "weights": [1.0], "adapter_name": "merged"} | changed
    model = model_with(workshop, {"math": PLAIN})
    with pytest.raises(ValueError, match=words) as caught:
        add_weighted_adapter(model, **arguments)
    assert isinstance(caught.value, PcbPeftError)
    assert set(model.peft_config) == {"math"}


def test_two_heads_do_not_fit_into_one_adapter(workshop):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = model_with(workshop, {"math": config, "code": config})
    with pytest.raises(UnsupportedError, match="heads of their own"):
        add_weighted_adapter(model, ["math", "code"], [1.0, 1.0], "merged", "cat")
    assert set(model.peft_config) == {"math", "code"}


def test_experts_are_added_which_peft_s_own_method_refuses(workshop):
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = workshop.peft_model("mixtral", config, seed=1, name="math")
    model = workshop.peft_model(model, config, seed=2, name="code")
    first, second = (alone(workshop, "mixtral", model, name) for name in ("math", "code"))
    add_weighted_adapter(model, ["math", "code"], [1.5, -0.5], "merged", "cat")
    for name, change in alone(workshop, "mixtral", model, "merged").items():
        workshop.assert_close(change, 1.5 * first[name] - 0.5 * second[name], 1e-5, name)
