"""The files of a merged adapter with the head of one task as its own."""

import torch

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.chosen_head import chosen_head
from pcb_peft.adapters.source import OpenedAdapter
from pcb_peft.formats import AdapterFiles, format_of
from pcb_peft.formats.heads import write_head
from pcb_peft.formats.plain_names import with_plain_names


def files_with_head(adapter: Adapter, opened: OpenedAdapter, name: str) -> AdapterFiles:
    """Return the files of an adapter with one of the heads beside it as its own; its other tensors stay as they are.

    Args:
        adapter: The adapter.
        opened: The files that it was read from.
        name: One of its `heads`.

    Returns:
        Configuration and tensors that PEFT loads together with the head.

    Raises:
        OptionError: There is no head of that name.
    """
    kept = chosen_head(adapter.name, adapter.head, adapter.heads, name)
    stored = with_plain_names(opened.tensors)
    written = write_head(kept, adapter.modules.keys(), format_of(opened.config), torch.float32)
    config = {key: value for key, value in opened.config.items() if value is not None}
    own = config.get("modules_to_save") or []
    config |= written.config
    if keys := [*own, *written.config.get("modules_to_save", [])]:
        config["modules_to_save"] = list(dict.fromkeys(keys))
    if kept.task.task_type is not None:
        config["task_type"] = kept.task.task_type
        config.pop("auto_mapping", None)
    elif kept.task.auto_mapping is not None:
        config["auto_mapping"] = dict(kept.task.auto_mapping)
    tensors = {tensor: stored.read(tensor) for tensor in stored.names()}
    return AdapterFiles(config, tensors | written.tensors)
