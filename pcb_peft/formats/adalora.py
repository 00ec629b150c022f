"""AdaLoRA: ΔW = scaling · lora_B @ diag(lora_E) @ lora_A, with as many singular values as training has left."""

import functools

import torch
from torch import Tensor

from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.formats.registry import register
from pcb_peft.formats.tuner import ModuleTensors, tuner

TINY = 1e-5  # PEFT's, against a division by zero


def entry(module: ModuleTensors) -> LazyDelta:
    """Return one module's change; the factors of a convolution are those of its flattened kernel.

    Source: Zhang et al. 2023, arXiv:2303.10512, equation 3. In PEFT the scaling is alpha over the initial rank,
    whatever rank training has left.
    """
    (rank, width), (height, _) = (
        module.shape(part, 2, empty=True) for part in ("lora_A", "lora_B")
    )
    scaling = module.number("lora_alpha") / (module.number("init_r") + TINY)
    load = functools.partial(_load, module, rank, (height, width), scaling)
    return LazyDelta(LowRank, (height, width), load, max(1, rank))


def _load(module: ModuleTensors, rank: int, shape: tuple[int, int], scaling: float) -> LowRank:
    lora_A = module.read("lora_A", rank, shape[1]) * module.read("lora_E", rank, 1)
    lora_B = module.read("lora_B", shape[0], rank)
    layout = module.layout(shape)
    return LowRank(_at_least_one(lora_A), _at_least_one(lora_B.T).T, scaling, layout=layout)


def _at_least_one(rows: Tensor) -> Tensor:
    """Return the rows, or one row of zeros if there is none: training may leave a module the rank 0."""
    return rows if len(rows) else torch.zeros(1, rows.shape[1])


register(tuner("ADALORA", "lora_", entry))
