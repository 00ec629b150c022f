"""What a format is: one way in which PEFT stores deltas.

A format reads a configuration and named tensors into entries, one per module, and writes deltas of its kind back.
Nothing downstream knows which format a delta came from.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pcb_peft.delta import Delta
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.checkpoint import Tensors

PREFIX = "base_model.model."
PLAIN_PARAMETER = re.compile(r".+\.(weight|bias)")
TUNER_PART = re.compile(r"(^|\.)(base_layer|token_adapter|original_module|\w*lora_\w+|\w+_l)(\.|$)")

Config: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One module's delta, before its tensors are read.

    Attributes:
        kind: Its type.
        shape: (out, in), as `Delta.shape`.
        load: Reads it.
        rank: Of a low-rank delta.
    """

    kind: type[Delta]
    shape: tuple[int, int]
    load: Callable[[], Delta]
    rank: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """All that an adapter holds.

    Attributes:
        modules: By module path in the base model.
        saved: Parameters that the adapter replaces (PEFT's modules_to_save), by parameter path.
    """

    modules: dict[str, Entry]
    saved: dict[str, Callable[[], Tensor]]


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """An adapter's file contents: configuration fields and tensors."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """One of PEFT's formats.

    Attributes:
        peft_type: PEFT's name.
        read: From configuration and tensors to contents.
        kind: The type of delta that `write` writes.
        write: From deltas by module to file contents; None for a format that is only read.
    """

    peft_type: str
    read: Callable[[Config, Tensors], Contents]
    kind: type[Delta] | None = None
    write: Callable[..., Written] | None = None


_SHELF: dict[str, Format] = {}


def register(format_: Format) -> None:
    """Puts a format on the shelf."""
    _SHELF[format_.peft_type] = format_


def format_of(config: Config) -> Format:
    """The format that an adapter's configuration names.

    Raises:
        UnsupportedError: It is none of those that can be read.
    """
    peft_type = str(config["peft_type"])
    if peft_type not in _SHELF:
        known = ", ".join(sorted(_SHELF))
        raise UnsupportedError(f"peft_type {peft_type} is not supported; supported are {known}")
    return _SHELF[peft_type]


def format_for(kind: type[Delta]) -> Format:
    """The format that stores deltas of this kind.

    Raises:
        UnsupportedError: None does.
    """
    for format_ in _SHELF.values():
        if format_.kind is kind:
            return format_
    raise UnsupportedError(
        f"a {kind.__name__} delta cannot be saved as a PEFT adapter: give a rank, or fold it into the base"
    )


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
        raise UnsupportedError(
            f"{module}: an adapter inside a wrapped layer (MultiheadAttention) is not supported"
        )
    return module


def finite(tensors: Tensors, name: str) -> Tensor:
    """A tensor in float32.

    Raises:
        AdapterError: It holds NaN or infinity.
    """
    values = tensors.read(name).float()
    if not torch.isfinite(values).all():
        raise AdapterError(f"{name} holds NaN or infinite values")
    return values


def saved_parameters(tensors: Tensors, names: list[str]) -> dict[str, Callable[[], Tensor]]:
    """The parameters of the base model among `names`, which the adapter replaces; they must all be such.

    Raises:
        UnsupportedError: A tensor of a tuner that this format does not read.
    """
    saved: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        parameter = name.removeprefix(PREFIX)
        plain = name != parameter and PLAIN_PARAMETER.fullmatch(parameter)
        if not plain or TUNER_PART.search(parameter):
            raise UnsupportedError(
                f"tensor {name} is neither a delta of this format nor a parameter of the base model that the adapter "
                "replaces (modules_to_save); it cannot be merged and will not be dropped"
            )
        saved[parameter] = lambda name=name: finite(tensors, name)
    return saved
