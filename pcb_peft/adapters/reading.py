"""Reading: from the files of an adapter to an `Adapter`."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.source import NESTED, OpenedAdapter, Source
from pcb_peft.deltas.replacements import (
    ReplacedParameter,
    Replacements,
    Task,
    modules_to_save_keys,
)
from pcb_peft.errors import AdapterError, PcbPeftError, UnsupportedError
from pcb_peft.files.tensors import refuse_empty, refuse_other_numbers
from pcb_peft.formats import AdapterContents, Base, format_of
from pcb_peft.formats.checkpoint import CONFIG, ReadFinite, SafetensorsFile
from pcb_peft.formats.config import checked_config
from pcb_peft.formats.heads import without_copies
from pcb_peft.formats.keys import PREFIX
from pcb_peft.formats.plain_names import with_plain_names, with_plain_patterns
from pcb_peft.runtime.shown import shown
from pcb_peft.writing.targets import existing


def read_adapter(name: str, source: Source | None, files: OpenedAdapter, base: Base) -> Adapter:
    """Return the adapter that files hold.

    Raises:
        PcbPeftError: They hold no adapter, or one that cannot be read.
    """
    config = with_plain_patterns(files.config)
    where = source.path if source else f"adapter {name!r}"
    refuse_other_numbers(files.tensors)
    refuse_empty(files.tensors)
    tensors = without_copies(with_plain_names(files.tensors))
    if nested := next((n for n in tensors.names() if n.startswith(PREFIX + PREFIX)), None):
        raise UnsupportedError(f"{where}: {nested} is from a PeftModel in another; {NESTED}")
    try:
        format_ = format_of(config)
        config = checked_config(config, CONFIG)
        contents = format_.read(config, tensors, base)
    except PcbPeftError as error:
        raise type(error)(f"{where}: {error}") from error
    if not (contents.modules or contents.rows):
        raise AdapterError(f"{where}: the files hold no delta of peft_type {config['peft_type']}")
    _refuse_replaced_targets(contents, set(tensors.names()), where)
    rows = {new.shape[0] for new in contents.saved.values() if new.shape}
    labels = files.labels if len(files.labels) in rows else ()  # others are the base model's
    task = Task(config.get("task_type"), labels, config.get("auto_mapping") or None)
    return Adapter(
        name=name,
        modules=DeltaMapping(contents.modules),
        source=source,
        files=files,
        reopen=functools.partial(read_adapter, name, source, files),
        base=base,
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision"),
        task_type=task.task_type,
        auto_mapping=task.auto_mapping,
        head=Replacements(
            modules_to_save_keys(contents.saved, config.get("modules_to_save") or []),
            contents.saved,
            contents.rows,
            contents.copies,
            task,
        ),
        companions=files.companions,
        heads={owner: _kept_head(head) for owner, head in files.heads.items()},
        inputs=_inputs(source, config),
        image=contents.image,
    )


def _inputs(source: Source | None, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the adapter's directory, and its base model's if it is on this disk."""
    base = config.get("base_model_name_or_path")
    local = [base] if isinstance(base, str) and existing(Path(base) / "config.json") else []
    return existing(*([] if source is None else [source.directory]), *local)


def _refuse_replaced_targets(contents: AdapterContents, names: set[str], where: str) -> None:
    """Refuse a parameter that is replaced and has a delta, unless PEFT finds it inside its own layer."""
    for parameter in contents.saved:
        if parameter.rpartition(".")[0] in contents.modules and PREFIX + parameter in names:
            raise UnsupportedError(
                f"{where}: {parameter} replaces a parameter of a module that has a delta too, and its name lacks "
                "PEFT's base_layer: PEFT would not load it"
            )


def _kept_head(tensors: SafetensorsFile) -> Replacements:
    """Return the head of one source of a merged adapter, from its file beside the adapter."""
    refuse_other_numbers(tensors)
    refuse_empty(tensors)
    parameters = {
        name: ReplacedParameter(tensors.shape(name), ReadFinite(tensors, name))
        for name in tensors.names()
    }
    try:
        task = Task.from_metadata(tensors.metadata())
    except ValueError as error:
        raise AdapterError(
            f"{tensors.where}: the texts beside the tensors are damaged ({shown(error)}); save it again"
        ) from error
    return Replacements(modules_to_save_keys(parameters, ()), parameters, task=task)
