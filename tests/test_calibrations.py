"""Calibrations against their dense definitions in numpy, and compositions against the pieces applied by hand."""

from collections.abc import Sequence
from pathlib import Path

import definitions
import numpy as np
import pytest
import torch
from definitions import pico, svd
from helpers import (
    LOSSLESS,
    Matrix,
    Pair,
    adapter,
    adapters,
    delta,
    dense,
    distance,
    low_rank,
    regauged,
)
from numpy.testing import assert_allclose

from pcb_peft import OptionError, merge_adapters, read_recipe
from pcb_peft.calibrations import get_calibration, list_calibrations
from pcb_peft.commands.cli import main
from pcb_peft.deltas.delta import Core, Delta, Dense, Diagonal, LowRank
from pcb_peft.deltas.layout import CONV1D
from pcb_peft.deltas.linalg import Basis
from pcb_peft.merging.engine import merge
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.recipes.steps import in_words

BEFORE, AFTER = list_calibrations("before"), list_calibrations("after")


# --- the deltas -------------------------------------------------------------------------------------------------------


POOLS: dict[str, list[Pair]] = {
    "mixed ranks": low_rank(2, 4, 1),
    "wide": low_rank(2, 3, shape=(6, 30)),
    "more than the matrix holds": low_rank(4, 4, 4, shape=(9, 7)),
    "shared A": [(b, low_rank(3)[0][1]) for b, _ in low_rank(3, 3, seed=1)],
    "equal": [*low_rank(3), *low_rank(3)],
    "one is zero": [*low_rank(3, 2), (np.zeros((16, 1)), np.zeros((1, 12)))],
}


TOLERANCE = {"low rank": 1e-9, "scaled": 1e-9, "core": 1e-9, "dense": 1e-6}  # dense is float32


def kinds(pair: Pair) -> dict[str, Delta]:
    """The same ΔW, known in several ways."""
    product = torch.as_tensor(pair[0] @ pair[1])
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    return {
        "low rank": delta(pair, torch.float64),
        "scaled": delta(pair, torch.float64, scaling=2.5),
        "core": Core(Basis(u), torch.diag(s), Basis(vh.T)),
        "dense": Dense(product),
    }


def matrix(some: Delta) -> Matrix:
    left, right = some.factors()
    return (left @ right).numpy()


def merged(pairs: Sequence[Pair], **arguments) -> Matrix:
    return merge_adapters(adapters(pairs), **{"method": "linear", **arguments}).delta("m").numpy()


# --- equal to the definition ------------------------------------------------------------------------------------------


POOLS_AND_KINDS = [
    *((pool, "low rank") for pool in POOLS),
    *(("mixed ranks", kind) for kind in TOLERANCE if kind != "low rank"),
    ("one is zero", "dense"),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in BEFORE), ("equalize", {"beta": 0.25}), ("exponent", {"power": 0.0})],
)
def test_before(name: str, options: dict[str, float]):
    for pool, kind in POOLS_AND_KINDS:
        pairs = POOLS[pool]
        found = BEFORE[name].function([kinds(pair)[kind] for pair in pairs], **options)
        for result, wanted in zip(
            found, definitions.BEFORE[name](dense(pairs), **options), strict=True
        ):
            assert_allclose(matrix(result), wanted, rtol=0, atol=TOLERANCE[kind] * 100)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in AFTER if name not in definitions.WHOLE_MODEL),
        ("svc", {"floor": 1.0}),
        ("norm", {"strength": 1.5}),
        ("response", {"least": 0.7}),
        ("exponent", {"power": 1.5}),
    ],
)
def test_after(name: str, options: dict[str, float]):
    for pool, kind in POOLS_AND_KINDS:
        pairs = POOLS[pool]
        total = sum(dense(pairs)) + 0.3 * dense(low_rank(2, shape=dense(pairs)[0].shape, seed=7))[0]
        u, s, vh = svd(total)
        found = AFTER[name].function(
            kinds((u * s, vh))[kind], [kinds(pair)[kind] for pair in pairs], **options
        )
        wanted = definitions.AFTER[name](total, dense(pairs), **options)
        assert distance(matrix(found), wanted) < TOLERANCE[kind]


