"""The elementwise and the geometric methods against their definitions in numpy (definitions.py)."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peft.utils.merge_utils
import pytest
import torch
from definitions import ELEMENTWISE, SHAPES, Array, Masks, logarithms, starts
from helpers import COORDINATES, LOSSLESS, adapter
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from torch import Tensor

from pcb_peft import Adapter, get_method, list_methods, merge_adapters
from pcb_peft.adapters.adapter import DeltaMapping
from pcb_peft.adapters.source import Source
from pcb_peft.deltas.delta import Diagonal, LowRank
from pcb_peft.errors import OptionError
from pcb_peft.formats import LazyDelta
from pcb_peft.tasks import counter_rng
from pcb_peft.tasks.blocks import Block, products, stacked
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits
from pcb_peft.tasks.task_vectors import TaskVectors

RANDOM = ("dare_linear", "dare_ties", "della")
TRIMMING = ("ties", "magnitude_prune", "breadcrumbs", "sce")
GEOMETRIC = ("slerp", "multislerp", "karcher", "model_stock")
DROPPING = (*RANDOM, *TRIMMING, "consensus")
METHODS = tuple(ELEMENTWISE)


def size(shapes: Sequence[tuple[int, int]] = SHAPES) -> int:
    return sum(math.prod(shape) for shape in shapes)


def keys(tasks: int, block: int) -> tuple[int, ...]:
    return tuple(counter_rng.key(block, task) for task in range(tasks))


def blocks_of(
    x: Array, weights: Sequence[float], shapes: Sequence[tuple[int, int]] = SHAPES
) -> list[Block]:
    blocks: list[Block] = []
    for index, (start, shape) in enumerate(starts(shapes)):
        values = torch.from_numpy(x[:, start : start + math.prod(shape)].reshape(len(x), *shape))
        block = stacked(values, weights)
        blocks.append(Block(block.shape, block.weights, block.open, keys(len(x), index)))
    return blocks


def merged(
    name: str, blocks: Sequence[Block], limits: Limits = DEFAULT_LIMITS, **options: Any
) -> Array:
    result = get_method(name)(TaskVectors(blocks, limits=limits), **options)
    return np.concatenate([result.block(i)[0].numpy().ravel() for i in range(len(blocks))])


def merge(name: str, x: Array, weights: Sequence[float] | None = None, **options: Any) -> Array:
    return merged(name, blocks_of(x, weights or [1.0] * len(x)), **options)


def kept(name: str, x: Array, **options: Any) -> list[int]:
    blocks = blocks_of(x, [1.0] * len(x))
    result = get_method(name)(TaskVectors(blocks), **options)
    return list(np.sum([result.block(i)[1].kept for i in range(len(blocks))], axis=0))


def splitmix64(key: int, positions: NDArray[np.uint64]) -> Array:
    """Uniform numbers; `test_noise` shows that these are the generator's."""
    with np.errstate(over="ignore"):
        z = np.uint64(key % 2**64) + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / 2.0**53


def uniform(tasks: int, shapes: Sequence[tuple[int, int]] = SHAPES) -> Masks:
    rows = [
        [splitmix64(key, np.arange(math.prod(shape), dtype=np.uint64)) for key in keys(tasks, i)]
        for i, shape in enumerate(shapes)
    ]
    return np.concatenate([np.stack(block) for block in rows], axis=1)


def normal(tasks: int, seed: int = 0) -> Array:
    """Of different lengths, and with something in common so that angles are below 90°."""
    generator = np.random.default_rng([seed, tasks])
    common = generator.standard_normal(size())
    own = generator.standard_normal((tasks, size()))
    return (0.7 * common + own) * (1 + np.arange(tasks))[:, None]


def quarters(tasks: int, seed: int = 0) -> Array:
    """Multiples of ¼: full of ties, zeros and sums that cancel."""
    return np.round(normal(tasks, seed)) / 4


def with_zeros(tasks: int, seed: int = 0) -> Array:
    """One task vector is zero, and one block is zero in all."""
    x = normal(tasks, seed)
    x[-1] = 0
    x[:, : math.prod(SHAPES[0])] = 0
    return x


