"""Compiled tiles: a method's arithmetic on a tile as one compiled loop instead of one torch call after another."""

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

CPU_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "compile_threads": 1,
    "cpp_wrapper": True,  # C++ calls release the interpreter's lock, so that tiles run side by side
    "cpp.threads": 1,
    "cpp.vec_isa_ok": True,  # testing which instructions the processor has takes longer than the rest
}


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Return why nothing can be compiled for a device, or None if it works; found by compiling one line."""
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
    """Return the same function, compiled for tiles of any size when it is first called.

    A built-in function of torch, such as `torch.abs`, is one call already and is returned as it is.
    """
    if isinstance(function, BuiltinFunctionType):
        return function
    options = CPU_OPTIONS if device.type == "cpu" else None
    compiled = torch.compile(function, dynamic=True, options=options)
    first_call, ready = threading.Lock(), threading.Event()

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if ready.is_set():
            return compiled(*args, **kwargs)
        with first_call:  # without the lock every thread would compile
            result = compiled(*args, **kwargs)
            ready.set()
        return result

    return call


def _probe(x: Tensor) -> tuple[Tensor, bool]:
    """A line to compile: −x, and whether it was compiled."""
    return x.neg(), torch.compiler.is_compiling()
