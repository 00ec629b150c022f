"""Decompositions and truncation, against numpy's SVD of the dense matrix."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from pcb_peft import OptionError
from pcb_peft.deltas import rank
from pcb_peft.deltas.delta import Core, Dense, LowRank
from pcb_peft.deltas.layout import CONV1D, LINEAR
from pcb_peft.deltas.linalg import Basis, column_signs, leading_svd, spanned, svd
from pcb_peft.deltas.rank import balanced, decompose, truncate
from pcb_peft.deltas.rank_choice import (
    EnergyFraction,
    FixedRank,
    Full,
    Lossless,
    NetUtility,
    RankBudget,
    parse_rank,
)

DTYPES = {torch.float32: 2e-6, torch.float64: 1e-12}  # and how exact a decomposition is
SHAPES = [(1, 1), (1, 9), (9, 1), (12, 12), (40, 12), (12, 40), (30, 20), (20, 30)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape)).to(dtype)


def orthonormal(rows, cols, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, cols)))[0]


def with_spectrum(rows, cols, sigma, seed=0):
    """A matrix of these singular values."""
    left, right = orthonormal(rows, len(sigma), seed), orthonormal(cols, len(sigma), seed + 1)
    return left * sigma @ right.T


def is_orthonormal(columns, tolerance):
    gram = columns.T.double() @ columns.double()
    return torch.allclose(gram, torch.eye(len(gram)).double(), rtol=0, atol=tolerance)


def distance(found, wanted):
    """‖found − wanted‖ / ‖wanted‖."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def best(matrix, count):
    """The closest matrix of that rank (Eckart and Young), and the energy that it retains."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :count] * s[:count] @ vh[:count], (s[:count] ** 2).sum() / (s**2).sum()


def low_rank(out, in_, r, seed=0, scaling=1.0, dtype=torch.float32):
    lora_A, lora_B = random(r, in_, seed=seed), random(out, r, seed=seed + 1)
    return LowRank(lora_A.to(dtype), lora_B.to(dtype), scaling)


def dense_of(delta):
    """ΔW in numpy's float64, from the definition of each kind."""
    if isinstance(delta, LowRank):
        return delta.scaling * (delta.lora_B.double().numpy() @ delta.lora_A.double().numpy())
    if isinstance(delta, Core):
        return (delta.left.matrix() @ delta.core.double() @ delta.right.matrix().T).numpy()
    return delta.values.double().numpy()


DELTAS = {
    "low-rank": low_rank(30, 20, 5),
    "low-rank, negative scaling": low_rank(20, 30, 5, scaling=-2.5),
    "low-rank, bfloat16": low_rank(20, 30, 5, dtype=torch.bfloat16),
    "rank above the dimensions": low_rank(6, 9, 14),
    "repeated directions": LowRank(random(2, 20).repeat(3, 1), random(30, 6)),
    "core": Core(
        Basis(torch.as_tensor(orthonormal(30, 6)).float()),
        random(6, 4),
        Basis(torch.as_tensor(orthonormal(20, 4)).float()),
    ),
    "dense": Dense(random(30, 20, dtype=torch.float32)),
    "dense, float64": Dense(random(20, 30)),
    "one row": low_rank(1, 20, 3),
    "one column": low_rank(20, 1, 3),
}
deltas = pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_thin_ordered_and_exact(shape, dtype):
    matrix = random(*shape, dtype=dtype)
    u, s, vh = svd(matrix)
    assert (u.shape[1], s.shape, vh.shape[0]) == (min(shape), (min(shape),), min(shape))
    assert {u.dtype, s.dtype, vh.dtype} == {dtype}
    assert is_orthonormal(u, 10 * DTYPES[dtype])
    assert is_orthonormal(vh.T, 10 * DTYPES[dtype])
    wanted = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert_allclose(s.double(), wanted, rtol=0, atol=DTYPES[dtype] * wanted[0])
    assert distance(u * s @ vh, matrix) < DTYPES[dtype]


def columns_of_condition(number):
    """Of length 1, and depending on each other ever more."""
    columns = with_spectrum(60, 12, np.geomspace(1, 1 / number, 12))
    return torch.as_tensor(columns / np.linalg.norm(columns, axis=0))


