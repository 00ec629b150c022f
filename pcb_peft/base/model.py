"""A base model on disk: its tensors, read one at a time, under the names that adapters use."""

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pcb_peft.base.architecture import Skeleton, build_skeleton
from pcb_peft.base.files import (
    SINGLE_FILE,
    TensorInfo,
    download,
    read_index,
    read_json,
    read_spans,
    refuse_quantised,
)
from pcb_peft.deltas.layout import CONV1D, LINEAR, Layout, layout_of
from pcb_peft.errors import BaseModelError, MismatchError


@dataclasses.dataclass(frozen=True, slots=True)
class WeightSlice:
    """Where a weight, or some rows of it, lies.

    Attributes:
        parameter: In the checkpoint.
        index: Which matrix of a stack it is; None for a parameter that is no stack.
        rows: Which rows of the weight these are, from the first to behind the last; None for all.
    """

    parameter: str
    index: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def whole(self) -> bool:
        """Whether the parameter and the weight are one and the same."""
        return self.index is None and self.rows is None

    def part(self, values: Tensor) -> Tensor:
        """That of the parameter's values, as a view."""
        return values if self.index is None else values[self.index]


def open_base_model(source: str | Path, revision: str | None = None) -> "BaseModel":
    """Opens a transformers checkpoint without reading a tensor.

    Args:
        source: A directory, or the id of a repository on the hub (from its cache when offline).
        revision: Branch, tag or commit of the repository. A directory has none.

    Raises:
        BaseModelError: There is no such model, or it is stored in a form that cannot be read.
    """
    directory = Path(source).expanduser()
    if not directory.is_dir():
        directory = download(str(source), revision)
    config = read_json(directory / "config.json")
    index = read_index(directory)
    spans = read_spans(directory, sorted(set(index.values())) or [SINGLE_FILE])
    refuse_quantised(config, spans, str(source))
    base = BaseModel(str(source), directory, config, spans)
    lacking = next((name for name in index if name not in spans and base.needs(name)), None)
    if lacking is not None:
        raise BaseModelError(
            f"{directory}: the index says {lacking} is in {index[lacking]}, which lacks it: fetch the model again"
        )
    return base


def lazy_base(
    base_model: "str | Path | BaseModel | None",
) -> "Callable[[], BaseModel] | None":
    """The base model, opened once, when it is first asked for."""
    if base_model is None:
        return None
    if isinstance(base_model, BaseModel):
        return lambda: base_model
    return functools.cache(lambda: open_base_model(base_model))