def papers_pico(pairs: Sequence[Pair]) -> list[Matrix]:
    """From the singular vectors of the stacked lora_B's."""
    u, s, _ = np.linalg.svd(np.hstack([b for b, _ in pairs]), full_matrices=False)
    alpha = 1 / (1 + (len(pairs) - 1) * s**2 / (s**2).sum())
    return [(b + u @ np.diag(alpha - 1) @ u.T @ b) @ a for b, a in pairs]


def test_pico_as_trained_is_the_papers():
    pairs = low_rank(2, 4, 3)
    found = BEFORE["pico"].function(
        [delta(pair, torch.float64) for pair in pairs], gauge="as_trained"
    )
    assert_allclose([matrix(some) for some in found], papers_pico(pairs), atol=1e-10)


def test_pico_is_the_papers_where_each_lora_a_has_orthonormal_rows():
    pairs = [(b, np.linalg.qr(a.T)[0].T) for b, a in low_rank(2, 4, 3)]
    found = BEFORE["pico"].function([delta(pair, torch.float64) for pair in pairs])
    assert_allclose([matrix(some) for some in found], papers_pico(pairs), atol=1e-10)


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BEFORE if name != "exponent"])
def test_before_a_single_adapter_is_left_alone(name: str):
    (pair,) = low_rank(3)
    alone, zero = (delta(p, torch.float64) for p in (pair, (np.zeros((16, 1)), np.zeros((1, 12)))))
    found, nothing = BEFORE[name].function([alone, zero])
    assert_allclose(matrix(found), matrix(alone), atol=1e-12)
    assert not matrix(nothing).any()


@pytest.mark.parametrize("name", [name for name in AFTER if name != "exponent"])
def test_after_a_single_adapter_is_left_alone(name: str):
    pairs = low_rank(3)
    assert distance(merged(pairs, after=name), dense(pairs)[0]) < 1e-6


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_exponent_1_changes_nothing_and_0_is_iso_c(when: str):
    pairs = POOLS["mixed ranks"]
    same = merged(pairs, **{when: {"exponent": {"power": 1.0}}})
    assert distance(same, sum(dense(pairs))) < 1e-6
    flat = merged(pairs, after={"exponent": {"power": 0.0}})
    assert distance(flat, merged(pairs, method="iso_c")) < 1e-5


@pytest.mark.parametrize(
    "steps", [*({"before": name} for name in BEFORE), *({"after": name} for name in AFTER)], ids=str
)
def test_equal_weights_scale_the_result(steps: dict[str, str]):
    for factor in (2.0, 1e-4):
        pairs = POOLS["mixed ranks"]
        scaled = merged(pairs, weights=[factor] * 3, **steps)
        assert distance(scaled, factor * merged(pairs, **steps)) < 1e-5


@pytest.mark.parametrize(
    "steps", [*({"before": name} for name in BEFORE), *({"after": name} for name in AFTER)], ids=str
)
def test_neither_factors_nor_order_matter(steps: dict[str, str]):
    pairs = POOLS["mixed ranks"]
    wanted = merged(pairs, **steps)
    assert distance(merged([regauged(pair) for pair in pairs], **steps), wanted) < 1e-5
    assert distance(merged(pairs[::-1], **steps), wanted) < 1e-5


def test_where_nothing_is_merged_nothing_comes_out():
    for steps in [*({"before": name} for name in BEFORE), *({"after": name} for name in AFTER)]:
        pairs = [(np.zeros((5, 2)), np.ones((2, 4)))] * 2
        assert not merged(pairs, **steps).any()


