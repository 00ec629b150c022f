"""The files of a saved adapter: configuration, tensors, model card, and the heads beside them."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.expert_stacks import stacked
from pcb_peft.adapters.found_by_peft import loaded_on, looked_up, with_parameter_targets
from pcb_peft.deltas.delta import Delta, LowRank
from pcb_peft.deltas.linalg import all_finite
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.errors import OptionError, PcbPeftError, UnsupportedError
from pcb_peft.formats import AdapterFiles, Format, format_for, writer_named
from pcb_peft.formats.checkpoint import CONFIG, SafetensorsFile
from pcb_peft.formats.heads import with_biases, write_head
from pcb_peft.formats.keys import AUTOMATIC_HEADS
from pcb_peft.formats.refusals import refuse_pipelines
from pcb_peft.images.metadata import with_title_and_hashes
from pcb_peft.images.names import EMBEDDING, ImageLora
from pcb_peft.images.targets import refuse_embeddings
from pcb_peft.runtime.processes import current
from pcb_peft.writing.atomic import replace_directory, write_file_atomically, write_files
from pcb_peft.writing.model_card import public_name
from pcb_peft.writing.targets import Overwrite, check_file_target, check_target, writing
from pcb_peft.writing.tensors_file import save_tensors

FileFormat: TypeAlias = Literal["peft", "diffusers", "kohya", "comfyui"]
"""The programs whose adapter files can be written."""

FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
PEFT: FileFormat = "peft"
RECIPE_FILE = "merge_recipe.yaml"
REPORT_FILE = "merge_report.json"
EVALUATION_FILE = "evaluation.json"
RECIPE, REPORT = "pcb_peft.recipe", "pcb_peft.report"
"""Keys of the metadata of a single file that hold the recipe and the report."""


class Savable(Protocol):
    """An adapter, as far as saving needs it; `Adapter` describes the attributes."""

    @property
    def name(self) -> str: ...
    @property
    def modules(self) -> DeltaMapping: ...
    @property
    def head(self) -> Replacements: ...
    @property
    def base_model(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def task_type(self) -> str | None: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def auto_mapping(self) -> Mapping[str, Any] | None: ...
    @property
    def image(self) -> ImageLora | None: ...
    def whole_biases(self) -> Mapping[str, Callable[[], Tensor]]: ...
    def companion_files(self) -> dict[str, bytes]: ...
    def noted(self, notes: Sequence[str]) -> "Savable": ...
    def card(self, peft_type: str, notes: Sequence[str] = ()) -> str: ...


def check_format(
    file_format: str, shapes: Mapping[str, tuple[int, int]], image: ImageLora | None
) -> None:
    """Raise PcbPeftError where LoRAs of these modules have no place in a format.

    Args:
        file_format: The format.
        shapes: Module to (out, in).
        image: What is known about them, if they belong to an image model.
    """
    if file_format == PEFT:
        refuse_pipelines(shapes, image)
    else:
        writer_named(file_format).check(shapes, image)


def is_one_file(output: Path) -> bool:
    """Return whether the name of an output is that of a single file: ``merged.safetensors``."""
    return output.suffix == ".safetensors"


def is_our_file(path: Path) -> bool:
    """Return whether this package wrote a single file."""
    try:
        return RECIPE in SafetensorsFile(path).metadata()
    except PcbPeftError:
        return False


def _save_file(
    adapter: Savable,
    path: Path,
    dtype: torch.dtype,
    *,
    rank_pattern: bool,
    overwrite: Overwrite,
    file_format: FileFormat,
) -> None:
    """Write an image LoRA as one file, with the recipe and the report in its metadata."""
    if file_format == PEFT:
        raise OptionError(
            f"{path} is the name of a file, and an adapter of PEFT is a directory: name a directory, or give a LoRA of "
            "an image model another format (format=, --format)"
        )
    check_file_target(path, overwrite=overwrite, inputs=adapter.inputs, is_ours=is_our_file)
    content = adapter_files(adapter, dtype, rank_pattern=rank_pattern, file_format=file_format)
    beside = adapter.companion_files()
    metadata = content.metadata | {RECIPE: beside.get(RECIPE_FILE, b"").decode()}
    if REPORT_FILE in beside:
        metadata[REPORT] = beside[REPORT_FILE].decode()
    write_file_atomically(
        path,
        lambda place: save_tensors(content.tensors, place, metadata),
        overwrite=overwrite,
        is_ours=is_our_file,
    )


def save_adapter(
    adapter: Savable,
    directory: Path,
    dtype: torch.dtype,
    *,
    rank_pattern: bool,
    overwrite: Overwrite,
    file_format: FileFormat,
) -> list[str]:
    """Write an adapter's directory or file, whole or not at all; of several processes, the first one writes.

    Arguments and errors are those of `Adapter.save_pretrained`.

    Returns:
        Sentences for the report.
    """
    notes: list[str] = []
    options = {"rank_pattern": rank_pattern, "overwrite": overwrite, "file_format": file_format}
    if is_one_file(directory) and not directory.is_dir():
        if current().is_main:
            _save_file(adapter, directory, dtype, **options)  # type: ignore[arg-type]
        current().barrier()
        return notes
    if current().is_main:
        check_target(directory, overwrite=overwrite, inputs=adapter.inputs)
        make = functools.partial(
            adapter_files, adapter, dtype, rank_pattern=rank_pattern, file_format=file_format
        )
        if file_format == PEFT:
            content, notes = _looked_up(adapter, make)
        else:
            content = make()
        card = adapter.card(str(content.config.get("peft_type", "LORA")), notes)
        files = adapter.noted(notes).companion_files() | {"README.md": card.encode()}
        if content.config:
            files[CONFIG] = (json.dumps(content.config, indent=2, sort_keys=True) + "\n").encode()
        replaced = replace_directory(directory, overwrite=overwrite, inputs=adapter.inputs)
        with replaced as target:
            with writing(directory):
                path = target / content.file
                metadata = {"format": "pt"} if content.config else content.metadata
                save_tensors(content.tensors, path, metadata)
            write_files(target, files)
    return [note for each in current().all_gather(notes) for note in each]


def _looked_up(
    adapter: Savable, make: Callable[..., AdapterFiles]
) -> tuple[AdapterFiles, list[str]]:
    """Return an adapter's files with targets that PEFT finds in its base model, and sentences for the report.

    Experts one by one are written as the stacks that hold them where PEFT finds others, or more, by their own names.
    """
    content, entries = make(), adapter.modules.entries
    replaced = [*adapter.head.rows, *(name.rpartition(".")[0] for name in adapter.head.parameters)]
    modules = [*entries, *replaced]
    model_class = loaded_on(adapter.base_model, adapter.revision, adapter.task_type, modules)
    if model_class is None or not entries:
        return content, []
    found = looked_up(content, model_class)
    if not found.is_exact:
        as_stacks = DeltaMapping(stacked(entries, model_class.skeleton))
        if as_stacks.entries.keys() != entries.keys():
            found = looked_up(make(modules=as_stacks), model_class)
    return found.files, [found.note(len(entries))]


def adapter_files(
    adapter: Savable,
    dtype: torch.dtype,
    *,
    rank_pattern: bool = False,
    file_format: FileFormat = PEFT,
    modules: DeltaMapping | None = None,
) -> AdapterFiles:
    """Return the configuration and the tensors of an adapter's files.

    Other arguments, and errors, are those of `Adapter.save_pretrained`.

    Args:
        adapter: The adapter.
        dtype: Dtype of the tensors.
        rank_pattern: Give every module its own rank.
        file_format: Program that the files are for.
        modules: Deltas to write in place of the adapter's.
    """
    biases = adapter.whole_biases()
    all_entries = (modules or adapter.modules).entries
    entries = {path: e for path, e in all_entries.items() if path not in biases}
    kinds = {entry.kind for entry in entries.values()}
    if len(kinds) > 1 or not (kinds or adapter.head.rows):
        names = ", ".join(sorted(kind.kind_name for kind in kinds)) or "no deltas at all"
        raise UnsupportedError(
            f"{adapter.name} holds {names}: one PEFT adapter holds deltas of one kind; fold it into the base instead"
        )
    kind = next(iter(kinds), None)
    if file_format != PEFT:
        return _other_files(adapter, file_format, kind, dtype, rank_pattern=rank_pattern)
    refuse_pipelines(entries, adapter.image)
    if rank_pattern and (not entries or any(entry.rank is None for entry in entries.values())):
        raise OptionError(f"rank_pattern: {adapter.name} has no ranks; leave it out")
    format_ = format_for(kind)
    content = _written(format_, dict(DeltaMapping(entries)), dtype, rank_pattern=rank_pattern)
    routers = {module for module, entry in entries.items() if entry.parameter}
    content = with_parameter_targets(content, routers)
    content = with_biases(content, biases, entries, dtype)
    head = write_head(adapter.head, entries.keys(), format_, dtype)
    tensors = _separate_storage(content.tensors | head.tensors)
    _refuse_overflow(tensors)
    return AdapterFiles(
        _identity(adapter, format_.peft_type) | content.config | head.config, tensors
    )


def _written(
    format_: Format, deltas: Mapping[str, Delta], dtype: torch.dtype, *, rank_pattern: bool
) -> AdapterFiles:
    """Return the deltas in a format; no deltas, for rows of embeddings alone, in an empty file."""
    if not deltas or format_.write is None:
        return AdapterFiles({}, {})
    options = {"rank_pattern": True} if rank_pattern else {}
    return format_.write(deltas, dtype, **options)


def _other_files(
    adapter: Savable,
    file_format: FileFormat,
    kind: type[Delta] | None,
    dtype: torch.dtype,
    *,
    rank_pattern: bool,
) -> AdapterFiles:
    """Return the adapter's files as programs other than PEFT load them."""
    writer = writer_named(file_format)
    parameters = adapter.head.parameters
    if not all(name.startswith(EMBEDDING) for name in parameters) or (
        kind is not LowRank or adapter.whole_biases()
    ):
        raise UnsupportedError(
            f"{adapter.name}: the format {file_format} holds a LoRA, and nothing beside it"
        )
    refuse_embeddings(parameters, file_format)
    loras: dict[str, Any] = dict(adapter.modules)
    content = writer.write(loras, dtype, image=adapter.image, rank_pattern=rank_pattern)
    embeddings = {name: new().to(dtype) for name, new in parameters.items()}
    tensors = _separate_storage(content.tensors | embeddings)
    _refuse_overflow(tensors)
    metadata = with_title_and_hashes(content.metadata, tensors, adapter.name)
    return dataclasses.replace(content, tensors=tensors, metadata=metadata)


