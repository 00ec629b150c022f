"""The files of a base model, and the place of each tensor in them."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from pcb_peft.base.config import WAY_OUT
from pcb_peft.errors import BaseModelError
from pcb_peft.files.header import Entry, read_header
from pcb_peft.files.json_text import read_json_file
from pcb_peft.files.links import warn_of_links
from pcb_peft.files.schema import checked
from pcb_peft.runtime.paths import is_file, why_unreadable
from pcb_peft.runtime.shown import quoted

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DOWNLOADED = [
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*"),
    *("*.bpe", "*.codes", "*.spm", "*.tiktoken"),
]
NOT_DOWNLOADED = ["consolidated*", "original/*", "onnx/*", "openvino/*"]


class _Index(msgspec.Struct):
    """The index of a checkpoint in several files: tensor to file."""

    weight_map: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of a tensor in a checkpoint.

    Attributes:
        file: Name of the file.
        begin: First byte of the values in the file.
        end: Byte after the last.
        shape: Shape of the tensor.
        dtype: Dtype by safetensors' name, such as ``BF16``.
        name: Its name in the file, where that is another than the one that it goes by.
    """

    file: str
    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: str
    name: str | None = None


def bytes_of(tensors: Mapping[str, TensorInfo]) -> int:
    """Return how many bytes some tensors take in their files."""
    return sum(tensor.end - tensor.begin for tensor in tensors.values())


def read_index(directory: Path, file: str = INDEX_FILE) -> dict[str, str]:
    """Return tensor to file, as the index says; empty for a single file, which is used even beside an index.

    Raises:
        BaseModelError: There are no weights that can be read, or the index is damaged.
    """
    warn_of_links(directory, sorted(directory.rglob("*")))
    if (directory / SINGLE_FILE).is_file():
        return {}
    path = directory / file
    if not path.is_file():
        raise BaseModelError(
            f"{directory} has neither {SINGLE_FILE} nor {file}, and other formats (.bin, .gguf) "
            "are not read; load the model with transformers and save it again with save_pretrained"
        )
    content = read_json_file(path, BaseModelError, WAY_OUT)
    index = checked(content, _Index, str(path), BaseModelError, WAY_OUT).weight_map
    for shard in set(index.values()):
        if Path(shard).name != shard or not is_file(directory / shard):
            raise BaseModelError(
                f"{path} names the file {quoted(shard)}, which is not beside it; fetch the model again"
            )
    if not index:
        raise BaseModelError(
            f"{path}: weight_map is {{}}; it must name the file of each tensor; fetch the model again"
        )
    return index


def read_tensor_infos(directory: Path, files: Iterable[str]) -> dict[str, TensorInfo]:
    """Return the places of the tensors of some files.

    Raises:
        BaseModelError: A file is damaged, or a tensor is in two.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        in_file = _tensors_in(directory, file)
        if twice := min(in_file.keys() & tensors.keys(), default=None):
            raise BaseModelError(
                f"{directory}: {twice} is in {tensors[twice].file} and {file}, and programs differ in which they load; "
                "fetch the model again, or load it with transformers and save it again with save_pretrained"
            )
        tensors |= in_file
    return tensors


def _tensors_in(directory: Path, file: str) -> dict[str, TensorInfo]:
    path = directory / file
    try:
        with safe_open(path, framework="pt"):  # checks header and length
            pass
    except (OSError, ValueError, RuntimeError, MemoryError, SafetensorError) as error:
        raise BaseModelError(
            f"{path} cannot be read ({why_unreadable(path, error)}); fetch the model again"
        ) from error
    entries, start = read_header(path, BaseModelError, WAY_OUT)
    return {name: _info(file, start, entry) for name, entry in entries.items()}


def _info(file: str, start: int, entry: Entry) -> TensorInfo:
    begin, end = entry.data_offsets
    return TensorInfo(file, start + begin, start + end, entry.shape, entry.dtype)