def test_svc_leaves_adapters_that_take_each_other_back():
    (pair,) = low_rank(3)
    found = merged([pair, (-pair[0], pair[1])], after="svc")
    assert np.linalg.norm(found) < 1e-12 * np.linalg.norm(dense([pair])[0])


def test_svc_takes_back_what_was_counted_twice():
    """Of T equal adapters their sum is T times each."""
    pairs = low_rank(3) * 4
    assert distance(merged(pairs, after="svc"), dense(pairs)[0]) < 1e-5


@pytest.mark.parametrize("least", [0.0, 0.7])
@pytest.mark.parametrize("per", ["module", "model"])
@pytest.mark.parametrize("method", ["linear", "tsv", "wudi", "stf"])
def test_copies_of_one_adapter_come_back_at_the_right_response(method: str, per: str, least: float):
    pairs = low_rank(3) * 4
    found = merged(pairs, method=method, after={"response": {"per": per, "least": least}})
    assert distance(found, dense(pairs)[0]) < 1e-5


def test_copies_of_one_vector_come_back_at_the_right_response():
    some = adapters([Diagonal(torch.tensor([1.0, 2.0, 3.0]))] * 3)
    for method, options in (("linear", {}), ("ties", {"density": 1.0})):
        found = merge_adapters(some, method=method, after="response", **options).modules["m"]
        assert isinstance(found, Diagonal)
        assert_allclose(found.l, [1.0, 2.0, 3.0], rtol=1e-6)


def test_a_merge_without_a_response_is_left_as_it_is():
    first, second = (
        delta((np.eye(3)[:, :1], np.eye(3)[:1])),
        delta((np.eye(3)[:, 1:2], np.eye(3)[:1])),
    )
    assert AFTER["response"].function(first, [second]) is first


def test_svc_does_not_care_about_the_scale_of_what_it_calibrates():
    """Above its floor: σ_r is divided by shares that grow with it."""
    pairs = [(b, abs(a)) for b, a in [(abs(b), a) for b, a in low_rank(1, 1, 1)]]
    few = [delta(pair, torch.float64) for pair in pairs]
    total = Dense(torch.as_tensor(sum(dense(pairs))))
    one, two = (matrix(AFTER["svc"].function(t, few)) for t in (total, total.scaled(2.0)))
    u, s, vh = svd(one)
    assert_allclose(u[:, 0] @ two @ vh[0], s[0], rtol=1e-8)


def test_vectors_have_norms():
    some = [Diagonal(torch.tensor(values)) for values in ([2.0, 1.0], [1.0, 5.0])]
    assert [delta.norm() for delta in BEFORE["equalize"].function(some)] == pytest.approx([2.5] * 2)
    total = Diagonal(torch.tensor([2.0, 5.0]))
    assert AFTER["norm"].function(total, some).norm() == pytest.approx(2.5)


# --- the whole model --------------------------------------------------------------------------------------------------

MODEL = [
    adapter("a", {"m": low_rank(2, seed=1)[0], "n": low_rank(3, seed=2)[0]}),
    adapter("b", {"m": low_rank(1, seed=3)[0], "o": low_rank(2, seed=4)[0]}),
]


@pytest.mark.parametrize("rank", [None, "full"])
@pytest.mark.parametrize("method", ["linear", "iso_c"])
def test_amplitude_is_one_factor_for_the_whole_model(method: str, rank: str | None):
    plain = merge_adapters(MODEL, method=method)
    found = merge_adapters(MODEL, method=method, rank=rank, after={"amplitude": {"strength": 1.15}})
    tasks = [[a.delta(module).numpy() for module in a.modules] for a in MODEL]
    merged = [plain.delta(module).numpy() for module in plain.modules]
    for module, wanted in zip(
        plain.modules, definitions.amplitude(merged, tasks, 1.15), strict=True
    ):
        assert distance(found.delta(module).numpy(), wanted) < 1e-5


