"""A base model on disk: its tensors, read one at a time, under the names that adapters use."""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcb_peft.base.architecture import NO_SKELETON, Skeleton, build_skeleton
from pcb_peft.base.config import read_config
from pcb_peft.base.files import (
    DOWNLOADED,
    NOT_DOWNLOADED,
    SINGLE_FILE,
    TensorInfo,
    read_index,
    read_tensor_infos,
)
from pcb_peft.base.hub import download
from pcb_peft.base.names import ParameterNames
from pcb_peft.base.pipeline import pipeline_tensors
from pcb_peft.base.places import WeightSlice, places_in_files
from pcb_peft.base.plain_checkpoint import plain_checkpoint, values_in
from pcb_peft.base.quantised import QuantisedWeight, is_quantised
from pcb_peft.base.refusals import no_bias_error, tied_error
from pcb_peft.deltas.layout import CONV1D, LINEAR, Layout, ParameterForm, layout_of
from pcb_peft.errors import BaseModelError, MismatchError
from pcb_peft.runtime.paths import expanded


def open_base_model(
    source: str | Path, revision: str | None = None, *, dequantize: bool = False
) -> "BaseModel":
    """Open a transformers checkpoint without reading a weight.

    Args:
        source: A directory, an image model in one file, or the id of a repository on the Hub (from its cache offline).
        revision: Branch, tag or commit of the repository. A directory has none.
        dequantize: Take a quantised checkpoint (NF4, INT8, GPTQ, AWQ, FP8 …), whose weights are then computed from
            their codes whenever they are read.

    Raises:
        BaseModelError: There is no such model, or it is stored in a form that cannot be read.
    """
    directory = expanded(source)
    if not directory.exists():
        directory = download(
            str(source),
            revision,
            wanted=DOWNLOADED,
            unwanted=NOT_DOWNLOADED,
            error_type=BaseModelError,
        )
    return _open(str(source), directory, dequantize=dequantize)


def _open(source: str, directory: Path, *, dequantize: bool) -> "BaseModel":
    if (tensors := pipeline_tensors(directory)) is not None:
        return BaseModel(source, directory, {}, tensors)
    config = read_config(directory)
    index = read_index(directory)
    stored = read_tensor_infos(directory, sorted(set(index.values())) or [SINGLE_FILE])
    if reason := is_quantised(config, stored):
        if not dequantize:
            raise _quantised_error(source, reason)
        base = BaseModel(source, directory, *plain_checkpoint(config, stored, directory, source))
    else:
        base = BaseModel(source, directory, config, stored)
    for name, file in index.items():
        if name not in stored and base.names.is_required(name):
            raise BaseModelError(
                f"{directory}: the index says {name} is in {file}, which lacks it: fetch the model again"
            )
    return base


def _quantised_error(source: str, reason: str) -> BaseModelError:
    return BaseModelError(
        f"{source} is quantised ({reason}), and a change of rounded codes would be lost; either dequantize=True "
        "(--dequantize) reads its weights as the quantised model computes with them, as an adapter that was trained on "
        "it has seen them, and a fold then writes bfloat16; or give the model that it was made from, in bfloat16, "
        "float16 or float32"
    )


def opened_base(base_model: "str | Path | BaseModel", *, dequantize: bool = False) -> "BaseModel":
    """Return a base model that is open: the one that was given, or the one in a directory or on the Hub."""
    if isinstance(base_model, BaseModel):
        return base_model
    return open_base_model(base_model, dequantize=dequantize)


class LazyBase:
    """A base model that is opened once, when it is first asked for; pickled unopened."""

    def __init__(
        self,
        source: "str | Path | BaseModel",
        directory: Path | None = None,
        dequantize: bool = False,
    ) -> None:
        """Name a base model.

        Args:
            source: Path or hub id, or a base model that is open.
            directory: Directory of the files, if it is known already.
            dequantize: As `open_base_model` takes it.
        """
        self._source, self._directory, self._dequantize = source, directory, dequantize

    def __call__(self) -> "BaseModel":
        """Return the base model; errors are those of `open_base_model`."""
        if isinstance(self._source, BaseModel):
            return self._source
        if self._directory is None:
            self._source = open_base_model(self._source, dequantize=self._dequantize)
        else:
            self._source = _open(str(self._source), self._directory, dequantize=self._dequantize)
        return self._source

    def __reduce__(self) -> tuple[Any, ...]:
        if type(self._source) is BaseModel:
            base = self._source
            return LazyBase, (base.source, base.directory, bool(base.quantised))
        return LazyBase, (self._source, self._directory, self._dequantize)


def lazy_base(
    base_model: "str | Path | BaseModel | None", *, dequantize: bool = False
) -> LazyBase | None:
    """Return the base model, opened once, when it is first asked for; None where there is none."""
    return None if base_model is None else LazyBase(base_model, dequantize=dequantize)


