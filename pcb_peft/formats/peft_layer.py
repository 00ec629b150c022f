"""The change that PEFT's own layer makes to one weight: for every tuner that PEFT can merge.

One weight of the base model at a time is put into a layer at its own path. PEFT wraps that layer as the adapter's
configuration says, loads its tensors and merges them. The result is that of PEFT's merge_and_unload, in float32, and
never more than one module of the model is in memory.
"""

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pcb_peft.deltas.delta import Delta, Dense
from pcb_peft.deltas.layout import Layout
from pcb_peft.errors import AdapterError, PcbPeftError, UnsupportedError
from pcb_peft.formats.base_weights import Weights
from pcb_peft.formats.checkpoint import CONFIG, check_finite
from pcb_peft.formats.keys import PREFIX
from pcb_peft.formats.lazy_delta import Config, LazyDelta, vector_delta
from pcb_peft.formats.tuner import ModuleTensors
from pcb_peft.runtime.shown import shown

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER = "default"
WHY = "its change is computed by PEFT's own layer from W"
ONLY_FOR_INJECTION = {  # fields that choose modules, or concern more than deltas; here the module is chosen
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "bias": "none",
    "task_type": None,
}
_OF_PEFT = (  # what PEFT's tuners raise for settings and shapes that they do not expect
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError),
    *(TypeError, ValueError),
)
CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclasses.dataclass(frozen=True, slots=True)
class Tuner:
    """One of PEFT's tuners.

    Attributes:
        prefix: Beginning of the names of its tensors.
        changes: Parameters of a module that it changes.
        depends_on_largest: True where the size of what all modules share follows from the largest module.
    """

    prefix: str
    changes: tuple[str, ...] = ("weight",)
    depends_on_largest: bool = False


def entries_by_peft(module: ModuleTensors, tuner: Tuner) -> dict[str, LazyDelta]:
    """Return the entries of one module.

    Raises:
        BaseModelError: No base model was given.
    """
    shape = module.base_shape(WHY)
    base = module.base_model(WHY)
    entries: dict[str, LazyDelta] = {}
    if "weight" in tuner.changes:
        load = functools.partial(_change, module, tuner, "weight")
        entries[module.path] = LazyDelta(Dense, shape, load)
    if "bias" in tuner.changes and base.bias(module.path) is not None:
        bias = vector_delta(torch.zeros(shape[0]))
        load = functools.partial(_change, module, tuner, "bias")
        entries[f"{module.path}.bias"] = LazyDelta(type(bias), bias.shape, load, bias.rank)
    return entries


def _change(module: ModuleTensors, tuner: Tuner, kind: str) -> Delta:
    """Return what PEFT adds to a module's weight, or to its bias."""
    base, path = module.base_model(WHY), module.path
    layer = _layer(base, path)
    before = {name: values.detach().clone() for name, values in layer.named_parameters()}
    layers = {path: layer}
    if tuner.depends_on_largest:
        others = {other: _outline(base, other) for other in module.all_paths if other != path}
        layers = {**others, path: layer}
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        _refusals(path, "PEFT itself refuses it"),
    ):
        warnings.simplefilter("ignore")  # PEFT warns of a model with only a few of its layers
        wrapped = _wrapped(module, layers)
        _load(module, tuner, wrapped)
        target: Any = wrapped.get_submodule(PREFIX + path)
        try:
            target.merge()
        except RuntimeError as error:  # such as an OFT of a kernel that is not square
            reason = " ".join(str(error).split())
            raise UnsupportedError(
                f"{path}: PEFT itself cannot merge this {module.config['peft_type']} ({reason}); leave the module out"
            ) from error
    after: nn.Module = target.get_base_layer()
    change = after.get_parameter(kind).detach() - before[kind]
    if kind == "bias":
        return vector_delta(change)
    layout = base.layout(path, module.base_shape(WHY))
    return Dense(layout.matrix(change).contiguous(), layout=layout)