def test_norm_is_a_factor_for_each_module():
    found = merge_adapters(MODEL, method="linear", after="norm")
    sizes = [a.modules["m"].norm() for a in MODEL]
    assert found.modules["m"].norm() == pytest.approx(np.mean(sizes), rel=1e-5)
    assert found.modules["o"].norm() == pytest.approx(MODEL[1].modules["o"].norm(), rel=1e-5)


def test_response_per_model_is_one_factor_for_the_whole_model():
    plain = merge_adapters(MODEL, method="iso_c")
    found = merge_adapters(MODEL, method="iso_c", after={"response": {"per": "model"}})
    whole = [
        {m: a.delta(m).numpy() if m in a.modules else 0 * plain.delta(m).numpy() for m in "mno"}
        for a in (*MODEL, plain)
    ]
    *tasks, total = [np.concatenate([x[m].ravel() for m in "mno"]) for x in whole]
    wanted = definitions.response(total, tasks)
    result = np.concatenate([found.delta(m).numpy().ravel() for m in "mno"])
    assert distance(result, wanted) < 1e-5


# --- compositions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", LOSSLESS)
@pytest.mark.parametrize("method", ["linear", "pcb"])
def test_a_composition_is_its_pieces_by_hand(method: str, space: str):
    pairs, weights = POOLS["mixed ranks"], [1.0, 0.5, 2.0]
    before = [{"exponent": {"power": 0.7}}, "pico"]
    after = ["svc", {"norm": {"strength": 1.2}}]
    given = {"method": method, "space": space, "scope": "module", "rank": "full"}
    found = merged(pairs, weights=weights, before=before, after=after, **given)

    deltas: Sequence[Delta] = [delta(pair) for pair in pairs]
    bent = BEFORE["pico"].function(BEFORE["exponent"].function(deltas, power=0.7))
    between = []
    for some in bent:
        lora_B, lora_A = some.factors()
        between.append(LowRank(lora_A.float(), lora_B.float()))
    middle = Dense(merge_adapters(adapters(between), weights=weights, **given).delta("m").double())
    own = [some.scaled(weight) for some, weight in zip(deltas, weights, strict=True)]
    wanted = AFTER["norm"].function(AFTER["svc"].function(middle, own), own, strength=1.2)
    assert distance(found, wanted.matrix().numpy()) < 1e-4


def test_the_scope_does_not_matter_to_what_calibrations_see():
    given = {"method": "linear", "before": "pico", "after": ["svc", "amplitude"]}
    one, other = (merge_adapters(MODEL, scope=scope, **given) for scope in ("module", "global"))
    for module in one.modules:
        assert distance(one.delta(module).numpy(), other.delta(module).numpy()) < 1e-6


def test_pico_as_published_is_pico_before_and_norm_after():
    pairs = POOLS["mixed ranks"]
    total = sum(pico(dense(pairs)))
    wanted = total * np.mean([np.linalg.norm(x) for x in dense(pairs)]) / np.linalg.norm(total)
    assert distance(merged(pairs, before="pico", after="norm"), wanted) < 1e-5


def test_conv1d_stays_conv1d():
    pairs = low_rank(2, 3)
    flipped = [LowRank(d.lora_A, d.lora_B, layout=CONV1D) for d in map(delta, pairs)]
    given = {"before": list(BEFORE), "after": list(AFTER)}
    found = merge_adapters(adapters(flipped), method="linear", **given).delta("m").numpy()
    assert distance(found.T, merged(pairs, **given)) < 1e-5


# --- recipe and command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["svc", ["svc"], ("svc",), {"svc": {}}, [{"svc": None}], [{"svc": {"floor": None}}]]
)
def test_a_calibration_can_be_written_in_several_ways(given):
    result = merge_adapters(adapters(POOLS["mixed ranks"]), method="linear", after=given)
    assert result.recipe.after == ({"svc": {"floor": None}},)


