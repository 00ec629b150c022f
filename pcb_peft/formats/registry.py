"""What a format is: one way in which PEFT stores deltas.

A format reads a configuration and named tensors into entries, one per module, and writes deltas of its kind back.
Nothing downstream knows which format a delta came from. A *module* is a path in the base model whose ``weight``
changes; a parameter that is no module's weight goes by its own path (``norm.bias``, ``attn.in_proj_weight``).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from pcb_peft.deltas.delta import Delta, Dense, LowRank, Rescaled
from pcb_peft.deltas.layout import LINEAR, Layout
from pcb_peft.deltas.linalg import all_finite
from pcb_peft.deltas.replacements import Parameter, Rows
from pcb_peft.errors import (
    AdapterError,
    BaseModelError,
    MismatchError,
    OptionError,
    UnsupportedError,
)
from pcb_peft.formats.checkpoint import SAFETENSORS, Tensors
from pcb_peft.runtime.threads import one_thread

PREFIX = "base_model.model."
AUTOMATIC_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"]}
PLAIN_PARAMETER = re.compile(r".+\.(weight|bias)")
TUNER_PART = re.compile(
    r"(^|\.)(base_layer|token_adapter|original_module|modules_to_save|\w*lora_\w+|\w+_l)(\.|$)"
)

PIPELINE_MODULE = re.compile(
    r"(unet|text_encoder(_\d)?|transformer\.(single_)?transformer_blocks)\.|lora_(unet|te\d?)_"
)
NO_DELTA = "it acts on prompts or activations, not on weights: there is no ΔW"
NO_SINGLE_DELTA = "what it adds to a weight depends on the input: there is no single ΔW"
REASONS = {  # types of PEFT's that are not read
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING"), NO_DELTA),
    **dict.fromkeys(("PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"), NO_DELTA),
    **dict.fromkeys(("XLORA", "POLY", "LILY", "SHADOW"), NO_SINGLE_DELTA),
    "FROD": "its factors come from a joint decomposition of all the base model's layers",
    "TINYLORA": "which of its vectors belongs to which module follows from the order of the model's layers",
    "UNILORA": "its file does not say which modules it changes",
}

Config: TypeAlias = Mapping[str, Any]


class Weights(Protocol):
    """A base model, as far as reading an adapter needs it.

    Attributes:
        source: For messages.
        residual: What an initialisation takes out of W (PiSSA …) is out of it already, and trained biases are in it.
    """

    @property
    def source(self) -> str: ...
    @property
    def residual(self) -> bool: ...
    def weight(self, module: str) -> Tensor: ...
    def shape(self, module: str) -> tuple[int, ...]: ...
    def bias(self, module: str) -> Tensor | None: ...
    def layer(self, module: str) -> nn.Module | None: ...
    def layout(self, module: str, shape: tuple[int, int]) -> Layout: ...
    def held(self, module: str) -> dict[str, tuple[tuple[int, ...], bool]]: ...


Base: TypeAlias = Callable[[], Weights] | None
"""The base model, opened when it is asked for; None where the caller gave none."""


@dataclasses.dataclass(frozen=True, slots=True)
class LazyDelta:
    """One module's delta, before its tensors are read.

    Attributes:
        kind: Its type.
        shape: (out, in), as `Delta.shape`.
        load: Reads it.
        rank: Of a low-rank delta, or of a delta's low-rank part.
        missing: Why it cannot be read without the base model, where that was not given.
        stacked: The weight is one of several in a parameter: an expert's.
    """

    kind: type[Delta]
    shape: tuple[int, int]
    load: Callable[[], Delta]
    rank: int | None = None
    missing: str = ""
    stacked: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterContents:
    """All that an adapter holds.

    Attributes:
        modules: By module path in the base model.
        saved: Parameters that the adapter replaces (PEFT's modules_to_save), by parameter path.
        rows: Rows of weights that it replaces (PEFT's trainable tokens), by module path.
        copies: Module to the one that it was tied to, whose rows are stored for it too.
    """

    modules: dict[str, LazyDelta]
    saved: dict[str, Parameter]
    rows: dict[str, Rows] = dataclasses.field(default_factory=dict[str, Rows])
    copies: dict[str, str] = dataclasses.field(default_factory=dict[str, str])


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's file contents: configuration (none where there is no such file), and tensors with their file."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    file: str = SAFETENSORS


@dataclasses.dataclass(frozen=True, slots=True)
class RowStore:
    """How a format stores rows that an adapter replaces.

    Attributes:
        part: What stands between a module and its rows.
        config: From the rows' numbers, by module, to fields of the configuration.
        copies: Whether the rows are stored again for a module that was tied to another.
    """

    part: str
    config: Callable[[Mapping[str, list[int]]], dict[str, Any]]
    copies: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """One of PEFT's formats.

    Attributes:
        peft_type: PEFT's name.
        read: From configuration, tensors and the base model, if one was given, to contents.
        kinds: The types of delta that `write` writes, one in an adapter.
        write: From deltas by module to file contents; None for a format that is only read.
        rows: How it stores rows that an adapter replaces; None where it has no place for them.
    """

    peft_type: str
    read: Callable[[Config, Tensors, Base], AdapterContents]
    kinds: tuple[type[Delta], ...] = ()
    write: Callable[..., AdapterFiles] | None = None
    rows: RowStore | None = None


_REGISTRY: dict[str, Format] = {}


def register(format_: Format) -> None:
    """Puts a format on the shelf."""
    _REGISTRY[format_.peft_type] = format_


def format_of(config: Config) -> Format:
    """The format that an adapter's configuration names.

    Raises:
        UnsupportedError: It is none of those that can be read.
    """
    peft_type = str(config["peft_type"])
    if peft_type not in _REGISTRY:
        known, reason = ", ".join(sorted(_REGISTRY)), REASONS.get(peft_type)
        because = f": {reason}" if reason else ""
        raise UnsupportedError(
            f"peft_type {peft_type} is not supported{because}; supported are {known}"
        )
    return _REGISTRY[peft_type]


def format_for(kind: type[Delta] | None) -> Format:
    """The format that stores deltas of this kind; rows and no deltas, if it is None.

    Raises:
        UnsupportedError: None does.
    """
    for format_ in _REGISTRY.values():
        if kind in format_.kinds or (kind is None and not format_.kinds and format_.rows):
            return format_
    raise UnsupportedError(
        f"a {getattr(kind, '__name__', kind)} delta cannot be saved as a PEFT adapter: give a rank, or fold it into "
        "the base"
    )


def format_named(name: str) -> Format:
    """The format of this name, to write.

    Raises:
        OptionError: There is none.
    """
    known = {key.lower(): f for key, f in _REGISTRY.items() if not f.kinds and f.write}
    if name not in known:
        raise OptionError(
            f"format is {name!r}; it must be peft, or one of {', '.join(sorted(known))}"
        )
    return known[name]


def module_of(key: str) -> str:
    """The path in the base model of the module whose tensors begin with `key`.

    Raises:
        UnsupportedError: The key is none of PEFT's, or the module exists only inside a wrapper of PEFT's.
    """
    module = key.removeprefix(PREFIX)
    if module == key:
        raise UnsupportedError(
            f"tensors {key}… are not PEFT's, whose names begin with {PREFIX}; PEFT would not load them either"
        )
    if "base_layer" in module.split("."):
        raise UnsupportedError(f"{module}: an adapter inside a wrapped layer is not supported")
    return module


@one_thread()  # others that were woken for so little would go on spinning
def finite(tensors: Tensors, name: str) -> Tensor:
    """A tensor in float32.

    Raises:
        AdapterError: It holds NaN or infinity.
    """
    return checked(tensors.read(name).float(), tensors, name)


def checked(values: Tensor, tensors: Tensors, name: str) -> Tensor:
    """`values`, which stand in `tensors` under that name; raises AdapterError for NaN and infinity."""
    if not all_finite(values):
        raise AdapterError(f"{tensors.where}: {name} holds NaN or infinite values")
    return values


def saved_parameters(tensors: Tensors, names: Sequence[str]) -> dict[str, Parameter]:
    """The parameters of the base model among `names`, which the adapter replaces; they must all be such.

    Raises:
        UnsupportedError: A tensor of a tuner that this format does not read.
    """
    saved: dict[str, Parameter] = {}
    for name in names:
        parameter = _parameter(name)
        plain = name.startswith(PREFIX) and PLAIN_PARAMETER.fullmatch(parameter)
        if not plain or TUNER_PART.search(parameter):
            raise UnsupportedError(
                f"tensor {name} is neither a delta of this format nor a parameter of the base model that the adapter "
                "replaces (modules_to_save); it cannot be merged and will not be dropped"
            )
        load = functools.partial(finite, tensors, name)
        saved[parameter] = Parameter(tensors.shape(name), load)
    return saved


def base_weight(
    base: Base | Parameter, module: str, shape: tuple[int, int], why: str, layout: Layout = LINEAR
) -> tuple[Tensor, Layout]:
    """W of a module as a matrix (out, in), float32, and how it is stored.

    Args:
        base: The base model; or the W that the adapter brings along, in the place of the base's.
        module: Its path.
        shape: (out, in), according to the adapter.
        why: It is needed.
        layout: According to the adapter.

    Raises:
        BaseModelError: No base model was given.
        MismatchError: The base has no such module, or in another shape.
    """
    if base is None:
        raise BaseModelError(f"{without_base(module, why)}: give base_model (--base-model)")
    if isinstance(base, Parameter):  # of an embedding or an output layer
        layout = layout if layout.lookup else LINEAR
        return layout.matrix(base()), layout
    opened = base()
    layout = layout if layout.lookup else opened.layout(module, shape)
    weight = layout.matrix(opened.weight(module)).float()
    if tuple(weight.shape) != shape:
        raise MismatchError(
            f"{module}: the adapter's (out, in) is {shape}, that of {opened.source} {tuple(weight.shape)}; "
            "give the base that the adapter was trained on"
        )
    return weight, layout


def without_base(module: str, why: str) -> str:
    """What to say where a base model is needed and none was given."""
    return f"{module}: {why}"


def as_dense(entry: LazyDelta) -> LazyDelta:
    """The same change: if it rescales W, as one matrix that does not follow another W."""

    def load() -> Dense:
        delta = entry.load()
        return Dense(delta.matrix(), layout=delta.layout)

    if entry.kind is not Rescaled:
        return entry
    return dataclasses.replace(entry, kind=Dense, load=load, rank=None)


def vector_delta(values: Tensor) -> LowRank:
    """The change of a parameter (n,), such as a bias: a matrix (n, 1) of rank 1."""
    return LowRank(torch.ones(1, 1), values[:, None], layout=Layout(shape=tuple(values.shape)))


def is_vector(delta: Delta) -> bool:
    """Whether a delta is that of a parameter (n,)."""
    return delta.layout.shape is not None and len(delta.layout.shape) == 1


def bias_entries(
    config: Config, tensors: Tensors, names: Sequence[str], base: Base
) -> tuple[dict[str, LazyDelta], list[str]]:
    """The trained biases of the base model (PEFT's `bias`) among `names`, as deltas; and the other names."""
    if config.get("bias", "none") == "none":
        return {}, list(names)
    heads = [
        *(config.get("modules_to_save") or []),
        *AUTOMATIC_HEADS.get(str(config.get("task_type")), []),
    ]
    entries: dict[str, LazyDelta] = {}
    for name in names:
        parameter = _parameter(name)
        in_head = any(f".{head}." in f".{parameter}" for head in heads)
        if parameter.endswith(".bias") and not in_head and not TUNER_PART.search(parameter):
            entries[parameter] = vector_entry(tensors, name, parameter, base, TRAINED_BIAS)
    rest = [name for name in names if _parameter(name) not in entries]
    return ({} if base and entries and base().residual else entries), rest


TRAINED_BIAS = (
    "its bias was trained (PEFT's `bias`), and the change is known only beside the base's own"
)


def vector_entry(tensors: Tensors, name: str, parameter: str, base: Base, why: str) -> LazyDelta:
    """The change of a vector (n,) of the base model whose new values the adapter holds, under `name`."""
    shape = (math.prod(tensors.shape(name)), 1)

    def load() -> LowRank:
        weight, _ = base_weight(base, parameter, shape, why)
        return vector_delta(finite(tensors, name) - weight[:, 0])

    return LazyDelta(LowRank, shape, load, 1, without_base(parameter, why) if base is None else "")


def _parameter(name: str) -> str:
    """A parameter's path in the base model, without PEFT's prefix and wrappers."""
    name = name.removeprefix(PREFIX).replace(".token_adapter.base_layer.", ".")
    return name.replace(".base_layer.", ".")


def refuse_pipelines(modules: Iterable[str]) -> None:
    """PEFT alone loads no adapter of a pipeline, whose modules belong to several models."""
    if module := next(filter(PIPELINE_MODULE.match, modules), None):
        raise OptionError(
            f"{module} belongs to a diffusion pipeline, and PEFT has no file for that: save it with "
            "format='diffusers' or 'kohya' (--format)"
        )
