"""(IA)³: layers whose input or output is scaled by a learned vector l."""

import re
from collections.abc import Mapping

import torch

from pcb_peft.delta import Diagonal
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.registry import (
    PREFIX,
    Config,
    Contents,
    Entry,
    Format,
    Written,
    finite,
    module_of,
    register,
    saved_parameters,
)

L = ".ia3_l"


def read(config: Config, tensors: Tensors) -> Contents:
    """The scalings of an (IA)³ checkpoint.

    Raises:
        UnsupportedError: A layer that is not linear.
    """
    names = tensors.names()
    keys = [name for name in names if name.endswith(L)]
    entries = {module_of(key.removesuffix(L)): _entry(config, tensors, key) for key in keys}
    rest = [name for name in names if not name.endswith(L)]
    return Contents(entries, saved_parameters(tensors, rest))


def _entry(config: Config, tensors: Tensors, key: str) -> Entry:
    shape = tensors.shape(key)
    if len(shape) != 2 or 1 not in shape:
        raise UnsupportedError(
            f"{key} has shape {shape}; only (out, 1) and (1, in) of linear layers are supported"
        )
    feedforward = shape[0] == 1
    flip = bool(config.get("fan_in_fan_out"))

    def load() -> Diagonal:
        return Diagonal(finite(tensors, key).flatten(), feedforward, fan_in_fan_out=flip)

    return Entry(Diagonal, (shape[0], shape[1]), load)


def write(modules: Mapping[str, Diagonal], dtype: torch.dtype) -> Written:
    """The deltas as an (IA)³ checkpoint."""
    tensors = {
        PREFIX + module + L: delta.l.reshape(delta.shape).to(dtype)
        for module, delta in modules.items()
    }
    config = {
        "target_modules": sorted(modules),
        "feedforward_modules": _feedforward(modules),
        "fan_in_fan_out": any(delta.fan_in_fan_out for delta in modules.values()),
        "init_ia3_weights": True,
    }
    return Written(config, tensors)


def _feedforward(modules: Mapping[str, Diagonal]) -> list[str] | str:
    """The feed-forward modules as PEFT tells them: by the end of the name; by an expression where that is ambiguous."""
    names = sorted(module for module, delta in modules.items() if delta.feedforward)
    others = [module for module, delta in modules.items() if not delta.feedforward]
    if any(other.endswith(tuple(names)) for other in others):
        return "|".join(map(re.escape, names))
    return names


register(Format("IA3", read, Diagonal, write))
