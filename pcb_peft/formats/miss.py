"""MiSS: a small matrix, repeated along the inputs."""

import functools

import torch

from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.peft_layer import Tuner, entries_by_peft
from pcb_peft.formats.registry import AdapterContents, Base, Config, Format, LazyDelta, register
from pcb_peft.formats.tuner import Parts, contents

PREFIX = "miss_"


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """The changes of a MiSS checkpoint.

    Raises:
        BaseModelError: No base model was given, and the adapter does not tell how many inputs a module has.
    """
    multiplies = config.get("init_weights") == "bat"  # W·D + D: as PEFT's own layer makes it
    entries = functools.partial(entries_by_peft, tuner=Tuner(PREFIX)) if multiplies else repeated
    return contents(config, tensors, base, PREFIX, entries)


def repeated(parts: Parts) -> dict[str, LazyDelta]:
    """One module's change: Dᵀ [I I I …], D (r, out), the last I cut off where W ends; a LoRA of rank r.

    Source: Kang & Yin 2025, arXiv:2409.15371, section 3; "mini" repeats D along the outputs too.
    """
    shape = parts.base_shape("its number of inputs is not in the adapter")
    rank, length = parts.shape("miss_block")

    def load() -> LowRank:
        columns = torch.arange(shape[1]) % rank
        lora_A = torch.nn.functional.one_hot(columns, rank).float().T.contiguous()
        lora_B = parts.read("miss_block", rank, length).repeat(1, shape[0] // length).T.contiguous()
        return LowRank(lora_A, lora_B, layout=parts.layout(shape))

    return {parts.module: LazyDelta(LowRank, shape, load, rank)}


register(Format("MISS", read))
