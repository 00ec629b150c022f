"""LoKr: the Kronecker product of two matrices, each of them whole or factored."""

import functools

import numpy as np
import torch
from torch import Tensor

from pcb_peft.deltas.delta import Dense
from pcb_peft.formats.kernels import kernel_layout, lycoris_scaling, product, tucker
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.formats.registry import register
from pcb_peft.formats.tuner import ModuleTensors, tuner


def entry(module: ModuleTensors) -> LazyDelta:
    """Return one module's change: scaling · w1 ⊗ w2, with w2 (out, in, *kernel) of a convolution.

    Source: Yeh et al. 2024 (LyCORIS), arXiv:2309.14859, section 3.3. On a Conv1d, PEFT multiplies w1 (a, b) with w2
    (c, d, k) as (1, a, b) with it, in training as in merging, and so does this.
    """
    first, second = _shape(module, "lokr_w1", 2), _shape(module, "lokr_w2", 2, 3, 4, 5)
    kernel = tuple(second[2:])
    shape = (first[0] * second[0], first[1] * second[1:].numel())
    scaling = lycoris_scaling(module)
    return LazyDelta(Dense, shape, functools.partial(_load, module, scaling, shape, kernel))


def _load(
    module: ModuleTensors, scaling: float, shape: tuple[int, int], kernel: tuple[int, ...]
) -> Dense:
    w1, w2 = _factor(module, "lokr_w1"), _factor(module, "lokr_w2")
    w1 = w1[..., None, None] if w2.ndim == 4 else w1
    values = scaling * torch.from_numpy(
        np.kron(w1.numpy(), w2.numpy())
    )  # torch's fails on some shapes
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


register(tuner("LOKR", "lokr_", entry))
