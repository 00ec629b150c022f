"""Compress-then-Merge space against higher-order orthogonal iteration on the dense tensor, in numpy."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers import Matrix, Pair, adapters, delta, dense, distance, low_rank, regauged
from numpy.testing import assert_allclose

from pcb_peft import list_methods, merge_adapters
from pcb_peft.spaces import get_space

pytestmark = pytest.mark.filterwarnings("ignore:the merged adapter retains")


def tucker(
    tasks: Sequence[Matrix], rank: int, beta: float, iterations: int
) -> tuple[Matrix, Matrix]:
    """U and V from the m×n matrices, by eigenvectors."""
    norms = np.array([np.linalg.norm(task) for task in tasks])
    mean = norms[norms > 0].mean()
    x = [
        task / norm * (beta * norm + (1 - beta) * mean)
        for task, norm in zip(tasks, norms, strict=True)
        if norm
    ]

    def leading(grams: Matrix) -> Matrix:
        return np.linalg.eigh(grams)[1][:, ::-1][:, :rank]

    u, v = leading(sum(a @ a.T for a in x)), leading(sum(a.T @ a for a in x))
    for _ in range(iterations):
        u = leading(sum(a @ v @ v.T @ a.T for a in x))
        v = leading(sum(a.T @ u @ u.T @ a for a in x))
    return u, v


def merged(pairs: Sequence[Pair], **arguments) -> Matrix:
    given = {"method": "linear", "space": "ctm", "rank": "full", **arguments}
    return merge_adapters(adapters(pairs), **given).delta("m").numpy()


PAIRS = [((1 + t) * b, a) for t, (b, a) in enumerate(low_rank(3, 2, 4))]
TOTAL = 9


@pytest.mark.parametrize(
    ("beta", "iterations"),
    [(0.0, 0), (0.25, 0), (1.0, 0), (0.0, 1), (0.25, 1), (1.0, 1), (0.25, 500)],
)
def test_projected_sum(beta: float, iterations: int):
    """U Uᵀ Σ λ_t ΔW_t V Vᵀ."""
    for rank in (2,) if iterations == 500 else (1, 2, 4, 6):
        assert_projected_sum(rank, beta, iterations)


def assert_projected_sum(rank: int, beta: float, iterations: int) -> None:
    found = merged(PAIRS, basis_rank=rank, beta=beta, iterations=iterations)
    u, v = tucker(dense(PAIRS), rank, beta, 3000 if iterations == 500 else iterations)
    wanted = u @ u.T @ sum(dense(PAIRS)) @ v @ v.T
    assert distance(found, wanted) < (1e-3 if iterations == 500 else 1e-5)


def test_weights_enter_the_bases_and_the_merge():
    weights = [0.1, 0.0, -2.0]
    found = merged(PAIRS, basis_rank=3, iterations=1, weights=weights)
    tasks = [weight * task for weight, task in zip(weights, dense(PAIRS), strict=True)]
    u, v = tucker(tasks, 3, 0.25, 1)
    assert distance(found, u @ u.T @ sum(tasks) @ v @ v.T) < 1e-5


def test_iterating_retains_more():
    """Of the smoothed energy."""

    def retained(iterations: int) -> float:
        u, v = tucker(dense(PAIRS), 3, 0.25, iterations)
        x = [task / np.linalg.norm(task) for task in dense(PAIRS)]
        return sum(np.linalg.norm(u.T @ a @ v) ** 2 for a in x)

    assert retained(0) < retained(1) < retained(50)


@pytest.mark.parametrize(
    "method", [m.name for m in list_methods().values() if not m.needs_statistic]
)
def test_every_method_leaves_an_adapter_of_that_rank(method: str):
    for basis_rank in (1, 3, 5):
        some = adapters(PAIRS[: list_methods()[method].arity])
        found = merge_adapters(some, method=method, space="ctm", basis_rank=basis_rank)
        assert found.modules["m"].rank <= basis_rank
        assert np.isfinite(found.delta("m").numpy()).all()


def test_the_default_is_the_largest_rank_of_an_adapter():
    found = merge_adapters(adapters(PAIRS), method="linear", space="ctm")
    assert found.modules["m"].rank == 4
    assert found.recipe.options == {"basis_rank": None, "beta": 0.25, "iterations": 100}


@pytest.mark.parametrize("basis_rank", [TOTAL, 500])
def test_at_the_rank_of_all_adapters_nothing_is_lost(basis_rank: int):
    found = merge_adapters(adapters(PAIRS), method="linear", space="ctm", basis_rank=basis_rank)
    assert distance(found.delta("m").numpy(), sum(dense(PAIRS))) < 1e-5
    assert found.report.energy == pytest.approx(1)


def test_the_report_says_what_the_bases_do_not_hold():
    found = merge_adapters(adapters(PAIRS), method="linear", space="ctm", basis_rank=2)
    u, v = tucker(dense(PAIRS), 2, 0.25, 3000)
    held = sum(np.linalg.norm(u.T @ task @ v) ** 2 for task in dense(PAIRS))
    wanted = held / sum(np.linalg.norm(task) ** 2 for task in dense(PAIRS))
    assert found.report.energy == pytest.approx(wanted, rel=1e-3)
    assert found.report.modules["m"].energy == pytest.approx(wanted, rel=1e-3)
    assert any("retains" in note for note in found.report.notes)


@pytest.mark.parametrize("method", ["linear", "pcb", "ties", "tsv", "iso_c"])
def test_neither_factors_nor_order_matter(method: str):
    wanted = merged(PAIRS, method=method, basis_rank=3)
    assert (
        distance(merged([regauged(p) for p in PAIRS], method=method, basis_rank=3), wanted) < 1e-4
    )
    assert distance(merged(PAIRS[::-1], method=method, basis_rank=3), wanted) < 1e-4


def test_zero_adapters_do_not_matter():
    zero = (np.zeros((16, 1)), np.zeros((1, 12)))
    wanted = merged(PAIRS, basis_rank=3)
    assert distance(merged([*PAIRS, zero], basis_rank=3), wanted) < 1e-5
    assert not merged([zero, zero], basis_rank=3).any()


def test_the_bases_are_orthonormal():
    projection = get_space("ctm")([delta(pair) for pair in PAIRS], [1.0] * 3, basis_rank=3)
    core = projection.decode([torch.eye(3, dtype=torch.float64)])
    assert projection.blocks[0].shape == (3, 3, 3)
    singular = np.linalg.svd(core.matrix().numpy(), compute_uv=False)
    assert_allclose(singular[:3], 1, rtol=1e-5)
