"""Add deltas into a base model's weights, shard by shard, without loading the model."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pcb_peft.base.files import INDEX_FILE, SINGLE_FILE
from pcb_peft.base.model import BaseModel, WeightSlice, split_parameter_name
from pcb_peft.deltas.delta import Delta, Dense, Diagonal
from pcb_peft.deltas.dtypes import SAFETENSORS_FLOATS
from pcb_peft.deltas.linalg import row_slices
from pcb_peft.deltas.replacements import Parameter, Replacements, Rows
from pcb_peft.errors import BaseModelError, MismatchError, OutputError
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.progress import Track, tracker
from pcb_peft.runtime.threads import side_by_side
from pcb_peft.writing.atomic import GrowingFile, shared_directory
from pcb_peft.writing.chunks import CHUNK_VALUES, Chunk, added, copied, read, whole
from pcb_peft.writing.shards import CheckpointEdit, TensorEdit, config_of, header_of, index_of
from pcb_peft.writing.tied_weights import (
    ParameterChange,
    check_untied,
    resolve_tied_edits,
    vocab_resizes,
)

_MOST_WORKERS = 8  # one thread writes, and more than that many do not make what it can write
_WEIGHTS = re.compile(
    r"\.(bin|ckpt|gguf|h5|mlmodel|msgpack|onnx|onnx_data|ot|pb|pt|pth|safetensors|tflite)$"
)


def fold_deltas(
    deltas: Mapping[str, Delta],
    base: BaseModel,
    output: Path | str,
    *,
    replaced: Replacements | None = None,
    tied: str = "refuse",
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    progress: Track | None = None,
) -> None:
    """Writes the base model with `deltas` added to its weights, as a transformers checkpoint.

    Every shard whose shapes stay keeps its header to the byte; a tensor without a delta is copied as bytes, one with
    a delta is computed in float32 (in float64 if the tensor is) and rounded once. The base's other files are copied
    as they are, but for weights in other formats (``.bin``, ``.onnx`` … and the folders that hold them), which
    would no longer be the same model. ``config.json`` is another one where the size of the
    vocabulary changes, or tied weights are untied.

    Args:
        deltas: Module → its delta. Each is asked for when its weight is met in the files, used and
            dropped: a mapping that computes them is never held as a whole.
        base: What to add them to.
        output: The directory to write. It appears whole or not at all.
        replaced: What takes the place of parameters, and of rows, before a delta is added.
        tied: What becomes of tied weights that do not change alike: "refuse", "untie", "both".
        extra_files: Path → content of files to write beside the weights, in place of the base's.
        overwrite: Replace `output` even though it holds something.
        progress: Is given the parameters that change in a shard, and the shard's name; hands the
            parameters on.

    Raises:
        MismatchError: A module is not in the base, or its delta has another shape than its weight.
        BaseModelError: A weight is tied, or not stored as plain floating-point numbers.
        OutputError: `output` cannot be written.
    """
    output = Path(output)
    _refuse_overlap(output.resolve(), base.directory.resolve())
    changes = _plan(deltas, base, replaced or Replacements())
    rewrite = resolve_tied_edits(changes, base, tied)
    resized, untied = vocab_resizes(rewrite, base), tuple(rewrite.added)
    described = index_of(base, rewrite) | config_of(base, resized, untied=bool(untied))
    track = progress or tracker(progress=False)
    processes = current()
    with shared_directory(output, processes, overwrite=overwrite) as directory:
        for file in processes.partition(
            base.files, lambda name: (base.directory / name).stat().st_size
        ):
            _fold_shard(base, file, directory / file, rewrite, track)
        if not processes.is_main:
            return
        for path in _other_files(base):
            shutil.copyfile(base.directory / path, _in_folder(directory / path))
        for name, content in (described | dict(extra_files or {})).items():
            _in_folder(directory / name).write_bytes(content)
        if untied:
            check_untied(directory, untied)


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedModel(BaseModel):
    """A base model with deltas in its weights, of which no file is written; made by `folded`.

    Attributes:
        below: The base model.
        edits: Parameter → what becomes of its values.
    """

    below: BaseModel
    edits: Mapping[str, TensorEdit]

    def tensor(self, parameter: str) -> Tensor:
        """A parameter's values with the deltas in them: float32 where there are any, and not rounded."""
        values = self.below.tensor(parameter)
        return self.edits[parameter](values.float().clone()) if parameter in self.edits else values


