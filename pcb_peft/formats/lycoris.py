"""LoHa and LoKr: ΔW of their tensors, whichever program stored them."""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pcb_peft.deltas.delta import Dense
from pcb_peft.formats.kernels import kernel_layout, product, tucker
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.formats.tuner import ModuleTensors


def loha_change(module: ModuleTensors, scaling: float) -> LazyDelta:
    """Return scaling · (w1_a w1_b) ∘ (w2_a w2_b), with a core t1, t2 in each of a convolution.

    Source: Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098, propositions 1 and 3.
    """
    left, right = module.shape("hada_w1_a", 2), module.shape("hada_w1_b", 2)
    core = module.shape("hada_t1", 3, 4, 5) if "hada_t1" in module.names else ()
    kernel = core[2:]
    shape = (left[1] if kernel else left[0], right[1] * math.prod(kernel))
    load = functools.partial(_load_loha, module, scaling, shape, (left, right, core))
    return LazyDelta(Dense, shape, load)


def _load_loha(
    module: ModuleTensors,
    scaling: float,
    shape: tuple[int, int],
    factor_shapes: tuple[tuple[int, ...], ...],
) -> Dense:
    first, second = (_product(module, number, *factor_shapes) for number in "12")
    values = (scaling * first * second).reshape(shape)
    kernel = factor_shapes[2][2:]
    return Dense(values, layout=kernel_layout(module, shape, kernel))


def _product(module: ModuleTensors, number: str, *shapes: tuple[int, ...]) -> Tensor:
    """Return one of the two matrices, from tensors of these shapes; an empty shape means that there is no core."""
    left, right, core = shapes
    factors = module.read(f"hada_w{number}_a", *left), module.read(f"hada_w{number}_b", *right)
    return tucker(module.read(f"hada_t{number}", *core), *factors) if core else product(*factors)


def lokr_change(
    module: ModuleTensors, scaling: float, product_of: Callable[[Tensor, Tensor], Tensor]
) -> LazyDelta:
    """Return scaling · w1 ⊗ w2, with w2 (out, in, *kernel) of a convolution.

    Source: Yeh et al. 2024 (LyCORIS), arXiv:2309.14859, section 3.3.

    Args:
        module: Tensors of the module.
        scaling: Factor of the product.
        product_of: From w1 and w2 to the product.
    """
    first, second = _shape(module, "lokr_w1", 2), _shape(module, "lokr_w2", 2, 3, 4, 5)
    kernel = tuple(second[2:])
    shape = (first[0] * second[0], first[1] * second[1:].numel())
    load = functools.partial(_load_lokr, module, scaling, shape, kernel, product_of)
    return LazyDelta(Dense, shape, load)


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """Return w1 ⊗ w2 for a w1 (a, b) and a w2 (c, d, *kernel)."""
    w1 = w1[(..., *[None] * (w2.ndim - w1.ndim))]
    return torch.from_numpy(np.kron(w1.numpy(), w2.numpy()))  # torch's fails on some shapes


def _load_lokr(
    module: ModuleTensors,
    scaling: float,
    shape: tuple[int, int],
    kernel: tuple[int, ...],
    product_of: Callable[[Tensor, Tensor], Tensor],
) -> Dense:
    values = scaling * product_of(_factor(module, "lokr_w1"), _factor(module, "lokr_w2"))
    return Dense(values.reshape(shape), layout=kernel_layout(module, shape, kernel))


def _shape(module: ModuleTensors, name: str, *dimensions: int) -> torch.Size:
    if name in module.names:
        return torch.Size(module.shape(name, *dimensions))
    left, right = module.shape(f"{name}_a", 2), module.shape(f"{name}_b", 2)
    if _core(name) in module.names:
        return torch.Size((left[1], right[1], *module.shape(_core(name), 3, 4, 5)[2:]))
    return torch.Size((left[0], right[1]))


def _factor(module: ModuleTensors, name: str) -> Tensor:
    def read(part: str) -> Tensor:
        return module.read(part, *module.shape(part))

    if name in module.names:
        return read(name)
    factors = read(f"{name}_a"), read(f"{name}_b")
    return tucker(read(_core(name)), *factors) if _core(name) in module.names else product(*factors)


def _core(name: str) -> str:
    return name.replace("w", "t")
