"""Replacements beside the deltas, as PEFT stores them: whole parameters, and rows of embeddings."""

import dataclasses
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.replacements import (
    ReplacedParameter,
    Replacements,
    TokenRows,
    modules_to_save_key,
    modules_to_save_keys,
)
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.checkpoint import ReadFinite, Tensors, Without
from pcb_peft.formats.keys import PLAIN_PARAMETER, PREFIX, TUNER_PART, module_of, parameter_of
from pcb_peft.formats.lazy_delta import AdapterFiles
from pcb_peft.formats.registry import Format

ROWS = "trainable_tokens_delta"  # PEFT's name; the rows take the place of others and are not added


def saved_parameters(tensors: Tensors, names: Sequence[str]) -> dict[str, ReplacedParameter]:
    """Return the parameters that the adapter replaces, which all of `names` must be.

    Raises:
        UnsupportedError: A tensor belongs to a tuner that this format does not read.
    """
    saved: dict[str, ReplacedParameter] = {}
    for name in names:
        parameter = parameter_of(name)
        plain = name.startswith(PREFIX) and PLAIN_PARAMETER.fullmatch(parameter)
        if not plain or TUNER_PART.search(parameter):
            raise UnsupportedError(
                f"tensor {name} is neither a delta of this format nor a parameter of the base model that the adapter "
                "replaces (modules_to_save); it cannot be merged and will not be dropped"
            )
        saved[parameter] = ReplacedParameter(tensors.shape(name), ReadFinite(tensors, name))
    return saved


@dataclasses.dataclass(frozen=True, slots=True)
class RowContents:
    """The rows among an adapter's tensors; see `Replacements` for `rows` and `copies`.

    Attributes:
        rows: Module to the rows of its weight.
        copies: Module to the module that it was tied to, whose rows it has.
        rest: Names of the tensors that are not rows.
    """

    rows: dict[str, TokenRows]
    copies: dict[str, str]
    rest: list[str]


def read_rows(
    tensors: Tensors,
    names: Sequence[str],
    part: str,
    indices_of: Callable[[str], Sequence[int] | None],
) -> RowContents:
    """Return the rows that an adapter replaces.

    Where embeddings were tied, PEFT may store the rows a second time for the other end: a copy.

    Args:
        tensors: The adapter's tensors.
        names: Tensors that may be rows.
        part: Name between a module and its rows, such as ``token_adapter.``.
        indices_of: Module to the numbers of its rows in the configuration; None if the module is not in there.

    Raises:
        AdapterError: The configuration does not say which rows they are.
    """
    suffix = f".{part}{ROWS}"
    keys = {module_of(n.removesuffix(suffix)): n for n in names if n.endswith(suffix)}
    stated = {module: indices_of(module) for module in keys}
    rows: dict[str, TokenRows] = {}
    copies: dict[str, str] = {}
    for module in sorted(keys, key=lambda module: stated[module] is None):
        original = next((m for m in rows if _equal(tensors, keys[m], keys[module])), None)
        if original and stated[module] is None:
            copies[module] = original
        else:
            rows[module] = _rows(tensors, keys[module], stated[module])
    return RowContents(rows, copies, [name for name in names if not name.endswith(suffix)])


def without_copies(tensors: Tensors) -> Tensors:
    """Return the tensors without those that PEFT saves a second time and does not load.

    Where all biases are trained, or the vocabulary was resized, PEFT saves a module that the adapter replaces up to
    three times: as ``head.weight``, which it loads; as ``head.modules_to_save.weight``, the same values; and as
    ``head.original_module.weight``, the base's. Tensors with other values than the loaded ones are not copies.
    """
    names = set(tensors.names())
    return Without(tensors, {name for name in names if _is_copy(tensors, name, names)})


def _is_copy(tensors: Tensors, name: str, names: Container[str]) -> bool:
    owner, _, rest = name.partition(".original_module.")
    if rest:
        return f"{owner}.{rest}" in names
    owner, _, rest = name.partition(".modules_to_save.")
    without_adapter_name = f"{owner}.{rest.partition('.')[2]}"
    loaded = next((n for n in (f"{owner}.{rest}", without_adapter_name) if n in names), None)
    return bool(rest) and loaded is not None and _equal(tensors, name, loaded)


def _equal(tensors: Tensors, one: str, other: str) -> bool:
    return tensors.shape(one) == tensors.shape(other) and torch.equal(
        tensors.read(one), tensors.read(other)
    )


