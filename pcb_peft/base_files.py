"""The files of a base model: which there are, and where in them each tensor lies."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pcb_peft.errors import BaseModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DOWNLOADED = [
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "LICENSE*"),
    *("*.bpe", "*.codes", "*.spm", "*.tiktoken"),
]
_NOT_DOWNLOADED = ["consolidated*", "original/*", "onnx/*", "openvino/*"]
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|SCB|weight_packed|weight_scale(_inv)?|weight\.(absmax|quant_map))$"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor lies: bytes `begin` to `end` of the checkpoint's file `file`; `dtype` is safetensors' word."""

    file: str
    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: str


def download(source: str, revision: str | None) -> Path:
    """The directory of a model on the hub, in its cache.

    Raises:
        BaseModelError: It cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(
            source,
            revision=revision,
            allow_patterns=_DOWNLOADED,
            ignore_patterns=_NOT_DOWNLOADED,
        )
        return Path(root)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{source} is neither a directory nor a hub repository that can be reached: {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """What a file of a checkpoint says.

    Raises:
        BaseModelError: There is none, or it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise BaseModelError(
            f"{path} cannot be read ({error}); give the directory of a transformers checkpoint"
        ) from error


def shard_files(directory: Path) -> list[str]:
    """Names of the files with weights; a single file goes before an index, as in transformers."""
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if not (directory / INDEX_FILE).is_file():
        raise BaseModelError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}, and other formats (.bin, .gguf) "
            "are not read; load the model with transformers and save it again with save_pretrained"
        )
    index = read_json(directory / INDEX_FILE)
    files = sorted(set(index["weight_map"].values()))
    for file in files:
        if Path(file).name != file or not (directory / file).is_file():
            raise BaseModelError(
                f"{directory / INDEX_FILE} names the file {file!r}, which is not beside it; "
                "fetch the model again"
            )
    return files


def read_spans(directory: Path, file: str) -> dict[str, Span]:
    """Where the tensors of a file lie.

    Raises:
        BaseModelError: It is damaged.
    """
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
    return {name: _span(file, start, entry) for name, entry in header.items()}


def _span(file: str, start: int, entry: Mapping[str, Any]) -> Span:
    begin, end = entry["data_offsets"]
    return Span(file, start + begin, start + end, tuple(entry["shape"]), entry["dtype"])


def refuse_quantised(config: Mapping[str, Any], spans: Mapping[str, Span], source: str) -> None:
    """Raises BaseModelError for weights to which nothing can be added."""
    tensor = next(filter(_QUANTISED.search, spans), None)
    if not (tensor or config.get("quantization_config")):
        return
    reason = f"it holds {tensor}" if tensor else "its config.json has a quantization_config"
    raise BaseModelError(
        f"{source} is quantised ({reason}): every change would be rounded away; "
        "give the model that it was made from, in bfloat16, float16 or float32"
    )
