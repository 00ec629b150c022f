"""Trainable tokens without other deltas: rows of embeddings take the place of others; nothing is added."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.files.patterns import Expression
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.heads import ends_with_any, read_rows, saved_parameters
from pcb_peft.formats.lazy_delta import AdapterContents, Config
from pcb_peft.formats.registry import Format, RowStore, register


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the rows of a TRAINABLE_TOKENS checkpoint."""
    del base
    replaced = read_rows(tensors, tensors.names(), "", functools.partial(_row_numbers, config))
    saved = saved_parameters(tensors, replaced.rest)
    return AdapterContents({}, saved, replaced.rows, replaced.copies)


def _row_numbers(config: Config, module: str) -> Sequence[int] | None:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        targeted = Expression(targets, "target_modules", AdapterError).fits(module)
    else:
        targeted = targets is None or ends_with_any(module, targets)
    return config.get("token_indices") if targeted else None


def row_config(indices: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return the fields of the configuration that say which rows of each module are replaced.

    Raises:
        UnsupportedError: They are not the same for all modules.
    """
    first, *others = indices.values()
    if any(other != first for other in others):
        raise UnsupportedError(
            f"{', '.join(indices)} have different token rows, and TRAINABLE_TOKENS has one list for all: fold the "
            "adapter into the base model"
        )
    return {"token_indices": first, "target_modules": sorted(indices), "init_weights": True}


register(Format("TRAINABLE_TOKENS", read, rows=RowStore("", row_config, copies=True)))