@dataclasses.dataclass(frozen=True, eq=False)
class BaseModel:
    """A checkpoint; made by `open_base_model`.

    A *module* is a path in the model in memory, as adapters name it (``model.layers.0.self_attn.q_proj``); a
    *parameter* is a name in the checkpoint's files. `names` leads from the one to the other.

    Attributes:
        source: Path or hub id, as the caller gave it.
        directory: Directory of the files; the file itself, if it is a checkpoint in one.
        config: ``config.json``; empty for a pipeline of diffusers and for a checkpoint in one file.
        tensors: Name in the files to place and shape. A quantised weight is listed as the layer without quantisation
            has it, in bfloat16, at the place of its codes.
        quantised: The weights that are computed from codes and scales; empty for an ordinary checkpoint.
    """

    source: str
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    quantised: Mapping[str, QuantisedWeight] = dataclasses.field(
        default_factory=dict[str, QuantisedWeight]
    )

    def __reduce__(self) -> tuple[Any, ...]:
        reopen = functools.partial(_open, dequantize=bool(self.quantised))
        return reopen, (self.source, self.directory)

    @property
    def residual(self) -> bool:
        """False: files hold W as it was before an initialisation such as PiSSA took its part out."""
        return False

    @functools.cached_property
    def files(self) -> tuple[str, ...]:
        """Names of the files that hold the weights."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @functools.cached_property
    def names(self) -> ParameterNames:
        """The names of the parameters in memory and in the files."""
        return ParameterNames(self._skeleton, self.tensors, self.config, self.tensor)

    @functools.cached_property
    def _skeleton(self) -> Skeleton:
        return build_skeleton(self.directory) if self.config else NO_SKELETON

    @property
    def input_embeddings(self) -> str | None:
        """Name in memory of the input embeddings; None where transformers does not know the architecture."""
        return self._skeleton.input_embeddings

    def parameter(self, module: str, kind: str = "weight") -> str:
        """Return the name in the files of a module's weight, or of the weight that it is tied to.

        Args:
            module: Path in memory, with or without the prefix of the bare model (``bert.``); or the path of a
                parameter that is not a module's weight (``attn.in_proj_weight``, ``norm.bias``).
            kind: Attribute that holds the weight.

        Raises:
            MismatchError: The base model has no such module.
            BaseModelError: It has the module, but its files store the weight in another form.
        """
        candidates = (f"{module}.{kind}", module)
        tied = (other for name in candidates for other in self.names.tied(name))
        stored = map(self.names.in_files, [*candidates, *tied])
        name = next(filter(None, stored), None)
        if name is None:
            raise self._not_found(module, kind)
        return name

    def bias_parameter(self, module: str) -> str | None:
        """Return the name in memory of a module's bias, or None where it has none."""
        name = f"{module}.bias"
        if self.names.in_files(name) is None and self.names.conversion(name) is None:
            return None
        return self.name_in_memory(module, "bias")

    def name_in_memory(self, module: str, kind: str = "weight") -> str:
        """Return the name in memory of a module's weight, or of a parameter; errors are those of `parameter`.

        A tensor in the files that is only a part of a parameter in memory keeps its name in the files.
        """
        in_model = self._skeleton.in_model(f"{module}.{kind}") or self._skeleton.in_model(module)
        if in_model and self.names.conversion(in_model):
            return in_model
        parameter = self.parameter(module, kind)
        if self.names.is_converted(parameter):
            return parameter
        return in_model or self.names.in_memory(parameter)

    def slices(self, module: str) -> tuple[WeightSlice, ...]:
        """Return the places of a module's weight, from its first rows to its last; errors are those of `parameter`.

        An expert (``mlp.experts.gate_up_proj.3``, ``mlp.experts.3.up_proj``) is part of a stack, or is stored in
        tensors of its own.
        """
        places = places_in_files(module, self.names)
        return places or (WeightSlice(self.parameter(module)),)

    def shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's weight, as it is stored.

        Raises:
            BaseModelError: It holds no values, or has no dimensions; the other errors are those of `parameter`.
        """
        last = self.slices(module)[-1]
        in_memory, in_files = self._skeleton.shape, self.tensors
        whole = in_memory(last.parameter) if last.converted else in_files[last.parameter].shape
        shape = last.shape_in(whole)
        if shape and 0 not in shape:
            return shape
        raise BaseModelError(
            f"{self.source}: the weight of {module} has the shape {shape}, so it is no matrix; fetch the model again"
        )

    def own_parameters(self, module: str) -> dict[str, ParameterForm]:
        """Return the parameters that a module holds itself, in their order.

        Empty where transformers does not know the architecture.
        """
        return self._skeleton.own_parameters(module)

    def tensor(self, parameter: str) -> Tensor:
        """Read the values of a parameter, by its name in the files; those of a quantised weight are float32."""
        if parameter in self.quantised:
            return self.quantised[parameter].values()
        place = self.tensors[parameter]
        return values_in(self.directory / place.file, place.name or parameter)

    def weight(self, module: str) -> Tensor:
        """Read W of a module, as it is stored; errors are those of `parameter`."""
        rows = [place.view(self._values(place)) for place in self.slices(module)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def bias(self, module: str) -> Tensor | None:
        """Read the bias of a module; None where it has none."""
        name = self.bias_parameter(module)
        return None if name is None else self.values(name)

    def values(self, name: str) -> Tensor:
        """Read a parameter by its name in memory, in the arrangement that it has there."""
        conversion = self.names.conversion(name)
        if conversion is None:
            return self.tensor(self.parameter(name))
        tensors = {file: self.tensor(file) for file in conversion.files}
        return conversion.load(tensors)[self.name_in_memory(name)]

    def parameter_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter, by its name in memory."""
        if self.names.conversion(name):
            return self._skeleton.shape(self.name_in_memory(name))
        return self.tensors[self.parameter(name)].shape

    def holds(self, name: str) -> bool:
        """Return whether the files hold a parameter in memory, or a matrix of a stack (``stack.3``)."""
        stack, _, number = name.rpartition(".")
        if number.isdecimal() and self.holds(stack):
            return int(number) < self.parameter_shape(stack)[0]
        return self.names.in_files(name) is not None or self.names.conversion(name) is not None

    def _values(self, place: WeightSlice) -> Tensor:
        """Read the values of a parameter; of a stack they are kept until those of another are asked for."""
        read = self.values if place.converted else self.tensor
        if place.index is None:
            return read(place.parameter)
        latest = self._latest.get(place.parameter)
        if latest is None:
            latest = read(place.parameter)
            self._latest.clear()
            self._latest[place.parameter] = latest
        return latest

    @functools.cached_property
    def _latest(self) -> dict[str, Tensor]:
        return {}

    def layout(self, module: str, shape: tuple[int, int]) -> Layout:
        """Return how a module stores W.

        The class of the layer decides. Where transformers does not know the architecture, or the architecture does not
        have the module, the shapes decide: W has the shape (out, in), or (in, out). A square W fits both; it is
        (out, in) if the layer has no bias (a ``Conv1D`` always has one), or if no layer of the checkpoint is seen to be
        a ``Conv1D`` (W not square, its bias as long as W is wide). What remains is ambiguous.

        Args:
            module: Path in memory.
            shape: (out, in) according to the adapter; 1 stands for a number that it does not know.

        Raises:
            MismatchError: The base model has no such module.
            BaseModelError: Both orientations are possible.
        """
        weight = self.shape(module)
        if len(weight) != 2:
            return Layout(shape=weight)
        place = self._skeleton.place_in_stack(module)
        if place and place.index is None:
            return LINEAR
        stack = place.stack if place else module.rpartition(".")[0]
        container, _, leaf = stack.rpartition(".")
        forms = self.own_parameters(container)
        if leaf in forms:  # one matrix of a stack
            return CONV1D if forms[leaf].transposed else LINEAR
        layer = self.layer(module)
        if layer is not None:
            return layout_of(layer)
        fits_linear, fits_conv1d = _fits(shape, weight), _fits(shape[::-1], weight)
        if not (fits_linear and fits_conv1d):
            return CONV1D if fits_conv1d else LINEAR
        if self.bias_parameter(module) is None or not any(map(self._seen_as_conv1d, self.tensors)):
            return LINEAR
        raise BaseModelError(
            f"{self.source}: the square weight of {module} may be stored as (out, in) or as (in, out): the base model "
            f"has layers of both kinds, and transformers does not know its architecture "
            f"({self.config.get('model_type')}); leave the module out"
        )

    def layer(self, module: str) -> nn.Module | None:
        """Return a module as transformers builds it, on the meta device; None where it does not know it."""
        return self._skeleton.layer(module)

    def _seen_as_conv1d(self, parameter: str) -> bool:
        bias = self.tensors.get(f"{parameter.removesuffix('.weight')}.bias")
        shape = self.tensors[parameter].shape
        if bias is None or len(shape) != 2:
            return False
        rows, cols = shape
        return rows != cols and bias.shape == (cols,)

    def _not_found(self, module: str, kind: str) -> BaseModelError | MismatchError:
        tied = self.names.tied(f"{module}.{kind}")
        if tied:
            return tied_error(self.source, module, tied)
        if self._skeleton.in_model(f"{module}.{kind}") is not None:
            return BaseModelError(
                f"{self.source}: {module} is not in the files as it is in memory (it is fused, "
                "split or permuted when the model is loaded); leave the module out"
            )
        layer = module.removesuffix(".bias")
        if layer != module and f"{layer}.weight" in self.tensors:
            return no_bias_error(self.source, layer)
        modules = [name.removesuffix(f".{kind}") for name in self.tensors if name.endswith(kind)]
        nearest = ", ".join(difflib.get_close_matches(module, modules, n=3)) or "none is similar"
        return MismatchError(
            f"{module} is not in the base model {self.source} (nearest: {nearest}); "
            "give the base that the adapter was trained on"
        )


def _fits(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Return whether a weight may have a shape of which 1 stands for an unknown number."""
    return len(weight) == 2 and all(a in (1, b) for a, b in zip(shape, weight, strict=True))