def weights_of(tasks: int) -> list[list[float]]:
    return [[1.0] * tasks, [0.5, 2.0, 1.0, 0.25, 1.5][:tasks], [1.0, -0.5, 2.0, 1.0, -1.0][:tasks]]


TASKS = (2, 3, 5)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ELEMENTWISE),
    ("ties", {"density": 0.37}),
    ("magnitude_prune", {"density": 0.001}),
    ("dare_linear", {"density": 0.6, "rescale": False}),
    ("dare_ties", {"density": 0.6, "rescale": False}),
    ("della", {"density": 0.4, "epsilon": 0.8}),
    ("della", {"density": 0.1, "epsilon": 1.0}),
    ("della", {"density": 0.9, "epsilon": 0.5, "rescale": False}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.3}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.0}),
    ("sce", {"density": 0.2}),
    ("sce", {"density": 1.0}),
    ("consensus", {"tall": 0.2, "votes": 1}),
    ("consensus", {"tall": 0.3, "votes": 5}),
    ("slerp", {"t": 0.0}),
    ("slerp", {"t": 0.1}),
    ("slerp", {"t": 1.0}),
]


def data_for(name: str) -> list[tuple[Callable[[int], Array], int]]:
    """Task vectors on which rounding decides nothing."""
    if count := list_methods()[name].arity:
        return [(normal, count)]
    many = [(normal, 2), (normal, 5), (with_zeros, 3)]
    cancel = name in ("sce", "della")  # variances that tie, rescaled entries that cancel
    return [*many, (quarters, 2), *([] if cancel else [(quarters, 3)])]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_agrees_with_the_definition(name: str, options: dict[str, Any]):
    """With its default options, and with others."""
    for data, tasks in data_for(name):
        assert_as_defined(name, options, data, tasks)


def assert_as_defined(
    name: str, options: dict[str, Any], data: Callable[[int], Array], tasks: int
) -> None:
    x, definition = data(tasks), ELEMENTWISE[name]
    known = {o.name: o.default for o in list_methods()[name].options.values()} | options
    if "uniform" in inspect.signature(definition).parameters:
        known["uniform"] = uniform(tasks)
    for weights in weights_of(tasks):
        expected = definition(x, np.array(weights), **known)
        actual = merge(name, x, weights, **options)
        assert_allclose(actual, expected, rtol=1e-9, atol=1e-9 * np.abs(x).max())


# --- what the papers and the house rules promise


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("magnitude_prune", "linear"),
        ("breadcrumbs", "linear"),
        ("dare_linear", "linear"),
        ("dare_ties", "ties"),
        ("della", "ties"),
    ],
)
def test_at_density_1_nothing_is_dropped(name: str, plain: str):
    x, options = normal(3), {"density": 1.0} if plain == "ties" else {}
    assert_array_equal(merge(name, x, density=1.0), merge(plain, x, **options))


@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_zero_task_vector_has_no_say(name: str):
    x = normal(2)
    x[1] = 0
    assert_allclose(merge(name, x, [0.5, 3.0]), 0.5 * x[0], rtol=1e-14)
    assert_array_equal(merge(name, 0 * x), np.zeros(size()))
    assert_array_equal(merge(name, normal(2), [0.0, 0.0]), np.zeros(size()))


@pytest.mark.parametrize("name", DROPPING)
def test_task_vectors_of_zeros_merge_to_zeros_of_which_none_is_kept(name: str):
    x = np.zeros((3, size()))
    assert_array_equal(merge(name, x), np.zeros(size()))
    assert kept(name, x) == [0, 0, 0]


def test_breadcrumbs_without_outliers_prunes_by_magnitude():
    """The slice [:-0] of other toolkits drops everything."""
    for density, gamma in ((0.3, 0.0), (0.3, 0.9 / size()), (1.0, 0.5)):
        x = normal(3)
        expected = merge("magnitude_prune", x, density=density)
        assert_array_equal(merge("breadcrumbs", x, density=density, gamma=gamma), expected)


