"""Order statistics of streams that are seen tile by tile, against numpy's sort of the whole."""

import contextlib
import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from pcb_peft.tasks import order_statistics
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits

PATIENCE = 60  # passes, however the sample misleads


class Stream:
    """`values` (rows, size) in tiles of some width, and how often they were passed over."""

    def __init__(self, values, width):
        self.tiles, self.passes = torch.as_tensor(values).split(width, dim=1), 0

    def sweep(self, split):
        self.passes += 1
        assert self.passes <= PATIENCE, "the search does not end"
        yield from map(split, self.tiles)


def check(values, sample, indices, width=1499, limits=DEFAULT_LIMITS):
    """Finds what stands at the indices, exactly; returns the number of passes."""
    stream = Stream(values, width)
    found = order_statistics.order_statistics(
        torch.as_tensor(sample), values.shape[1], indices, stream.sweep, limits=limits
    )
    assert_array_equal(found.numpy(), np.sort(values, axis=1)[:, indices])
    assert found.numpy().dtype == values.dtype
    return stream.passes


rng = np.random.default_rng(0)
SIZE = 8_000
PLACES = [0, SIZE // 100, SIZE // 2, int(SIZE * 0.9), SIZE - 1]
STREAMS = {
    "normal": rng.normal(size=SIZE),
    "sorted": np.sort(rng.normal(size=SIZE)),
    "sorted blocks, the largest first": np.sort(rng.normal(size=(20, 400)).ravel())
    .reshape(20, 400)[::-1]
    .ravel(),
    "all equal": np.full(SIZE, 3.25),
    "two values": rng.integers(0, 2, SIZE).astype(float),
    "ten values": rng.integers(0, 10, SIZE) / 7,
    "zero nearly everywhere": np.where(rng.random(SIZE) < 0.001, rng.normal(size=SIZE), 0.0),
    "zeros of both signs": np.where(rng.random(SIZE) < 0.5, -0.0, 0.0),
    "heavy tails": rng.standard_cauchy(SIZE) ** 5,
    "denormal": rng.normal(size=SIZE) * 5e-322,
    "infinite ends": np.where(rng.random(SIZE) < 0.2, np.inf, rng.normal(size=SIZE)),
    "a gap": np.where(rng.random(SIZE) < 0.5, -1e9, 1e9) + rng.normal(size=SIZE),
    "a comb": np.tile([-1.0, 1.0], SIZE // 2) * np.arange(SIZE),
}
SAMPLES = {  # `count` values of a row, as a sampler could return them in good or bad luck
    "fair": lambda row, count: np.random.default_rng(1).choice(row, count, replace=False),
    "the smallest": lambda row, count: np.sort(row)[:count],
    "the largest": lambda row, count: np.sort(row)[-count:],
    "the first": lambda row, count: row[:count],
    "the median, again and again": lambda row, count: np.full(count, np.median(row)),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_the_answer_is_that_of_a_sort_whatever_the_sample_says(stream):
    """A bracket that misses costs one pass more: then everything on that side of it is kept."""
    for sample in SAMPLES:
        row = STREAMS[stream]
        assert check(row[None], SAMPLES[sample](row, 1000)[None], PLACES) <= 2


@pytest.mark.parametrize("stream", STREAMS)
def test_a_fair_sample_needs_one_pass(stream):
    row = STREAMS[stream]
    assert check(row[None], SAMPLES["fair"](row, 1000)[None], PLACES) == 1


@pytest.mark.parametrize(("kept", "passes"), [(600, 25), (2500, 6)])
@pytest.mark.parametrize("stream", STREAMS)
def test_values_that_do_not_fit_cost_passes_and_never_the_answer(stream, kept, passes):
    """24√(n/4) of n kept values, two thirds of them if n is 300, are what the next pass looks at."""
    for sample in SAMPLES:
        row, limits = STREAMS[stream], Limits(bracket_values=kept)
        assert check(row[None], SAMPLES[sample](row, 100)[None], PLACES, limits=limits) <= passes


def arrays_in(thing):
    """All arrays and tensors that an object holds on to, those whose memory they are a view of included."""
    if isinstance(thing, torch.Tensor):
        return [thing.numpy()]
    if isinstance(thing, np.ndarray):
        return [thing] if thing.base is None else arrays_in(thing.base)
    parts = [x for x in gc.get_referents(thing) if not isinstance(x, type)]
    return [array for part in parts for array in arrays_in(part)]


def test_a_bracket_does_not_hold_on_to_the_tiles_from_which_it_keeps_a_part(monkeypatch):
    held = []
    add = order_statistics.Bracket.add

    def measured(bracket, part):
        add(bracket, part)
        held.append(sum({id(array): array.nbytes for array in arrays_in(bracket)}.values()))

    monkeypatch.setattr(order_statistics.Bracket, "add", measured)
    limits = Limits(bracket_values=1000)
    check(rng.normal(size=(1, 50_000)), np.zeros((1, 1)), [25_000], width=100, limits=limits)
    assert 8 * 500 < max(held) <= 3 * 8 * 1100  # a buffer that grows has some room to spare


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17])
def test_tiny_streams(size):
    row = np.round(np.random.default_rng(size).normal(size=(1, size)), 1)
    for count in range(1, size + 1):
        check(row, row[:, :count], list(range(size)), width=2)


def test_a_sample_that_is_the_whole_stream_needs_no_pass():
    row = rng.normal(size=(1, 1000))
    assert check(row, row[:, ::-1].copy(), [0, 500, 999]) == 0


def test_rows_are_searched_each_for_itself_in_the_same_passes():
    values = np.stack([STREAMS[name] for name in ("normal", "ten values", "heavy tails")])
    sample = np.stack([SAMPLES["fair"](row, 1000) for row in values])
    assert check(values, sample, PLACES) == 1


def test_indices_may_come_in_any_order_and_more_than_once():
    row = rng.normal(size=(1, 5000))
    check(row, row[:, :200], [4999, 17, 2500, 17, 0, 2501])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_million_values(dtype):
    values = rng.normal(size=(2, 1_000_000))
    values[1] = np.abs(values[1]) ** 9
    values = values.astype(dtype)
    places = [0, 10_000, 500_000, 900_000, 999_999]
    assert check(values, values[:, ::50].copy(), places, width=60_000) == 1


def test_a_bracket_keeps_what_lies_in_it_ends_included_and_counts_what_lies_below():
    """Below 2: 1, 0, 1. From 2 to 5: 2, 5, 3, 4, 4, 5, 2. Above: 9, 9."""
    values = torch.tensor([1.0, 0, 2, 5, 3, 9, 4, 4, 5, 2, 1, 9])
    below, inside, kept = order_statistics.partition(values, 2.0, 5.0)
    assert (below, inside, sorted(kept.tolist())) == (3, 7, [2, 2, 3, 4, 4, 5, 5])
    assert order_statistics.partition(values, -np.inf, 1.0)[:2] == (0, 3)
    assert order_statistics.partition(values, 5.0, np.inf)[:2] == (8, 4)


def test_a_bracket_of_one_value_counts_it_and_keeps_nothing():
    below, inside, kept = order_statistics.partition(torch.tensor([1.0, 2, 2, 3]), 2.0, 2.0)
    assert (below, inside, len(kept)) == (1, 2, 0)


@pytest.mark.parametrize("quantile", [0.0, 0.001, 0.3, 0.999, 1.0])
def test_a_bracket_reaches_twelve_standard_errors_to_both_sides(quantile):
    """Of n sampled values the q-th is off by √(n q (1 − q)) places, and by one at the ends."""
    n = 100_000
    low, high = order_statistics.narrow_bracket(torch.arange(float(n)), quantile, -np.inf, np.inf)
    center, margin = quantile * (n - 1), 12 * max(1, np.sqrt(n * quantile * (1 - quantile)))
    assert low == (np.floor(center - margin) if center >= margin else -np.inf)
    assert high == (np.ceil(center + margin) if center + margin <= n - 1 else np.inf)


@pytest.mark.parametrize("index", [0, 10, 500, 989, 995, 999])
def test_values_that_are_no_numbers_are_not_searched_for_ever(index):
    """One in a hundred of them may do no harm: numpy sorts them to the end."""
    row = np.full((1, 1000), np.nan)
    with pytest.raises(ValueError, match="NaN"):
        check(row, np.zeros((1, 10)), [index])
    row[0, np.arange(1000) % 100 > 0] = rng.normal(size=990)
    stream = Stream(row, 100)
    with contextlib.suppress(ValueError):
        order_statistics.order_statistics(
            torch.as_tensor(row[:, 1:20]), 1000, [index], stream.sweep
        )


numbers = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-1e300, 1e300),
    st.sampled_from([0.0, -0.0, 1e-320, np.inf, -np.inf]),
)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_stream_any_sample_any_tiles(data):
    rows, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    row = st.lists(numbers, min_size=size, max_size=size)
    values = np.array([data.draw(row) for _ in range(rows)])
    place = st.integers(0, size - 1)
    sample = data.draw(st.lists(place, min_size=1, unique=True))
    indices = data.draw(st.lists(place, min_size=1, max_size=3))
    check(values, values[:, sample], indices, width=data.draw(st.integers(1, size)))
