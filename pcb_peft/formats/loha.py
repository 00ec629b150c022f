"""LoHa: the entrywise product of two low-rank matrices."""

from pcb_peft.formats.kernels import lycoris_scaling
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.formats.lycoris import loha_change
from pcb_peft.formats.registry import register
from pcb_peft.formats.tuner import ModuleTensors, tuner


def entry(module: ModuleTensors) -> LazyDelta:
    """Return one module's change, at PEFT's scaling."""
    return loha_change(module, lycoris_scaling(module))


register(tuner("LOHA", "hada_", entry))