def test_breadcrumbs_keeps_its_density_whatever_gamma():
    for gamma in (0.0, 0.05, 0.4, 1.0):
        assert kept("breadcrumbs", normal(2), density=0.5, gamma=gamma) == [size() // 2] * 2


@pytest.mark.parametrize("name", ["ties", "magnitude_prune", "breadcrumbs"])
def test_entries_that_tie_are_all_kept(name: str):
    x = np.where(normal(2) > 0, 1.0, -1.0)
    assert kept(name, x, density=0.1) == [size()] * 2


@pytest.mark.parametrize("name", ["ties", "magnitude_prune"])
def test_zeros_are_not_kept_to_fill_the_density(name: str):
    x = np.zeros((2, size()))
    x[:, :3] = [[1, 2, 3], [1, 0, 0]]
    assert kept(name, x, density=0.5) == [3, 1]


# --- randomness


@pytest.mark.parametrize("name", ["dare_linear", "della"])
def test_dropping_keeps_the_expectation(name: str):
    """Of 2,000 draws, entry by entry and in the sum: within 5 standard errors. One task, so that nothing is elected."""
    x, draws, density = normal(1)[0], 2000, 0.3
    rows = np.tile(x.reshape(1, -1), (draws, 1))
    block = stacked(torch.from_numpy(rows)[:, None], [1.0] * draws)
    many = Block(block.shape, block.weights, block.open, tuple(range(draws)))
    tasks = TaskVectors([many])
    survivors = dropped_by(name, tasks, density)
    errors = (survivors.mean(0) - x) / (np.abs(x) * np.sqrt((1 / density - 1) / draws))
    assert np.abs(errors).max() < 6  # a row's smallest entries are kept less often by `della`
    assert abs(errors.mean()) * math.sqrt(len(x)) < 5
    if name == "dare_linear":
        assert 0.9 < errors.std() < 1.1


def dropped_by(name: str, tasks: TaskVectors, density: float) -> Array:
    """What a method leaves of each task vector: it hands this to the report as what it kept."""
    seen: list[Tensor] = []
    original = TaskVectors.combine

    def combine(self: TaskVectors, rule: Any, *, whole: bool = False) -> Any:
        seen.extend(tile() for _, tile in self.tiles(0, True))
        return original(self, rule, whole=whole)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskVectors, "combine", combine)
        get_method(name)(tasks, density=density)
    return seen[0][:, 0].numpy()


def test_della_keeps_large_entries_more_often():
    draws, n = 4000, 25
    row = np.random.default_rng(0).permutation(np.arange(1.0, n + 1)) * (-1) ** np.arange(n)
    block = stacked(torch.from_numpy(np.tile(row, (draws, 1)))[:, None], [1.0] * draws)
    tasks = TaskVectors([Block(block.shape, block.weights, block.open, tuple(range(draws)))])
    often = (dropped_by("della", tasks, 0.7) != 0).mean(0)[np.argsort(np.abs(row))]
    expected = np.linspace(0.63, 0.77, n)  # the default ε of 0.14
    assert np.abs(often - expected).max() < 5 * math.sqrt(0.25 / draws)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_threads_and_tiles_change_no_byte_of_sums_over_all_entries(name: str):
    tasks = count_for(name)
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 3), (90, 400), (7, 50)]
    x = [torch.randn(tasks, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    blocks = [stacked(each, [1.0] * tasks) for each in x]
    blocks = [Block(b.shape, b.weights, b.open, keys(tasks, i)) for i, b in enumerate(blocks)]

    def run(values: int, threads: int) -> Array:
        torch.set_num_threads(threads)
        return merged(name, blocks, Limits(tile_values=values))

    before = torch.get_num_threads()
    try:
        expected = run(1 << 16, 1)
        assert_array_equal(run(1 << 16, 3), expected)
        one, several = run(5000, 1), run(5000, 4)
    finally:
        torch.set_num_threads(before)
    assert_array_equal(several, one)
    assert_array_equal(one, expected)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in GEOMETRIC])