def _identity(adapter: Savable, peft_type: str) -> dict[str, Any]:
    """Return the fields of the configuration that say what the adapter belongs to."""
    automatic = AUTOMATIC_HEADS.get(str(adapter.task_type), [])
    parts = {part for name in adapter.head.parameters for part in name.split(".")}
    headless = automatic and not parts.intersection(automatic)
    base = public_name(adapter.base_model)
    task_type = None if headless else adapter.task_type
    fields = {
        "peft_type": peft_type,
        "task_type": task_type,
        "auto_mapping": None if task_type else adapter.auto_mapping,
        "base_model_name_or_path": base,
        "revision": adapter.revision if base else None,
        "inference_mode": True,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _separate_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same values, each contiguous and in memory of its own, as safetensors needs them."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, values in tensors.items():
        values = values.contiguous()
        storage = values.untyped_storage()
        if storage.nbytes() > values.nbytes or storage.data_ptr() in storages:
            values = values.clone()
        storages.add(storage.data_ptr())
        separate[name] = values
    return separate


def _refuse_overflow(tensors: Mapping[str, Tensor]) -> None:
    """Raise OptionError where tensors hold values that are too large for their dtype."""
    for name, values in tensors.items():
        if not all_finite(values):
            raise OptionError(
                f"{name} has values that are too large for {values.dtype}: save it in bfloat16 or float32"
            )
