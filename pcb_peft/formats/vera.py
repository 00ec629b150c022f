"""VeRA: one pair of random matrices for all modules, and two trained vectors for each module."""

import functools

from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.lazy_delta import AdapterContents, Config, LazyDelta
from pcb_peft.formats.peft_layer import Tuner, entries_by_peft
from pcb_peft.formats.registry import Format, register
from pcb_peft.formats.tuner import NO_INPUT_SIZE, ModuleTensors, contents

PREFIX = "vera_lambda_"


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the changes of a VeRA checkpoint.

    Raises:
        BaseModelError: No base model was given, and the adapter does not say how many inputs a module has.
    """
    return contents(config, tensors, base, PREFIX, entries)


def entries(module: ModuleTensors) -> dict[str, LazyDelta]:
    """Return one module's change: diag(λ_b) B diag(λ_d) A, with as many columns of A and rows of B as W has.

    Source: Kopiczko et al. 2024, arXiv:2310.11454, equation 2. PEFT draws A and B again if they were not saved.
    """
    if "vera_A" not in module.names:
        return entries_by_peft(module, Tuner(PREFIX, depends_on_largest=True))
    shape, rank = module.base_shape(NO_INPUT_SIZE), module.shape("vera_A", 2)[0]
    return {module.path: LazyDelta(LowRank, shape, functools.partial(_load, module, shape), rank)}


def _load(module: ModuleTensors, shape: tuple[int, int]) -> LowRank:
    (rank, width), height = module.shape("vera_A", 2), module.shape("vera_B", 2)[0]
    lora_A = module.read("vera_A", rank, width)[:, : shape[1]]
    lora_B = module.read("vera_B", height, rank)[: shape[0]]
    lora_A = module.read("vera_lambda_d", rank)[:, None] * lora_A
    lora_B = module.read("vera_lambda_b", shape[0])[:, None] * lora_B
    return LowRank(lora_A, lora_B, layout=module.layout(shape))


register(Format("VERA", read))
