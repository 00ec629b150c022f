"""Task vectors that are made of others: everything but the blocks stays as it was."""

import dataclasses

import pytest
import torch

from pcb_peft.runtime.processes import Processes
from pcb_peft.tasks.blocks import Block, stacked
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits
from pcb_peft.tasks.task_vectors import TaskVectors


def block() -> Block:
    values = torch.arange(24.0).view(2, 4, 3)
    made = stacked(values, (1.0, 0.5))
    return dataclasses.replace(made, keys=(1, 2), task_statistics=lambda: [torch.ones(4, 3)] * 2)


DERIVED = {
    "transformed": lambda tasks: tasks.transformed(lambda x, _: x + 1),
    "with_task_statistics": lambda tasks: tasks.with_task_statistics(lambda _: lambda x, *_: x + 1),
    "with_blocks": lambda tasks: tasks.with_blocks(tasks.blocks[:2]),
}


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_derived_task_vectors_keep_everything_but_the_blocks(derive):
    tasks = TaskVectors(
        [block()] * 3,
        device=torch.device("meta"),
        track=lambda indices: list(indices),
        processes=Processes(1, 3),
        block_indices=[1],
        max_bytes=7.0,
        limits=Limits(tile_values=11),
    )
    derived = derive(tasks)
    for field in dataclasses.fields(TaskVectors):
        kept = getattr(derived, field.name) is getattr(tasks, field.name)
        assert kept == (field.name != "blocks"), field.name
        assert field.name == "blocks" or field.default != getattr(tasks, field.name)


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_derived_task_vectors_cache_no_tile_if_there_is_no_memory(derive):
    tasks = derive(TaskVectors([block()] * 3, max_bytes=0))
    assert not tasks.caches_tiles
    assert derive(TaskVectors([block()] * 3)).caches_tiles


@pytest.mark.parametrize("name", ["transformed", "with_task_statistics"])
def test_a_process_reads_only_its_own_blocks_of_derived_task_vectors(name):
    opened = []

    def watched(index):
        plain = block()

        def open_(dtype, device):
            opened.append(index)
            return plain.open(dtype, device)

        return dataclasses.replace(plain, open=open_)

    tasks = TaskVectors([watched(0), watched(1), watched(2)], block_indices=[0, 2])
    DERIVED[name](tasks).extremes(torch.abs)
    assert set(opened) == {0, 2}


def test_a_block_without_task_statistics_says_so():
    tasks = TaskVectors([stacked(torch.ones(2, 4, 3), (1.0, 1.0))])
    with pytest.raises(ValueError, match="no task statistics"):
        tasks.with_task_statistics(lambda _: lambda x, *_: x)


def test_task_vectors_have_a_short_repr():
    assert repr(TaskVectors([block()] * 3)) == "TaskVectors(2 adapters, 3 blocks, 36 values each)"


@pytest.mark.parametrize(
    ("adapters", "size", "expected"),
    [
        (2, 1 << 18, 1 << 18),  # as a whole
        (2, (1 << 18) + 16, (1 << 14) + 1),  # one in sixteen
        (2, 1 << 30, 1 << 20),  # one in a thousand, of very large scopes
        (1024, 1 << 30, 1 << 16),  # less for many adapters
    ],
)
def test_how_much_is_sampled(adapters, size, expected):
    assert DEFAULT_LIMITS.sample_size(adapters, size) == expected


def test_a_scope_of_at_most_134_million_values_is_computed_in_float64():
    assert DEFAULT_LIMITS.dtype(4, 1 << 25) == torch.float64
    assert DEFAULT_LIMITS.dtype(4, (1 << 25) + 1) == torch.float32
