"""Adapters that have directions in common: a merge with its parents, copies, other factors of one adapter."""

import numpy as np
import pytest
from helpers import Pair, adapters, low_rank

from pcb_peft import list_methods, merge_adapters
from pcb_peft.spaces.bases import shared_bases

OUT, IN, RANK = 40, 30, 4


def merge_of(factors: list[Pair]) -> Pair:
    """The factors of their sum, as a merge writes them."""
    b, a = np.hstack([b for b, _ in factors]), np.vstack([a for _, a in factors])
    u, s, vh = np.linalg.svd((b @ a).astype(np.float32), full_matrices=False)
    rank = len(a)
    return u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank])[:, None] * vh[:rank]


def regauged(pair: Pair, condition: float, seed: int = 3) -> Pair:
    rng = np.random.default_rng(seed)
    q, p = (np.linalg.qr(rng.normal(size=(RANK, RANK)))[0] for _ in range(2))
    gauge = q * np.geomspace(1, condition, RANK) @ p
    return pair[0] @ gauge, np.linalg.solve(gauge, pair[1])


A, B = low_rank(RANK, RANK, shape=(OUT, IN))
COHORTS = {
    "a merge with its parents": [A, B, merge_of([A, B])],
    "two merges of a parent": [merge_of([A, B]), merge_of([A, (-B[0], B[1])])],
    "a copy": [A, B, A],
    "other factors of one": [A, B, regauged(A, 1e3)],
}


@pytest.mark.parametrize("cohort", COHORTS)
def test_directions_that_adapters_share_are_counted_once(cohort: str):
    deltas = [adapter.modules["m"] for adapter in adapters(COHORTS[cohort])]
    bases = shared_bases([delta.factors() for delta in deltas])
    assert bases.left.shape == (OUT, 2 * RANK)
    assert bases.right.shape == (IN, 2 * RANK)
    for core, delta in zip(bases.cores, deltas, strict=True):
        restored = (bases.left @ core @ bases.right.matrix().T).float()
        assert float((restored - delta.matrix()).norm()) < 1e-4 * delta.norm()


@pytest.mark.parametrize("method", ["pcb", "linear", "ties", "tsv", "flat"])
@pytest.mark.parametrize("cohort", COHORTS)
def test_no_rank_is_written_for_rounding(cohort: str, method: str):
    merged = merge_adapters(adapters(COHORTS[cohort]), method)
    assert merged.report.modules["m"].rank <= 2 * RANK


def test_pcb_of_a_merge_with_its_parents_does_not_hang_on_the_last_bits():
    """A tiny change of the third adapter changes the merge as little."""
    exact = COHORTS["a merge with its parents"]
    other = [A, B, tuple(part * (1 + 3e-8) for part in exact[2])]
    first, second = (merge_adapters(adapters(x), "pcb").delta("m") for x in (exact, other))
    assert float((first - second).norm() / first.norm()) < 1e-4


@pytest.mark.parametrize(
    "method",
    [name for name, m in list_methods().items() if m.needs_statistic is None and m.arity is None],
)
def test_no_method_blows_up_adapters_that_were_trained_from_one_lora_a(method: str):
    """The norm of the merge stays below that of all adapters end to end."""
    for drift in (0.3, 0.1, 0.03, 0.003):
        rng = np.random.default_rng(0)
        start = rng.normal(size=(RANK, IN))
        factors = [
            (rng.normal(size=(OUT, RANK)), start + drift * rng.normal(size=(RANK, IN)))
            for _ in range(4)
        ]
        merged = merge_adapters(adapters(factors), method).delta("m").norm()
        assert float(merged) < 1.01 * sum(np.linalg.norm(b @ a) for b, a in factors)


CONTINUOUS = [
    name
    for name, m in list_methods().items()
    if m.identity_on_one and m.needs_statistic is None and m.arity is None
]


@pytest.mark.parametrize("method", CONTINUOUS)
def test_other_factors_of_an_adapter_merge_as_the_adapter_does(method: str):
    """(BG, G⁻¹A), written to float32, is the same adapter up to rounding, which grows with the condition of G."""
    for condition in (1e1, 1e3):
        plain, other = ([A, B, copy] for copy in (A, regauged(A, condition)))
        first, second = (
            merge_adapters(adapters(x), method).delta("m").numpy() for x in (plain, other)
        )
        assert np.linalg.norm(first - second) < 1e-6 * condition * np.linalg.norm(first)
