"""The spectral methods against their dense definitions, in numpy on the m×n matrices, and against laws."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from helpers import Matrix, Pair, adapter, adapters, dense, distance, low_rank, regauged
from numpy.testing import assert_allclose

from pcb_peft import get_method, merge_adapters
from pcb_peft.tasks.blocks import stacked
from pcb_peft.tasks.task_vectors import TaskVectors

ROUNDING = 1e-6  # part of the largest singular value that the methods take for 0
EQUIVARIANT = ("tsv", "iso_c", "iso_cts", "wudi", "stf")  # bases do not matter to them
METHODS = (*EQUIVARIANT, "robust_merge", "fr")


# --- the definitions --------------------------------------------------------------------------------------------------


def svd(matrix: Matrix, scale: float | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """The triplets of the numerical rank."""
    u, s, vh = np.linalg.svd(matrix)
    rank = int((s > ROUNDING * (s[0] if scale is None else scale)).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def polar(columns: Matrix) -> Matrix:
    """C (CᵀC)^{-1/2}, the inverse on the range."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    kept = values > ROUNDING**2 * values[-1]
    return columns @ (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T


def tsv(x: Sequence[Matrix], density: float = 1.0) -> Matrix:
    u, s, v = [], [], []
    for matrix in x:
        left, values, right = svd(matrix)
        count = int(np.ceil(density * len(values)))
        u.append(left[:, :count])
        s.append(values[:count])
        v.append(right[:count].T)
    return polar(np.hstack(u)) @ np.diag(np.concatenate(s)) @ polar(np.hstack(v)).T


def iso_c(x: Sequence[Matrix]) -> Matrix:
    u, s, vh = svd(sum(x))
    return s.mean() * u @ vh


def iso_cts(x: Sequence[Matrix], common: float = 0.8) -> Matrix:
    u, s, vh = svd(sum(x))
    rank = len(s)
    own = min(round((rank - int(rank * common)) / len(x)), rank // len(x))
    k = rank - own * len(x)
    left, values, right = [u[:, :k]], [s[:k]], [vh[:k].T]
    for matrix in x:
        rest = matrix - u[:, :k] @ u[:, :k].T @ matrix
        a, b, c = svd(rest, np.linalg.norm(matrix))
        left.append(a[:, :own])
        values.append(b[:own])
        right.append(c[:own].T)
    return np.concatenate(values).mean() * polar(np.hstack(left)) @ polar(np.hstack(right)).T


def wudi(x: Sequence[Matrix], ridge: float = 0.0) -> Matrix:
    """The least-norm solution of the normal equations of the objective."""
    grams = [matrix.T @ matrix / np.linalg.norm(matrix) ** 2 for matrix in x]
    left = sum(grams) + ridge * np.eye(x[0].shape[1])
    right = sum(matrix @ gram for matrix, gram in zip(x, grams, strict=True)) + ridge * sum(x)
    return np.linalg.lstsq(left, right.T, rcond=ROUNDING**2)[0].T


def stf(x: Sequence[Matrix]) -> Matrix:
    """The smallest ΔW with u_kᵀ ΔW v_k = σ_k: one linear equation in the entries of ΔW per singular triplet."""
    rows, values = [], []
    for matrix in x:
        u, s, vh = svd(matrix)
        rows += [np.outer(u[:, k], vh[k]).ravel() for k in range(len(s))]
        values += list(s)
    solution = np.linalg.lstsq(np.array(rows), np.array(values), rcond=ROUNDING)[0]
    return solution.reshape(x[0].shape)


def robust_merge(x: Sequence[Matrix], density: float = 0.2) -> Matrix:
    def largest(factor: Matrix) -> Matrix:
        count = max(1, int(density * factor.size))
        return factor * (abs(factor) >= np.sort(abs(factor).ravel())[-count])

    factors, scales = [], np.zeros((len(x), min(x[0].shape)))
    for t, matrix in enumerate(x):
        u, s, vh = svd(matrix)
        lora_A, lora_B = np.sqrt(s)[:, None] * vh, u * np.sqrt(s)
        pruned = largest(lora_A)
        for i in range(len(s)):
            if pruned[i].any():
                scales[t, i] = abs(lora_A[i]).sum() / abs(pruned[i]).sum()
        factors.append((largest(lora_B), pruned))
    total = scales.sum(0)
    return sum(
        scales[t, i] / total[i] * np.outer(lora_B[:, i], lora_A[i])
        for t, (lora_B, lora_A) in enumerate(factors)
        for i in range(len(lora_A))
        if total[i]
    )


def fr(x: Sequence[Matrix], cutoff: float = 0.1) -> Matrix:
    rows, cols = (np.fft.fftfreq(length) for length in x[0].shape)
    radius = np.sqrt(rows[:, None] ** 2 + cols**2)
    high = radius >= cutoff * np.sqrt(0.5)
    return sum(np.fft.ifft2(high * np.fft.fft2(matrix)).real for matrix in x)


DEFINITIONS: dict[str, Callable[..., Matrix]] = {
    function.__name__: function for function in (tsv, iso_c, iso_cts, wudi, stf, robust_merge, fr)
}


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
    return DEFINITIONS[method]([matrix for matrix in x if matrix.any()], **options)


# --- equal to the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("method", EQUIVARIANT)
def test_on_cores_it_equals_its_dense_definition(method: str, pool: str):
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


@pytest.mark.parametrize("pool", ["two", "wide", *HARD])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("robust_merge", {}),
        ("robust_merge", {"density": 0.05}),
        ("robust_merge", {"density": 1.0}),
        ("fr", {}),
        ("fr", {"cutoff": 0.0}),
        ("fr", {"cutoff": 0.4}),
    ],
)
def test_what_looks_at_entries_equals_its_definition_on_the_same_matrices(
    method: str, options: dict[str, float], pool: str
):
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
    assert distance(merged, fr(dense(pool))) < 1e-5


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
    merged = apply("wudi", x)
    slope = sum((merged - t) @ t.T @ t / np.linalg.norm(t) ** 2 for t in x)
    assert np.linalg.norm(slope) < 1e-8 * np.linalg.norm(merged)


def test_wudi_goes_from_its_minimum_to_task_arithmetic():
    x = dense(POOLS["mixed ranks"])
    assert distance(apply("wudi", x, ridge=1e6), sum(x)) < 1e-5
    assert distance(apply("wudi", x, ridge=1e-9), apply("wudi", x)) < 1e-5


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