def folded(deltas: Mapping[str, Delta], base: BaseModel, replaced: Replacements) -> FoldedModel:
    """The base model as `fold_deltas` would write it; arguments and errors are likewise.

    Raises:
        BaseModelError: Parameters would have other shapes, or `fold_deltas` raises it.
    """
    rewrite = resolve_tied_edits(_plan(deltas, base, replaced), base, "refuse")
    if rewrite.shapes:
        raise BaseModelError(
            f"{', '.join(rewrite.shapes)} would have other shapes than in {base.source}: fold, and "
            "give what comes out as the base"
        )
    return FoldedModel(base.source, base.directory, base.config, base.spans, base, rewrite.edits)


@dataclasses.dataclass(frozen=True)
class AddDeltas:
    """The edit of a parameter to which deltas are added.

    Attributes:
        delta: Module to its delta.
        modules: Where in the parameter modules lie.
    """

    delta: Callable[[str], Delta]
    modules: Mapping[WeightSlice, str]

    def __call__(self, values: Tensor) -> Tensor:
        """A parameter's values with the changes of the modules that lie there, in place."""
        for place, module in self.modules.items():
            delta = self.delta(module)
            if place.rows is not None:
                delta = Dense(delta.matrix()[slice(*place.rows)])
            delta.apply_(place.part(values))
        return values

    def split(self, parts: Sequence[slice]) -> Sequence[Delta] | None:
        """What is done to each of these rows; None where all must be there at once."""
        (place, module), *others = self.modules.items()
        return None if others or not place.whole else self.delta(module).split(parts)


def _in_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _refuse_overlap(output: Path, base: Path) -> None:
    if output.is_relative_to(base) or base.is_relative_to(output):
        raise OutputError(
            f"{output} and the base model in {base} lie in each other; name a directory elsewhere"
        )


def _plan(
    deltas: Mapping[str, Delta], base: BaseModel, head: Replacements
) -> dict[str, ParameterChange]:
    """Parameter in memory → what becomes of its values; no delta is looked at yet."""
    whole = {
        base.in_memory(*split_parameter_name(name)): new for name, new in head.parameters.items()
    }
    some = {base.in_memory(module): rows for module, rows in head.rows.items()}
    edits = _delta_edits(deltas, base, {name: new.shape for name, new in whole.items()})
    own = {*edits, *whole, *some}
    # where ends are tied, PEFT lets both have the rows of the first, and the matrix below rows or a delta
    if base.inputs in some:
        some = dict.fromkeys(_others(base, base.inputs), some[base.inputs]) | some
    for name in sorted(whole.keys() & {*edits, *some}):
        whole = dict.fromkeys(_others(base, name), whole[name]) | whole
    changes: dict[str, ParameterChange] = {}
    for name in dict.fromkeys([*edits, *whole, *some]):
        new = whole.get(name)
        parameter = base.parameter(name)
        shape = new.shape if new else base.spans[parameter].shape
        steps: tuple[TensorEdit | None, ...] = (
            functools.partial(_in_place_of, new) if new else None,
            functools.partial(_with_rows, name, some[name]) if name in some else None,
            edits.get(name),
        )
        first, *rest = filter(None, steps)
        edit = functools.partial(_in_turn, (first, *rest)) if rest else first
        changes[name] = ParameterChange(parameter, edit, shape, own=name in own)
    return changes


def _others(base: BaseModel, name: str) -> list[str]:
    """What a parameter in memory is tied to, as far as the names are known."""
    return [other for other in base.tied(name) if base.has(other)]


def _delta_edits(
    deltas: Mapping[str, Delta], base: BaseModel, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorEdit]:
    """Parameter in memory → what a delta makes of its values; `shapes` are those that are not the base's."""
    places = {module: base.places(module) for module in deltas}
    names = {
        module: base.in_memory(module) for module, (first, *_) in places.items() if first.whole
    }

    @functools.lru_cache(maxsize=1)  # a weight and its bias are neighbours in the file
    def delta(module: str) -> Delta:
        return fitted(deltas[module], module, base, shapes.get(names.get(module, "")))

    taken: dict[str, dict[WeightSlice, str]] = {}
    for module, own in places.items():
        for place in own:
            name = names.get(module, place.parameter)
            other = taken.setdefault(name, {}).setdefault(place, module)
            if other != module:
                raise MismatchError(
                    f"{module} and {other} are two names for {name}; leave one of them out"
                )
    edits: dict[str, TensorEdit] = {
        name: AddDeltas(delta, modules) for name, modules in taken.items()
    }
    for module in deltas:
        if base.bias_parameter(module) is not None:
            bias = base.in_memory(module, "bias")
            edits.setdefault(
                bias, lambda values, module=module: delta(module).apply_to_bias(values)
            )
    return edits


def _in_place_of(new: Parameter, values: Tensor) -> Tensor:
    return new().to(values.dtype, copy=True)


def _in_turn(steps: Sequence[TensorEdit], values: Tensor) -> Tensor:
    for step in steps:
        values = step(values)
    return values


