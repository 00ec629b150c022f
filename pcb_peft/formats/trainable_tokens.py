"""Trainable tokens by themselves: rows of embeddings take the place of others; nothing is added anywhere."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.heads import matching, read_rows
from pcb_peft.formats.registry import (
    AdapterContents,
    Base,
    Config,
    Format,
    RowStore,
    register,
    saved_parameters,
)


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """The rows of a TRAINABLE_TOKENS checkpoint."""
    del base
    targets = config.get("target_modules")

    def indices_of(module: str) -> Sequence[int] | None:
        if isinstance(targets, str):
            hit = re.fullmatch(targets, module) is not None
        else:
            hit = targets is None or matching(module, targets)
        return config.get("token_indices") if hit else None

    read_ = read_rows(tensors, tensors.names(), "", indices_of)
    return AdapterContents({}, saved_parameters(tensors, read_.rest), read_.rows, read_.copies)


def row_config(indices: Mapping[str, list[int]]) -> dict[str, Any]:
    """The fields of the configuration that tell the rows of each module.

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
