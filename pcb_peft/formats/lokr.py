"""LoKr: the Kronecker product of two matrices, each of them whole or factored."""

from torch import Tensor

from pcb_peft.formats.kernels import lycoris_scaling
from pcb_peft.formats.lazy_delta import LazyDelta
from pcb_peft.formats.lycoris import kron, lokr_change
from pcb_peft.formats.registry import register
from pcb_peft.formats.tuner import ModuleTensors, tuner


def entry(module: ModuleTensors) -> LazyDelta:
    """Return one module's change, at PEFT's scaling.

    On a Conv1d, PEFT multiplies w1 (a, b) with w2 (c, d, k) as (1, a, b) with it, in training as in merging, and so
    does this.
    """
    return lokr_change(module, lycoris_scaling(module), _kron_of_peft)


def _kron_of_peft(w1: Tensor, w2: Tensor) -> Tensor:
    return kron(w1 if w2.ndim == 4 else w1[(*[None] * (w2.ndim - w1.ndim), ...)], w2)


register(tuner("LOKR", "lokr_", entry))
