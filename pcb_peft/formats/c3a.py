"""C3A: a matrix of circulant blocks."""

import torch

from pcb_peft.deltas.delta import Dense
from pcb_peft.formats.registry import LazyDelta, register
from pcb_peft.formats.tuner import Parts, tuner


def entry(parts: Parts) -> LazyDelta:
    """One module's change: block (i, j) holds c[(q − p) mod b] / in at (p, q), c = kernel[i, j].

    Source: Chen et al. 2024, arXiv:2407.19342, section 3; the division by `in` is PEFT's.
    """
    rows, cols, size = parts.shape("c3a_kernel")
    shape = (rows * size, cols * size)

    def load() -> Dense:
        steps = torch.arange(size)
        blocks = parts.read("c3a_kernel", rows, cols, size)[:, :, (steps - steps[:, None]) % size]
        values = blocks.transpose(1, 2).reshape(shape) / shape[1]
        return Dense(values, layout=parts.layout(shape))

    return LazyDelta(Dense, shape, load)


register(tuner("C3A", "c3a_", entry))
