"""HRA: the inputs of W go through a few reflections."""

import torch

from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.peft_layer import WHY, Tuner, entries_by_peft, opened
from pcb_peft.formats.registry import AdapterContents, Base, Config, Format, LazyDelta, register
from pcb_peft.formats.tuner import Parts, contents

TUNER = Tuner("hra_")


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """The changes of an HRA checkpoint.

    Raises:
        BaseModelError: No base model was given.
    """
    return contents(config, tensors, base, TUNER.prefix, entries)


def entries(parts: Parts) -> dict[str, LazyDelta]:
    """One module's change: W Π (I − 2 u uᵀ) − W, u the normalised columns of hra_u (in, r); a LoRA of rank r.

    Source: Yuan et al. 2024, arXiv:2405.17484, equation 5. With `apply_GS`, PEFT's own layer makes the u orthogonal.
    """
    if parts.config.get("apply_GS"):
        return entries_by_peft(parts, TUNER)
    shape = parts.base_shape(WHY)
    rank = parts.shape("hra_u")[1]

    def load() -> LowRank:
        layout = parts.layout(shape)
        weight = layout.matrix(opened(parts).weight(parts.module)).double()
        lora_A = torch.nn.functional.normalize(parts.read("hra_u", shape[1], rank).double().T)
        columns = []
        for u in lora_A:
            columns.append(-2 * weight @ u)
            weight = weight + columns[-1][:, None] * u
        return LowRank(lora_A.float(), torch.stack(columns, 1).float(), layout=layout)

    return {parts.module: LazyDelta(LowRank, shape, load, rank)}


register(Format("HRA", read))
