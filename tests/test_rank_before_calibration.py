"""Rank and strength: what makes all directions alike keeps the strongest of them, not any."""

import numpy as np
import pytest
from helpers import Matrix, adapters, dense, distance, low_rank

from pcb_peft import Adapter, OptionError, list_methods, merge_adapters


def pool() -> tuple[list[Adapter], Matrix]:
    """Four adapters of rank 3, and their sum."""
    pairs = low_rank(3, 3, 3, 3, shape=(20, 16))
    return adapters(pairs), sum(dense(pairs))


def flattened(matrix: Matrix, rank: int) -> Matrix:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return s[:rank].mean() * u[:, :rank] @ vh[:rank]


@pytest.mark.parametrize("space", ["core", "knots", "dense"])
@pytest.mark.parametrize("rank", [1, 5])
def test_iso_c_flattens_the_strongest_directions(space: str, rank: int):
    made, total = pool()
    merged = merge_adapters(made, "iso_c", space=space, rank=rank)
    assert distance(merged.delta("m").numpy(), flattened(total, rank)) < 1e-5


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("rank", [2, 5])
def test_a_rank_comes_before_a_calibration(rank: int):
    made, total = pool()
    merged = merge_adapters(made, "linear", rank=rank, after={"exponent": {"power": 0.0}})
    assert distance(merged.delta("m").numpy(), flattened(total, rank)) < 1e-5
    assert merged.modules.entries["m"].rank == rank


def test_iso_cts_has_the_rank_and_all_of_its_strength_there():
    made, _ = pool()
    merged = merge_adapters(made, "iso_cts", rank=10)
    strengths = np.linalg.svd(merged.delta("m").numpy(), compute_uv=False)
    np.testing.assert_allclose(strengths[:10], strengths[0], rtol=1e-5)
    assert strengths[10] < 1e-5 * strengths[0]


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("rank", [0.9, "budget:8"])
def test_energy_cannot_choose_among_equals(method: str, rank: float | str):
    made, _ = pool()
    with pytest.raises(OptionError, match="equally strong"):
        merge_adapters(made, method, rank=rank)


def test_the_rank_is_no_option():
    assert "rank" not in list_methods()["iso_c"].options
    made, _ = pool()
    merged = merge_adapters(made, "iso_c", rank=5)
    assert dict(merged.recipe.options) == {}
