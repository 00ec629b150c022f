"""DeLoRA: a low-rank change whose factors are normalised, and whose strength is a number of its own."""

import functools

import torch

from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.formats.registry import register
from pcb_peft.formats.tuner import ModuleTensors, tuner

SMALLEST_NORM = 1e-4  # PEFT's: smaller norms count as this


def entry(module: ModuleTensors) -> LazyDelta:
    """Return one module's change: B diag(λ / (r ‖a_i‖ ‖b_i‖)) A, its columns times the norms that W had at first.

    Source: Bini et al. 2025, arXiv:2503.18225, equation 8; PEFT scales the columns by W's, not the whole by ‖W‖_F.
    """
    (rank, width), (height, _) = module.shape("delora_A", 2), module.shape("delora_B", 2)
    load = functools.partial(_load, module, rank, (height, width))
    return LazyDelta(LowRank, (height, width), load, rank)


def _load(module: ModuleTensors, rank: int, shape: tuple[int, int]) -> LowRank:
    lora_A = module.read("delora_A", rank, shape[1])
    lora_B = module.read("delora_B", shape[0], rank)
    norms = torch.linalg.vector_norm(lora_A, dim=1).clamp(min=SMALLEST_NORM)
    norms = norms * torch.linalg.vector_norm(lora_B, dim=0).clamp(min=SMALLEST_NORM)
    gain = module.read("delora_lambda", 1) / (rank * norms)
    columns = module.read("delora_w_norm", shape[1])
    return LowRank(lora_A * columns, lora_B * gain, layout=module.layout(shape))


register(tuner("DELORA", "delora_", entry))
