"""The files of a base model, and the place of each tensor in them."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pcb_peft.errors import BaseModelError
from pcb_peft.files.json_text import read_json_file
from pcb_peft.files.shown import quoted

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DOWNLOADED = [
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*"),
    *("*.bpe", "*.codes", "*.spm", "*.tiktoken"),
]
NOT_DOWNLOADED = ["consolidated*", "original/*", "onnx/*", "openvino/*"]
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|SCB|weight_packed|weight_scale(_inv)?|weight\.(absmax|quant_map))$"
)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of a tensor in a checkpoint.

    Attributes:
        file: Name of the file.
        begin: First byte of the values in the file.
        end: Byte after the last.
        shape: Shape of the tensor.
        dtype: Dtype by safetensors' name, such as ``BF16``.
    """

    file: str
    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of a checkpoint.

    Raises:
        BaseModelError: There is no such file, or it is damaged.
    """
    way_out = "give the directory of a transformers checkpoint"
    return _object(read_json_file(path, BaseModelError, way_out), str(path))


def read_index(directory: Path) -> dict[str, str]:
    """Return tensor to file, as the index says; empty for a single file, which is used even beside an index.

    Raises:
        BaseModelError: There are no weights that can be read, or the index is damaged.
    """
    if (directory / SINGLE_FILE).is_file():
        return {}
    path = directory / INDEX_FILE
    if not path.is_file():
        raise BaseModelError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}, and other formats (.bin, .gguf) "
            "are not read; load the model with transformers and save it again with save_pretrained"
        )
    index: dict[str, str] = _object(
        read_json(path).get("weight_map") or None, f"weight_map of {path}"
    )
    for file in index.values():
        if Path(str(file)).name != file or not (directory / file).is_file():
            raise BaseModelError(
                f"{path} names the file {file!r}, which is not beside it; fetch the model again"
            )
    return index


def _object(content: Any, what: str) -> dict[str, Any]:
    """Return JSON content that must be an object; `what` names it in messages."""
    if not isinstance(content, dict):
        raise BaseModelError(
            f"{what}: found {quoted(content)}, where an object with names must be; fetch the model again"
        )
    return content  # pyright: ignore[reportUnknownVariableType]


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
    except SafetensorError as error:
        raise BaseModelError(f"{path} is damaged ({error}); fetch the model again") from error
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(start - 8))
    header.pop("__metadata__", None)
    return {name: _info(file, start, entry) for name, entry in header.items()}


def _info(file: str, start: int, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(file, start + begin, start + end, tuple(entry["shape"]), entry["dtype"])


def refuse_quantised(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], source: str
) -> None:
    """Raise BaseModelError for a quantised model."""
    tensor = next(filter(_QUANTISED.search, tensors), None)
    if not (tensor or config.get("quantization_config")):
        return
    reason = f"it holds {tensor}" if tensor else "its config.json has a quantization_config"
    raise BaseModelError(
        f"{source} is quantised ({reason}): every change would be rounded away; "
        "give the model that it was made from, in bfloat16, float16 or float32"
    )
