"""A total rank by net utility, against the definition on dense float64 matrices."""

import numpy as np
import peft
import pytest
import torch
from helpers import adapters, low_rank, regauged

from pcb_peft import OptionError, merge_adapters

LORA = peft.LoraConfig(r=4, target_modules="all-linear")
WEIGHTS = (1.0, -0.5, 2.0)


def norms(deltas):
    """Per adapter: D ↦ ‖D ΔWᵀ‖² in a module, relative to the adapter's own over all modules."""
    whole = [sum(np.linalg.norm(x @ x.T) ** 2 for x in adapter.values()) for adapter in deltas]
    return [
        lambda module, d, x=x, size=size: np.linalg.norm(d @ x[module].T) ** 2 / size
        for x, size in zip(deltas, whole, strict=True)
    ]


def scored(deltas):
    """(net utility, module, σ u vᵀ) of every direction of every adapter."""
    of = norms(deltas)
    found = []
    for t, adapter in enumerate(deltas):
        for module, x in adapter.items():
            u, s, vh = np.linalg.svd(x, full_matrices=False)
            for k in range(4):
                d = s[k] * np.outer(u[:, k], vh[k])
                others = sum(of[i](module, d) for i in range(len(deltas)) if i != t)
                found.append((of[t](module, d) - others, module, d))
    return sorted(found, key=lambda entry: -entry[0])


@pytest.mark.parametrize(
    "total", [20, *(pytest.param(total, marks=pytest.mark.slow) for total in (1, 60))]
)
def test_the_directions_of_the_highest_net_utility_are_merged(workshop, total):
    paths = workshop.adapters("llama", [LORA, LORA, LORA])
    deltas = [
        {m: w * x.numpy() for m, x in workshop.deltas("llama", adapter).items()}
        for adapter, w in zip(paths, WEIGHTS, strict=True)
    ]
    wanted = {}
    for utility, module, d in scored(deltas)[:total]:
        assert utility > 0
        wanted[module] = wanted.get(module, 0) + d
    merged = merge_adapters(paths, "linear", WEIGHTS, rank=f"utility:{total}")
    workshop.assert_deltas(merged, {m: torch.from_numpy(x) for m, x in wanted.items()}, 1e-5)
    assert sum(delta.rank for delta in merged.modules.values()) <= total
    assert "net utility" in str(merged.report)


def test_what_another_task_s_inputs_meet_is_dropped_though_it_is_large():
    """x: 3 e₁e₁ᵀ + 2 e₂e₂ᵀ; y: 4 e₃e₁ᵀ + 1 e₄e₃ᵀ. Both 3 and 4 read e₁, which the other task knows.

    81/97 − 9·16/257 > 0, but 256/257 − 16·9/97 < 0: of y only the 1 is left.
    """
    eye = np.eye(4, dtype=np.float32)
    x = (eye[:, [0, 1]] * [3, 2], eye[[0, 1]])
    y = (eye[:, [2, 3]] * [4, 1], eye[[0, 2]])
    pairs = [(b.astype(np.float32), a) for b, a in (x, y)]
    merged = merge_adapters(adapters(pairs), "linear", rank="utility:4")
    wanted = np.diag([3.0, 2, 0, 0])
    wanted[3, 2] = 1
    np.testing.assert_allclose(merged.delta("m").numpy(), wanted, atol=1e-6)
    best = merge_adapters(adapters(pairs), "linear", rank="utility:1").delta("m").numpy()
    np.testing.assert_allclose(best, np.diag([3.0, 0, 0, 0]), atol=1e-6)


def test_the_factors_do_not_matter():
    pairs = low_rank(3, 3, shape=(6, 5))
    others = [regauged(pair) for pair in pairs]
    one, other = (
        merge_adapters(adapters(some), "tsv", rank="utility:3").delta("m")
        for some in (pairs, others)
    )
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_equal_adapters_leave_nothing_and_the_message_says_so():
    pair = (np.ones((3, 1), np.float32), np.ones((1, 4), np.float32))
    with pytest.raises(OptionError, match=r"too much alike; 'budget:5'"):
        merge_adapters(adapters([pair, pair]), "linear", rank="utility:5")


def test_an_adapter_that_is_alone_keeps_its_strongest_directions(workshop):
    adapter = workshop.adapter("llama", LORA)
    found = merge_adapters([adapter], rank="utility:30")
    kept = merge_adapters([adapter], rank="utility:1000")
    assert sum(delta.rank for delta in found.modules.values()) == 30
    workshop.assert_deltas(kept, workshop.deltas("llama", adapter))