def _wrapped(module: ModuleTensors, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return PEFT's model around these layers alone."""
    import peft

    config = _config(module.config, list(layers))
    return peft.get_peft_model(_model(layers), config, adapter_name=ADAPTER).eval()


@contextlib.contextmanager
def _refusals(module: str, what: str) -> Generator[None]:
    """Raise UnsupportedError for what PEFT's code raises in the block: it meets a stranger's settings and tensors."""
    try:
        yield
    except PcbPeftError:
        raise
    except _OF_PEFT as error:
        raise UnsupportedError(f"{module}: {what}: {shown(error)}") from error


def _config(config: Config, modules: Sequence[str]) -> "PeftConfig":
    from peft import PeftConfig

    fields: dict[str, Any] = copy.deepcopy(dict(config))
    fields |= {name: value for name, value in ONLY_FOR_INJECTION.items() if name in fields}
    fields["target_modules"] = modules
    kind = f"the installed PEFT does not take this configuration of peft_type {config['peft_type']}"
    with _refusals(CONFIG, kind):
        return PeftConfig.from_peft_type(**fields)


def _load(module: ModuleTensors, tuner: Tuner, wrapped: nn.Module) -> None:
    """Load the adapter's tensors into PEFT's layer; both must have the same tensors."""
    from peft import set_peft_model_state_dict

    values = {name: _checked(module, name) for name in module.names.values()}
    with _refusals(module.path, "PEFT cannot load its tensors"):
        result = set_peft_model_state_dict(wrapped, values, adapter_name=ADAPTER)
    prefix = f"{PREFIX}{module.path}."
    missing = [
        name
        for name in result.missing_keys
        if name.startswith(prefix + tuner.prefix)
        and name.removeprefix(prefix).replace(f".{ADAPTER}", "") not in module.names  # is shared
    ]
    if missing:
        names = ", ".join(sorted(missing))
        raise AdapterError(f"{module.path}: the adapter has no {names}, which PEFT's layer needs")
    if result.unexpected_keys:
        names = ", ".join(sorted(result.unexpected_keys))
        raise AdapterError(f"{module.path}: PEFT's layer has no place for {names}")


def _checked(module: ModuleTensors, name: str) -> Tensor:
    values = module.tensors.read(name)
    values = values.float() if values.is_floating_point() else values
    check_finite(values, module.tensors, name)
    return values


def _model(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a model that has these layers, each at its path, and nothing else."""
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
    """Return a layer of the base model, with its values in float32."""
    weight, bias = base.weight(module).float(), base.bias(module)
    layer = _empty_layer(base, module, tuple(weight.shape), bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    return layer


def _outline(base: Weights, module: str) -> nn.Module:
    """Return a layer of the same size whose weight takes no memory: one zero stands for all values."""
    shape = base.shape(module)
    layer = _empty_layer(base, module, shape, bias=False)
    layer.weight = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    return layer


def _empty_layer(base: Weights, module: str, shape: tuple[int, ...], bias: bool) -> nn.Module:
    """Return a layer of the kind that the base model has, on the meta device."""
    layer = base.layer(module)
    if layer is not None:
        return copy.deepcopy(layer).to("meta")
    with torch.device("meta"):
        return _layer_of_shape(base.layout(module, (1, 1)), shape, bias)


def _layer_of_shape(layout: Layout, shape: tuple[int, ...], bias: bool) -> nn.Module:
    """Return a layer for a weight of this shape where transformers does not know the architecture."""
    from transformers.pytorch_utils import Conv1D

    if layout.transposed:
        return Conv1D(shape[1], shape[0])
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=bias)
    if len(shape) in CONVOLUTIONS:
        return CONVOLUTIONS[len(shape)](shape[1], shape[0], shape[2:], bias=bias)
    raise UnsupportedError(f"a weight of shape {shape} belongs to no layer that PEFT can wrap")
