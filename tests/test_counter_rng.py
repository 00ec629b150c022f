"""The random numbers: SplitMix64 in Python's own integers, statistics, and what they must not depend on."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pcb_peft.tasks import counter_rng
from pcb_peft.tasks.blocks import Block, products, stacked, transformed
from pcb_peft.tasks.limits import Limits
from pcb_peft.tasks.task_vectors import TaskVectors

SEEDED = {  # the first outputs of SplitMix64, as its implementations in many languages are tested with
    0: (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F),
    1234567: (6457827717110365317, 3203168211198807973, 9817491932198370423),
}
KEYS = (0, 1, 2, 3, -1, 2**63 - 1, -(2**63), counter_rng.key(0, "a", "b", 0))


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published, one number after the other, in integers of any size."""
    mask, state, numbers = 2**64 - 1, seed % 2**64, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return numbers


def uniform(keys: tuple[int, ...], positions: Tensor) -> Tensor:
    return counter_rng.uniform(torch.tensor(keys), positions)


def stream(key: int, count: int) -> np.ndarray:
    return uniform((key,), torch.arange(count)[None]).numpy().ravel()


@pytest.mark.parametrize("seed", SEEDED)
def test_the_reference_of_this_test_gives_the_published_numbers(seed: int):
    assert splitmix64(seed, 3) == list(SEEDED[seed])


@pytest.mark.parametrize("key", KEYS)
def test_uniform_numbers_are_splitmix64(key: int):
    expected = np.array([(number >> 11) / 2**53 for number in splitmix64(key, 1000)])
    np.testing.assert_array_equal(stream(key, 1000), expected)


def test_positions_may_come_in_any_order_and_shape_and_be_as_large_as_a_model():
    positions = torch.tensor([[7, 2**40, 0], [2**62, 1, 7]])
    numbers = uniform((5, 6), positions)
    assert numbers.shape == (2, 2, 3)
    assert numbers.dtype == torch.float64
    alone = [uniform((5,), positions[i : i + 1, j : j + 1]) for i in range(2) for j in range(3)]
    assert torch.equal(numbers[0].flatten(), torch.cat(alone).flatten())
    np.testing.assert_array_equal(numbers[1, :, 1][1], stream(6, 2)[1])


def chi_square(numbers: np.ndarray, bins: int) -> float:
    """(χ² − degrees of freedom) in standard deviations: of order 1 if every bin is as likely."""
    counts = np.bincount((numbers * bins).astype(int), minlength=bins)
    expected = len(numbers) / bins
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return (chi2 - (bins - 1)) / np.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("key", KEYS)
def test_numbers_are_uniform(key: int):
    numbers = stream(key, 1 << 18)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(chi_square(numbers, 1000)) < 5
    assert (
        abs(chi_square(numbers * 2**24 % 1, 1000)) < 5
    )  # the 24 leading bits are not all there is
    kolmogorov = np.abs(np.sort(numbers) - np.arange(len(numbers)) / len(numbers)).max()
    assert kolmogorov * np.sqrt(len(numbers)) < 2.2  # exceeded once in 8,000


@pytest.mark.parametrize(("one", "other"), [*itertools.pairwise(KEYS)])
def test_neighbouring_keys_are_independent(one: int, other: int):
    """Also where the other is some positions ahead: they are parts of one cycle."""
    first, second = stream(one, 1 << 18), stream(other, 1 << 18)
    assert abs(chi_square((np.floor(first * 32) + second) / 32, 1024)) < 5
    for lag in (0, 1, 2, 3, 64, 4096):
        a, b = first[: len(first) - lag], second[lag:]
        assert abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(a)) < 5


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 1000, 4096])
def test_neighbouring_positions_are_independent(lag: int):
    numbers = stream(0, 1 << 18)
    a, b = numbers[:-lag], numbers[lag:]
    assert abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(a)) < 5
    assert abs(chi_square((np.floor(a * 32) + b) / 32, 1024)) < 5


def test_keys_differ_wherever_a_part_does_and_never_change():
    parts = [
        (seed, name, module, block)
        for seed in (0, 1)
        for name in ("a", "b")
        for module in ("m", "n")
        for block in (0, 1)
    ]
    assert len({counter_rng.key(*each) for each in parts}) == len(parts)
    assert counter_rng.key("ab", "c") != counter_rng.key("a", "bc")
    assert counter_rng.key(1) != counter_rng.key("1")
    assert counter_rng.key(0, "adapter", "model.layers.0.q_proj", 0) == -3154262575073544249


