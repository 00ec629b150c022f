"""The spectral methods against their dense definitions, in numpy on the m×n matrices, and against laws."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from definitions import SPECTRAL, svd
from helpers import Matrix, Pair, adapter, adapters, dense, distance, low_rank, regauged
from numpy.testing import assert_allclose

from pcb_peft import get_method, merge_adapters
from pcb_peft.tasks.blocks import stacked
from pcb_peft.tasks.task_vectors import TaskVectors

EQUIVARIANT = ("tsv", "iso_c", "flat", "iso_cts", "wudi", "stf")  # bases do not matter to them
METHODS = tuple(SPECTRAL)


# --- the adapters -----------------------------------------------------------------------------------------------------


def shared_right(seed: int = 1) -> list[Pair]:
    (_, lora_A), *pairs = low_rank(3, 3, 3, seed=seed)
    return [(lora_B, lora_A) for lora_B, _ in pairs]


POOLS: dict[str, list[Pair]] = {
    "two": low_rank(3, 3),
    "mixed ranks": low_rank(2, 5, 1, 3),
    "wide": low_rank(2, 3, 2, shape=(8, 40)),
    "more than the matrix holds": low_rank(4, 4, 4, shape=(10, 9)),
    "full rank": low_rank(8, 8, shape=(8, 8)),
    "shared A": shared_right(),
    "overlapping": [*low_rank(3, 2), tuple(np.array(f) for f in low_rank(3)[0])],
    "one is zero": [*low_rank(3, 2), (np.zeros((16, 1)), np.zeros((1, 12)))],
}
HARD = ("mixed ranks", "more than the matrix holds", "one is zero")


def apply(method: str, x: Sequence[Matrix], weights: Sequence[float] = (), **options) -> Matrix:
    """The method's function on these matrices, as the engine calls it."""
    weights = weights or [1.0] * len(x)
    block = stacked(torch.as_tensor(np.stack(x)), weights)
    return get_method(method)(TaskVectors([block]), **options).block(0)[0].numpy()


def cores(x: Sequence[Matrix]) -> tuple[Matrix, list[Matrix], Matrix]:
    """U, all Uᵀ ΔW V, and V, in float64."""
    u = svd(np.hstack(x))[0]
    v = svd(np.vstack(x))[2].T
    return u, [u.T @ matrix @ v for matrix in x], v


def definition(method: str, x: Sequence[Matrix], **options) -> Matrix:
    """Zero task vectors have no say."""
    return SPECTRAL[method]([matrix for matrix in x if matrix.any()], **options)


# --- equal to the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EQUIVARIANT)
def test_on_cores_it_equals_its_dense_definition(method: str):
    for pool in POOLS:
        x = dense(POOLS[pool])
        u, small, v = cores(x)
        merged = u @ apply(method, small) @ v.T
        assert distance(merged, definition(method, x)) < 1e-8


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tsv", {"density": 0.5}),
        ("tsv", {"density": 0.01}),
        ("iso_cts", {"common": 0.0}),
        ("iso_cts", {"common": 0.5}),
        ("iso_cts", {"common": 1.0}),
        ("wudi", {"ridge": 1e-3}),
        ("wudi", {"ridge": 1.0}),
    ],
)
@pytest.mark.parametrize("pool", HARD)
def test_options(method: str, options: dict[str, float], pool: str):
    x = dense(POOLS[pool])
    u, small, v = cores(x)
    merged = u @ apply(method, small, **options) @ v.T
    assert distance(merged, definition(method, x, **options)) < 1e-8


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, {}) for name in METHODS),
        ("robust_merge", {"density": 0.05}),
        ("robust_merge", {"density": 1.0}),
        ("fr", {"cutoff": 0.0}),
        ("fr", {"cutoff": 0.4}),
    ],
)
def test_on_the_same_matrices_it_equals_its_definition(method: str, options: dict[str, float]):
    for pool in ("two", "wide", *HARD):
        x = dense(POOLS[pool])
        assert distance(apply(method, x, **options), definition(method, x, **options)) < 1e-8


@pytest.mark.parametrize("pool", ["mixed ranks", "wide"])
@pytest.mark.parametrize("method", EQUIVARIANT)
def test_from_adapters_to_adapter(method: str, pool: str):
    """Adapters are float32."""
    merged = merge_adapters(adapters(POOLS[pool]), method=method).delta("m").numpy()
    assert distance(merged, definition(method, dense(POOLS[pool]))) < 1e-5


