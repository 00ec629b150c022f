"""What a changed checkpoint says about itself: the headers of its shards, its index and its configuration."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pcb_peft.base.files import INDEX_FILE
from pcb_peft.base.model import BaseModel

TensorEdit = Callable[[Tensor], Tensor]
"""From a parameter's values, which it may change in place, to what takes their place."""


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointEdit:
    """What becomes of the tensors of a checkpoint.

    Attributes:
        edits: Parameter to what becomes of its values.
        shapes: Parameter to its new shape, where that is another.
        added: A new parameter to the one that it is made from; it goes into the same file.
    """

    edits: dict[str, TensorEdit]
    shapes: dict[str, tuple[int, ...]]
    added: dict[str, str]

    def shape(self, base: BaseModel, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter, an old or a new one, in the end."""
        source = self.added.get(parameter, parameter)
        return self.shapes.get(parameter, base.spans[source].shape)

    def added_to(self, base: BaseModel, file: str) -> dict[str, str]:
        """The new parameters of a file."""
        return {new: old for new, old in self.added.items() if base.spans[old].file == file}


def header_of(base: BaseModel, file: str, rewrite: CheckpointEdit) -> bytes:
    """The first bytes of a shard, up to its values: to the byte as they were, if the shapes are."""
    with (base.directory / file).open("rb") as stream:
        length = stream.read(8)
        text = stream.read(int.from_bytes(length, "little"))
    added = rewrite.added_to(base, file)
    entries: dict[str, Any] = json.loads(text)
    if not added and not entries.keys() & rewrite.shapes.keys():
        return length + text
    entries |= {new: dict(entries[old]) for new, old in added.items()}
    names = sorted(base.spans.keys() & entries.keys(), key=lambda name: base.spans[name].begin)
    end = 0
    for name in [*names, *added]:
        begin, end = end, end + _size(base, rewrite, name)
        entries[name] |= {
            "shape": list(rewrite.shape(base, name)),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(base: BaseModel, rewrite: CheckpointEdit) -> dict[str, bytes]:
    """The index of the shards, by its name, where it changes."""
    changed = {**rewrite.shapes, **rewrite.added}
    path = base.directory / INDEX_FILE
    if not changed or (len(base.files) == 1 and not path.is_file()):
        return {}
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"] |= {new: base.spans[old].file for new, old in rewrite.added.items()}
    index["weight_map"] = dict(sorted(index["weight_map"].items()))
    for name in changed:
        old = base.spans.get(name)
        known = (old.end - old.begin, math.prod(old.shape)) if old else (0, 0)
        now = (_size(base, rewrite, name), math.prod(rewrite.shape(base, name)))
        for field, before, after in zip(
            ("total_size", "total_parameters"), known, now, strict=True
        ):
            if field in index.get("metadata", {}):
                index["metadata"][field] += after - before
    return {INDEX_FILE: _text(index)}


def config_of(base: BaseModel, heights: Mapping[int, int], *, untied: bool) -> dict[str, bytes]:
    """``config.json``, by its name, where it changes.

    Args:
        base: The base model.
        heights: Size of the vocabulary, before and after, where it changes.
        untied: The output layer has got weights of its own.
    """
    if not heights and not untied:
        return {}
    config: dict[str, Any] = json.loads(json.dumps(dict(base.config)))
    nested = [part for part in config.values() if isinstance(part, dict)]
    for part in (config, *nested):
        if part.get("vocab_size") in heights:
            part["vocab_size"] = heights[part["vocab_size"]]
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return {"config.json": _text(config)}


def _size(base: BaseModel, rewrite: CheckpointEdit, parameter: str) -> int:
    """How many bytes a parameter takes in the end."""
    span = base.spans[rewrite.added.get(parameter, parameter)]
    if (shape := rewrite.shape(base, parameter)) == span.shape:
        return span.end - span.begin
    return (span.end - span.begin) // math.prod(span.shape) * math.prod(shape)


def _text(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
