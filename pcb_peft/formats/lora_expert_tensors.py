"""LoRA of the experts of a layer in two tensors of three dimensions, as Tinker writes it and SGLang reads it.

``experts.w1.lora_A`` has the shape (E, r, in) and ``experts.w1.lora_B`` (E, out, r); E is 1 where all experts share
that side. w1, w3 and w2 are the gate, the projection up and the projection down. PEFT has no such form.
"""

import functools
from collections.abc import Sequence

from pcb_peft.deltas.delta import LowRank
from pcb_peft.errors import AdapterError
from pcb_peft.formats.checkpoint import Tensors, read_finite
from pcb_peft.formats.lazy_delta import Config, LazyDelta
from pcb_peft.formats.lora_parts import LoraTensors, scaling_of

NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
OWN_NAMES = "block_sparse_moe.experts"  # where an expert's matrices have these names themselves
DIMENSIONS = 3


def read_expert_tensors(
    config: Config, tensors: Tensors, modules: Sequence[LoraTensors]
) -> tuple[dict[str, LazyDelta], list[LoraTensors]]:
    """Return the deltas of experts that share tensors, one by one, and the modules that do not.

    Raises:
        AdapterError: Two tensors do not fit each other.
    """
    entries: dict[str, LazyDelta] = {}
    rest: list[LoraTensors] = []
    for lora in modules:
        if _holds_experts(tensors, lora):
            entries |= _entries(config, tensors, lora)
        else:
            rest.append(lora)
    return entries, rest


def _holds_experts(tensors: Tensors, lora: LoraTensors) -> bool:
    container = lora.path.rpartition(".")[0]
    if container.rpartition(".")[2] != "experts" or not {"lora_A", "lora_B"} <= lora.names.keys():
        return False
    return all(len(tensors.shape(lora.names[part])) == DIMENSIONS for part in ("lora_A", "lora_B"))


def _entries(config: Config, tensors: Tensors, lora: LoraTensors) -> dict[str, LazyDelta]:
    name_A, name_B = lora.names["lora_A"], lora.names["lora_B"]
    (count_A, rank, inputs), (count_B, outputs, rank_B) = (
        tensors.shape(name_A),
        tensors.shape(name_B),
    )
    if rank != rank_B or (count_A != count_B and 1 not in (count_A, count_B)):
        raise AdapterError(
            f"{lora.path}: lora_A {tensors.shape(name_A)} and lora_B {tensors.shape(name_B)} are not those of the same "
            "experts at one rank"
        )
    container, _, leaf = lora.path.rpartition(".")
    leaf = leaf if container.endswith(OWN_NAMES) else NAMES.get(leaf, leaf)
    scaling = scaling_of(config, lora, rank)
    return {
        f"{container}.{expert}.{leaf}": LazyDelta(
            LowRank,
            (outputs, inputs),
            functools.partial(_load, tensors, name_A, name_B, expert, scaling),
            rank,
        )
        for expert in range(max(count_A, count_B))
    }


def _load(tensors: Tensors, name_A: str, name_B: str, expert: int, scaling: float) -> LowRank:
    lora_A, lora_B = read_finite(tensors, name_A), read_finite(tensors, name_B)
    return LowRank(lora_A[expert % len(lora_A)], lora_B[expert % len(lora_B)], scaling)
