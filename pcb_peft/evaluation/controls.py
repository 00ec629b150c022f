"""Adapters that should do badly: a merge is worth something only if it does better."""

from collections.abc import Sequence

import torch

from pcb_peft.adapters.adapter import Adapter, DeltaMapping
from pcb_peft.deltas.delta import Delta, Diagonal, LowRank
from pcb_peft.formats import in_memory
from pcb_peft.merging.engine import merge_adapters

RANK = 16  # of a random adapter where the merge is dense


def random_adapter(like: Adapter, seed: int = 0) -> Adapter:
    """An adapter of random numbers, of the same norm in every module as another one."""
    generator = torch.Generator().manual_seed(seed)
    entries = {
        module: in_memory(_random(entry.load(), entry.rank or RANK, generator))
        for module, entry in like.modules.entries.items()
    }
    return Adapter(
        name="random", modules=DeltaMapping(entries), base=like.base, base_model=like.base_model
    )


def uniform_soup(
    adapters: Sequence[Adapter], base_model: str, *, dequantize: bool = False
) -> Adapter:
    """The plain average of the adapters."""
    weights = [1 / len(adapters)] * len(adapters)
    return merge_adapters(
        adapters,
        "linear",
        weights=weights,
        base_model=base_model,
        dequantize=dequantize,
        progress=False,
    )


def _random(delta: Delta, rank: int, generator: torch.Generator) -> Delta:
    norm, (rows, cols) = delta.norm(), delta.shape
    if isinstance(delta, Diagonal):
        change = torch.randn(delta.l.shape, generator=generator)
        return Diagonal(1 + change * (norm / change.norm()), delta.feedforward, layout=delta.layout)
    rank = min(rank, rows, cols)
    lora_A = torch.randn(rank, cols, generator=generator)
    lora_B = torch.randn(rows, rank, generator=generator)
    drawn = LowRank(lora_A, lora_B, layout=delta.layout)
    return LowRank(lora_A, lora_B * (norm / drawn.norm()), layout=delta.layout)