def test_single_precision_makes_the_same_choices(name: str):
    x, expected = normal(3), merge(name, normal(3))
    blocks = blocks_of(x.astype(np.float32).astype(np.float64), [1.0] * 3)
    actual = merged(name, blocks, Limits(double_values=0))
    assert actual.dtype == np.float32
    assert_array_equal(actual == 0, expected == 0)
    assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# --- geometry


@pytest.mark.parametrize("name", ["slerp", "multislerp", "karcher"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 3.0], [2.0, -0.5]])
def test_the_length_is_that_of_the_docstring(name: str, weights: list[float]):
    """The mean |λ| times the mean of the lengths, weighted by |λ|."""
    x = normal(2)
    masses, lengths = np.abs(weights), np.linalg.norm(x, axis=1)
    expected = masses.mean() * (masses @ lengths) / masses.sum()
    assert np.linalg.norm(merge(name, x, weights)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 3.0], [2.0, -0.5]])
def test_the_karcher_mean_of_two_is_slerp(weights: list[float]):
    x = normal(2)
    assert_allclose(merge("karcher", x, weights), merge("slerp", x, weights), atol=1e-10)


@pytest.mark.parametrize("tasks", TASKS)
def test_at_the_karcher_mean_the_logarithms_cancel(tasks: int):
    """Also of task vectors that are nearly at right angles, as those of different tasks are."""
    x = np.random.default_rng(tasks).standard_normal((tasks, size()))
    weights = np.arange(1.0, tasks + 1)
    mean = merge("karcher", x, list(weights))
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.linalg.norm(weights @ logarithms(mean / np.linalg.norm(mean), units)) < 1e-9


@pytest.mark.parametrize("name", GEOMETRIC)
def test_parallel_and_opposite_task_vectors(name: str):
    x = normal(1)
    assert_allclose(merge(name, np.concatenate([x, 3 * x])), 2 * x[0], rtol=1e-7)
    assert_allclose(merge(name, np.concatenate([x, -x])), 0 * x[0], atol=1e-7)
    nearly = np.concatenate([x, x + 1e-9 * np.random.default_rng(0).standard_normal(x.shape)])
    assert_allclose(merge(name, nearly), x[0], atol=1e-8)


def test_slerp_ends_at_its_adapters():
    x = normal(2)
    assert_allclose(merge("slerp", x, t=0.0), x[0], atol=1e-12)
    assert_allclose(merge("slerp", x, t=1.0), x[1], atol=1e-12)


@pytest.mark.parametrize("rank", [None, "full"])
@pytest.mark.parametrize("tasks", [3, 4])
def test_slerp_takes_two_and_says_so_before_a_tensor_is_read(tasks: int, rank: str | None):
    def unread() -> LowRank:
        raise AssertionError("a tensor was read")

    unreadable = DeltaMapping({"layer.0": LazyDelta(LowRank, (9, 12), unread, 2)})
    adapters = [dataclasses.replace(some, modules=unreadable) for some in pool(tasks)]
    override = {"modules": "*", "method": "slerp"}
    for arguments in ({"method": "slerp"}, {"method": "linear", "overrides": [override]}):
        with pytest.raises(OptionError, match=f"takes 2 adapters, and there are {tasks}.*karcher"):
            merge_adapters(adapters, rank=rank, **arguments)


def test_model_stock_of_one_task_is_the_mean_and_of_orthogonal_ones_is_zero():
    x = normal(1)
    assert_allclose(merge("model_stock", np.concatenate([x, x, x])), x[0], rtol=1e-12)
    at_right_angles = np.eye(3, size())
    assert_array_equal(merge("model_stock", at_right_angles), np.zeros(size()))


# --- PEFT's own functions, on the same tensors: its `dare_*` with the same masks


def as_peft(x: Array) -> list[Tensor]:
    return list(torch.from_numpy(x.reshape(len(x), *SHAPES[0])))


