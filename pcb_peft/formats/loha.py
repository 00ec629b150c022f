"""LoHa: the entrywise product of two low-rank matrices."""

import functools
import math

from torch import Tensor

from pcb_peft.deltas.delta import Dense
from pcb_peft.formats.kernels import kernel_layout, lycoris_scaling, product, tucker
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.formats.registry import register
from pcb_peft.formats.tuner import ModuleTensors, tuner


def entry(module: ModuleTensors) -> LazyDelta:
    """Return one module's change: scaling · (w1_a w1_b) ∘ (w2_a w2_b), with a core t1, t2 in each of a convolution.

    Source: Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098, propositions 1 and 3.
    """
    left, right = module.shape("hada_w1_a", 2), module.shape("hada_w1_b", 2)
    core = module.shape("hada_t1", 3, 4, 5) if "hada_t1" in module.names else ()
    kernel = core[2:]
    shape = (left[1] if kernel else left[0], right[1] * math.prod(kernel))
    scaling = lycoris_scaling(module)
    load = functools.partial(_load, module, scaling, shape, (left, right, core))
    return LazyDelta(Dense, shape, load)


def _load(
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


register(tuner("LOHA", "hada_", entry))