def test_no_calibration_leaves_no_trace():
    recipe = merge_adapters(adapters(low_rank(2, 2)), method="linear").recipe
    assert (recipe.before, recipe.after) == ((), ())
    assert "before" not in recipe.to_yaml()


def test_the_recipe_says_all_and_makes_the_same_again(tmp_path: Path):
    some = adapters(POOLS["mixed ranks"])
    steps = {"before": ["equalize", {"exponent": {"power": 0.3}}], "after": ["svc", "amplitude"]}
    first = merge_adapters(some, method="tsv", **steps)
    path = tmp_path / "recipe.yaml"
    path.write_text(first.recipe.to_yaml())
    again = read_recipe(path)
    assert again == first.recipe
    assert again.before == ({"equalize": {"beta": 0.0}}, {"exponent": {"power": 0.3}})
    assert torch.equal(merge(again, some).delta("m"), first.delta("m"))
    assert in_words(again.before) == "equalize (beta=0.0), exponent (power=0.3)"
    first.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| before | equalize (beta=0.0), exponent (power=0.3) |" in card
    assert "| after | svc, amplitude (strength=1.0) |" in card


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"before": "svc"}, "before: no calibration 'svc'"),
        ({"after": "pico"}, "after: no calibration 'pico'"),
        ({"after": "svd"}, "did you mean 'svc'"),
        ({"after": {"svc": {"flor": 1}}}, "did you mean 'floor'"),
        ({"after": {"svc": {"floor": 2.0}}}, "it must be a number in"),
        ({"after": [1]}, "1 is not a calibration"),
        ({"after": {"svc": 1}}, "is not a calibration"),
        ({"after": [{"svc": {}, "norm": {}}]}, "is not a calibration"),
    ],
)
def test_a_mistake_is_named(steps: dict, message: str):
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        merge_adapters(adapters(low_rank(2, 2)), method="linear", **steps)


def test_what_needs_directions_refuses_vectors():
    some = adapters([Diagonal(torch.tensor([1.0, 2.0, 3.0]))] * 2)
    with pytest.raises(OptionError, match=r"svc cannot take \(IA\)³ adapters; it takes LoRA"):
        merge_adapters(some, method="linear", after="svc")
    merge_adapters(some, method="linear", before="equalize", after=["norm", "amplitude"])


def test_the_command_line(workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["up"])
    paths = [str(path) for path in workshop.adapters("mlp", [config, config])]
    words = ["merge", *paths, "-o", str(tmp_path / "out"), "--method", "linear"]
    words += ["--before", "equalize:beta=0.5", "--after", "svc", "exponent:power=0.25"]
    assert main(words) == 0, capsys.readouterr().err
    recipe = read_recipe(tmp_path / "out" / "merge_recipe.yaml")
    assert recipe.before == ({"equalize": {"beta": 0.5}},)
    assert recipe.after == ({"svc": {"floor": None}}, {"exponent": {"power": 0.25}})


@pytest.mark.parametrize("name", sorted({*BEFORE, *AFTER}))
def test_the_command_line_explains_calibrations(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["methods", name]) == 0
    assert "Source: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "calibration", [*BEFORE.values(), *AFTER.values()], ids=lambda some: some.function.__name__
)
def test_every_option_is_explained(calibration):
    assert "Source:" in (calibration.function.__doc__ or "")
    assert all(option.explanation for option in calibration.options.values())


def test_get_calibration_knows_both_shelves():
    assert get_calibration("before", "pico").name == "pico"
    with pytest.raises(OptionError, match="there are amplitude"):
        get_calibration("after", "nothing")


def test_a_recipe_normalizes_its_steps():
    source = merge_adapters(adapters(low_rank(1, 1)), method="linear").recipe.adapters
    assert Recipe.parse(adapters=source, after=["svc"]).after == ({"svc": {}},)
