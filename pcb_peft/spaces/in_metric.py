"""Any space in the metric of a module's inputs: adapters compete as ΔW_t P, and the merge M leaves as M P⁻¹."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pcb_peft.deltas.delta import Delta
from pcb_peft.deltas.metric import ModuleMetric
from pcb_peft.spaces.registry import Encode, Projection


def in_metric(encode: Encode, metric: ModuleMetric) -> Encode:
    """Return the space of ΔW_t P.

    Args:
        encode: The space.
        metric: P.
    """
    return functools.partial(_encode, encode, metric)


def _encode(
    encode: Encode,
    metric: ModuleMetric,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    **options: Any,
) -> Projection:
    inner = encode([metric.enter(delta) for delta in deltas], weights, **options)

    def decode(merged: Sequence[Tensor]) -> Delta:
        return metric.leave(inner.decode(merged))

    return dataclasses.replace(inner, decode=decode, project_statistic={})
