"""The change that PEFT's own layer makes to one weight: for every tuner that PEFT can merge.

One weight of the base model at a time is put into a layer at its own path, PEFT wraps that layer as the adapter's
configuration says, loads its tensors and merges them: what is computed is PEFT's merge_and_unload, in float32, and
never more than one module of the model is in memory.
"""

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pcb_peft.deltas.delta import Delta, Dense
from pcb_peft.deltas.layout import Layout
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.registry import (
    PREFIX,
    Config,
    LazyDelta,
    Weights,
    checked,
    vector_delta,
)
from pcb_peft.formats.tuner import Parts

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER = "default"
WHY = "its change is what PEFT's own layer makes of W"
ONLY_FOR_INJECTION = {  # fields that choose modules, or name what is no delta; here one module is chosen already
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "bias": "none",
    "task_type": None,
}
CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclasses.dataclass(frozen=True, slots=True)
class Tuner:
    """A tuner of PEFT's.

    Attributes:
        prefix: With which the names of its tensors begin.
        changes: Which parameters of a module.
        measures_all: The size of what all modules share follows from the largest of them.
    """

    prefix: str
    changes: tuple[str, ...] = ("weight",)
    measures_all: bool = False


def entries_by_peft(parts: Parts, tuner: Tuner) -> dict[str, LazyDelta]:
    """The entries of one module.

    Raises:
        BaseModelError: No base model was given.
    """
    shape = parts.base_shape(WHY)
    base = opened(parts)
    entries: dict[str, LazyDelta] = {}
    if "weight" in tuner.changes:
        entries[parts.module] = LazyDelta(Dense, shape, lambda: _change(parts, tuner, "weight"))
    if "bias" in tuner.changes and base.bias(parts.module) is not None:
        bias = vector_delta(torch.zeros(shape[0]))
        entries[f"{parts.module}.bias"] = LazyDelta(
            type(bias), bias.shape, lambda: _change(parts, tuner, "bias"), bias.rank
        )
    return entries


def opened(parts: Parts) -> Weights:
    """The base model of parts that have one."""
    assert parts.base is not None  # noqa: S101  (base_shape has raised before)
    return parts.base()


def _change(parts: Parts, tuner: Tuner, kind: str) -> Delta:
    """What PEFT adds to a module's weight, or to its bias."""
    base, module = opened(parts), parts.module
    layer = _layer(base, module)
    before = {name: values.detach().clone() for name, values in layer.named_parameters()}
    others = {other: _outline(base, other) for other in parts.everywhere if other != module}
    layers = {**others, module: layer} if tuner.measures_all else {module: layer}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's words on a model with only a few of its layers
        wrapped = _wrapped(parts, layers)
        _load(parts, tuner, wrapped)
        target: Any = wrapped.get_submodule(PREFIX + module)
        target.merge()
    after: nn.Module = target.get_base_layer()
    change = after.get_parameter(kind).detach() - before[kind]
    if kind == "bias":
        return vector_delta(change)
    layout = base.layout(module, parts.base_shape(WHY))
    return Dense(layout.matrix(change).contiguous(), layout=layout)


def _wrapped(parts: Parts, layers: Mapping[str, nn.Module]) -> nn.Module:
    """PEFT's model around these layers alone."""
    import peft

    config = _config(parts.config, list(layers))
    try:
        return peft.get_peft_model(_model(layers), config, adapter_name=ADAPTER).eval()
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedError(f"{parts.module}: PEFT itself refuses it: {error}") from error


def _config(config: Config, modules: Sequence[str]) -> "PeftConfig":
    from peft import PeftConfig

    fields: dict[str, Any] = copy.deepcopy(dict(config))
    fields |= {name: value for name, value in ONLY_FOR_INJECTION.items() if name in fields}
    fields["target_modules"] = modules
    try:
        return PeftConfig.from_peft_type(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"the installed PEFT does not take this configuration of peft_type {config['peft_type']}: {error}"
        ) from error


def _load(parts: Parts, tuner: Tuner, wrapped: nn.Module) -> None:
    """Gives PEFT's layer the adapter's tensors: all that it has, and none that it has not."""
    from peft import set_peft_model_state_dict

    values = {name: _checked(parts, name) for name in parts.names.values()}
    try:
        result = set_peft_model_state_dict(wrapped, values, adapter_name=ADAPTER)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"{parts.module}: PEFT cannot load its tensors: {reason}") from error
    own = f"{PREFIX}{parts.module}."
    missing = [
        name
        for name in result.missing_keys
        if name.startswith(own + tuner.prefix)
        and name.removeprefix(own).replace(f".{ADAPTER}", "") not in parts.names  # is shared
    ]
    for what, names in (("has no", missing), ("has no place for", result.unexpected_keys)):
        if names:
            raise AdapterError(f"{parts.module}: PEFT's layer {what} {', '.join(sorted(names))}")


def _checked(parts: Parts, name: str) -> Tensor:
    values = parts.tensors.read(name)
    values = values.float() if values.is_floating_point() else values
    return checked(values, parts.tensors, name)


def _model(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A model that has these layers, each at its path, and nothing else."""
    model = nn.Module()
    for path, layer in layers.items():
        parent = model
        *names, last = path.split(".")
        for name in names:
            if name not in dict(parent.named_children()):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, layer)
    return model


def _layer(base: Weights, module: str) -> nn.Module:
    """A layer of the base model, with its values in float32."""
    weight, bias = base.weight(module).float(), base.bias(module)
    layer = _empty_layer(base, module, tuple(weight.shape), bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer


def _outline(base: Weights, module: str) -> nn.Module:
    """A layer of the same size, without values: one number takes the place of all."""
    shape = base.shape(module)
    layer = _empty_layer(base, module, shape, bias=False)
    layer.weight = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    return layer


def _empty_layer(base: Weights, module: str, shape: tuple[int, ...], bias: bool) -> nn.Module:
    """A layer of the kind that the base has, on the meta device."""
    known = base.layer(module)
    if known is not None:
        return copy.deepcopy(known).to("meta")
    with torch.device("meta"):
        return _layer_of_shape(base.layout(module, (1, 1)), shape, bias)


def _layer_of_shape(layout: Layout, shape: tuple[int, ...], bias: bool) -> nn.Module:
    """What a weight of this shape is of where transformers does not know the architecture."""
    from transformers.pytorch_utils import Conv1D

    if layout.transposed:
        return Conv1D(shape[1], shape[0])
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=bias)
    if len(shape) in CONVOLUTIONS:
        return CONVOLUTIONS[len(shape)](shape[1], shape[0], shape[2:], bias=bias)
    raise UnsupportedError(f"a weight of shape {shape} is of no layer that PEFT could wrap")
