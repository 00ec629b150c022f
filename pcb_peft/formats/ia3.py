"""(IA)³: layers whose input or output is scaled by a learned vector l."""

import functools
import math
import re
from collections.abc import Mapping

import torch

from pcb_peft.deltas.delta import Diagonal
from pcb_peft.deltas.layout import CONV1D, LINEAR, Layout
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.files.patterns import Expression
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import Tensors, read_finite
from pcb_peft.formats.heads import saved_parameters
from pcb_peft.formats.keys import PREFIX, module_of
from pcb_peft.formats.lazy_delta import AdapterContents, AdapterFiles, Config, LazyDelta
from pcb_peft.formats.registry import Format, register

SUFFIX = ".ia3_l"


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the scalings of an (IA)³ checkpoint.

    Raises:
        UnsupportedError: A layer is neither linear nor a convolution.
    """
    del base
    names = tensors.names()
    keys = [name for name in names if name.endswith(SUFFIX)]
    entries = {module_of(key.removesuffix(SUFFIX)): _entry(config, tensors, key) for key in keys}
    rest = [name for name in names if not name.endswith(SUFFIX)]
    return AdapterContents(entries, saved_parameters(tensors, rest))


def _entry(config: Config, tensors: Tensors, key: str) -> LazyDelta:
    shape = tensors.shape(key)
    if len(shape) < 2 or max(shape) != math.prod(shape):
        raise UnsupportedError(
            f"{key} has shape {shape}; only (out, 1), (1, in) and those of convolutions are supported"
        )
    convolution = len(shape) > 2  # there l is (1, n, 1, …), whatever it scales
    feedforward = _is_feedforward(config, key) if convolution else shape[0] == 1
    layout = CONV1D if config.get("fan_in_fan_out") else LINEAR
    layout = Layout(shape=shape) if convolution else layout
    size = math.prod(shape)
    load = functools.partial(_load, tensors, key, feedforward, layout)
    return LazyDelta(Diagonal, (1, size) if feedforward else (size, 1), load)


def _load(tensors: Tensors, key: str, feedforward: bool, layout: Layout) -> Diagonal:
    return Diagonal(read_finite(tensors, key).flatten(), feedforward, layout=layout)


def _is_feedforward(config: Config, key: str) -> bool:
    """Decide as PEFT does: by the end of the module's name, or by a regular expression."""
    module, stated = module_of(key.removesuffix(SUFFIX)), config.get("feedforward_modules") or []
    if isinstance(stated, str):
        return Expression(stated, "feedforward_modules", AdapterError).fits(module)
    return module.endswith(tuple(stated))


def write(modules: Mapping[str, Diagonal], dtype: torch.dtype) -> AdapterFiles:
    """Return the deltas as an (IA)³ checkpoint."""
    tensors = {
        PREFIX + module + SUFFIX: delta.l.reshape(_stored_shape(delta)).to(dtype)
        for module, delta in modules.items()
    }
    config = {
        "target_modules": sorted(modules),
        "feedforward_modules": _feedforward(modules),
        "fan_in_fan_out": any(delta.layout.transposed for delta in modules.values()),
        "init_ia3_weights": True,
    }
    return AdapterFiles(config, tensors)


def _stored_shape(delta: Diagonal) -> tuple[int, ...]:
    if delta.layout.shape is None:
        return delta.shape
    return (1, delta.l.numel(), *[1] * (len(delta.layout.shape) - 2))


def _feedforward(modules: Mapping[str, Diagonal]) -> list[str] | str:
    """Name the feed-forward modules as PEFT matches them: by the end of the path, or by an expression if ambiguous."""
    names = sorted(module for module, delta in modules.items() if delta.feedforward)
    others = [module for module, delta in modules.items() if not delta.feedforward]
    if any(other.endswith(tuple(names)) for other in others):
        return "|".join(map(re.escape, names))
    return names


register(Format("IA3", read, kinds=(Diagonal,), write=write))
