"""Add deltas into a base model's weights, shard by shard, without loading the model."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from pcb_peft.base.config import WAY_OUT
from pcb_peft.base.files import INDEX_FILE, SINGLE_FILE
from pcb_peft.base.model import BaseModel
from pcb_peft.base.one_file import HERE
from pcb_peft.base.plain_checkpoint import QUANTISATION_FILES
from pcb_peft.deltas.delta import Delta
from pcb_peft.deltas.dtypes import SAFETENSORS_FLOATS
from pcb_peft.deltas.linalg import row_slices
from pcb_peft.deltas.replacements import Replacements
from pcb_peft.errors import BaseModelError, OptionError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.files.schema import checked
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.progress import Track, tracker
from pcb_peft.runtime.threads import side_by_side
from pcb_peft.writing.atomic import (
    copy_file,
    shared_directory,
    write_file_atomically,
    write_files,
)
from pcb_peft.writing.beside_pipeline import files_beside_pipeline
from pcb_peft.writing.chunks import (
    CHUNK_VALUES,
    Chunk,
    copy_chunks,
    read_tensor,
    sum_chunks,
    value_chunks,
)
from pcb_peft.writing.edits import TensorEdit, Unchanged
from pcb_peft.writing.fold_plan import plan_fold
from pcb_peft.writing.growing_file import GrowingFile
from pcb_peft.writing.new_head import NewHead
from pcb_peft.writing.resume import Resumable, key_of
from pcb_peft.writing.shards import CheckpointEdit, config_of, header_of, index_of
from pcb_peft.writing.targets import (
    Inputs,
    Overwrite,
    check_file_target,
    check_target,
    writing,
)
from pcb_peft.writing.tied_weights import check_untied, resolve_tied_edits, vocab_resizes

_MOST_WORKERS = 8  # one thread writes; more workers would make chunks faster than it can write them
_WEIGHTS = re.compile(
    r"\.(bin|ckpt|gguf|h5|mlmodel|msgpack|onnx|onnx_data|ot|pb|pt|pth|safetensors|tflite)$"
)


def fold_deltas(  # noqa: PLR0913  (every choice, by name)
    deltas: Mapping[str, Delta],
    base: BaseModel,
    output: Path | str,
    *,
    replaced: Replacements | None = None,
    added: NewHead | None = None,
    tied: str = "refuse",
    extra_files: Mapping[str, bytes | None] | None = None,
    files_at_end: Callable[[], Mapping[str, bytes]] = dict[str, bytes],
    facts: dict[str, Any] | None = None,
    overwrite: Overwrite = False,
    progress: Track | None = None,
    identity: str | None = None,
    resume: bool = False,
) -> None:
    """Write the base model with `deltas` added to its weights, in the form that it has.

    A shard whose shapes stay keeps its header to the byte. A tensor without a delta is copied as bytes; one with a
    delta is computed in float32 (in float64 if the tensor is) and rounded once. The base model's other files are copied
    as they are, except weights in other formats (``.bin``, ``.onnx`` … and the folders that hold them), which would no
    longer be the same model. ``config.json`` changes where the size of the vocabulary does, or tied weights are untied.

    Args:
        deltas: Module to delta. Each is read when its weight is met in the files, used and dropped: a mapping that
            computes them is never held as a whole.
        base: The base model.
        output: Directory to write, or file, if the base model is one. It appears whole or not at all.
        replaced: Parameters and rows that take the place of the base model's, before a delta is added.
        added: A head that the base model has no place for.
        tied: Policy for tied weights that do not change alike: "refuse", "untie", "both".
        extra_files: Path to content of files to write beside the weights, in place of the base model's; None leaves a
            file of the base model out.
        files_at_end: Makes further such files once all deltas have been read; it is called in every process.
        facts: Plain data by module that `deltas` fills while it is read; a fold that is continued has them from before.
        overwrite: Replace `output` even though it holds something: True, if this package wrote it; "all", anything.
        progress: Receives the parameters that change in a shard, and the shard's name; passes the parameters on.
        identity: Text by which `deltas` are known in another run; None: they are not.
        resume: Continue what a killed run of the same fold left.

    Raises:
        MismatchError: A module is not in the base model, or its delta has another shape than its weight.
        BaseModelError: A weight is tied, or not stored as plain floating-point numbers.
        OutputError: `output` cannot be written.
    """
    output, inputs, replaced = Path(output), [base.directory], replaced or Replacements()
    check_fold_target(output, overwrite=overwrite, inputs=inputs)
    _check_form(base, output, resume=resume)
    checkpoint = resolve_tied_edits(plan_fold(deltas, base, replaced), base, tied)
    untied = tuple(checkpoint.added)
    descriptions = _descriptions(base, checkpoint, added or NewHead())
    beside = dict(extra_files or {})
    track, processes = progress or tracker(progress=False), current()
    if base.directory.is_file():
        _fold_file(base, output, checkpoint, track, overwrite=overwrite)
        return
    headers = (header_of(base, file, checkpoint) for file in base.files)
    known_by = None if identity is None else key_of(identity, base, replaced, tied, headers)
    resumable = None if known_by is None else Resumable(known_by, resume)
    shared = shared_directory(
        output, processes, overwrite=overwrite, inputs=inputs, resumable=resumable
    )
    with shared as directory:
        facts = {} if facts is None else facts
        for file in _shards_to_fold(base, directory, resumable, facts):
            known = set(facts)
            sha256 = _fold_shard(base, file, directory / file, checkpoint, track)
            if resumable is not None:
                resumable.note(directory, file, sha256, facts, known)
        beside |= files_at_end()
        if not processes.is_main:
            return
        others = _other_files(base, checkpoint.edits)
        for path in [path for path in others if path.as_posix() not in beside]:
            copy_file(base.directory / path, directory / path)
        written = {name: text for name, text in (descriptions | beside).items() if text is not None}
        write_files(directory, written)
        if untied:
            check_untied(directory, untied)


def _descriptions(base: BaseModel, checkpoint: CheckpointEdit, added: NewHead) -> dict[str, bytes]:
    """Add a new head to the edits, and return the index and the configuration where they change."""
    resized, untied = vocab_resizes(checkpoint, base), bool(checkpoint.added)
    added.add_to(checkpoint, base)
    changed = config_of(base, resized, added.config, untied=untied)
    return index_of(base, checkpoint) | changed


def _shards_to_fold(
    base: BaseModel, directory: Path, resumable: Resumable | None, facts: dict[str, Any]
) -> list[str]:
    """Return this process's share of the shards, without those that a killed run of the same fold has written.

    The facts that were noted with those are put into `facts`.
    """
    processes = current()

    def size(file: str) -> int:
        return (base.directory / file).stat().st_size

    whole = set[str]()
    if resumable is not None and resumable.wanted:
        if processes.is_main:
            resumable.tidy(directory)
        share = processes.partition(base.files, size)
        whole.update(*processes.all_gather(resumable.whole_shards(directory, share)))
        facts |= resumable.facts_of(directory, whole)
    if whole and processes.is_main:
        warnings.warn(
            f"{len(whole)} of {len(base.files)} shards of a run that was ended are whole: the fold goes on from there",
            stacklevel=4,
        )
    return processes.partition([file for file in base.files if file not in whole], size)


def check_fold_target(output: Path, *, overwrite: Overwrite, inputs: Inputs = ()) -> None:
    """Raise OutputError where a folded model must not be written: a directory, or a file (``model.safetensors``)."""
    if output.suffix == ".safetensors" and not output.is_dir():
        check_file_target(output, overwrite=overwrite, inputs=inputs, is_ours=_not_ours)
    else:
        check_target(output, overwrite=overwrite, inputs=inputs)


def _not_ours(_: Path) -> bool:
    """Return False: a folded checkpoint in one file has the header of its base model, and no mark of this package."""
    return False


def _fold_file(
    base: BaseModel,
    output: Path,
    checkpoint: CheckpointEdit,
    track: Track,
    *,
    overwrite: Overwrite,
) -> None:
    """Write a checkpoint in one file; of several processes, the first one writes."""
    processes = current()
    if processes.is_main:
        write_file_atomically(
            output,
            lambda place: _fold_shard(base, HERE, place, checkpoint, track),
            overwrite=overwrite,
            is_ours=_not_ours,
        )
    processes.barrier()


def _check_form(base: BaseModel, output: Path, *, resume: bool) -> None:
    """Refuse a directory for a checkpoint in one file, and a file for a directory."""
    one_file, named = base.directory.is_file(), output.suffix == ".safetensors"
    if one_file and resume:
        raise OptionError(f"{base.source} is one file, which is written anew: leave out resume")
    if one_file and not named:
        raise OptionError(
            f"{base.source} is one file, and so is what it becomes: name it {output.name}.safetensors"
        )
    if named and not one_file:
        raise OptionError(
            f"{output} is the name of a file, and {base.source} is a directory: name a directory"
        )


def _fold_shard(
    base: BaseModel, file: str, target: Path, checkpoint: CheckpointEdit, track: Track
) -> str:
    """Copy a shard, with the edited values in the place of the old ones; return its SHA-256."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    workers = min(torch.get_num_threads(), _MOST_WORKERS)
    contents = side_by_side(lambda chunk: chunk(), _chunks(base, file, checkpoint, track), workers)
    with GrowingFile(target) as writer, contextlib.closing(contents):
        writer.write(header_of(base, file, checkpoint))
        for content in contents:
            writer.write(content)
        return writer.sha256()


