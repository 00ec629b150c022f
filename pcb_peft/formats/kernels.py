"""Parts that LoHa and LoKr (LyCORIS) share: patterns of rank and alpha, and tensor factors of convolutions."""

import torch
from torch import Tensor

from pcb_peft.deltas.layout import LINEAR, Layout
from pcb_peft.errors import AdapterError
from pcb_peft.formats.lora_parts import pattern_value
from pcb_peft.formats.tuner import ModuleTensors
from pcb_peft.runtime.shown import quoted

DEFAULT = 8  # PEFT's r and alpha, where the configuration leaves them out


def lycoris_scaling(module: ModuleTensors) -> float:
    """Return alpha/r, with the patterns that match the module.

    Raises:
        AdapterError: There is no alpha, or the rank is not an integer from 1.
    """
    alpha, rank = (
        pattern_value(module.config, pattern, module.path, module.config.get(field, DEFAULT))
        for pattern, field in (("alpha_pattern", "alpha"), ("rank_pattern", "r"))
    )
    if alpha is None or not isinstance(rank, int) or rank < 1:
        raise AdapterError(
            f"{module.path}: alpha is {quoted(alpha)} and r is {quoted(rank)}; they must be a number, and an integer "
            "from 1"
        )
    return alpha / rank


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix (out, in) of `left` (out, r) and `right` (r, in).

    Raises:
        AdapterError: They do not fit each other.
    """
    if left.shape[1] != right.shape[0]:
        raise _misfit(left, right)
    return left @ right


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the kernel (out, in, *kernel) of a core (r, r, *kernel), `left` (r, out) and `right` (r, in).

    Raises:
        AdapterError: They do not fit each other.
    """
    if core.shape[:2] != (len(left), len(right)):
        raise _misfit(core, left, right)
    return torch.einsum("ij...,ip,jr->pr...", core, left, right)


def _misfit(*factors: Tensor) -> AdapterError:
    shapes = " and ".join(str(tuple(factor.shape)) for factor in factors)
    return AdapterError(f"factors of shapes {shapes} do not fit each other")


def kernel_layout(module: ModuleTensors, shape: tuple[int, int], kernel: tuple[int, ...]) -> Layout:
    """Return how a module stores W.

    Args:
        module: Tensors of the module.
        shape: (out, in), with the kernel multiplied into `in`.
        kernel: Kernel according to the adapter's tensors, empty where they do not say. PEFT writes that of a Conv1d
            as (k, 1).
    """
    if module.base is not None:
        return module.layout(shape)
    if not kernel:
        return LINEAR
    kernel = kernel[:1] if kernel[1:] == (1,) else kernel
    out, width = shape
    return Layout(shape=(out, width // torch.Size(kernel).numel(), *kernel))
