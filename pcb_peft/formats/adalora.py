"""AdaLoRA: ΔW = scaling · lora_B @ diag(lora_E) @ lora_A, as many singular values as training has left."""

import torch
from torch import Tensor

from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats.registry import LazyDelta, register
from pcb_peft.formats.tuner import Parts, tuner

TINY = 1e-5  # PEFT's, against a division by zero


def entry(parts: Parts) -> LazyDelta:
    """One module's change; of convolutions the factors are those of the flattened kernel.

    Source: Zhang et al. 2023, arXiv:2303.10512, equation 3. The scaling is alpha over the initial rank, in PEFT,
    whatever rank training has left.
    """
    (rank, width), (height, _) = parts.shape("lora_A"), parts.shape("lora_B")
    scaling = parts.number("lora_alpha") / (parts.number("init_r") + TINY)

    def load() -> LowRank:
        lora_A = parts.read("lora_A", rank, width) * parts.read("lora_E", rank, 1)
        lora_B = parts.read("lora_B", height, rank)
        layout = parts.layout((height, width))
        return LowRank(_at_least_one(lora_A), _at_least_one(lora_B.T).T, scaling, layout=layout)

    return LazyDelta(LowRank, (height, width), load, max(1, rank))


def _at_least_one(rows: Tensor) -> Tensor:
    """The rows, or one of zeros where there is none: training may leave a module the rank 0."""
    return rows if len(rows) else torch.zeros(1, rows.shape[1])


register(tuner("ADALORA", "lora_", entry))
