"""Fused arithmetic: what a method does to a tile as one compiled loop, in place of one call after another."""

import functools
import threading
import warnings
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

WORTH_VALUES = 3 << 30  # of all adapters together: below, compiling takes longer than it saves
MOST_TASKS = 16  # what is done to each pair of adapters is spelled out
ON_CPU: dict[str, str | int | bool | Callable[..., Any]] = {
    "compile_threads": 1,
    "cpp_wrapper": True,  # which releases the interpreter's lock, so that tiles run side by side
    "cpp.threads": 1,
    "cpp.vec_isa_ok": True,  # trying out what the processor can do takes longer than all else
}


def worth_compiling(tasks: int, size: int) -> bool:
    """Whether so many adapters of so many values take longer than compiling."""
    return tasks <= MOST_TASKS and tasks * size >= WORTH_VALUES


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device; None if it can."""
    try:
        with warnings.catch_warnings():  # torch's compiler still imports what torch deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            _, compiled = compile_tiles(_probe, device)(torch.ones(64, device=device))
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return None if compiled else "torch.compile is switched off"


def compile_tiles(
    function: Callable[Arguments, Result], device: torch.device
) -> Callable[Arguments, Result]:
    """The same function, compiled for tiles of any size when it is first called; one call of torch stays what it is."""
    if isinstance(function, BuiltinFunctionType):
        return function
    options = ON_CPU if device.type == "cpu" else None
    compiled = torch.compile(function, dynamic=True, options=options)
    compiling, ready = threading.Lock(), threading.Event()

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if ready.is_set():
            return compiled(*args, **kwargs)
        with compiling:  # or every thread that comes compiles anew
            result = compiled(*args, **kwargs)
            ready.set()
        return result

    return call


def _probe(x: Tensor) -> tuple[Tensor, bool]:
    return x.neg(), torch.compiler.is_compiling()
