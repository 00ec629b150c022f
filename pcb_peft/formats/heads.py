"""How PEFT stores what an adapter replaces beside its deltas: whole parameters, and rows of embeddings."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.replacements import (
    Replacements,
    Rows,
    modules_to_save_key,
    modules_to_save_keys,
)
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.checkpoint import Tensors, Without
from pcb_peft.formats.registry import PREFIX, AdapterFiles, Format, finite, module_of

ROWS = "trainable_tokens_delta"  # PEFT's name for rows that take the place of others; they are no delta


@dataclasses.dataclass(frozen=True, slots=True)
class RowsRead:
    """The rows among an adapter's tensors; see `Replacements` for `rows` and `copies`."""

    rows: dict[str, Rows]
    copies: dict[str, str]
    rest: list[str]


def read_rows(
    tensors: Tensors,
    names: Sequence[str],
    part: str,
    indices_of: Callable[[str], Sequence[int] | None],
) -> RowsRead:
    """The rows that an adapter replaces, and the names of the other tensors.

    Where embeddings were tied, PEFT may store the rows a second time, for the other end: a copy.

    Args:
        tensors: The adapter's.
        names: Those that may be rows.
        part: What stands between a module and its rows, such as ``token_adapter.``.
        indices_of: Module to the rows that the configuration tells for it; None if it does not speak of it.

    Raises:
        AdapterError: The configuration does not tell which rows they are.
    """
    suffix = f".{part}{ROWS}"
    keys = {module_of(n.removesuffix(suffix)): n for n in names if n.endswith(suffix)}
    stated = {module: indices_of(module) for module in keys}
    rows: dict[str, Rows] = {}
    copies: dict[str, str] = {}
    for module in sorted(keys, key=lambda module: stated[module] is None):
        original = next((m for m in rows if _same(tensors, keys[m], keys[module])), None)
        if original and stated[module] is None:
            copies[module] = original
        else:
            rows[module] = _rows(tensors, keys[module], stated[module])
    return RowsRead(rows, copies, [name for name in names if not name.endswith(suffix)])


def without_copies(tensors: Tensors) -> Tensors:
    """The tensors without those that PEFT saves beside what it loads, and does not load.

    Where all biases are trained, or the vocabulary was resized, it saves a module that the adapter replaces up to three
    times: as ``head.weight``, which it loads; as ``head.modules_to_save.weight``, the same values; and as
    ``head.original_module.weight``, the base's. Other values than those that are loaded are no copy.
    """
    names = set(tensors.names())
    return Without(tensors, {name for name in names if _is_copy(tensors, name, names)})


def _is_copy(tensors: Tensors, name: str, names: Container[str]) -> bool:
    owner, _, rest = name.partition(".original_module.")
    if rest:
        return f"{owner}.{rest}" in names
    owner, _, rest = name.partition(".modules_to_save.")
    places = (f"{owner}.{rest}", f"{owner}.{rest.partition('.')[2]}")  # or an adapter's name first
    loaded = next((place for place in places if place in names), None)
    return bool(rest) and loaded is not None and _same(tensors, name, loaded)


def _same(tensors: Tensors, one: str, other: str) -> bool:
    return tensors.shape(one) == tensors.shape(other) and torch.equal(
        tensors.read(one), tensors.read(other)
    )


def _rows(tensors: Tensors, name: str, indices: Sequence[int] | None) -> Rows:
    """Rows as the configuration numbers them."""
    shape, stated = tensors.shape(name), list(indices or [])
    numbers = all(type(index) is int and index >= 0 for index in stated)
    if not numbers or len(shape) != 2 or len(stated) != shape[0] or len(set(stated)) != shape[0]:
        raise AdapterError(
            f"{name} has shape {shape}, and the configuration says that it is rows {indices}: there must be one "
            "number, 0 or more, for each row, and none twice"
        )
    return Rows(tuple(stated), functools.partial(finite, tensors, name))


def write_head(
    head: Replacements, deltas: Collection[str], format_: Format, dtype: torch.dtype
) -> AdapterFiles:
    """What an adapter replaces, as PEFT stores it beside deltas of a format.

    Args:
        head: What it replaces.
        deltas: The modules that change besides.
        format_: Of the deltas.
        dtype: Of the tensors.

    Raises:
        UnsupportedError: PEFT has no place for it.
    """
    store = format_.rows
    if head.rows and store is None:
        raise UnsupportedError(
            f"an adapter of peft_type {format_.peft_type} holds no token rows ({', '.join(head.rows)}): fold the "
            "adapter into the base model"
        )
    if both := sorted(head.rows.keys() & set(deltas)):
        raise UnsupportedError(
            f"{both[0]} has a delta and token rows, and PEFT holds one of the two for a module: fold the adapter into "
            "the base model"
        )
    config: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    if head.rows and store is not None:
        copies = head.copies if store.copies else {}
        rows = {**head.rows, **{copy: head.rows[of] for copy, of in copies.items()}}
        config |= store.config({module: list(rows[module].indices) for module in head.rows})
        tensors |= {
            f"{PREFIX}{m}.{store.part}{ROWS}": rows[m].load().to(dtype).clone() for m in rows
        }
    between = dict.fromkeys(deltas, "base_layer.")
    if store is not None:
        between |= dict.fromkeys([*head.rows, *head.copies], f"{store.part}base_layer.")
    tensors |= {_key(name, between): values().to(dtype) for name, values in head.parameters.items()}
    alone = [name for name in head.parameters if name.rpartition(".")[0] not in between]
    words = modules_to_save_keys(alone, head.modules)
    torn = [
        n
        for n in head.parameters
        if n not in alone and modules_to_save_key(n, head.modules) in words
    ]
    if torn:
        raise UnsupportedError(
            f"{torn[0]} has a delta and is part of {modules_to_save_key(torn[0], head.modules)}, which an adapter "
            "replaces as a whole (modules_to_save), and PEFT holds one of the two: fold the adapter into the base model"
        )
    if alone:
        config["modules_to_save"] = list(words)
    return AdapterFiles(config, tensors)


def _key(parameter: str, between: Mapping[str, str]) -> str:
    module, _, kind = parameter.rpartition(".")
    return f"{PREFIX}{module}.{between.get(module, '')}{kind}"


def matching(module: str, targets: Container[str]) -> bool:
    """Whether a module's path, or the end of it, is one of some targets."""
    parts = module.split(".")
    return any(".".join(parts[start:]) in targets for start in range(len(parts)))


def with_biases(
    written: AdapterFiles,
    biases: Mapping[str, Callable[[], Tensor]],
    owners: Container[str],
    dtype: torch.dtype,
) -> AdapterFiles:
    """The same file contents, and whole biases of the base model, as they are trained (PEFT's `bias`).

    Args:
        written: Of the deltas; `owners` are their modules.
        biases: By parameter, what reads them.
        dtype: Of the tensors.
    """
    if not biases:
        return written
    tensors, alone = dict(written.tensors), False
    for name, load in biases.items():
        owner = name.removesuffix(".bias")
        between = ".base_layer" if owner in owners else ""
        alone |= not between
        tensors[f"{PREFIX}{owner}{between}.bias"] = load().to(dtype)
    config = written.config | {"bias": "all" if alone else "lora_only"}
    return dataclasses.replace(written, config=config, tensors=tensors)