@dataclasses.dataclass(frozen=True, eq=False)
class BaseModel:
    """A checkpoint; made by `open_base_model`.

    A *module* is a path in the model in memory, as adapters name it
    (``model.layers.0.self_attn.q_proj``); a *parameter* is a name in the checkpoint's files. The
    two differ where the checkpoint was saved from the bare encoder (no ``bert.``), or by an older
    release of transformers.

    Attributes:
        source: What the caller named.
        directory: Where the files are.
        config: ``config.json``.
        spans: Parameter → where it lies.
    """

    source: str
    directory: Path
    config: Mapping[str, Any]
    spans: Mapping[str, TensorInfo]

    @property
    def residual(self) -> bool:
        """Whether an initialisation such as PiSSA has been at the weights: not in files."""
        return False

    @functools.cached_property
    def files(self) -> tuple[str, ...]:
        """Names of the files that hold the weights."""
        return tuple(sorted({span.file for span in self.spans.values()}))

    @property
    def parameters(self) -> Mapping[str, str]:
        """Name in memory → name in the files, for every tensor that is the same in both."""
        return self._in_files

    def parameter(self, module: str, kind: str = "weight") -> str:
        """The name of a module's weight in the checkpoint; of the one that it is tied to, if it has none of its own.

        Args:
            module: Its path in memory, with or without the prefix of the bare model (``bert.``); or the path of a
                parameter that is not a module's weight (``attn.in_proj_weight``, ``norm.bias``).
            kind: The attribute that holds the weight.

        Raises:
            MismatchError: The base has no such module.
            BaseModelError: It has, but its files do not: the weight is stored otherwise.
        """
        names = (f"{module}.{kind}", module)
        candidates = [*names, *(other for name in names for other in self.tied(name))]
        name = next(filter(None, map(self.find, candidates)), None)
        if name is None:
            raise self._not_found(module, kind)
        return name

    def places(self, module: str) -> tuple[WeightSlice, ...]:
        """Where a module's weight lies, from its first rows to its last; raises what `parameter` raises.

        An expert (``mlp.experts.gate_up_proj.3``) is part of a stack, or lies in files of its own.
        """
        stack, _, number = module.rpartition(".")
        if not number.isdecimal() or self.find(f"{module}.weight"):
            return (WeightSlice(self.parameter(module)),)
        name, index = self.find(stack), int(number)
        if name is not None and index < self.spans[name].shape[0]:
            return (WeightSlice(name, index),)
        matrices = self._sources.get(self._skeleton.known(stack) or "", [])
        if index >= len(matrices):
            raise self._not_found(module, "weight")
        heights = [self.spans[name].shape[0] for name in matrices[index]]
        ends = list(itertools.accumulate(heights))
        return tuple(
            WeightSlice(name, rows=(end - height, end))
            for name, height, end in zip(matrices[index], heights, ends, strict=True)
        )

    def shape(self, module: str) -> tuple[int, ...]:
        """Of a module's weight, as it is stored; raises what `parameter` raises."""
        places = self.places(module)
        first, *rest = self.spans[places[0].parameter].shape[places[0].index is not None :]
        rows = places[-1].rows
        return (first if rows is None else rows[1], *rest)

    def held(self, module: str) -> dict[str, tuple[tuple[int, ...], bool]]:
        """The parameters that a module holds itself, in their order: shape, and whether its matrices are (in, out).

        Empty where transformers does not know the architecture.
        """
        return self._skeleton.held(module)

    def in_memory(self, module: str, kind: str = "weight") -> str:
        """The name in memory of a module's weight, or of a parameter; raises what `parameter` raises.

        What is no parameter of its own there, but a part of one, keeps its name in the files.
        """
        parameter, known = self.parameter(module, kind), self._skeleton.known
        if self._skeleton.converts(parameter):
            return parameter
        return known(f"{module}.{kind}") or known(module) or self._skeleton.renamed(parameter)

    def has(self, name: str) -> bool:
        """Whether the model has a parameter of that name in memory, be it tied to another."""
        return self.find(name) is not None or self._skeleton.known(name) is not None

    def needs(self, name: str) -> bool:
        """Whether the model lacks values where the files do not hold the parameter of that name in them.

        It does not where the parameter is tied to one that they hold, or of no use in memory: transformers loads such a
        checkpoint, whose index was written before its files.
        """
        skeleton = self._skeleton
        if not skeleton.parameters:
            return not self.config.get("tie_word_embeddings")
        tied = any(self.find(other) for other in self.tied(name))
        return skeleton.renamed(name) in skeleton.parameters and not tied

    @functools.cached_property
    def inputs(self) -> str | None:
        """The name in memory of the input embeddings; None where transformers does not know the architecture."""
        return self._skeleton.inputs

    @functools.cached_property
    def embeddings(self) -> frozenset[str]:
        """The parameters that have a row for every token, by their names in the files."""
        skeleton = self._skeleton
        if skeleton.parameters:
            return frozenset(filter(None, map(self.find, skeleton.embeddings)))
        size = self.config.get("vocab_size")
        return frozenset(n for n, s in self.spans.items() if s.shape[:1] == (size,) != s.shape)

    def tensor(self, parameter: str) -> Tensor:
        """A parameter's values, freshly read."""
        path = self.directory / self.spans[parameter].file
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(parameter)

    def weight(self, module: str) -> Tensor:
        """W of a module, as it is stored; raises what `parameter` raises."""
        parts = [place.part(self.tensor(place.parameter)) for place in self.places(module)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def bias(self, module: str) -> Tensor | None:
        """The bias of a module, or None where it has none."""
        name = self.bias_parameter(module)
        return None if name is None else self.tensor(name)

    def bias_parameter(self, module: str) -> str | None:
        """The name of a module's bias in the checkpoint, or None where it has none."""
        return self.find(f"{module}.bias")

    def tied(self, parameter: str) -> tuple[str, ...]:
        """What else, in memory, has the values of `parameter`; empty where they are its own.

        Where transformers does not know the architecture, ``tie_word_embeddings`` and the height
        of the weight (a row for every token) tell.
        """
        if self._skeleton.parameters:
            return self._skeleton.tied.get(self._skeleton.renamed(parameter), ())
        span = self.spans.get(parameter)
        tokens = span is not None and span.shape[:1] == (self.config.get("vocab_size"),)
        return ("the output layer",) if tokens and self.config.get("tie_word_embeddings") else ()

    def layout(self, module: str, shape: tuple[int, int]) -> Layout:
        """How a module stores W.

        The class of the layer tells. Where transformers does not know the architecture, or the
        architecture not the module, the shapes tell: W equals `shape`, or is the other way round.
        A square W equals both, and then is (out, in) if the layer has no bias (a ``Conv1D`` always
        has one), or if no layer of the checkpoint is seen to be a ``Conv1D`` (W not square, its
        bias as long as W is wide). What remains is ambiguous.

        Args:
            module: Its path in memory.
            shape: (out, in) according to the adapter; 1 stands for a number that it does not know.

        Raises:
            MismatchError: The base has no such module.
            BaseModelError: Both orientations are possible.
        """
        weight = self.shape(module)
        if len(weight) != 2:
            return Layout(shape=weight)
        container, _, leaf = module.rpartition(".")[0].rpartition(".")
        if leaf in (held := self.held(container)):
            return CONV1D if held[leaf][1] else LINEAR
        layer = self._skeleton.layer(module)
        if layer is not None:
            return layout_of(layer)
        straight, turned = _fits(shape, weight), _fits(shape[::-1], weight)
        if not (straight and turned):
            return CONV1D if turned else LINEAR
        if self.bias_parameter(module) is None or not any(map(self._seen_as_conv1d, self.spans)):
            return LINEAR
        raise BaseModelError(
            f"{self.source}: whether the square weight of {module} is stored as (out, in) or as "
            f"(in, out) cannot be told: the base has layers of both kinds, and its architecture "
            f"({self.config.get('model_type')}) is none of transformers' own; leave the module out"
        )

    def layer(self, module: str) -> nn.Module | None:
        """A module as transformers builds it, on the meta device; None where it does not know it."""
        return self._skeleton.layer(module)

    def _seen_as_conv1d(self, parameter: str) -> bool:
        bias = self.spans.get(f"{parameter.removesuffix('.weight')}.bias")
        shape = self.spans[parameter].shape
        return bias is not None and len(shape) == 2 and shape[0] != shape[1] == bias.shape[0]

    @functools.cached_property
    def _skeleton(self) -> Skeleton:
        return build_skeleton(self.directory)

    @functools.cached_property
    def _sources(self) -> dict[str, list[list[str]]]:
        return self._skeleton.sources(self.spans)

    @functools.cached_property
    def _in_files(self) -> dict[str, str]:
        skeleton = self._skeleton
        same = (name for name in sorted(self.spans) if not skeleton.converts(name))
        return {skeleton.renamed(name): name for name in same}

    def find(self, name: str) -> str | None:
        """The parameter behind a name in memory, or None where the files do not hold it.

        One that the model does not have is a name of the file, an older one, or a head's.
        """
        known = self._skeleton.known(name)
        if known is not None:
            return self._in_files.get(known)
        return name if name in self.spans else self._in_files.get(self._skeleton.renamed(name))

    def _not_found(self, module: str, kind: str) -> BaseModelError | MismatchError:
        tied = self.tied(f"{module}.{kind}")
        if tied:
            return tied_error(self.source, module, tied)
        if self._skeleton.known(f"{module}.{kind}") is not None:
            return BaseModelError(
                f"{self.source}: {module} is not in the files as it is in memory (it is fused, "
                "split or permuted when the model is loaded); leave the module out"
            )
        modules = [name.removesuffix(f".{kind}") for name in self.spans if name.endswith(kind)]
        nearest = ", ".join(difflib.get_close_matches(module, modules, n=3)) or "none is similar"
        return MismatchError(
            f"{module} is not in the base model {self.source} (nearest: {nearest}); "
            "give the base that the adapter was trained on"
        )


def split_parameter_name(name: str) -> tuple[str, str]:
    """The module and the kind that `parameter` takes, of a name that has both in one."""
    module, _, kind = name.rpartition(".")
    return module, kind


def tied_error(source: str, module: str, tied: tuple[str, ...]) -> BaseModelError:
    """Why one end of tied weights cannot be changed, and the way out."""
    others = ", ".join(name.removesuffix(".weight") for name in tied)
    return BaseModelError(
        f"{source}: {module} is tied to the embeddings or another weight ({others}): what is made "
        "for one would change the other; tied='untie' (--tied untie) gives each its own weights when it is folded, "
        "tied='both' changes both, or leave the module out"
    )


def _fits(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    return len(weight) == 2 and all(a in (1, b) for a, b in zip(shape, weight, strict=True))
