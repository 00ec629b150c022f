"""MiSS: a small matrix, repeated along the inputs."""

import functools

import torch

from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.lazy_delta import AdapterContents, Config, LazyDelta
from pcb_peft.formats.peft_layer import Tuner, entries_by_peft
from pcb_peft.formats.registry import Format, register
from pcb_peft.formats.tuner import NO_INPUT_SIZE, ModuleTensors, contents

PREFIX = "miss_"


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the changes of a MiSS checkpoint.

    Raises:
        BaseModelError: No base model was given, and the adapter does not say how many inputs a module has.
    """
    multiplies = config.get("init_weights") == "bat"  # W·D + D: computed by PEFT's own layer
    entries = functools.partial(entries_by_peft, tuner=Tuner(PREFIX)) if multiplies else repeated
    return contents(config, tensors, base, PREFIX, entries)


def repeated(module: ModuleTensors) -> dict[str, LazyDelta]:
    """Return one module's change: Dᵀ [I I I …], D (r, out), the last I cut off where W ends; a LoRA of rank r.

    Source: Kang & Yin 2025, arXiv:2409.15371, section 3; "mini" repeats D along the outputs too.
    """
    shape, rank = module.base_shape(NO_INPUT_SIZE), module.shape("miss_block", 2)[0]
    return {module.path: LazyDelta(LowRank, shape, functools.partial(_load, module, shape), rank)}


def _load(module: ModuleTensors, shape: tuple[int, int]) -> LowRank:
    rank, length = module.shape("miss_block", 2)
    columns = torch.arange(shape[1]) % rank
    lora_A = torch.nn.functional.one_hot(columns, rank).float().T.contiguous()
    lora_B = module.read("miss_block", rank, length).repeat(1, shape[0] // length).T.contiguous()
    return LowRank(lora_A, lora_B, layout=module.layout(shape))


register(Format("MISS", read))
