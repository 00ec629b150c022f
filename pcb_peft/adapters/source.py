"""Sources of adapters: a directory, the Hub, or a live PeftModel; and the record by which one is found again."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcb_peft.base.hub import download
from pcb_peft.deltas.replacements import HEADS
from pcb_peft.errors import AdapterError, AdapterNotFoundError, OptionError
from pcb_peft.formats.checkpoint import (
    CONFIG,
    PICKLE,
    PIPELINE,
    SAFETENSORS,
    SafetensorsFile,
    Tensors,
    TensorsInMemory,
    open_tensors,
    pipeline_config,
    read_config,
)
from pcb_peft.runtime.hashing import sha256_of_file

IN_MEMORY = "in memory: "


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """The source of one adapter.

    Attributes:
        path: A directory or a hub id; `IN_MEMORY` and a name, if there are no files.
        revision: Revision of the hub repository.
        subfolder: Folder in the directory or the repository.
        sha256: Hash of the tensors' file, when it was read.
        config_sha256: Hash of the configuration's file.
    """

    path: str
    revision: str | None = None
    subfolder: str | None = None
    sha256: str | None = None
    config_sha256: str | None = None

    @property
    def directory(self) -> str:
        """The path with the subfolder; it need not exist."""
        return str(Path(self.path, self.subfolder)) if self.subfolder else self.path

    @property
    def name(self) -> str:
        """Last part of the path, for messages and reports."""
        name = Path(self.subfolder or self.path).resolve().name
        return name.removesuffix(".safetensors") or "adapter"


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedAdapter:
    """An adapter's configuration and tensors.

    Attributes:
        config: The configuration.
        tensors: The tensors.
        sha256: Hash of the tensors' file.
        config_sha256: Hash of the configuration's file.
        heads: Heads beside a merged adapter: those of its sources, by the source's name.
    """

    config: Mapping[str, Any]
    tensors: Tensors
    sha256: str | None = None
    config_sha256: str | None = None
    heads: Mapping[str, Tensors] = dataclasses.field(default_factory=dict[str, Tensors])


def open_files(source: Source, *, hashed: bool = True) -> OpenedAdapter:
    """Open the files of an adapter in a directory or on the Hub.

    Raises:
        AdapterNotFoundError: There is no adapter there.
        AdapterError: Its hash is not the one that the source names.
    """
    if source.path.startswith(IN_MEMORY):
        raise AdapterError(
            f"{source.path} has no files: the recipe comes from a merge of adapters in memory; save that adapter, "
            "and write its directory into the recipe"
        )
    directory = _local(source) or _downloaded(source)
    if (file := _pipeline_file(directory)) is not None:
        tensors = SafetensorsFile(file)
        return OpenedAdapter(
            pipeline_config(tensors), tensors, _tensors_digest(source, file, hashed=hashed)
        )
    if not (directory / CONFIG).is_file():
        raise AdapterNotFoundError(f"{directory} holds no {CONFIG}{_nearby(directory)}")
    weights = (directory / name for name in (SAFETENSORS, PICKLE))
    digest = _tensors_digest(source, next(filter(Path.is_file, weights), None), hashed=hashed)
    configured = sha256_of_file(directory / CONFIG)
    _refuse_other(source, "configuration", configured, "config_sha256", source.config_sha256)
    heads = {
        path.stem: SafetensorsFile(path)
        for path in sorted(directory.glob(f"{HEADS}/*.safetensors"))
    }
    config, tensors = read_config(directory / CONFIG), open_tensors(directory)
    return OpenedAdapter(config, tensors, digest, configured, heads)


def _tensors_digest(source: Source, file: Path | None, *, hashed: bool) -> str | None:
    digest = source.sha256 if file is None or not hashed else sha256_of_file(file)
    _refuse_other(source, "tensors", digest, "sha256", source.sha256)
    return digest


def _refuse_other(
    source: Source, what: str, digest: str | None, key: str, stated: str | None
) -> None:
    if stated not in (None, digest):
        raise AdapterError(
            f"{source.path} has changed: the SHA-256 of its {what} is {digest}, the recipe says {stated}; "
            f"restore the adapter, or take {key} out of the recipe to merge what is there now"
        )


def _pipeline_file(path: Path) -> Path | None:
    """Return the LoRA of a diffusion pipeline: the file itself, or the only adapter in a directory."""
    if path.is_file():
        return path
    alone = (path / PIPELINE).is_file() and not (path / CONFIG).is_file()
    return path / PIPELINE if alone else None


def files_of_model(model: Any, adapter_name: str) -> OpenedAdapter:
    """Return what `PeftModel.save_pretrained` would write for one adapter of a live model.

    Raises:
        OptionError: The model has no adapter of that name.
    """
    from peft import get_peft_model_state_dict

    if adapter_name not in getattr(model, "peft_config", {}):
        names = ", ".join(getattr(model, "peft_config", {})) or "none (is it a PeftModel?)"
        raise OptionError(f"the model has no adapter {adapter_name!r}; its adapters are {names}")
    config = model.peft_config[adapter_name].to_dict()
    config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
    config["task_type"] = getattr(config.get("task_type"), "value", config.get("task_type"))
    if config.get("base_model_name_or_path") is None:
        config["base_model_name_or_path"] = getattr(model.get_base_model(), "name_or_path", None)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return OpenedAdapter(config, TensorsInMemory(tensors, f"adapter {adapter_name!r}"))


def _local(source: Source) -> Path | None:
    directory = Path(source.path).expanduser()
    if directory.is_file() and directory.suffix == ".safetensors":
        return directory
    if not directory.is_dir():
        return None
    return directory / source.subfolder if source.subfolder else directory


def _downloaded(source: Source) -> Path:
    """Return the adapter's directory in the Hub's cache."""
    prefix = f"{source.subfolder}/" if source.subfolder else ""
    names = (CONFIG, SAFETENSORS, PICKLE, PIPELINE, f"{HEADS}/*.safetensors")
    root = download(
        source.path,
        source.revision,
        wanted=[prefix + name for name in names],
        error_type=AdapterNotFoundError,
    )
    return root / prefix


def _nearby(directory: Path) -> str:
    """Return a hint for messages: the subfolders of a directory that hold adapters."""
    if not directory.is_dir():
        return ": no such directory"
    names = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    return f"; there are adapters in its subfolders {', '.join(names)}" if names else ""
