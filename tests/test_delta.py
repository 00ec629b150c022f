"""Deltas: every view of one says the same, and what torch computes from the definition."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from pcb_peft import BaseModelError
from pcb_peft.deltas.delta import Core, Delta, Dense, Diagonal, LowRank, Rescaled
from pcb_peft.deltas.layout import CONV1D, LINEAR
from pcb_peft.deltas.linalg import Basis

OUT, IN = 7, 5


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(rows, cols):
    return torch.linalg.qr(random(rows, cols)).Q


A, B, L, R, C = random(3, IN), random(OUT, 3), orthonormal(OUT, 3), orthonormal(IN, 2), random(3, 2)
l_out, l_in = 1 + random(OUT) / 2, 1 + random(IN) / 2
W = random(OUT, IN, seed=9)

# What each kind means for W (out, in), in float64; additive kinds have a ΔW of their own, and norms and factors.
ADDITIVE = {
    "low-rank": (LowRank(A, B, 0.5), 0.5 * B.double() @ A.double()),
    "low-rank, negative scaling": (LowRank(A, B, -2.0), -2 * B.double() @ A.double()),
    "low-rank, bfloat16": (
        LowRank(A.bfloat16(), B.bfloat16(), 1.5),
        1.5 * B.bfloat16().double() @ A.bfloat16().double(),
    ),
    "core": (Core(Basis(L), C, Basis(R)), L.double() @ C.double() @ R.double().T),
    "core, float64 in the middle": (
        Core(Basis(L), C.double(), Basis(R)),
        L.double() @ C.double() @ R.double().T,
    ),
    "dense": (Dense(random(OUT, IN)), random(OUT, IN).double()),
    "dense, float64": (
        Dense(random(OUT, IN, dtype=torch.float64)),
        random(OUT, IN, dtype=torch.float64),
    ),
    "dense, wide": (Dense(random(IN, OUT)), random(IN, OUT).double()),
    "rescaled": (
        Rescaled(l_out - 1, LowRank(A, B, 0.5), lambda: W),
        (l_out.double() - 1)[:, None] * W.double() + 0.5 * B.double() @ A.double(),
    ),
}
MULTIPLICATIVE = {
    "diagonal": (Diagonal(l_out), l_out.double()[:, None] * W.double()),
    "diagonal, feed-forward": (Diagonal(l_in, feedforward=True), W.double() * l_in.double()),
    "diagonal, bfloat16": (
        Diagonal(l_out.bfloat16()),
        l_out.bfloat16().double()[:, None] * W.double(),
    ),
}
ia3_as_additive = pytest.mark.parametrize(("delta", "dense"), ADDITIVE.values(), ids=ADDITIVE)
multiplicative = pytest.mark.parametrize(
    ("delta", "changed"), MULTIPLICATIVE.values(), ids=MULTIPLICATIVE
)
every_kind = pytest.mark.parametrize(
    "delta",
    [delta for delta, _ in (ADDITIVE | MULTIPLICATIVE).values()],
    ids=ADDITIVE | MULTIPLICATIVE,
)
flips = pytest.mark.parametrize("flip", [False, True], ids=["Linear", "Conv1D"])


def flipped(delta, flip):
    return dataclasses.replace(delta, layout=CONV1D if flip else LINEAR)


def stored(weight, flip):
    return weight.T.contiguous() if flip else weight


def near(found, wanted, tolerance=1e-6):
    assert_close(found.double(), wanted.double(), rtol=0, atol=tolerance * float(wanted.norm()))


def tensors(delta):
    values = (getattr(delta, field.name) for field in dataclasses.fields(delta))
    return [value for value in values if isinstance(value, torch.Tensor)]


@ia3_as_additive
def test_the_matrix_is_the_change_in_float32_and_of_its_shape(delta, dense):
    matrix = delta.matrix()
    assert matrix.dtype == torch.float32
    assert delta.shape == matrix.shape == dense.shape
    near(matrix, dense)


@ia3_as_additive
def test_the_factors_multiply_to_the_change_in_float64(delta, dense):
    left, right = delta.factors()
    assert left.dtype == right.dtype == torch.float64
    assert left.shape[1] == right.shape[0] <= min(dense.shape)
    near(left @ right, dense)


def test_the_factors_of_a_low_rank_delta_share_the_scaling_evenly_and_the_sign_is_with_lora_b():
    left, right = LowRank(A, B, -4.0).factors()
    near(left, -2 * B)
    near(right, 2 * A)


def test_the_factors_of_a_low_rank_delta_are_exact_to_float64():
    left, right = LowRank(A, B, 0.25).factors()
    assert torch.equal(left @ right, 0.5 * B.double() @ (0.5 * A.double()))


@ia3_as_additive
def test_the_norm_is_that_of_the_change(delta, dense):
    assert delta.norm() == pytest.approx(float(dense.norm()), rel=1e-6)


@multiplicative
def test_the_norm_of_a_diagonal_is_its_distance_from_one(delta, changed):
    del changed
    assert delta.norm() == pytest.approx(float((delta.l.double() - 1).norm()), rel=1e-12)


@ia3_as_additive
def test_a_scaled_change_is_that_many_times_as_large(delta, dense):
    for weight in (2.0, -0.5, 0.0, 1.0):
        scaled = delta.scaled(weight)
        assert type(scaled) is type(delta)
        near(scaled.matrix(), weight * dense)
        left, right = scaled.factors()
        near(left @ right, weight * dense)
        assert scaled.norm() == pytest.approx(abs(weight) * float(dense.norm()), rel=1e-6)


@multiplicative
@flips
def test_a_scaled_diagonal_changes_any_weight_that_many_times_as_much(delta, changed, flip):
    for weight in (2.0, -0.5, 0.0, 1.0):
        wanted = W.double() + weight * (changed - W.double())
        found = flipped(delta, flip).scaled(weight).apply(stored(W, flip))
        near(found, stored(wanted, flip), 1e-2 if delta.l.dtype == torch.bfloat16 else 1e-6)


@every_kind
@flips
def test_zero_changes_nothing_and_is_of_the_same_kind_and_shape(delta, flip):
    zero = flipped(delta, flip).zero()
    weight = stored(W if delta.shape[0] != IN else W.T.contiguous(), flip)
    assert type(zero) is type(delta)
    assert zero.shape == delta.shape
    assert zero.layout.transposed == flip
    assert torch.equal(zero.apply(weight), weight)
    assert zero.norm() == 0
    assert dataclasses.asdict(zero).get("feedforward") == getattr(delta, "feedforward", None)


@ia3_as_additive
@flips
def test_the_delta_is_added_to_the_weight_as_it_is_stored(delta, dense, flip):
    weight = stored(random(*dense.shape, seed=9), flip)
    delta = flipped(delta, flip)
    assert delta.shape == dense.shape
    assert delta.delta().dtype == torch.float32
    near(delta.delta(), stored(dense, flip))
    near(delta.apply(weight), weight.double() + stored(dense, flip))


@multiplicative
@flips
def test_a_diagonal_scales_rows_or_columns_of_the_weight_as_it_is_stored(delta, changed, flip):
    delta, weight = flipped(delta, flip), stored(W, flip)
    near(delta.apply(weight), stored(changed, flip))
    near(delta.delta(weight), stored(changed - W.double(), flip))
    assert delta.delta(weight).dtype == torch.float32


def test_the_shape_of_a_diagonal_says_which_side_it_scales():
    assert Diagonal(l_out).shape == (OUT, 1)
    assert Diagonal(l_in, feedforward=True).shape == (1, IN)


@pytest.mark.parametrize("delta", [Diagonal(l_out), Diagonal(l_in, feedforward=True)])
@pytest.mark.parametrize("view", [Delta.matrix, Delta.factors, Delta.delta])
def test_a_diagonal_has_no_change_without_the_weight(delta, view):
    with pytest.raises(BaseModelError, match="give base_model"):
        getattr(delta, view.__name__)()


@every_kind
def test_the_weight_keeps_its_dtype_and_is_rounded_once(delta):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = (W if delta.shape[0] != IN else W.T.contiguous()).to(dtype)
        after = delta.apply(weight)
        assert after.dtype == dtype
        if isinstance(delta, Diagonal):
            l = delta.l.double()  # noqa: E741
            exact = weight.double() * (l if delta.feedforward else l[:, None])
        else:
            exact = weight.double() + delta.matrix().double()
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        slack = 4e-7 * (weight.double().abs() + exact.abs() + 1)
        assert ((after.double() - exact).abs() <= spacing / 2 + slack).all()


@every_kind
@flips
def test_nothing_is_modified(delta, flip):
    delta = flipped(delta, flip)
    weight = stored(W if delta.shape[0] != IN else W.T.contiguous(), flip)
    bias = random(weight.shape[1 if flip else 0])
    held = [weight, bias, *tensors(delta)]
    copies = [tensor.clone() for tensor in held]
    delta.apply(weight)
    delta.apply_to_bias(bias)
    delta.delta(weight)
    delta.scaled(2.0)
    delta.zero()
    delta.norm()
    assert all(map(torch.equal, held, copies))


@ia3_as_additive
def test_a_change_that_is_added_leaves_the_bias_alone(delta, dense):
    bias = random(dense.shape[0])
    assert torch.equal(delta.apply_to_bias(bias), bias)


def test_an_output_that_is_scaled_is_scaled_with_its_bias():
    """l ∘ (W x + b) = (l ∘ W) x + l ∘ b; an input that is scaled never meets the bias."""
    bias, x = random(OUT), random(IN, seed=1)
    for delta, wanted in (
        (Diagonal(l_out), l_out * (W @ x + bias)),
        (Diagonal(l_in, feedforward=True), W @ (l_in * x) + bias),
    ):
        found = delta.apply(W) @ x + delta.apply_to_bias(bias)
        near(found, wanted)
        assert delta.apply_to_bias(bias.bfloat16()).dtype == torch.bfloat16


def test_a_norm_of_low_rank_factors_needs_no_dense_matrix():
    """B (50 000, 4) and A (4, 50 000): ΔW would hold 2.5 · 10⁹ values."""
    big_B, big_A = random(50_000, 4), random(4, 50_000)
    _, r_B = torch.linalg.qr(big_B.double())
    _, r_A = torch.linalg.qr(big_A.double().T)
    assert LowRank(big_A, big_B, -3.0).norm() == pytest.approx(
        3 * float((r_B @ r_A.T).norm()), rel=1e-9
    )


def test_the_norm_of_factors_that_cancel_is_no_root_of_a_negative_number():
    lora_B = torch.cat([B, -B], dim=1)
    lora_A = torch.cat([A, A])
    norm = LowRank(lora_A, lora_B).norm()
    assert math.isfinite(norm)
    assert norm <= 1e-6 * LowRank(A, B).norm()


def test_every_kind_is_looked_at_here():
    """A new kind: add it to one of the tables above."""
    kinds, names = list(Delta.__subclasses__()), set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        names.add(kind.__name__)
    assert names == {type(delta).__name__ for delta, _ in (ADDITIVE | MULTIPLICATIVE).values()}
