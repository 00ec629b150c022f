"""VeRA: one pair of random matrices for all modules, and two trained vectors for each."""

from pcb_peft.deltas.delta import LowRank
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.peft_layer import Tuner, entries_by_peft
from pcb_peft.formats.registry import AdapterContents, Base, Config, Format, LazyDelta, register
from pcb_peft.formats.tuner import Parts, contents

PREFIX = "vera_lambda_"


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """The changes of a VeRA checkpoint.

    Raises:
        BaseModelError: No base model was given, and the adapter does not tell how many inputs a module has.
    """
    return contents(config, tensors, base, PREFIX, entries)


def entries(parts: Parts) -> dict[str, LazyDelta]:
    """One module's change: diag(λ_b) B diag(λ_d) A, with as many columns of A and rows of B as W has.

    Source: Kopiczko et al. 2024, arXiv:2310.11454, equation 2. A and B that were not saved are drawn again by PEFT.
    """
    if "vera_A" not in parts.names:
        return entries_by_peft(parts, Tuner(PREFIX, measures_all=True))
    shape = parts.base_shape("its number of inputs is not in the adapter")
    random_A, random_B = parts.shape("vera_A"), parts.shape("vera_B")
    rank = random_A[0]

    def load() -> LowRank:
        lora_A = parts.read("vera_A", rank, *random_A[1:])[:, : shape[1]]
        lora_B = parts.read("vera_B", *random_B[:1], rank)[: shape[0]]
        lora_A = parts.read("vera_lambda_d", rank)[:, None] * lora_A
        lora_B = parts.read("vera_lambda_b", shape[0])[:, None] * lora_B
        return LowRank(lora_A, lora_B, layout=parts.layout(shape))

    return {parts.module: LazyDelta(LowRank, shape, load, rank)}


register(Format("VERA", read))
