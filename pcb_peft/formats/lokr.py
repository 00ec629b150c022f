"""LoKr: the Kronecker product of two matrices, each of them whole or factored."""

import numpy as np
import torch
from torch import Tensor

from pcb_peft.deltas.delta import Dense
from pcb_peft.formats.kernels import kernel_layout, lycoris_scaling, product, tucker
from pcb_peft.formats.registry import LazyDelta, register
from pcb_peft.formats.tuner import Parts, tuner


def entry(parts: Parts) -> LazyDelta:
    """One module's change: scaling · w1 ⊗ w2, with w2 (out, in, *kernel) of a convolution.

    Source: Yeh et al. 2024 (LyCORIS), arXiv:2309.14859, section 3.3. On a Conv1d, PEFT multiplies w1 (a, b) with w2
    (c, d, k) as (1, a, b) with it, in training as in merging, and so does this.
    """
    first, second = _shape(parts, "lokr_w1"), _shape(parts, "lokr_w2")
    kernel = second[2:]
    shape = (first[0] * second[0], first[1] * second[1:].numel())
    scaling = lycoris_scaling(parts)

    def load() -> Dense:
        w1, w2 = _factor(parts, "lokr_w1"), _factor(parts, "lokr_w2")
        w1 = w1[..., None, None] if w2.ndim == 4 else w1
        product = np.kron(w1.numpy(), w2.numpy())  # torch's fails on some shapes
        values = scaling * torch.from_numpy(product)
        return Dense(values.reshape(shape), layout=kernel_layout(parts, shape, kernel))

    return LazyDelta(Dense, shape, load)


def _shape(parts: Parts, name: str) -> torch.Size:
    if name in parts.names:
        return torch.Size(parts.shape(name))
    left, right = parts.shape(f"{name}_a"), parts.shape(f"{name}_b")
    if _core(name) in parts.names:
        return torch.Size((left[1], right[1], *parts.shape(_core(name))[2:]))
    return torch.Size((left[0], right[1]))


def _factor(parts: Parts, name: str) -> Tensor:
    def read(part: str) -> Tensor:
        return parts.read(part, *parts.shape(part))

    if name in parts.names:
        return read(name)
    factors = read(f"{name}_a"), read(f"{name}_b")
    return tucker(read(_core(name)), *factors) if _core(name) in parts.names else product(*factors)


def _core(name: str) -> str:
    return name.replace("w", "t")


register(tuner("LOKR", "lokr_", entry))