@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("density", [0.1, 0.7])
@pytest.mark.parametrize("name", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_agrees_with_peft(name: str, density: float, tasks: int, monkeypatch: pytest.MonkeyPatch):
    """With equal weights: PEFT elects the signs before it applies them."""
    x = normal(tasks)[:, : math.prod(SHAPES[0])]
    masks = iter(uniform(tasks, SHAPES[:1]) < density)
    monkeypatch.setattr(
        torch, "bernoulli", lambda p: torch.from_numpy(next(masks).reshape(p.shape)).to(p.dtype)
    )
    weights = [1.5] * tasks
    expected = getattr(peft.utils.merge_utils, name)(as_peft(x), torch.tensor(weights), density)
    actual = merged(name, blocks_of(x, weights, SHAPES[:1]), density=density)
    assert_allclose(actual, expected.numpy().ravel(), rtol=1e-12, atol=1e-12)


# --- the whole merge, in every space and scope


def lora(name: str, seed: int, modules: Sequence[str] = ("layer.0", "layer.1")) -> Adapter:
    """All have their first direction in common, so that their angles are below 90°."""
    common = torch.Generator().manual_seed(0)
    generator = torch.Generator().manual_seed(seed + 1)

    def low_rank(rank: int) -> LowRank:
        lora_A = torch.randn(rank, 12, generator=generator)
        lora_B = torch.randn(9, rank, generator=generator)
        lora_A[0] = 2 * torch.randn(12, generator=common)
        lora_B[:, 0] = torch.randn(9, generator=common)
        return LowRank(lora_A, lora_B, 0.5)

    return adapter(name, {module: low_rank(2 + seed) for module in modules})


def ia3(name: str, seed: int) -> Adapter:
    values = 1 + torch.randn(20, generator=torch.Generator().manual_seed(seed))
    return adapter(name, {"layer.0": Diagonal(values)})


def pool(tasks: int) -> list[Adapter]:
    return [lora(f"adapter{i}", i) for i in range(tasks)]


def deltas(method: str, adapters: Sequence[Adapter], **options: Any) -> dict[str, Tensor]:
    merged_adapter = merge_adapters(adapters, method, progress=False, **options)
    modules = merged_adapter.modules
    return {name: delta_of(modules[name]) for name in modules}


def delta_of(delta: Any) -> Tensor:
    return delta.l - 1 if isinstance(delta, Diagonal) else delta.matrix()


def count_for(method: str) -> int:
    return list_methods()[method].arity or 3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_vectors(method: str):
    result = deltas(method, [ia3(f"adapter{i}", i) for i in range(count_for(method))])
    assert result["layer.0"].isfinite().all()


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("method", GEOMETRIC)
def test_geometric_methods_are_the_same_in_all_lossless_coordinates(method: str, scope: str):
    adapters = pool(count_for(method))
    wanted = deltas(method, adapters, space="dense", scope=scope, rank="full")
    for space in COORDINATES:
        found = deltas(method, adapters, space=space, scope=scope, rank="full")
        for module, delta in wanted.items():
            torch.testing.assert_close(found[module], delta, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "space"),
    [
        *((method, "core") for method in RANDOM),
        *(("dare_linear", s) for s in LOSSLESS if s != "core"),
    ],
)
def test_seed_adapter_and_module_make_the_masks_and_the_order_does_not(method: str, space: str):
    adapters = pool(2)
    first = deltas(method, adapters, space=space, rank="full")
    again = deltas(method, adapters, space=space, rank="full", seed=0)
    other = deltas(method, adapters, space=space, rank="full", seed=1)
    turned = deltas(method, adapters[::-1], space=space, rank="full")
    for module, delta in first.items():
        assert torch.equal(again[module], delta)
        assert not torch.allclose(other[module], delta, atol=1e-3)
        torch.testing.assert_close(turned[module], delta, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [*TRIMMING, *GEOMETRIC])
def test_the_scope_matters_to_methods_that_compare_entries_or_add_over_them(method: str):
    adapters = pool(count_for(method))
    one, other = (
        deltas(method, adapters, space="core", scope=scope, rank="full")
        for scope in ("global", "module")
    )
    assert not any(torch.equal(one[module], other[module]) for module in one)


