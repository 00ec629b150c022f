"""A total rank, shared out over modules."""

import numpy as np
import peft
import pytest
import torch

from pcb_peft import OptionError, merge_adapters
from pcb_peft.deltas.rank_budget import ranks_within

LORA = peft.LoraConfig(r=4, target_modules="all-linear")


def singular_values(workshop, adapters):
    """Of Σ ΔW per module, according to PEFT, and the energy of the best choice of that many."""
    first, second = (workshop.deltas("llama", adapter) for adapter in adapters)
    return {m: np.linalg.svd((first[m] + second[m]).numpy(), compute_uv=False) for m in first}


def test_a_budget_loses_the_least_energy_that_it_must(workshop):
    adapters = workshop.adapters("llama", [LORA, LORA])
    spectra = singular_values(workshop, adapters)
    merged = merge_adapters(adapters, "linear", rank="budget:60")
    ranks = {module: delta.rank for module, delta in merged.modules.items()}
    assert sum(ranks.values()) == 60
    lead = sum(s[0] ** 2 for s in spectra.values())
    rest = np.sort(np.concatenate([s[1:] for s in spectra.values()]))[::-1]
    best = lead + (rest[: 60 - len(spectra)] ** 2).sum()
    whole = sum((s**2).sum() for s in spectra.values())
    assert merged.report.energy == pytest.approx(best / whole, rel=1e-5)


def test_a_budget_is_saved_with_every_modules_own_rank(workshop, tmp_path):
    adapters = workshop.adapters("llama", [LORA, LORA])
    merged = merge_adapters(adapters, "linear", rank="budget:60")
    merged.save_pretrained(tmp_path / "out", rank_pattern=True)
    loaded = workshop.deltas("llama", tmp_path / "out")
    for module in merged.modules:
        workshop.assert_close(merged.delta(module), loaded[module], 1e-6, module)


def test_equal_singular_values_are_shared_out_in_the_order_of_names():
    spectra = {"b": torch.tensor([3.0, 1.0, 1.0]), "a": torch.tensor([9.0, 1.0])}
    assert ranks_within(spectra, 4) == {"a": 2, "b": 2}


@pytest.mark.parametrize("rank", ["budget:3", "budget:0", "budget:x", "large"])
def test_a_wrong_budget_is_refused(workshop, rank):
    adapters = workshop.adapters("llama", [LORA, LORA])
    with pytest.raises(OptionError, match="rank is"):
        merge_adapters(adapters, "linear", rank=rank)
