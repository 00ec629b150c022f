"""Compiled tiles: the values of plain torch, whatever the tiles and threads; and what happens without a compiler."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pcb_peft.methods import get_method
from pcb_peft.tasks import compiling
from pcb_peft.tasks.blocks import products
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits
from pcb_peft.tasks.task_vectors import TaskVectors

CPU = torch.device("cpu")


@pytest.fixture
def compiler() -> None:
    """Whether one works is found by compiling, which takes a second."""
    if reason := compiling.why_not_compiled(CPU):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


LARGE = Limits(double_values=0, compile_values=0)  # as if the few values of a test were many
PLAIN = Limits(double_values=0)


def scope(limits: Limits = LARGE) -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    blocks = [
        products(
            [
                (torch.randn(rows, 3, generator=generator), torch.randn(3, 67, generator=generator))
                for _ in range(3)
            ],
            (1.0, 0.5, -0.75),
        )
        for rows in (41, 130)
    ]
    return TaskVectors(blocks, limits=limits)


def merged(name: str, limits: Limits = LARGE, **options: object) -> Tensor:
    result = get_method(name)(scope(limits), **options)
    return torch.cat([result.block(index)[0].flatten() for index in range(2)])


CASES: list[tuple[str, dict[str, object]]] = [
    *[("pcb", {"formula": name}) for name in ("paper", "vision")],
    ("ties", {}),
    ("model_stock", {}),
]


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES)
def test_compiled_values_are_those_of_plain_torch(name, options):
    assert scope().compiled
    compiled = merged(name, **options)
    assert not scope(PLAIN).compiled
    plain = merged(name, PLAIN, **options)
    assert (compiled != 0).eq(plain != 0).all()
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6 * float(plain.abs().max()))


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
def test_compiled_values_do_not_depend_on_tiles_and_threads():
    expected = merged("pcb", density=0.3)
    for tile, threads in ((3 * 67, 1), (3 * 67 * 5, 2), (3 * 67 * 17, 1)):
        limits = dataclasses.replace(LARGE, tile_values=tile)
        torch.set_num_threads(threads)
        assert merged("pcb", limits, density=0.3).equal(expected)


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
def test_what_is_compiled_is_compiled_once(launch):
    """Whatever the lengths of tiles, and the threads that meet it for the first time."""
    code = (
        "import torch; from pcb_peft.tasks.limits import Limits; from pcb_peft.methods import get_method\n"
        "from pcb_peft.tasks.blocks import products; from pcb_peft.tasks.task_vectors import TaskVectors\n"
        "torch._logging.set_logs(recompiles=True)\n"
        "limits = Limits(double_values=0, compile_values=0, sample_values=500, tile_values=1000)\n"
        "blocks = [products([(torch.rand(n, 2), torch.rand(2, 67))] * 3, (1, 1, 1)) for n in (41, 130)]\n"
        "tasks = TaskVectors(blocks, limits=limits); get_method('ties')(tasks).block(1); print(tasks.compiled)"
    )
    codes, outputs, errors = launch(1, ["-c", code], threads=2)
    assert (codes, outputs) == ([0], ["True\n"]), errors
    assert "Recompiling" not in errors[0]


def test_what_takes_less_time_than_compiling_is_not_compiled():
    assert not scope(DEFAULT_LIMITS).compiled
    assert not DEFAULT_LIMITS.worth_compiling(adapters=4, size=1 << 29)
    assert DEFAULT_LIMITS.worth_compiling(adapters=4, size=1 << 30)
    assert not DEFAULT_LIMITS.worth_compiling(adapters=1000, size=1 << 30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "none", "PATH": "/none"}, "compiler"),
        ({"TORCHDYNAMO_DISABLE": "1"}, "switched off"),
    ],
)
def test_without_a_compiler_the_arithmetic_is_plain_torch(launch, variables, reason, tmp_path):
    code = (
        "import torch; from pcb_peft.tasks.limits import Limits; limits = Limits(compile_values=0)\n"
        "from pcb_peft.tasks.blocks import stacked; from pcb_peft.tasks.task_vectors import TaskVectors\n"
        "tasks = TaskVectors([stacked(torch.ones(2, 3, 4), (1, 1))], limits=limits)\n"
        "print(tasks.compiled, tasks.why_not_compiled)"
    )
    variables = {**variables, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    codes, (output,), errors = launch(1, ["-c", code], **variables)
    assert codes == [0], errors
    assert output.startswith("False ")
    assert reason in output
