"""The files of an output, as a consumer's loader sees them: form, configuration, and names and shapes of tensors."""

import dataclasses
import functools
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pcb_peft.base.hub import configuration_directory
from pcb_peft.errors import AdapterError, AdapterNotFoundError
from pcb_peft.files.adapter_config import checked_config
from pcb_peft.files.gguf import is_adapter, is_gguf
from pcb_peft.files.header import read_header
from pcb_peft.files.json_text import read_json_file
from pcb_peft.runtime.paths import expanded

Form: TypeAlias = Literal["peft", "pipeline", "mlx", "gguf", "model"]
"""PEFT's directory, a LoRA of an image pipeline, mlx-lm's directory, a GGUF file, or a whole model."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PIPELINE, MLX = "pytorch_lora_weights.safetensors", "adapters.safetensors"
FORM_NAMES: dict[Form, str] = {
    "peft": "a PEFT adapter",
    "pipeline": "a LoRA of an image pipeline",
    "mlx": "an adapter for mlx-lm",
    "gguf": "a GGUF file",
    "model": "a whole model",
}
AGAIN = "write the adapter again"
_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_embedding_A)(?:\.weight)?$")
_STACK = re.compile(r"(\.base_layer)+$")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclasses.dataclass(frozen=True, slots=True)
class TensorShape:
    """A tensor's dtype (by safetensors' name) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class OutputFiles:
    """The files of an adapter or a model.

    Attributes:
        path: The directory, or the file.
        form: The form that they have.
        config: ``adapter_config.json``, or a model's ``config.json``; of a GGUF file, whether it is an adapter.
        tensors: Name to dtype and shape, of what is stored in safetensors.
        unreadable: Files that other users of the machine cannot read.
        heads: Names of the heads that are kept beside the adapter.
        base: ``config.json`` of the base model, if it is on this machine; else empty.
    """

    path: Path
    form: Form
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorShape]
    unreadable: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """Module to the rank of its LoRA; of a stack of experts, that of each of them."""
        ranks: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            if (match := _LORA.fullmatch(name)) and tensor.shape:
                module = _STACK.sub("", match[1])
                rank = self.config.get("r") if self.is_stack(match[1]) else tensor.shape[0]
                ranks[module] = max(ranks.get(module, 0), rank if isinstance(rank, int) else 0)
        return ranks

    @property
    def rank(self) -> int:
        """The highest rank; 0 without a LoRA."""
        return max(self.ranks.values(), default=0)

    def is_stack(self, module: str) -> bool:
        """Return whether a LoRA belongs to a stack of experts (PEFT's target_parameters)."""
        targets = self.config.get("target_parameters") or []
        owners = (target.rpartition(".")[0] for target in targets)
        path = _STACK.sub("", module)
        return any(path == owner or path.endswith(f".{owner}") for owner in owners)

    def by_layer(self) -> dict[str, set[int]]:
        """Return the kinds of modules (names without the layer's number), each with the layers that have one."""
        kinds: dict[str, set[int]] = {}
        for module in self.ranks:
            if layer := _LAYER.search(module):
                kind = f"{module[: layer.start(1)]}*{module[layer.end(1) :]}"
                kinds.setdefault(kind, set()).add(int(layer[1]))
        return kinds


def open_output(path: str | Path) -> OutputFiles:
    """Read configuration and headers of an adapter or a model; no tensor is read.

    Raises:
        AdapterNotFoundError: There is neither.
        AdapterError: A file is damaged.
    """
    path = expanded(path)
    if path.suffix == ".gguf" and path.is_file():
        return _gguf([path])
    mlx = path.name == MLX and path.with_name(CONFIG).is_file()
    if path.is_file() and (mlx or path.name in (CONFIG, WEIGHTS)):
        path = path.parent
    if path.is_file() and path.suffix == ".safetensors":
        return OutputFiles(path, "pipeline", {}, _header(path), _unreadable([path]))
    form = _form(path)
    config = _json(path / ("config.json" if form == "model" else CONFIG))
    if form == "peft":
        checked_config({"peft_type": "LORA"} | config, str(path / CONFIG))
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    names = {"peft": WEIGHTS, "mlx": MLX, "pipeline": PIPELINE}
    weights = [file for file in files if file.name == names.get(form, file.name)]
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if form in ("peft", "mlx") and not weights and not (path / PICKLE).is_file():
        raise AdapterNotFoundError(f"{path} has no {names[form]}; {AGAIN}")
    if form == "gguf":
        return _gguf(ggufs)
    return OutputFiles(
        path,
        form,
        config,
        _headers(file for file in weights if file.suffix == ".safetensors"),
        _unreadable(files),
        tuple(sorted(file.stem for file in path.glob("heads/*.safetensors"))),
        config_of_model(config.get("base_model_name_or_path")) if form == "peft" else {},
    )


def _gguf(files: list[Path]) -> OutputFiles:
    for file in files:
        if not is_gguf(file):
            raise AdapterError(f"{file} is no GGUF file: its first four bytes say so; {AGAIN}")
    config = {"adapter": is_adapter(files[0])}
    return OutputFiles(files[0], "gguf", config, {}, _unreadable(files))


def _form(path: Path) -> Form:
    if (path / CONFIG).is_file():
        return "mlx" if (path / MLX).is_file() else "peft"
    if (path / "config.json").is_file():
        return "model"
    if (path / PIPELINE).is_file():
        return "pipeline"
    if path.is_dir() and any(file.is_file() for file in path.glob("*.gguf")):
        return "gguf"
    raise AdapterNotFoundError(
        f"{path} holds neither an adapter ({CONFIG}, {PIPELINE}, *.gguf) nor a model (config.json); give the directory "
        "that merge, export or fold wrote"
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json_file(path, AdapterError, AGAIN)
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds no object with names; {AGAIN}")
    return content  # pyright: ignore[reportUnknownVariableType]


def _headers(paths: Iterable[Path]) -> dict[str, TensorShape]:
    return {name: tensor for path in paths for name, tensor in _header(path).items()}


def _header(path: Path) -> dict[str, TensorShape]:
    """Return names and shapes of a safetensors file."""
    entries, _ = read_header(path, AdapterError, AGAIN)
    return {name: TensorShape(entry.dtype, entry.shape) for name, entry in entries.items()}


def _unreadable(files: list[Path]) -> tuple[str, ...]:
    group_and_others = stat.S_IRGRP | stat.S_IROTH
    return tuple(file.name for file in files if not file.stat().st_mode & group_and_others)


def config_of_model(name: object) -> dict[str, Any]:
    """Return ``config.json`` of a model in a directory or in the Hub's cache; empty if it is not on this machine."""
    directory = configuration_directory(name, None) if isinstance(name, str) and name else None
    return {} if directory is None else _json(directory / "config.json")
