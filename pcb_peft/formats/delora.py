"""DeLoRA: a low-rank change whose factors are normalised, and whose strength is a number of its own."""

import torch

from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats.registry import LazyDelta, register
from pcb_peft.formats.tuner import Parts, tuner

SMALLEST = 1e-4  # of a norm that is divided by, in PEFT


def entry(parts: Parts) -> LazyDelta:
    """One module's change: B diag(λ / (r ‖a_i‖ ‖b_i‖)) A, its columns times the norms that W had at first.

    Source: Bini et al. 2025, arXiv:2503.18225, equation 8; PEFT scales the columns by W's, not the whole by ‖W‖_F.
    """
    (rank, width), (height, _) = parts.shape("delora_A"), parts.shape("delora_B")

    def load() -> LowRank:
        lora_A, lora_B = parts.read("delora_A", rank, width), parts.read("delora_B", height, rank)
        norms = torch.linalg.vector_norm(lora_A, dim=1).clamp(min=SMALLEST)
        norms = norms * torch.linalg.vector_norm(lora_B, dim=0).clamp(min=SMALLEST)
        gain = parts.read("delora_lambda", 1) / (rank * norms)
        columns = parts.read("delora_w_norm", width)
        return LowRank(lora_A * columns, lora_B * gain, layout=parts.layout((height, width)))

    return LazyDelta(LowRank, (height, width), load, rank)


register(tuner("DELORA", "delora_", entry))
