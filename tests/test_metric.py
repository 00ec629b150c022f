"""Metrics against their dense definitions in numpy, and what is measured of a base model against a plain loop."""

from pathlib import Path

import definitions
import numpy as np
import peft
import pytest
import torch
from helpers import Matrix, Pair, adapter, adapters, distance, low_rank
from numpy.testing import assert_allclose

from pcb_peft import OptionError, TaskStatistics, merge, merge_adapters, read_recipe
from pcb_peft.data.moments import measure_moments, moments_of, open_moments, save_moments
from pcb_peft.deltas.delta import Core, Dense, LowRank
from pcb_peft.deltas.linalg import Basis
from pcb_peft.deltas.metric import Moments, metric_of
from pcb_peft.deltas.rank import truncate
from pcb_peft.deltas.rank_choice import FixedRank
from pcb_peft.errors import MismatchError
from pcb_peft.runtime.progress import tracker

OUT, IN = 18, 14
pytestmark = pytest.mark.filterwarnings("ignore:the merged adapter retains")


def inputs(count: int = 200) -> Matrix:
    rng = np.random.default_rng(7)
    return (
        rng.normal(size=(count, IN)) @ np.diag(np.geomspace(3, 0.1, IN)) @ rng.normal(size=(IN, IN))
    )


def powers(moments: Matrix, power: float = 0.25, ridge: float = 0.05) -> tuple[Matrix, Matrix]:
    """P and its inverse."""
    moments = moments / (np.trace(moments) / len(moments)) + ridge * np.eye(len(moments))
    values, vectors = np.linalg.eigh(moments)
    return tuple(vectors * values**p @ vectors.T for p in (power, -power))


def pairs(*ranks: int) -> list[Pair]:
    return low_rank(*ranks, shape=(OUT, IN))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "moments.safetensors"
    save_moments({"m": moments_of(torch.as_tensor(inputs()))}, path)
    return str(path)


def merged(factors: list[Pair], method: str, file: str, **arguments) -> Matrix:
    return merge_adapters(adapters(factors), method, metric=file, **arguments).delta("m").numpy()


def flat(tasks: list[Matrix], P: Matrix, inverse: Matrix, rank: int | None) -> Matrix:
    changed = [task @ P for task in tasks]
    plain = definitions.flat(changed) if rank is None else definitions.flat_of_rank(changed, rank)
    return plain @ inverse


@pytest.mark.parametrize("space", ["core", "knots", "dense"])
@pytest.mark.parametrize("rank", [None, 3])
def test_flat_in_a_metric_is_its_dense_definition(space: str, rank: int | None, file: str):
    factors = pairs(2, 3, 2)
    x = inputs()
    wanted = flat([b @ a for b, a in factors], *powers(x.T @ x / len(x)), rank)
    assert distance(merged(factors, "flat", file, space=space, rank=rank), wanted) < 1e-5


def test_a_rank_in_a_metric_is_reduced_rank_regression():
    """With the full whitening it is the best answer of that rank to the inputs: Izenman 1975."""
    factors, x = pairs(3, 3), inputs()
    total = sum(b @ a for b, a in factors)
    P, inverse = powers(x.T @ x / len(x), power=0.5, ridge=0.0)
    u, s, vh = np.linalg.svd(total @ P, full_matrices=False)
    best = u[:, :2] * s[:2] @ vh[:2] @ inverse
    metric = metric_of(moments_of(torch.as_tensor(x)), power=0.5, ridge=0.0)
    cut, _ = truncate(metric.enter(Dense(torch.as_tensor(total))), FixedRank(2))
    result = metric.leave(cut).matrix().numpy()
    assert distance(result, best) < 1e-5
    errors = [np.linalg.norm((some - total) @ x.T) for some in (result, truncated(total, 2))]
    assert errors[0] < errors[1]


def truncated(matrix: Matrix, rank: int) -> Matrix:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def test_a_rank_of_linear_is_chosen_in_the_metric(file: str):
    factors, x = pairs(3, 3), inputs()
    P, inverse = powers(x.T @ x / len(x))
    wanted = truncated(sum(b @ a for b, a in factors) @ P, 2) @ inverse
    assert distance(merged(factors, "linear", file, rank=2), wanted) < 1e-5


