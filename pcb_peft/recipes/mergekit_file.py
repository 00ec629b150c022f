"""The keys of mergekit's YAML files, and what each may hold."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

from pcb_peft.errors import OptionError
from pcb_peft.files.schema import Count, Number, checked


class _Condition(msgspec.Struct, forbid_unknown_fields=True):
    """A value for the modules that match a filter."""

    value: bool | Number | list[Number]
    filter: str | None = None


_Setting: TypeAlias = bool | Number | _Condition | list[Number | _Condition] | None


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A model with its own parameters."""

    model: str
    parameters: dict[str, _Setting] | None = None
    layer_range: tuple[Count, Count] | None = None


class _Slice(msgspec.Struct, forbid_unknown_fields=True):
    """Some layers of some models."""

    sources: list[_Entry] | None = None
    parameters: dict[str, _Setting] | None = None


class _File(msgspec.Struct):
    """The keys of a file that are read."""

    merge_method: str
    base_model: str | None = None
    models: list[_Entry] | None = None
    slices: list[_Slice] | None = None
    parameters: dict[str, _Setting] | None = None


def check_file(content: Mapping[str, Any]) -> None:
    """Raise OptionError where a key of a file of mergekit's holds what mergekit does not know.

    >>> check_file({"merge_method": "linear", "models": 3})
    Traceback (most recent call last):
        ...
    pcb_peft.errors.OptionError: mergekit's file: models is 3; it must be a list or null; correct it
    """
    checked(content, _File, "mergekit's file", OptionError, "correct it")
