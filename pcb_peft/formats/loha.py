"""LoHa: the entrywise product of two low-rank matrices."""

import math

from torch import Tensor

from pcb_peft.deltas.delta import Dense
from pcb_peft.formats.kernels import kernel_layout, lycoris_scaling, product, tucker
from pcb_peft.formats.registry import LazyDelta, register
from pcb_peft.formats.tuner import Parts, tuner


def entry(parts: Parts) -> LazyDelta:
    """One module's change: scaling · (w1_a w1_b) ∘ (w2_a w2_b), of convolutions with a core t1, t2 in each.

    Source: Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098, propositions 1 and 3.
    """
    left, right = parts.shape("hada_w1_a"), parts.shape("hada_w1_b")
    core = parts.shape("hada_t1") if "hada_t1" in parts.names else ()
    kernel = core[2:]
    shape = (left[1] if kernel else left[0], right[1] * math.prod(kernel))
    scaling = lycoris_scaling(parts)

    def load() -> Dense:
        first, second = (_product(parts, number, left, right, core) for number in "12")
        values = (scaling * first * second).reshape(shape)
        return Dense(values, layout=kernel_layout(parts, shape, kernel))

    return LazyDelta(Dense, shape, load)


def _product(parts: Parts, number: str, *shapes: tuple[int, ...]) -> Tensor:
    """One of the two matrices, from tensors of these shapes; there is no core where its shape is empty."""
    left, right, core = shapes
    factors = parts.read(f"hada_w{number}_a", *left), parts.read(f"hada_w{number}_b", *right)
    return tucker(parts.read(f"hada_t{number}", *core), *factors) if core else product(*factors)


register(tuner("LOHA", "hada_", entry))