@pytest.mark.parametrize("space", ["core", "knots", "dense"])
def test_a_sum_is_a_sum_in_any_metric(space: str, file: str):
    factors = pairs(2, 3)
    wanted = sum(b @ a for b, a in factors)
    assert distance(merged(factors, "linear", file, space=space), wanted) < 1e-6


@pytest.mark.parametrize("method", ["flat", "pcb", "tsv", "iso_c"])
def test_one_adapter_comes_back(method: str, file: str):
    ((b, a),) = pairs(3)
    assert distance(merged([(b, a)], method, file), b @ a) < 1e-6


@pytest.mark.parametrize("method", ["flat", "pcb", "tsv"])
def test_factors_do_not_matter(method: str, file: str):
    factors = pairs(2, 3)
    gauge = np.random.default_rng(3).normal(size=(3, 3)) + 2 * np.eye(3)
    other = [factors[0], (factors[1][0] @ gauge, np.linalg.solve(gauge, factors[1][1]))]
    assert distance(merged(other, method, file), merged(factors, method, file)) < 1e-5


def test_an_isotropic_metric_changes_nothing(tmp_path: Path):
    path = tmp_path / "moments.safetensors"
    save_moments({"m": moments_of(torch.eye(IN))}, path)
    factors = pairs(2, 3, 2)
    plain = merge_adapters(adapters(factors), "flat", rank=4).delta("m").numpy()
    assert distance(merged(factors, "flat", str(path), rank=4), plain) < 1e-5


def test_every_kind_of_delta_enters_and_leaves():
    x = inputs()
    metric = metric_of(moments_of(torch.as_tensor(x), kept=5))
    ((b, a),) = pairs(3)
    u, s, vh = (torch.as_tensor(part) for part in np.linalg.svd(b @ a, full_matrices=False))
    kinds = [
        LowRank(torch.as_tensor(a), torch.as_tensor(b)),
        Core(Basis(u), torch.diag(s), Basis(vh.T)),
        Dense(torch.as_tensor(b @ a)),
    ]
    inside = [metric.enter(delta).matrix().numpy() for delta in kinds]
    for one, delta in zip(inside, kinds, strict=True):
        assert_allclose(one, inside[0], atol=1e-5)
        assert_allclose(metric.leave(metric.enter(delta)).matrix(), b @ a, atol=1e-5)


def test_moments_of_some_directions_hold_the_mean_of_the_others():
    x = torch.as_tensor(inputs())
    moments = moments_of(x, kept=4)
    values = np.linalg.eigvalsh(x.T @ x / len(x))[::-1]
    assert_allclose(moments.values, values[:4], rtol=1e-5)
    assert moments.rest == pytest.approx(values[4:].mean(), rel=1e-5)
    assert moments.trace == pytest.approx(values.sum(), rel=1e-5)


def test_a_layer_that_sees_nothing_prefers_no_direction():
    metric = metric_of(Moments(torch.zeros(2), torch.eye(IN)[:, :2], 0.0))
    rows = torch.ones(1, IN)
    assert_allclose(metric.times(rows), rows)


def test_what_is_measured_is_what_the_layers_see(workshop):
    model = workshop.model("llama").eval()
    tokens = torch.randint(0, 30, (3, 5))
    mask = torch.ones_like(tokens)
    mask[1, 3:] = 0
    seen: dict[str, torch.Tensor] = {}
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, __, name=name: seen.update({name: x[0]}))
    moments = measure_moments(model, {"input_ids": tokens, "attention_mask": mask}, tracker(False))
    assert moments.keys() == layers.keys() - {"lm_head"}
    for name, one in moments.items():
        x = seen[name][mask.bool()].double()
        dense = one.vectors.double() * one.values @ one.vectors.T.double()
        others = torch.eye(len(dense)) - one.vectors.double() @ one.vectors.T.double()
        assert_allclose(dense + one.rest * others, x.T @ x / len(x), atol=1e-5)