def keyed(block: Block, keys: tuple[int, ...]) -> Block:
    return dataclasses.replace(block, keys=keys)


def random_blocks() -> list[Block]:
    """Both kinds of block, of uneven shapes, some lower than a tile and some higher."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = [(301, 47), (5, 400), (1, 1), (64, 1)]
    made = [
        products([(normal(m, 3), normal(3, n)) for _ in range(3)], (1, 1, 1)) for m, n in shapes
    ]
    made.append(stacked(normal(3, 50, 60), (1, 1, 1)))
    return [
        keyed(block, (counter_rng.key(i), counter_rng.key(i, 1), counter_rng.key(i, 2)))
        for i, block in enumerate(made)
    ]


def whole(tasks: TaskVectors) -> list[Tensor]:
    """Every block of the task vectors, put together from its tiles."""
    indices = range(len(tasks.blocks))
    return [torch.cat([tile() for _, tile in tasks.tiles(index)], dim=1) for index in indices]


def noisy(x: Tensor, uniform: Tensor) -> Tensor:
    del x
    return uniform


def test_a_transformed_block_has_the_numbers_of_its_keys_and_places():
    for block, values in zip(
        random_blocks(), whole(TaskVectors(random_blocks()).transformed(noisy)), strict=True
    ):
        _, rows, cols = block.shape
        expected = uniform(block.keys, torch.arange(rows * cols).view(rows, cols))
        assert torch.equal(values, expected)


def test_parts_of_a_block_have_the_same_numbers():
    for block in random_blocks():
        part = transformed(block, noisy).open(torch.float64, torch.device("cpu"))
        everything = part(slice(None), slice(None))
        rows, cols = torch.randperm(block.shape[1])[:20], torch.randperm(block.shape[2])[:7]
        assert torch.equal(part(rows, cols), everything[:, rows][:, :, cols])


@pytest.mark.parametrize("values", [1, 1000, 1 << 30])
@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_and_threads_change_nothing(values: int, threads: int):
    expected = whole(TaskVectors(random_blocks()).transformed(noisy))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        merged = (
            TaskVectors(random_blocks(), limits=Limits(tile_values=values))
            .transformed(noisy)
            .combine(lambda x, weights: (weights * x).sum(0))
        )
        for index, block in enumerate(expected):
            assert torch.equal(merged.block(index)[0], block.sum(0))
    finally:
        torch.set_num_threads(before)


def test_order_statistics_of_transformed_task_vectors_are_exact():
    """Also where a sample of parts of rows sets the brackets."""

    def drop(x: Tensor, uniform: Tensor) -> Tensor:
        return x * (uniform < 0.4)

    limits = Limits(sample_values=2000)
    tasks = TaskVectors(random_blocks(), limits=limits).transformed(drop)
    assert tasks.sample < tasks.size
    entries = (
        torch.cat([block.flatten(1) for block in whole(tasks)], dim=1).abs().sort(dim=1).values
    )
    indices = [0, tasks.size // 2, tasks.size * 9 // 10, tasks.size - 1]
    assert torch.equal(tasks.order_statistics(torch.abs, indices)[:, 0, 0], entries[:, indices])


def test_transforms_follow_one_another():
    tasks = TaskVectors(random_blocks())
    twice = tasks.transformed(lambda x, _: 2 * x).transformed(lambda x, _: x + 1)
    for values, original in zip(whole(twice), whole(tasks), strict=True):
        assert torch.equal(values, 2 * original + 1)


def test_a_block_without_keys_says_so():
    with pytest.raises(ValueError, match="0 keys for 2 adapters"):
        TaskVectors([stacked(torch.ones(2, 3, 4), (1, 1))]).transformed(noisy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_numbers():
    keys, positions = torch.tensor(KEYS), torch.arange(1 << 16).view(256, 256)
    assert torch.equal(
        counter_rng.uniform(keys.cuda(), positions.cuda()).cpu(),
        counter_rng.uniform(keys, positions),
    )


def test_nothing_is_drawn_where_no_method_asks(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(counter_rng, "uniform", refuse)
    drawn: Callable[[Tensor, Tensor], Tensor] = noisy
    tasks = TaskVectors(random_blocks())
    tasks.combine(lambda x, weights: (weights * x).sum(0)).block(0)
    tasks.sums(torch.abs)
    with pytest.raises(AssertionError):
        tasks.transformed(drawn).sums(torch.abs)