def test_fr_from_adapters_to_a_dense_delta():
    pool = POOLS["mixed ranks"]
    merged = merge_adapters(adapters(pool), method="fr", rank="full").delta("m").numpy()
    assert distance(merged, definition("fr", dense(pool))) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_weights_scale_the_task_vectors_first(method: str):
    x, weights = dense(POOLS["mixed ranks"]), [0.5, -1.0, 2.0, 0.0]
    weighted = [w * matrix for w, matrix in zip(weights, x, strict=True)]
    assert distance(apply(method, x, weights), definition(method, weighted)) < 1e-8


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_task_without_a_competitor_comes_back(method: str):
    x = [dense(low_rank(4))[0], np.zeros((16, 12))]
    assert_allclose(apply(method, x), x[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_merges_to_nothing(method: str):
    assert not apply(method, [np.zeros((5, 4))] * 3).any()
    opposite = dense(low_rank(2))[0]
    merged = apply(method, [opposite, -opposite])
    assert np.isfinite(merged).all()
    assert np.linalg.norm(merged) <= 1e-12 * np.linalg.norm(opposite)


@pytest.mark.parametrize("method", ["tsv", "wudi", "stf"])
def test_equal_adapters_merge_to_themselves(method: str):
    (x,) = dense(low_rank(4))
    assert distance(apply(method, [x, x, x]), x) < 1e-8


@pytest.mark.parametrize("method", EQUIVARIANT)
def test_it_turns_with_the_bases(method: str):
    x = dense(POOLS["mixed ranks"])
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in x[0].shape)
    turned = apply(method, [left @ matrix @ right for matrix in x])
    assert distance(turned, left @ apply(method, x) @ right) < 1e-8


@pytest.mark.parametrize("pool", ["shared A", "overlapping"])
@pytest.mark.parametrize("method", [*EQUIVARIANT, "fr"])
def test_the_factors_do_not_matter_where_adapters_share_directions(method: str, pool: str):
    """There G in float32 leaves noise, which methods that ask for the numerical rank do not see.

    (`robust_merge` counts entries, of which core space then has more.)
    """
    pairs = POOLS[pool]
    found = merge_adapters(adapters([regauged(pair) for pair in pairs]), method=method, rank="full")
    wanted = merge_adapters(adapters(pairs), method=method, rank="full")
    assert distance(found.delta("m").numpy(), wanted.delta("m").numpy()) < 2e-5


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_does_not_touch_a_module_has_no_say_there(method: str):
    first, second, third = low_rank(3, 2, 4)
    some = [
        adapter("a", {"m": first, "n": second}),
        adapter("b", {"m": second}),
        adapter("c", {"n": third, "o": first}),
    ]
    merged = merge_adapters(some, method=method, rank="full")
    for module, pairs in {"m": [first, second], "n": [second, third], "o": [first]}.items():
        wanted = merge_adapters(adapters(pairs), method=method, rank="full").delta("m")
        assert distance(merged.delta(module).numpy(), wanted.numpy()) < 1e-4


# --- what the papers promise ------------------------------------------------------------------------------------------


def test_stf_keeps_every_singular_response():
    x = dense(POOLS["mixed ranks"])
    merged = apply("stf", x)
    for matrix in x:
        u, s, vh = svd(matrix)
        assert_allclose(np.einsum("ik,ij,kj->k", u, merged, vh), s, rtol=1e-8)


def test_wudi_is_where_its_objective_is_flat():
    x = dense(POOLS["mixed ranks"])
    merged = apply("wudi", x, ridge=0.0)
    slope = sum((merged - t) @ t.T @ t / np.linalg.norm(t) ** 2 for t in x)
    assert np.linalg.norm(slope) < 1e-8 * np.linalg.norm(merged)


def test_wudi_goes_from_its_minimum_to_task_arithmetic():
    x = dense(POOLS["mixed ranks"])
    kappa = min(1, sum(np.linalg.norm(m) ** 2 for m in x) / np.linalg.norm(sum(x)) ** 2)
    assert distance(apply("wudi", x, ridge=1e6), kappa * sum(x)) < 1e-5
    assert distance(apply("wudi", x, ridge=1e-9), apply("wudi", x, ridge=0.0)) < 1e-5


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_all_directions_are_equally_strong(method: str):
    merged = apply(method, dense(POOLS["mixed ranks"]))
    _, s, _ = svd(merged)
    assert len(s) == 11  # 2 + 5 + 1 + 3
    assert_allclose(s, s[0], rtol=1e-8)


def test_iso_c_keeps_the_sum_of_the_singular_values():
    x = dense(POOLS["mixed ranks"])
    assert_allclose(svd(apply("iso_c", x))[1].sum(), svd(sum(x))[1].sum())


def test_orthogonal_tasks_do_not_interfere():
    """TSV-M, WUDI and STF then add up."""
    u, v = (np.linalg.qr(np.random.default_rng(i).normal(size=(12, 12)))[0] for i in (0, 1))
    x = [u[:, :3] * (3, 2, 1) @ v[:, :3].T, u[:, 3:7] * (4, 3, 2, 1) @ v[:, 3:7].T]
    for method in ("tsv", "wudi", "stf"):
        assert distance(apply(method, x), sum(x)) < 1e-8


def test_tsv_at_a_fraction_of_the_triplets_has_the_rank_of_one_adapter():
    merged = apply("tsv", dense(low_rank(4, 4)), density=0.5)
    assert len(svd(merged)[1]) == 4


def test_fr_drops_a_constant_and_keeps_a_checkerboard():
    rows, cols = np.indices((8, 6))
    checkerboard = (-1.0) ** (rows + cols)
    merged = apply("fr", [np.ones((8, 6)), 2 * checkerboard])
    assert_allclose(merged, 2 * checkerboard, atol=1e-12)