def test_layers_with_one_input_are_stored_once(workshop, tmp_path: Path):
    model = workshop.model("llama").eval()
    tokens = torch.randint(0, 30, (2, 5))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    save_moments(measure_moments(model, batch, tracker(False)), tmp_path / "m.safetensors")
    layers = open_moments(tmp_path / "m.safetensors").layers
    q, k, v = (layers[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv")
    assert q == k == v != layers["model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("rondom", "it must be 'random'"),
        ("random", "give base_model too"),
        ("nowhere.safetensors", "cannot be read"),
    ],
)
def test_a_mistake_is_named(metric: str, message: str):
    with pytest.raises(OptionError, match=message):
        merge_adapters(adapters(pairs(2, 2)), "flat", metric=metric)


def test_a_metric_of_another_model_is_refused(tmp_path: Path):
    path = tmp_path / "moments.safetensors"
    save_moments({"n": moments_of(torch.eye(IN))}, path)
    with pytest.raises(MismatchError, match="knows no module of the adapters"):
        merge_adapters(adapters(pairs(2, 2)), "flat", metric=str(path))
    save_moments({"m": moments_of(torch.eye(IN + 1))}, path)
    with pytest.raises(MismatchError, match="m has 14 inputs, and 15 in"):
        merge_adapters(adapters(pairs(2, 2)), "flat", metric=str(path))


def test_random_tokens_are_measured_once_and_the_recipe_repeats_to_the_byte(
    workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = workshop.base("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    paths = workshop.adapters("llama", [config, config])
    first = merge_adapters(paths, "flat", metric="random", rank=2, base_model=base)
    (file,) = (tmp_path / "cache" / "pcb_peft" / "moments").iterdir()
    written = file.stat().st_mtime_ns
    first.save_pretrained(tmp_path / "first")
    recipe = read_recipe(tmp_path / "first" / "merge_recipe.yaml")
    assert recipe.metric.path == "random"
    assert recipe.metric.sha256
    merge(recipe).save_pretrained(tmp_path / "second")
    assert file.stat().st_mtime_ns == written
    name = "adapter_model.safetensors"
    assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def statistics(grams: list[Matrix]) -> list[TaskStatistics]:
    return [
        TaskStatistics("gram", {"m": (IN, IN)}, {"m": torch.as_tensor(gram).float()}.__getitem__)
        for gram in grams
    ]


def test_the_statistics_of_the_adapters_can_be_the_metric():
    factors, x = pairs(2, 3), inputs()
    grams = [y.T @ y / len(y) for y in (x, x @ np.diag(np.geomspace(1, 5, IN)))]
    given = {"metric": "statistics", "statistics": statistics(grams)}
    found = merge_adapters(adapters(factors), "flat", rank=2, **given).delta("m").numpy()
    wanted = flat([b @ a for b, a in factors], *powers(sum(grams) / 2), 2)
    assert distance(found, wanted) < 1e-5
    with pytest.raises(OptionError, match="needs statistics of kind gram"):
        merge_adapters(adapters(factors), "flat", metric="statistics")


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_regmean_in_core_space_is_ssr(ridge: float):
    """B R with R = Q (G + λ)⁻¹ of arXiv:2606.10617, in orthonormal rows of the adapters' A; the ridge is relative."""
    factors, rng = pairs(2, 3, 2), np.random.default_rng(5)
    grams = [
        y.T @ y / len(y)
        for y in (rng.normal(size=(40, IN)) * rng.uniform(0.2, 2, IN) for _ in factors)
    ]
    rows = np.linalg.svd(np.vstack([a for _, a in factors]), full_matrices=False)[2]
    latent = [rows @ gram @ rows.T for gram in grams]
    latent = [gram + ridge * np.trace(gram) / len(rows) * np.eye(len(rows)) for gram in latent]
    answers = sum(b @ a @ rows.T @ gram for (b, a), gram in zip(factors, latent, strict=True))
    wanted = answers @ np.linalg.inv(sum(latent)) @ rows
    given = {"space": "core", "alpha": 1.0, "ridge": ridge, "statistics": statistics(grams)}
    found = merge_adapters(adapters(factors), "regmean", **given).delta("m").numpy()
    assert distance(found, wanted) < 1e-5


def test_a_module_that_the_metric_does_not_know_is_told(tmp_path: Path):
    path = tmp_path / "moments.safetensors"
    save_moments({"m": moments_of(torch.as_tensor(inputs()))}, path)
    first, second = pairs(2, 2)
    some = [adapter("a", {"m": first, "n": second}), adapter("b", {"m": second})]
    report = merge_adapters(some, "linear", metric=str(path)).report
    assert any("knows nothing of 1 modules, such as n" in note for note in report.notes)
