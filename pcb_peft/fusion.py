"""Fused arithmetic: what a method does to a tile as one compiled loop, in place of one call after another."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

WORTH_VALUES = 1 << 31  # of all adapters together: below, compiling takes longer than it saves
MOST_TASKS = 16  # what is done to each pair of adapters is spelled out


def worth(tasks: int, size: int) -> bool:
    """Whether so many adapters of so many values take longer than compiling."""
    return tasks <= MOST_TASKS and tasks * size >= WORTH_VALUES


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device; None if it can."""
    try:
        with warnings.catch_warnings():  # torch's compiler still imports what torch deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            _, compiled = fused(_probe)(torch.ones(64, device=device))
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return None if compiled else "torch.compile is switched off"


def fused(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, compiled for tiles of any size when it is first called, for one thread each."""
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "cpp.threads": 1,
        "compile_threads": 1,
    }
    return torch.compile(function, dynamic=True, options=options)


def _probe(x: Tensor) -> tuple[Tensor, bool]:
    return x.neg(), torch.compiler.is_compiling()
