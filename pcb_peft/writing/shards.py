"""The descriptions in a changed checkpoint: the headers of its shards, its index and its configuration."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from pcb_peft.base.config import WAY_OUT
from pcb_peft.base.files import INDEX_FILE, bytes_of
from pcb_peft.base.model import BaseModel
from pcb_peft.errors import BaseModelError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.files.schema import Number, checked
from pcb_peft.writing.edits import TensorEdit


class _Totals(msgspec.Struct):
    """The sums in the index of a checkpoint."""

    total_size: Number | None = None
    total_parameters: Number | None = None


class _Index(msgspec.Struct):
    """The index of a checkpoint."""

    weight_map: dict[str, str]
    metadata: _Totals = msgspec.field(default_factory=_Totals)


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointEdit:
    """The edits of a checkpoint's tensors.

    Attributes:
        edits: Parameter to the edit of its values.
        shapes: Parameter to its new shape, if it has one.
        added: New parameter to the parameter that it is made from; it goes into the same file.
    """

    edits: dict[str, TensorEdit]
    shapes: dict[str, tuple[int, ...]]
    added: dict[str, str]

    def shape(self, base: BaseModel, parameter: str) -> tuple[int, ...]:
        """Return the shape of a parameter, an old or a new one, after the edits."""
        source = self.added.get(parameter, parameter)
        return self.shapes.get(parameter, base.tensors[source].shape)

    def added_to(self, base: BaseModel, file: str) -> dict[str, str]:
        """Return the new parameters of a file."""
        return {new: old for new, old in self.added.items() if base.tensors[old].file == file}


def header_of(base: BaseModel, file: str, checkpoint: CheckpointEdit) -> bytes:
    """Return the first bytes of a shard, up to its values; if no shape changes, they are those of the base model."""
    added = checkpoint.added_to(base, file)
    if base.quantised:
        entries = _entries_of(base, file)
    else:
        with (base.directory / file).open("rb") as stream:
            length = stream.read(8)
            text = stream.read(int.from_bytes(length, "little"))
        entries: dict[str, Any] = json.loads(text)
        if not added and not entries.keys() & checkpoint.shapes.keys():
            return length + text
    entries |= {new: dict(entries[old]) for new, old in added.items()}
    names = sorted(base.tensors.keys() & entries.keys(), key=lambda name: base.tensors[name].begin)
    end = 0
    for name in [*names, *added]:
        begin, end = end, end + _size(base, checkpoint, name)
        entries[name] |= {
            "shape": list(checkpoint.shape(base, name)),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entries_of(base: BaseModel, file: str) -> dict[str, Any]:
    """Return the header of a shard of a quantised model once its weights are plain numbers; no place is set yet."""
    tensors = {name: tensor for name, tensor in base.tensors.items() if tensor.file == file}
    entries = {name: {"dtype": tensor.dtype} for name, tensor in tensors.items()}
    return {"__metadata__": {"format": "pt"}, **entries}


def index_of(base: BaseModel, checkpoint: CheckpointEdit) -> dict[str, bytes]:
    """Return the index of the shards, by its file name, if it changes."""
    changed = {**checkpoint.shapes, **checkpoint.added}
    path = base.directory / INDEX_FILE
    if not (changed or base.quantised) or (len(base.files) == 1 and not path.is_file()):
        return {}
    index: dict[str, Any] = read_json_file(path, BaseModelError, WAY_OUT)
    checked(index, _Index, str(path), BaseModelError, WAY_OUT)
    if base.quantised:
        total = bytes_of(base.tensors)
        files = {name: tensor.file for name, tensor in sorted(base.tensors.items())}
        index = dict[str, Any](metadata={"total_size": total}, weight_map=files)
    index["weight_map"] |= {new: base.tensors[old].file for new, old in checkpoint.added.items()}
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    totals = index.get("metadata", {})
    for name in changed:
        old = base.tensors.get(name)
        old_size, old_count = (old.end - old.begin, math.prod(old.shape)) if old else (0, 0)
        if totals.get("total_size") is not None:
            totals["total_size"] += _size(base, checkpoint, name) - old_size
        if totals.get("total_parameters") is not None:
            totals["total_parameters"] += math.prod(checkpoint.shape(base, name)) - old_count
    return {INDEX_FILE: _text(index)}


def config_of(
    base: BaseModel, vocab_sizes: Mapping[int, int], fields: Mapping[str, Any], *, untied: bool
) -> dict[str, bytes]:
    """Return ``config.json``, by its file name, if it changes.

    Args:
        base: The base model.
        vocab_sizes: Size of the vocabulary before the fold to its size after it; empty if it stays.
        fields: Fields that get another value.
        untied: True if the output layer has got weights of its own.
    """
    if not (vocab_sizes or fields or untied or base.quantised):
        return {}
    config: dict[str, Any] = json.loads(json.dumps(dict(base.config)))
    nested = [part for part in config.values() if isinstance(part, dict)]
    for part in (config, *nested):
        if part.get("vocab_size") in vocab_sizes:
            part["vocab_size"] = vocab_sizes[part["vocab_size"]]
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return {"config.json": _text(config | dict(fields))}


def _size(base: BaseModel, checkpoint: CheckpointEdit, parameter: str) -> int:
    """Return the number of bytes of a parameter after the edits."""
    tensor = base.tensors[checkpoint.added.get(parameter, parameter)]
    if (shape := checkpoint.shape(base, parameter)) == tensor.shape:
        return tensor.end - tensor.begin
    return (tensor.end - tensor.begin) // math.prod(tensor.shape) * math.prod(shape)


def _text(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
