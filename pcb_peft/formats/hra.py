"""HRA: the inputs of W go through a few reflections."""

import functools

import torch

from pcb_peft.deltas.delta import LowRank
from pcb_peft.errors import AdapterError
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.lazy_delta import AdapterContents, Config, LazyDelta
from pcb_peft.formats.peft_layer import WHY, Tuner, entries_by_peft
from pcb_peft.formats.registry import Format, register
from pcb_peft.formats.tuner import ModuleTensors, contents

TUNER = Tuner("hra_")


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the changes of an HRA checkpoint.

    Raises:
        BaseModelError: No base model was given.
    """
    return contents(config, tensors, base, TUNER.prefix, entries)


def entries(module: ModuleTensors) -> dict[str, LazyDelta]:
    """Return one module's change: W Π (I − 2 u uᵀ) − W, u the normalised columns of hra_u (in, r); a LoRA of rank r.

    Source: Yuan et al. 2024, arXiv:2405.17484, equation 5. With `apply_GS`, PEFT's own layer makes the u orthogonal.
    """
    if module.config.get("apply_GS"):
        return entries_by_peft(module, TUNER)
    shape, rank = module.base_shape(WHY), module.shape("hra_u", 2)[1]
    if rank == 0:
        raise AdapterError(f"{module.path}: hra_u has no columns: the adapter has the rank 0")
    return {
        module.path: LazyDelta(LowRank, shape, functools.partial(_load, module, shape, rank), rank)
    }


def _load(module: ModuleTensors, shape: tuple[int, int], rank: int) -> LowRank:
    layout = module.layout(shape)
    weight = layout.matrix(module.base_model(WHY).weight(module.path)).double()
    lora_A = torch.nn.functional.normalize(module.read("hra_u", shape[1], rank).double().T)
    columns = []
    for u in lora_A:
        columns.append(-2 * weight @ u)
        weight = weight + columns[-1][:, None] * u
    return LowRank(lora_A.float(), torch.stack(columns, 1).float(), layout=layout)


register(Format("HRA", read))