def _chunks(
    base: BaseModel, file: str, checkpoint: CheckpointEdit, track: Track
) -> Iterator[Chunk]:
    """Yield the chunks that follow a shard's header."""
    source = base.directory / file
    tensors = {name: tensor for name, tensor in base.tensors.items() if tensor.file == file}
    names = sorted(tensors, key=lambda name: tensors[name].begin)
    computed = [name for name in names if name in checkpoint.edits or name in base.quantised]
    position = 0
    for name in track(computed, file):
        place = names.index(name, position)
        for copied in names[position:place]:
            yield from copy_chunks(source, tensors[copied].begin, tensors[copied].end)
        yield from _edited_chunks(base, name, name, checkpoint.edits.get(name, Unchanged()))
        position = place + 1
    for copied in names[position:]:
        yield from copy_chunks(source, tensors[copied].begin, tensors[copied].end)
    for name, origin in checkpoint.added_to(base, file).items():
        yield from _edited_chunks(base, name, origin, checkpoint.edits[name])


def _edited_chunks(base: BaseModel, name: str, origin: str, edit: TensorEdit) -> Iterator[Chunk]:
    """Yield the chunks of a parameter that is made from the values of one in the files, its `origin`."""
    tensor = base.tensors[origin]
    if tensor.dtype not in SAFETENSORS_FLOATS:
        raise BaseModelError(
            f"{base.source}: {origin} is stored as {base.tensor(origin).dtype}, to which nothing can be added; "
            "give the model in bfloat16, float16 or float32"
        )
    if origin in base.quantised:  # float32, rounded once
        values = edit.apply(base.tensor(origin))
        return value_chunks(values.to(SAFETENSORS_FLOATS[tensor.dtype]), name)
    source = base.directory / tensor.file
    deltas = edit.split(row_slices(tensor.shape, CHUNK_VALUES))
    if deltas:
        return sum_chunks(source, tensor, deltas, name)
    return value_chunks(edit.apply(read_tensor(source, tensor)), name)


