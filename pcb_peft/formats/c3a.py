"""C3A: a matrix of circulant blocks."""

import functools

import torch

from pcb_peft.deltas.delta import Dense
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.formats.registry import register
from pcb_peft.formats.tuner import ModuleTensors, tuner


def entry(module: ModuleTensors) -> LazyDelta:
    """Return one module's change: block (i, j) holds c[(q − p) mod b] / in at (p, q), c = kernel[i, j].

    Source: Chen et al. 2024, arXiv:2407.19342, section 3; the division by `in` is PEFT's.
    """
    rows, cols, size = module.shape("c3a_kernel", 3)
    return LazyDelta(Dense, (rows * size, cols * size), functools.partial(_load, module))


def _load(module: ModuleTensors) -> Dense:
    rows, cols, size = module.shape("c3a_kernel", 3)
    shape = (rows * size, cols * size)
    steps = torch.arange(size)
    blocks = module.read("c3a_kernel", rows, cols, size)[:, :, (steps - steps[:, None]) % size]
    values = blocks.transpose(1, 2).reshape(shape) / shape[1]
    return Dense(values, layout=module.layout(shape))


register(tuner("C3A", "c3a_", entry))
