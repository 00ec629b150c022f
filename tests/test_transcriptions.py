"""The transcriptions against the authors' code (golden tensors) and arithmetic done by hand."""

import json
from math import exp
from pathlib import Path

import numpy as np
import pytest
import transcriptions
from numpy.testing import assert_allclose, assert_array_equal
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden" / "pcb.safetensors"
FORMULAS = ("reference", "nlp", "vision", "es")


def golden_outputs() -> list[tuple[str, str]]:
    """(case, formula) of every recorded run."""
    with safe_open(GOLDEN, "numpy") as file:
        keys = [key.split(".") for key in file.keys()]  # noqa: SIM118
    return [(key[0], key[1]) for key in keys if key[-1] == "float64"]


def load(case: str, formula: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(the transcription's result, the authors' result)."""
    with safe_open(GOLDEN, "numpy") as file:
        x, weights = (
            file.get_tensor(f"{case}.{name}").astype(np.float64) for name in ("x", "weights")
        )
        authors = file.get_tensor(f"{case}.{formula}.{dtype}")
        density = json.loads(file.metadata()["golden"])["density"][case]
    assert authors.dtype == dtype
    return getattr(transcriptions, f"pcb_{formula}")(x, weights, density), authors


def test_every_code_path_is_recorded() -> None:
    assert {formula for _, formula in golden_outputs()} == set(FORMULAS)


@pytest.mark.parametrize(("case", "formula"), golden_outputs())
def test_agrees_with_the_authors_code_in_float64(case: str, formula: str) -> None:
    """Entry by entry, and exactly the same entries are zero."""
    ours, authors = load(case, formula, "float64")
    assert_array_equal(ours == 0, authors == 0)
    assert_allclose(ours, authors, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("case", "formula"), golden_outputs())
def test_agrees_with_the_authors_code_as_published_in_float32(case: str, formula: str) -> None:
    """In norm, and exactly the same entries are zero: float32 flips none at the threshold here.

    Single entries, at most 18 of a run, are off by 1e-6 to 4e-4 relative. A share is
    (score - threshold) / (max - threshold), so just above the threshold float32 loses the digits of
    the difference; that shows where several tasks keep the entry, most where they nearly cancel.
    """
    ours, authors = load(case, formula, "float32")
    assert_array_equal(ours == 0, authors == 0)
    assert np.linalg.norm(ours - authors) <= 1e-6 * np.linalg.norm(ours)


def test_ties_by_hand() -> None:
    """int(.4 * 5) = 2 entries are kept, and whatever ties with the second.

    w x, the kept in []:   [ 4]  -1   [ 3]   0     2
                            -2  [-4]   -2   [ 4]   0       (weight -2 turned the vector around)
                           [-3]   0   [ 2]   1   [ 2]      (two entries tie for the second place)
    sum of the kept:         1   -4     5    4     2
    elected:                 +    -     +    +     +
    mean of these:          4/1 -4/1  (3+2)/2 4/1  2/1
    """
    x = np.array([[4, -1, 3, 0, 2], [1, 2, 1, -2, 0], [-6, 0, 4, 2, 4]], dtype=np.float64)
    merged = transcriptions.ties(x, np.array([1.0, -2.0, 0.5]), density=0.4)
    assert_array_equal(merged, [4, -4, 2.5, 4, 2])


def test_ties_elects_nothing_where_the_kept_entries_cancel() -> None:
    """1 - 1 = 0 elects no sign; (2 + 1) / 2 = 1.5."""
    merged = transcriptions.ties(np.array([[1.0, 2.0], [-1.0, 1.0]]), np.ones(2), density=1.0)
    assert_array_equal(merged, [0, 1.5])


def test_ties_at_density_zero_keeps_nothing() -> None:
    assert_array_equal(transcriptions.ties(np.array([[1.0, 2.0]]), np.ones(1), density=0.0), [0, 0])


def test_linear_by_hand() -> None:
    """3 (1, 3) - 1 (4, 5) = (-1, 4)."""
    x = np.array([[1.0, 3.0], [4.0, 5.0]])
    assert_array_equal(transcriptions.linear(x, np.array([3.0, -1.0])), [-1, 4])


def test_pcb_paper_by_hand() -> None:
    """x_1 = (2, -1, 0, 1), x_2 = (1, 2, 0, 0); T = 2, D = 4, density 1/2, weights (2, -1).

    Norm(x_1 x_1) = Norm(4, 1, 0, 1)  = (1, 1/4, 0, 1/4)
    Norm(x_2 x_2) = Norm(1, 4, 0, 0)  = (1/4, 1, 0, 0)
    Norm(x_1 x_2) = Norm(2, -2, 0, 0) = (1, 0, 1/2, 1/2)

    intra_1 = (e^2, e^1/2, 1, e^1/2) / 11.6865      inter_11 = (e, e^1/4, 1, e^1/4) / 6.2863
    intra_2 = (e^1/2, e^2, 1, 1)     / 11.0378      inter_22 = (e^1/4, e, 1, 1)     / 6.0023
                                                    inter_12 = (e, 1, e^1/2, e^1/2) / 7.0157

    beta_1 = (.5184, .0489, .0337, .0620)   threshold sorted[2] = .0620: keeps entries 0 and 3
    beta_2 = (.0898, .3986, .0364, .0364)   threshold sorted[2] = .0898: keeps entries 0 and 1

    merged = ((.5184 * 2 * 2 - .0898 * 1) / (.5184 + .0898), -1 * 2, 0, 2 * 1) = (3.262, -2, 0, 2)
    """
    x = np.array([[2, -1, 0, 1], [1, 2, 0, 0]], dtype=np.float64)
    inter_12 = exp(1) / (exp(1) + 1 + 2 * exp(1 / 2))
    inter_11 = exp(1) / (exp(1) + 2 * exp(1 / 4) + 1)
    inter_22 = exp(1 / 4) / (exp(1 / 4) + exp(1) + 2)
    beta_1 = exp(2) / (exp(2) + 2 * exp(1 / 2) + 1) * (inter_11 + inter_12)
    beta_2 = exp(1 / 2) / (exp(1 / 2) + exp(2) + 2) * (inter_12 + inter_22)
    first = (beta_1 * 2 * 2 - beta_2 * 1) / (beta_1 + beta_2)
    assert first == pytest.approx(3.262, abs=5e-4)
    merged = transcriptions.pcb_paper(x, np.array([2.0, -1.0]), density=0.5)
    assert_allclose(merged, [first, -2, 0, 2], rtol=1e-14)
