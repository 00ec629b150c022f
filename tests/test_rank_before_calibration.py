"""Rank and strength: what makes all directions alike keeps the strongest of them, not any."""

import numpy as np
import pytest
import torch

from pcb_peft import Adapter, OptionError, merge_adapters
from pcb_peft.adapters.adapter import DeltaMapping
from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats import LazyDelta

Matrix = np.ndarray


def adapters(count: int = 4, rank: int = 3) -> tuple[list[Adapter], list[Matrix]]:
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(20, rank)), rng.normal(size=(rank, 16))) for _ in range(count)]
    made = []
    for number, (lora_B, lora_A) in enumerate(pairs):
        delta = LowRank(torch.as_tensor(lora_A), torch.as_tensor(lora_B))
        entry = LazyDelta(LowRank, delta.shape, lambda delta=delta: delta, rank=rank)
        made.append(Adapter(name=f"task{number}", modules=DeltaMapping({"m": entry})))
    return made, [b @ a for b, a in pairs]


def flattened(matrix: Matrix, rank: int) -> Matrix:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return s[:rank].mean() * u[:, :rank] @ vh[:rank]


def distance(result: Matrix, wanted: Matrix) -> float:
    return float(np.linalg.norm(result - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("space", ["core", "knots", "dense"])
@pytest.mark.parametrize("rank", [1, 5])
def test_iso_c_flattens_the_strongest_directions(space: str, rank: int):
    made, tasks = adapters()
    merged = merge_adapters(made, "iso_c", space=space, rank=rank)
    assert distance(merged.delta("m").numpy(), flattened(sum(tasks), rank)) < 1e-5


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("rank", [2, 5])
def test_a_rank_comes_before_a_calibration(rank: int):
    made, tasks = adapters()
    merged = merge_adapters(made, "linear", rank=rank, after={"exponent": {"power": 0.0}})
    assert distance(merged.delta("m").numpy(), flattened(sum(tasks), rank)) < 1e-5
    assert merged.modules.entries["m"].rank == rank


def test_iso_cts_has_the_rank_and_all_of_its_strength_there():
    made, _ = adapters()
    merged = merge_adapters(made, "iso_cts", rank=10)
    strengths = np.linalg.svd(merged.delta("m").numpy(), compute_uv=False)
    np.testing.assert_allclose(strengths[:10], strengths[0], rtol=1e-5)
    assert strengths[10] < 1e-5 * strengths[0]


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("rank", [0.9, "budget:8"])
def test_energy_cannot_choose_among_equals(method: str, rank: float | str):
    made, _ = adapters()
    with pytest.raises(OptionError, match="equally strong"):
        merge_adapters(made, method, rank=rank)


def test_the_rank_is_no_option():
    from pcb_peft import list_methods

    assert "rank" not in list_methods()["iso_c"].options
    made, _ = adapters()
    merged = merge_adapters(made, "iso_c", rank=5)
    assert dict(merged.recipe.options) == {}