COLUMNS = {  # and whether they may stay as they are
    "random": (random(40, 12), True),
    "one": (random(40, 1), True),
    "of very different lengths": (random(40, 12) * torch.logspace(-9, 9, 12).double(), True),
    "near to each other": (columns_of_condition(1e3), True),
    "too near to each other": (columns_of_condition(1e7), False),
    "one of them zero": (random(40, 12) * torch.arange(12), False),
    "all zero": (torch.zeros(9, 3).double(), False),
    "twice the same": (torch.cat([random(40, 4)] * 2, dim=1), False),
    "more than rows": (random(12, 40), False),
}


@pytest.mark.parametrize(("columns", "stay"), COLUMNS.values(), ids=COLUMNS)
def test_what_columns_span_has_an_orthonormal_basis_and_gives_them_again(columns, stay):
    given = columns.clone()
    basis, coordinates = spanned(columns)
    assert (basis.columns is columns) == stay
    assert is_orthonormal(basis.matrix(), 1e-7)
    again = basis @ coordinates
    lengths = torch.where(given.any(0), given.norm(dim=0), 1)
    assert_allclose(again / lengths, given / lengths, rtol=0, atol=1e-12)
    assert torch.equal(columns, given)


@pytest.mark.parametrize("change", [random(4, 3), None], ids=["changed", "as it is"])
def test_what_is_multiplied_with_a_basis_is_multiplied_with_its_matrix(change):
    basis = Basis(random(9, 4), change)
    matrix = basis.columns if change is None else basis.columns @ change
    small, rotation, tall = random(matrix.shape[1], 2), random(matrix.shape[1], 2), random(9, 5)
    assert basis.shape == matrix.shape
    assert_allclose(basis.matrix(), matrix, rtol=1e-12)
    assert_allclose(basis @ small, matrix @ small, rtol=1e-12)
    assert_allclose(basis.across(small.T), small.T @ matrix.T, rtol=1e-12)
    assert_allclose(basis.coordinates(tall), matrix.T @ tall, rtol=1e-12)
    assert_allclose(basis.turned(rotation).matrix(), matrix @ rotation, rtol=1e-12)


@pytest.mark.parametrize("shape", [(9, 3), (3, 9), (5, 5)])
def test_svd_of_zero_is_zero(shape):
    u, s, vh = svd(torch.zeros(*shape))
    assert torch.isfinite(u).all()
    assert torch.isfinite(vh).all()
    assert not s.any()


def test_column_signs_look_at_the_entry_of_largest_magnitude():
    columns = torch.tensor([[1.0, -3.0, 0.0], [-2.0, 2.0, 0.0]])
    assert column_signs(columns).tolist() == [-1, -1, 1]


SPECTRA = {
    "flat": np.ones(140),
    "noise": np.linalg.svd(np.random.default_rng(9).normal(size=(160, 140)), compute_uv=False),
    "decaying slowly": 1 / np.sqrt(np.arange(1, 141)),
    "decaying fast": 0.9 ** np.arange(140),
    "a cliff": np.where(np.arange(140) < 16, 1.0, 1e-4),
}
spectra = pytest.mark.parametrize("sigma", SPECTRA.values(), ids=SPECTRA)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(160, 140), (140, 160)], ids=["tall", "wide"])
@spectra
def test_the_randomised_svd_retains_the_energy_of_the_exact_one_within_a_percent(
    sigma, shape, dtype
):
    matrix = torch.as_tensor(with_spectrum(*shape, sigma)).to(dtype)
    u, s, vh = leading_svd(matrix, 16)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], 16), (16,), (16, shape[1]))
    assert is_orthonormal(u, 1e-5)
    assert is_orthonormal(vh.T, 1e-5)
    lost = distance(u * s @ vh, matrix) ** 2
    assert 1 - lost >= 0.99 * (sigma[:16] ** 2).sum() / (sigma**2).sum()


def test_the_randomised_svd_is_exact_where_the_rank_is_what_it_was_asked_for():
    matrix = torch.as_tensor(with_spectrum(200, 150, np.linspace(3, 1, 10)))
    u, s, vh = leading_svd(matrix, 10)
    assert distance(u * s @ vh, matrix) < 1e-12
    assert_allclose(s, np.linspace(3, 1, 10), rtol=1e-12)