@pytest.mark.parametrize("method", [*RANDOM, "consensus"])
def test_the_scope_does_not_matter_to_methods_without_statistics(method: str):
    one, other = (
        deltas(method, pool(3), space="core", scope=scope, rank="full")
        for scope in ("global", "module")
    )
    assert all(torch.equal(one[module], other[module]) for module in one)


def test_an_adapter_is_known_by_its_file_and_else_by_its_name():
    def merged_as(names: Sequence[str], hashes: Sequence[str | None]) -> Tensor:
        adapters = [
            dataclasses.replace(lora(name, i), source=Source(name, sha256=sha256))
            for i, (name, sha256) in enumerate(zip(names, hashes, strict=True))
        ]
        return deltas("dare_linear", adapters, rank="full")["layer.0"]

    first = merged_as(["a", "b"], ["1f", "2e"])
    assert torch.equal(merged_as(["renamed", "moved"], ["1f", "2e"]), first)
    assert not torch.equal(merged_as(["a", "b"], ["1f", "3d"]), first)
    assert not torch.equal(merged_as(["a", "b"], [None, None]), merged_as(["a", "c"], [None, None]))


def test_each_adapter_module_and_block_has_masks_of_its_own(monkeypatch: pytest.MonkeyPatch):
    seen: set[int] = set()
    original = counter_rng.uniform

    def uniform(keys: Tensor, positions: Tensor) -> Tensor:
        seen.update(keys.tolist())
        return original(keys, positions)

    monkeypatch.setattr(counter_rng, "uniform", uniform)
    for seed in (0, 1):
        deltas("dare_linear", pool(3), space="factor", seed=seed)
    assert len(seen) == 2 * 3 * 2 * 2  # seeds, adapters, modules, lora_A and lora_B


def test_masks_of_a_module_do_not_depend_on_the_other_modules():
    few = [lora(f"adapter{i}", i, ("layer.0",)) for i in range(3)]
    many = [lora(f"adapter{i}", i) for i in range(3)]
    alone = deltas("dare_linear", few, space="dense", rank="full")
    assert torch.equal(
        alone["layer.0"], deltas("dare_linear", many, space="dense", rank="full")["layer.0"]
    )


def test_dropped_products_are_the_same_in_any_tile():
    generator = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(64, 4, generator=generator), torch.randn(4, 33, generator=generator))
        for _ in range(3)
    ]
    block = products(factors, [1.0] * 3)
    block = Block(block.shape, block.weights, block.open, keys(3, 0))
    expected = merged("dare_ties", [block])
    assert_array_equal(merged("dare_ties", [block], Limits(tile_values=500)), expected)


@pytest.mark.parametrize(
    ("held", "room", "calls"), [(48, 2 * 48 * 8, 2), (47, 2 * 48 * 8, 4), (48, 2 * 48 * 8 - 1, 4)]
)
def test_a_score_is_taken_once_of_each_tile_that_is_held(held: int, room: int, calls: int):
    seen: list[int] = []

    def score(tile: Tensor) -> Tensor:
        seen.append(tile.numel())
        return tile.abs()

    limits = Limits(tile_values=12, cached_values=held)
    block = stacked(torch.rand(2, 8, 3), (1, 1))
    tasks = TaskVectors([block], max_bytes=room, limits=limits)
    once = tasks.cached_per_tile(score)
    tasks.order_statistics(once, [1])
    tasks.combine(lambda x, weights: (x * weights * once(x)).sum(0)).block(0)
    assert len(seen) == calls


@pytest.mark.parametrize("method", METHODS)
def test_no_method_writes_into_what_it_is_shown(method: str):
    values = torch.from_numpy(np.random.default_rng(5).normal(size=(3, 20, 30)))
    shown = values.clone()
    block = dataclasses.replace(stacked(shown, (1, 0.5, -2)), keys=keys(3, 0))
    get_method(method)(TaskVectors([block])).block(0)
    assert shown.equal(values)
