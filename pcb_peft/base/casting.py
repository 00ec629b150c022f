"""A checkpoint seen in another dtype."""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from pcb_peft.base.model import BaseModel
from pcb_peft.base.quantised import QuantisedWeight
from pcb_peft.deltas.dtypes import SAFETENSORS_FLOATS


def cast_model(base: BaseModel, dtype: torch.dtype) -> BaseModel:
    """Return a base model whose floating-point tensors have another dtype; values are rounded when they are written.

    Tensors that have that dtype already stay as they are.
    """
    name = next(name for name, one in SAFETENSORS_FLOATS.items() if one == dtype)
    tensors, computed = dict(base.tensors), dict(base.quantised)
    for parameter, place in base.tensors.items():
        if place.dtype not in SAFETENSORS_FLOATS or place.dtype == name:
            continue
        end = place.begin + dtype.itemsize * math.prod(place.shape)
        tensors[parameter] = dataclasses.replace(place, end=end, dtype=name)
        values = functools.partial(_float32, base, parameter)
        computed[parameter] = QuantisedWeight(name, (parameter,), place.shape, values)
    if computed == base.quantised:
        return base
    config = dict(base.config) | {
        key: str(dtype).removeprefix("torch.")
        for key in ("dtype", "torch_dtype")
        if key in base.config
    }
    return BaseModel(base.source, base.directory, config, tensors, computed)


def _float32(base: BaseModel, parameter: str) -> Tensor:
    return base.tensor(parameter).float()
