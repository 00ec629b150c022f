"""The registered formats: ways in which PEFT stores deltas, and ways in which other programs do.

A format reads a configuration and named tensors into one entry per module, and writes deltas of its kind back. No code
above this room knows which format a delta came from.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from pcb_peft.deltas.delta import Delta, LowRank
from pcb_peft.errors import OptionError, UnsupportedError
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.lazy_delta import AdapterContents, AdapterFiles, Config
from pcb_peft.formats.refusals import REASONS
from pcb_peft.images.names import ImageLora
from pcb_peft.plugins.registry import Registry


@dataclasses.dataclass(frozen=True, slots=True)
class RowStore:
    """The way in which a format stores rows of embeddings that an adapter replaces.

    Attributes:
        part: Name between a module and its rows.
        config: From the rows' numbers, by module, to fields of the configuration.
        copies: True where the rows are stored again for a module that was tied to another.
    """

    part: str
    config: Callable[[Mapping[str, list[int]]], dict[str, Any]]
    copies: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """One of PEFT's formats.

    Attributes:
        peft_type: PEFT's name of the tuner.
        read: From configuration, tensors and the base model, if one was given, to contents.
        kinds: Types of delta that `write` writes; an adapter holds one of them.
        write: From deltas by module to file contents; None for a format that is only read.
        rows: How it stores rows that an adapter replaces; None where it has no place for them.
        defined_by: Function that the format was made of, for messages; default: `read`.
    """

    peft_type: str
    read: Callable[[Config, Tensors, Base], AdapterContents]
    kinds: tuple[type[Delta], ...] = ()
    write: Callable[..., AdapterFiles] | None = None
    rows: RowStore | None = None
    defined_by: Callable[..., Any] | None = None


class WriteLoras(Protocol):
    """Write LoRAs by module; with `rank_pattern` each at its own rank."""

    def __call__(
        self,
        modules: Mapping[str, LowRank],
        dtype: torch.dtype,
        *,
        image: ImageLora | None,
        rank_pattern: bool,
    ) -> AdapterFiles: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Writer:
    """A form of LoRA files that programs other than PEFT load.

    Attributes:
        name: Name that a caller gives (``format="kohya"``).
        write: From LoRAs by module to file contents.
        check: From shapes by module, and what is known about the LoRA, to the names in the file; raises
            UnsupportedError where there are none.
        defined_by: Function that the writer was made of, for messages; default: `write`.
    """

    name: str
    write: WriteLoras
    check: Callable[[Mapping[str, tuple[int, int]], ImageLora | None], Mapping[str, str]]
    defined_by: Callable[..., Any] | None = None


_FORMATS = Registry[Format]("format", entry_points="pcb_peft.formats")
_WRITERS = Registry[Writer]("format", entry_points="pcb_peft.formats")


def register(entry: Format | Writer) -> None:
    """Register a format of PEFT's, or a writer for another program.

    Raises:
        OptionError: The name is taken.
    """
    if isinstance(entry, Writer):
        _WRITERS.add(entry.name, entry, defined_by=entry.defined_by or entry.write)
    else:
        _FORMATS.add(entry.peft_type, entry, defined_by=entry.defined_by or entry.read)


def list_formats() -> dict[str, Format]:
    """Return PEFT's formats that can be read, by PEFT's name of the tuner."""
    return _FORMATS.list()


def format_of(config: Config) -> Format:
    """Return the format that an adapter's configuration names.

    Raises:
        UnsupportedError: It is not one that can be read.
    """
    peft_type = str(config["peft_type"])
    format_ = _FORMATS.find(peft_type)
    if format_ is None:
        because = f": {REASONS[peft_type]}" if peft_type in REASONS else ""
        raise UnsupportedError(
            f"peft_type {peft_type} is not supported{because}; supported are {', '.join(_FORMATS.list())}"
        )
    return format_


def format_for(kind: type[Delta] | None) -> Format:
    """Return PEFT's format for deltas of this kind; if it is None, for replaced rows without deltas.

    Raises:
        UnsupportedError: PEFT has no format for them.
    """
    for format_ in _FORMATS.list().values():
        if kind in format_.kinds or (kind is None and not format_.kinds and format_.rows):
            return format_
    name = "replaced rows" if kind is None else f"a {kind.kind_name}"
    raise UnsupportedError(
        f"{name} cannot be saved as a PEFT adapter: give a rank, or fold it into the base"
    )


def writer_named(name: str) -> Writer:
    """Return the writer for another program than PEFT.

    Raises:
        OptionError: There is no writer of that name.
    """
    writer = _WRITERS.find(name)
    if writer is None:
        raise OptionError(
            f"format is {name!r}; it must be peft, or one of {', '.join(_WRITERS.list())}"
        )
    return writer
