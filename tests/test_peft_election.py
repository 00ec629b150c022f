"""PEFT's names do what PEFT does, also where the weights differ."""

import numpy as np
import peft
import pytest
import torch
from conftest import Workshop
from helpers import adapters, low_rank
from peft.utils import merge_utils

from pcb_peft import Adapter, load_adapter, merge_adapters


def pool() -> list[Adapter]:
    return adapters(low_rank(3, 3, 3))


WEIGHTS = [[1.0, 1.0, 1.0], [1.0, 0.3, 2.0], [1.0, -0.5, 0.2]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_ties_svd_is_pefts_ties_on_the_deltas(weights: list[float]):
    made = pool()
    found = merge_adapters(made, "ties_svd", weights, rank="full", density=0.4).delta("m")
    deltas = [adapter.delta("m") for adapter in made]
    wanted = merge_utils.ties(deltas, torch.tensor(weights), density=0.4)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_dare_ties_svd_is_pefts_dare_ties_on_the_deltas(weights: list[float]):
    """At density 1 nothing is random, and the election alone is compared."""
    made = pool()
    found = merge_adapters(made, "dare_ties_svd", weights, rank="full", density=1.0).delta("m")
    deltas = [adapter.delta("m") for adapter in made]
    wanted = merge_utils.dare_ties(deltas, torch.tensor(weights), density=1.0)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_election_can_be_chosen_against_pefts_name():
    made, weights = pool(), WEIGHTS[1]
    ours = merge_adapters(made, "ties_svd", weights, rank="full", elect="weighted").delta("m")
    plain = merge_adapters(made, "ties", weights, space="dense", scope="module", rank="full")
    assert torch.equal(ours, plain.delta("m"))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_linear_on_the_trained_factors_is_pefts_linear(workshop: Workshop, weights: list[float]):
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    paths = workshop.adapters("llama", [config] * 3)
    model = peft.PeftModel.from_pretrained(workshop.model("llama"), paths[0], paths[0].name)
    for path in paths[1:]:
        model.load_adapter(path, path.name)
    names = [path.name for path in paths]
    model.add_weighted_adapter(names, weights, "merged", combination_type="linear")
    model.save_pretrained(workshop.directory / "theirs", selected_adapters=["merged"])
    theirs = load_adapter(workshop.directory / "theirs" / "merged")
    ours = merge_adapters(paths, "linear", weights, space="factor", gauge="as_trained")
    for module in theirs.modules:
        workshop.assert_close(ours.delta(module), theirs.delta(module), 1e-5)