def test_the_randomised_svd_gives_the_same_bytes_each_time_and_leaves_the_global_generator_alone():
    matrix = random(200, 150, dtype=torch.float32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = leading_svd(matrix, 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(map(torch.equal, first, leading_svd(matrix, 20)))


@deltas
def test_decompose_is_exact_and_its_bases_are_orthonormal(delta):
    left, middle, right = decompose(delta)
    product = middle.double()
    if left is not None:
        assert is_orthonormal(left.matrix(), 1e-6)
        product = left @ product
    if right is not None:
        assert is_orthonormal(right.matrix(), 1e-6)
        product = right.across(product)
    assert distance(product, dense_of(delta)) < 1e-6


@deltas
def test_balanced_factors_share_the_singular_values_evenly(delta):
    lora_A, lora_B = balanced(delta)
    dense = dense_of(delta)
    assert distance(lora_B @ lora_A, dense) < 1e-6
    root = np.sqrt(np.linalg.svd(dense, compute_uv=False))
    for gram in (lora_B.T @ lora_B, lora_A @ lora_A.T):
        wanted = np.zeros(len(gram))
        wanted[: len(root)] = (root[: len(gram)]) ** 2
        assert_allclose(gram, np.diag(wanted), rtol=0, atol=1e-5 * wanted[0])
    largest = lora_B[lora_B.abs().argmax(0), torch.arange(lora_B.shape[1])]
    noise = 1e-6 * float(lora_B.abs().max())
    assert (largest[lora_B.abs().amax(0) > noise] > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_balanced_factors_do_not_depend_on_the_gauge(seed):
    delta = low_rank(30, 20, 5, scaling=0.5, dtype=torch.float64)
    gauge = random(5, 5, seed=seed) + 3 * torch.eye(5)
    other = LowRank(
        torch.linalg.inv(gauge) @ delta.lora_A, 4 * delta.lora_B @ gauge, delta.scaling / 4
    )
    for one, two in zip(balanced(delta), balanced(other), strict=True):
        assert_allclose(one, two, rtol=0, atol=1e-10)


@deltas
def test_truncation_to_a_rank_is_optimal(delta):
    for count in (1, 2, 4, 100):
        found, energy = truncate(delta, FixedRank(count))
        wanted, wanted_energy = best(dense_of(delta), count)
        assert distance(dense_of(found), wanted) < 3e-6
        assert energy == pytest.approx(wanted_energy, abs=1e-6)
        assert energy <= 1
        assert found.rank <= count
        assert {found.lora_A.dtype, found.lora_B.dtype} == {torch.float32}
        assert found.scaling == 1


@deltas
def test_truncation_to_an_energy_keeps_the_fewest_directions_that_hold_it(delta):
    for part in (0.01, 0.5, 0.9, 0.999):
        found, energy = truncate(delta, EnergyFraction(part))
        s = np.linalg.svd(dense_of(delta), compute_uv=False)
        energies = (s**2).cumsum() / (s**2).sum()
        assert found.rank == 1 + (energies < part).sum()
        assert energy == pytest.approx(energies[found.rank - 1], abs=1e-6)
        assert energy >= part


@deltas
def test_truncation_to_no_rank_drops_nothing_but_rounding(delta):
    found, energy = truncate(delta, Lossless())
    dense = dense_of(delta)
    assert found.rank == np.linalg.matrix_rank(dense, tol=1e-5 * np.linalg.norm(dense, 2))
    assert distance(dense_of(found), dense) < 3e-6
    assert energy == pytest.approx(1, abs=1e-6)


@deltas
def test_truncated_factors_are_balanced(delta):
    found, _ = truncate(delta, FixedRank(3))
    gram_A, gram_B = found.lora_A @ found.lora_A.T, found.lora_B.T @ found.lora_B
    assert_allclose(gram_A, gram_B, rtol=0, atol=1e-5 * float(gram_A.max()))


def test_truncation_cuts_the_noise_of_the_precision_it_computes_in():
    """σ = 1, 1e-3, 1e-8: the last is rounding in float32 and a direction like any other in float64."""
    matrix = torch.as_tensor(with_spectrum(20, 15, np.array([1, 1e-3, 1e-8])))
    assert truncate(Dense(matrix), Lossless())[0].rank == 3
    assert truncate(Dense(matrix.float()), Lossless())[0].rank == 2


@pytest.mark.parametrize("rank", [None, 1, 3, 0.5])
@pytest.mark.parametrize(
    "delta",
    [
        LowRank(random(3, 9), torch.zeros(7, 3)),
        Dense(torch.zeros(7, 9)),
        Core(Basis(random(7, 2)), torch.zeros(2, 2), Basis(random(9, 2))),
    ],
    ids=["low-rank", "dense", "core"],
)
def test_zero_stays_zero(delta, rank):
    found, energy = truncate(delta, parse_rank(rank))
    assert found.shape == (7, 9)
    assert found.rank == 1
    assert not found.matrix().any()
    assert torch.isfinite(found.lora_A).all()
    assert torch.isfinite(found.lora_B).all()
    assert energy == 1


@pytest.mark.parametrize("delta", [low_rank(9, 7, 3), Dense(random(9, 7))], ids=["low", "dense"])
def test_truncation_keeps_the_way_in_which_w_is_stored(delta):
    flipped = dataclasses.replace(delta, layout=CONV1D)
    assert truncate(flipped, FixedRank(2))[0].layout == CONV1D
    assert truncate(delta, FixedRank(2))[0].layout == LINEAR
    assert truncate(flipped, FixedRank(2))[0].delta().shape == (7, 9)


def test_inputs_are_not_modified():
    for delta in DELTAS.values():
        before = dense_of(delta).copy()
        truncate(delta, FixedRank(2))
        balanced(delta)
        assert np.array_equal(dense_of(delta), before)


@pytest.fixture
def randomised(monkeypatch):
    """Takes the way of large matrices from 100 rows and columns on; counts how often."""
    calls = []

    def spy(matrix, count):
        calls.append(count)
        return leading_svd(matrix, count)

    monkeypatch.setattr(rank, "EXACT_SIZE", 100)
    monkeypatch.setattr(rank, "leading_svd", spy)
    return calls


@spectra
def test_large_matrices_are_truncated_close_to_optimally(randomised, sigma):
    matrix = with_spectrum(160, 140, sigma)
    found, energy = truncate(Dense(torch.as_tensor(matrix).float()), FixedRank(16))
    optimum = (sigma[:16] ** 2).sum() / (sigma**2).sum()
    assert randomised == [16]
    assert found.rank == 16
    assert 0.99 * optimum <= energy <= optimum + 1e-6
    assert energy == pytest.approx(1 - distance(dense_of(found), matrix) ** 2, abs=1e-5)
    again, _ = truncate(Dense(torch.as_tensor(matrix).float()), FixedRank(16))
    assert torch.equal(found.lora_A, again.lora_A)
    assert torch.equal(found.lora_B, again.lora_B)


@pytest.mark.parametrize("part", [0.3, 0.5, 0.7])
def test_a_little_energy_of_a_large_matrix_takes_its_leading_directions_only(randomised, part):
    sigma = SPECTRA["decaying slowly"]
    found, energy = truncate(
        Dense(torch.as_tensor(with_spectrum(160, 140, sigma)).float()), parse_rank(part)
    )
    energies = (sigma**2).cumsum() / (sigma**2).sum()
    optimum = 1 + (energies < part).sum()
    assert randomised == [32]
    assert optimum <= found.rank <= optimum + 1
    assert part <= energy <= energies[found.rank - 1] + 1e-5


@pytest.mark.parametrize("part", [35, 120, 0.9999])
def test_large_matrices_are_decomposed_in_full_for_a_high_rank_or_much_energy(randomised, part):
    sigma = SPECTRA["decaying slowly"]
    found, energy = truncate(
        Dense(torch.as_tensor(with_spectrum(160, 140, sigma)).float()), parse_rank(part)
    )
    energies = (sigma**2).cumsum() / (sigma**2).sum()
    count = part if isinstance(part, int) else 1 + (energies < part).sum()
    assert randomised == ([] if isinstance(part, int) else [32])
    assert found.rank == count
    assert energy == pytest.approx(energies[count - 1], abs=1e-5)


def test_factors_are_never_decomposed_at_random(randomised):
    """Their middle is as small as their rank, and however large W is they are truncated optimally."""
    delta = low_rank(500, 400, 30)
    assert distance(dense_of(truncate(delta, FixedRank(4))[0]), best(dense_of(delta), 4)[0]) < 3e-6
    assert not randomised


RANKS = {
    None: Lossless(),
    1: FixedRank(1),
    64: FixedRank(64),
    0.5: EnergyFraction(0.5),
    0.999: EnergyFraction(0.999),
    "budget:200": RankBudget(200),
    "utility:7": NetUtility(7),
    "full": Full(),
}


@pytest.mark.parametrize(("given", "choice"), RANKS.items())
def test_a_rank_is_parsed_once_and_said_as_it_was_given(given, choice):
    assert parse_rank(given) == choice
    assert parse_rank(choice) == choice
    assert choice.as_given == given


@pytest.mark.parametrize(
    "value", [0, -3, 0.0, 1.0, 1.5, True, "half", float("nan"), "8", "budget:0", "budget:x", []]
)
def test_what_is_no_rank_is_refused_with_its_value(value):
    message = f"rank is {value!r}; it must be an integer from 1"
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_rank(value)
