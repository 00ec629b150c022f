"""One adapter on one screen: what it is, where it changes its base model, and what looks wrong."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.companions import companions_beside
from pcb_peft.adapters.loading import AdapterLike, load_adapter
from pcb_peft.base.model import lazy_base
from pcb_peft.errors import AdapterNotFoundError, PcbPeftError
from pcb_peft.inspection.concerns import concerns
from pcb_peft.inspection.converted import inspect_converted
from pcb_peft.inspection.facts import FOLDED, Inspection, ModuleFacts
from pcb_peft.inspection.geometry import effective_rank, has_factors, singular_values
from pcb_peft.merging.evaluation_file import read_evaluation
from pcb_peft.merging.one_name import under_one_name
from pcb_peft.merging.report_file import read_report
from pcb_peft.runtime.paths import expanded, size_on_disk
from pcb_peft.runtime.progress import tracker


def inspect_adapter(
    adapter: AdapterLike,
    base_model: str | Path | None = None,
    *,
    dequantize: bool = False,
    progress: bool | None = None,
) -> Inspection:
    """Look at one adapter: what it is, where and how strongly it changes its base model, and what looks wrong.

    Everything comes from the adapter's files; no model is loaded.

    Args:
        adapter: A directory, a hub id, (PeftModel, adapter name), or an adapter that is loaded.
        base_model: Path or hub id of the base model, for kinds that need W, and to look the modules up in it.
        dequantize: Take a quantised base model; its weights are computed from their codes.
        progress: Show a bar; default: on a terminal.

    Returns:
        The facts, to print or to read.

    Raises:
        AdapterError: There is no adapter, and no model that a merge was folded into; or its files are damaged as a
            whole.
        UnsupportedError: It holds something that cannot be read; the message names it.

    Example:
        >>> from pcb_peft import inspect_adapter
        >>> inspect_adapter("math-lora").ranks
        {8: 2}
    """
    base = lazy_base(base_model, dequantize=dequantize)
    if (converted := inspect_converted(adapter)) is not None:
        return dataclasses.replace(converted, warnings=tuple(concerns(converted)))
    try:
        opened = load_adapter(adapter, base_model=base, hashed=False)
    except AdapterNotFoundError:
        if (folded := _folded(adapter)) is None:
            raise
        return folded
    config: Mapping[str, Any] = {} if opened.files is None else opened.files.config
    track = tracker(progress)
    modules = {
        module: _module_facts(opened, module) for module in track(list(opened.modules), "modules")
    }
    path = None if opened.source is None else expanded(opened.source.path)
    directory = path if opened.files is None else opened.files.directory or path
    made = None if directory is None else read_report(directory)
    inspection = Inspection(
        name=opened.name,
        path=None if opened.source is None else opened.source.path,
        tuner=str(config.get("peft_type", "merged")),
        task_type=opened.task_type,
        base_model=opened.base_model or _image_model(opened),
        revision=opened.revision,
        config=config,
        modules=modules,
        replaced={name: tuple(one.shape) for name, one in opened.head.parameters.items()},
        token_rows={module: len(rows.indices) for module, rows in opened.head.rows.items()},
        labels=opened.head.task.labels,
        heads=tuple(opened.heads),
        companions=tuple(name for files in opened.companions.values() for name in files),
        bytes=size_on_disk(path) if path is not None and path.exists() else None,
        made=made,
        evaluation=None if directory is None or made is None else read_evaluation(directory),
    )
    found = [*concerns(inspection), *_name_concerns(opened, base)]
    return dataclasses.replace(inspection, warnings=tuple(found))


def _folded(source: object) -> Inspection | None:
    """Return the facts about a model that a merge was folded into; None for anything else."""
    place = expanded(source) if isinstance(source, str | Path) else None
    report = None if place is None or not place.is_dir() else read_report(place)
    if place is None or report is None:
        return None
    return Inspection(
        name=place.resolve().name,
        path=str(source),
        tuner=FOLDED,
        bytes=size_on_disk(place),
        companions=tuple(name for files in companions_beside(place).values() for name in files),
        made=report,
        evaluation=read_evaluation(place),
    )


def _image_model(adapter: Adapter) -> str | None:
    """Return the name of an image LoRA's model, as far as its modules tell; its file names no base model."""
    return " or ".join(adapter.image.architectures) or None if adapter.image else None


def _module_facts(adapter: Adapter, module: str) -> ModuleFacts:
    entry = adapter.modules.entries[module]
    kind = entry.kind.kind_name
    if entry.missing and adapter.base is None:
        return ModuleFacts(kind, entry.shape, entry.rank, 0.0, None, entry.missing, needs_base=True)
    try:
        delta = adapter.modules[module]
    except PcbPeftError as error:
        return ModuleFacts(kind, entry.shape, entry.rank, 0.0, None, str(error))
    if not has_factors(delta):
        return ModuleFacts(kind, entry.shape, entry.rank, delta.norm(), None)
    values = singular_values(delta)
    return ModuleFacts(kind, entry.shape, entry.rank, float(values.norm()), effective_rank(values))


def _name_concerns(adapter: Adapter, base: Any) -> list[str]:
    try:
        return list(under_one_name([adapter], base)[1])
    except PcbPeftError as error:
        return [str(error)]