def _with_rows(name: str, rows: Rows, values: Tensor) -> Tensor:
    last, shape = max(rows.indices), rows.load().shape
    if last >= len(values) or shape[1:] != values.shape[1:]:
        raise MismatchError(
            f"{name}: the adapter replaces rows up to {last} by {tuple(shape)}, the base has "
            f"{tuple(values.shape)}; give the base that the adapter was trained on, with its vocabulary"
        )
    return rows.put_into(values)


def fitted(
    delta: Delta, module: str, base: BaseModel, shape_of_own: tuple[int, ...] | None = None
) -> Delta:
    """`delta`, as the base stores W: an adapter's own word on that is often wrong; W may be the adapter's own."""
    weight = shape_of_own or base.shape(module)
    layout = delta.layout if delta.layout.lookup else base.layout(module, delta.shape)
    shape = layout.matrix_shape(weight)
    if isinstance(delta, Diagonal):  # has but one of the two numbers
        shape = (1, weight[not layout.transposed]) if delta.feedforward else (shape[0], 1)
    if delta.shape != shape or (isinstance(delta, Diagonal) and len(weight) < 2):
        raise MismatchError(
            f"{module}: the adapter's (out, in) is {delta.shape}, the weight in {base.source} is "
            f"{weight}{' as (in, out)' * layout.transposed}; give the base that the adapter was trained on"
        )
    return dataclasses.replace(
        delta, layout=dataclasses.replace(layout, expert=delta.layout.expert)
    )


def _fold_shard(
    base: BaseModel, file: str, target: Path, rewrite: CheckpointEdit, track: Track
) -> None:
    """Copies a shard, with the values of the edited parameters replaced on the way."""
    workers = min(torch.get_num_threads(), _MOST_WORKERS)
    pieces = side_by_side(lambda piece: piece(), _pieces(base, file, rewrite, track), workers)
    with GrowingFile(target) as writer, contextlib.closing(pieces):
        writer.write(header_of(base, file, rewrite))
        for content in pieces:
            writer.write(content)


def _pieces(base: BaseModel, file: str, rewrite: CheckpointEdit, track: Track) -> Iterator[Chunk]:
    """What follows a shard's header."""
    source = base.directory / file
    here = (name for name in rewrite.edits if name in base.spans and base.spans[name].file == file)
    edited = sorted(here, key=lambda name: base.spans[name].begin)
    with source.open("rb") as stream:
        position = 8 + int.from_bytes(stream.read(8), "little")
    for name in track(edited, file):
        yield from copied(source, position, base.spans[name].begin)
        yield from _edited(base, name, name, rewrite.edits[name])
        position = base.spans[name].end
    ends = [span.end for span in base.spans.values() if span.file == file]
    yield from copied(source, position, max(ends, default=position))
    for name, origin in rewrite.added_to(base, file).items():
        yield from _edited(base, name, origin, rewrite.edits[name])


def _edited(base: BaseModel, name: str, origin: str, edit: TensorEdit) -> Iterator[Chunk]:
    """A parameter that is made from the values of one in the files."""
    span = base.spans[origin]
    if span.dtype not in SAFETENSORS_FLOATS:
        raise BaseModelError(
            f"{base.source}: {origin} is stored as {base.tensor(origin).dtype}, to which nothing can be added; "
            "give the model in bfloat16, float16 or float32"
        )
    split = (
        edit.split(row_slices(span.shape, CHUNK_VALUES)) if isinstance(edit, AddDeltas) else None
    )
    if split:
        return added(base.directory / span.file, span, split, name)
    return whole(edit(read(base.directory / span.file, span)), name)


def _other_files(base: BaseModel) -> list[Path]:
    """What goes along with the weights, relative to the base's directory.

    Weights in other formats do not, at the top or in a folder (``onnx/``), unless the folder is a
    further module of a sentence-transformers model. Neither do hidden folders.
    """
    paths = [path.relative_to(base.directory) for path in sorted(base.directory.rglob("*"))]
    left_out = {path.parts[0] for path in paths if _WEIGHTS.search(path.name)}
    left_out |= {path.parts[0] for path in paths if len(path.parts) > 1 and path.parts[0][0] == "."}
    left_out |= {path.name for path in paths if path.name.endswith(".index.json")}
    keep = {INDEX_FILE} if base.files != (SINGLE_FILE,) else set[str]()
    left_out -= keep | _module_folders(base.directory)
    return [
        path
        for path in paths
        if path.parts[0] not in left_out and (base.directory / path).is_file()
    ]


def _module_folders(directory: Path) -> set[str]:
    modules = directory / "modules.json"
    if not modules.is_file():
        return set()
    return {module["path"] for module in json.loads(modules.read_text(encoding="utf-8"))}