def _other_files(base: BaseModel, changed: Iterable[str]) -> list[Path]:
    """Return the files to copy beside the weights, relative to the base model's directory.

    Weights in other formats are left out, at the top or in a folder (``onnx/``), unless the folder is a further module
    of a sentence-transformers model. So are hidden folders.
    """
    if not base.config:
        return files_beside_pipeline(base, changed, _WEIGHTS)
    paths = [path.relative_to(base.directory) for path in sorted(base.directory.rglob("*"))]
    weights = {path.parts[0] for path in paths if _WEIGHTS.search(path.name)}
    hidden = {path.parts[0] for path in paths if len(path.parts) > 1 and path.parts[0][0] == "."}
    indices = {path.name for path in paths if path.name.endswith(".index.json")}
    own_index = {INDEX_FILE} if base.files != (SINGLE_FILE,) else set[str]()
    left_out = (weights | hidden | indices) - own_index - _module_folders(base.directory)
    left_out |= set(QUANTISATION_FILES if base.quantised else ())
    return [
        path
        for path in paths
        if path.parts[0] not in left_out and (base.directory / path).is_file()
    ]


def _module_folders(directory: Path) -> set[str]:
    """Return the folders of the further modules of a sentence-transformers model."""
    path = directory / "modules.json"
    if not path.is_file():
        return set()
    content = read_json_file(path, BaseModelError, WAY_OUT)
    modules = checked(content, list[_Module], str(path), BaseModelError, WAY_OUT)
    return {module.path for module in modules}


class _Module(msgspec.Struct):
    """A module of a sentence-transformers model."""

    path: str