def _rows(tensors: Tensors, name: str, indices: Sequence[int] | None) -> TokenRows:
    """Return rows with their numbers from the configuration."""
    shape, stated = tensors.shape(name), list(indices or [])
    numbers = all(type(index) is int and index >= 0 for index in stated)
    if not numbers or len(shape) != 2 or len(stated) != shape[0] or len(set(stated)) != shape[0]:
        raise AdapterError(
            f"{name} has shape {shape}, and the configuration says that it is rows {indices}: there must be one "
            "number, 0 or more, for each row, and none twice"
        )
    return TokenRows(tuple(stated), ReadFinite(tensors, name))


def write_head(
    head: Replacements, deltas: Collection[str], format_: Format, dtype: torch.dtype
) -> AdapterFiles:
    """Return what an adapter replaces, as PEFT stores it beside deltas of a format.

    Args:
        head: Parameters and rows that the adapter replaces.
        deltas: Modules that have a delta.
        format_: Format of the deltas.
        dtype: Dtype of the tensors.

    Raises:
        UnsupportedError: PEFT has no place for it.
    """
    config, tensors = _written_rows(head, deltas, format_, dtype)
    between = dict.fromkeys(deltas, "base_layer.")
    if format_.rows is not None:
        part = f"{format_.rows.part}base_layer."
        between |= dict.fromkeys([*head.rows, *head.copies], part)
    tensors |= {_key(name, between): values().to(dtype) for name, values in head.parameters.items()}
    alone = [name for name in head.parameters if name.rpartition(".")[0] not in between]
    keys = modules_to_save_keys(alone, head.modules)
    for name in head.parameters:
        key = modules_to_save_key(name, head.modules)
        if name not in alone and key in keys:
            raise UnsupportedError(
                f"{name} has a delta and is part of {key}, which an adapter replaces as a whole (modules_to_save), "
                "and PEFT holds one of the two: fold the adapter into the base model"
            )
    if alone:
        config["modules_to_save"] = list(keys)
    return AdapterFiles(config, tensors)


def _written_rows(
    head: Replacements, deltas: Collection[str], format_: Format, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the rows of embeddings: fields of the configuration, and tensors."""
    store = format_.rows
    if not head.rows:
        return {}, {}
    if store is None:
        raise UnsupportedError(
            f"an adapter of peft_type {format_.peft_type} holds no token rows ({', '.join(head.rows)}): fold the "
            "adapter into the base model"
        )
    if both := sorted(head.rows.keys() & set(deltas)):
        raise UnsupportedError(
            f"{both[0]} has a delta and token rows, and PEFT holds one of the two for a module: fold the adapter into "
            "the base model"
        )
    rows = dict(head.rows)
    if store.copies:
        rows |= {copy: head.rows[original] for copy, original in head.copies.items()}
    tensors = {
        f"{PREFIX}{module}.{store.part}{ROWS}": replaced.load().to(dtype).clone()
        for module, replaced in rows.items()
    }
    return store.config({module: list(head.rows[module].indices) for module in head.rows}), tensors


def _key(parameter: str, between: Mapping[str, str]) -> str:
    module, _, kind = parameter.rpartition(".")
    return f"{PREFIX}{module}.{between.get(module, '')}{kind}"


def ends_with_any(module: str, targets: Container[str]) -> bool:
    """Return whether a module's path, or the end of it, is one of the targets."""
    parts = module.split(".")
    return any(".".join(parts[start:]) in targets for start in range(len(parts)))


def with_biases(
    written: AdapterFiles,
    biases: Mapping[str, Callable[[], Tensor]],
    owners: Container[str],
    dtype: torch.dtype,
) -> AdapterFiles:
    """Return the file contents with whole biases of the base model beside the deltas (PEFT's `bias`).

    Args:
        written: Contents for the deltas.
        biases: Parameter path to a function that reads the bias.
        owners: Modules of the deltas.
        dtype: Dtype of the tensors.
    """
    if not biases:
        return written
    tensors, some_alone = dict(written.tensors), False
    for name, load in biases.items():
        owner = name.removesuffix(".bias")
        between = ".base_layer" if owner in owners else ""
        some_alone = some_alone or not between
        tensors[f"{PREFIX}{owner}{between}.bias"] = load().to(dtype)
    config = written.config | {"bias": "all" if some_alone else "lora_only"}
    return dataclasses.replace(written, config=config, tensors=tensors)
