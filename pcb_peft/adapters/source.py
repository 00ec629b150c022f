"""Sources of adapters: a directory or the Hub; and the record by which one is found again."""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pcb_peft.adapters.beside import STATING_LABELS, labels_beside
from pcb_peft.adapters.companions import (
    GROUPS,
    TRAINED,
    Companions,
    companions_beside,
    refuse_trained_files,
)
from pcb_peft.adapters.other_files import how_to_get_an_adapter, refuse_file
from pcb_peft.adapters.saving import EVALUATION_FILE, RECIPE_FILE, REPORT_FILE
from pcb_peft.base.hub import download, listed, snapshot_in
from pcb_peft.deltas.replacements import HEADS, NAME
from pcb_peft.errors import AdapterError, AdapterNotFoundError
from pcb_peft.files.links import warn_of_links
from pcb_peft.formats.checkpoint import (
    CONFIG,
    OLD_PIPELINE,
    PICKLE,
    PICKLED,
    PIPELINE,
    SAFETENSORS,
    SafetensorsFile,
    Tensors,
    open_pipeline_file,
    open_tensors,
    read_config,
)
from pcb_peft.runtime.hashing import sha256_of_file
from pcb_peft.runtime.paths import expanded
from pcb_peft.runtime.shown import shown, some_of
from pcb_peft.writing.model_card import CARD

IN_MEMORY = "in memory: "
NESTED = (
    "PEFT puts one adapter inside the other then, and the outer one alone is no adapter of the base model: call "
    "get_peft_model on the base model, and model.add_adapter for a second adapter; to train on top of a finished one, "
    "merge_and_unload() it first"
)
"""Why an adapter of nested PeftModels is refused, and the way out."""
MODEL_FILES = ("config.json", "model_index.json")  # of directories whose tensors are no LoRA
LORA = re.compile(r"(?!(adapter_model|model(-\d+-of-\d+)?)\.)[^/]+\.(safetensors|sft)")
"""Matches names that files of image LoRAs may have, in a directory that holds nothing else."""
ONE_FILE = (".safetensors", ".sft", *PICKLED)


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

    def for_peft(self) -> dict[str, Any]:
        """Return the arguments of `PeftModel.from_pretrained` that say where the adapter is."""
        if (directory := _local(self)) is not None:
            return {"model_id": str(directory)}
        options = {"revision": self.revision, "subfolder": self.subfolder}
        given = {name: value for name, value in options.items() if value is not None}
        return {"model_id": self.path, **given}

    @property
    def name(self) -> str:
        """Last part of the path, for messages and reports."""
        path = Path(self.subfolder or self.path)
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # links in a circle
            path = path if path.is_file() else path.resolve()  # a file in the Hub's cache is a link
        if path.parent.name == "snapshots":
            path = path.parent.parent
        return (
            shown(re.sub(r"^models--(.*--)?", "", path.name).removesuffix(".safetensors"))
            or "adapter"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedAdapter:
    """An adapter's configuration and tensors.

    Attributes:
        config: The configuration.
        tensors: The tensors.
        sha256: Hash of the tensors' file.
        config_sha256: Hash of the configuration's file.
        heads: Heads beside a merged adapter: those of its sources, by the source's name.
        labels: Names of the classes of the adapter's head, in the order of its rows.
        directory: Directory of the files; None for an adapter in memory, or a single file.
        companions: Tokenizer and other files beside it that belong to the model.
    """

    config: Mapping[str, Any]
    tensors: Tensors
    sha256: str | None = None
    config_sha256: str | None = None
    heads: Mapping[str, SafetensorsFile] = dataclasses.field(
        default_factory=dict[str, SafetensorsFile]
    )
    labels: tuple[str, ...] = ()
    directory: Path | None = None
    companions: Companions = dataclasses.field(default_factory=dict[str, Mapping[str, Path]])


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
    if problem := refuse_file(expanded(source.path)):
        raise AdapterError(problem)
    directory = _local(source) or _downloaded(source)
    if (file := _pipeline_file(directory)) is not None:
        config, tensors = open_pipeline_file(file)
        return OpenedAdapter(config, tensors, _tensors_digest(source, file, hashed=hashed))
    if not (directory / CONFIG).is_file():
        raise AdapterNotFoundError(
            f"{directory} holds no {CONFIG}{how_to_get_an_adapter(directory)}{_of_hub(source)}"
        )
    warn_of_links(directory, sorted(directory.iterdir()))
    config = _config(directory)
    refuse_trained_files(directory)
    tensors = open_tensors(directory)  # before the hash: what is no such file may have any length
    weights = (directory / name for name in (SAFETENSORS, PICKLE))
    digest = _tensors_digest(source, next(filter(Path.is_file, weights), None), hashed=hashed)
    configured = _digest(directory / CONFIG)
    _refuse_other(source, "configuration", configured, "config_sha256", source.config_sha256)
    files = [
        (path.stem, SafetensorsFile(path))
        for path in sorted(directory.glob(f"{HEADS}/*.safetensors"))
    ]
    heads = {file.metadata().get(NAME, stem): file for stem, file in files}
    return OpenedAdapter(
        config,
        tensors,
        digest,
        configured,
        heads,
        labels_beside(directory),
        directory,
        companions_beside(directory),
    )


def _digest(file: Path) -> str:
    try:
        return sha256_of_file(file)
    except OSError as error:
        raise AdapterError(
            f"{file} cannot be read: {error.strerror}; look at the disk, and at the permissions"
        ) from error


def _tensors_digest(source: Source, file: Path | None, *, hashed: bool) -> str | None:
    digest = source.sha256 if file is None or not hashed else _digest(file)
    _refuse_other(source, "tensors", digest, "sha256", source.sha256)
    return digest


def _refuse_other(
    source: Source, what: str, digest: str | None, key: str, stated: str | None
) -> None:
    if stated not in (None, digest):
        raise AdapterError(
            f"{source.path} has changed: the SHA-256 of its {what} is {digest}, the recipe says {shown(stated)}; "
            f"restore the adapter, or take {key} out of the recipe to merge what is there now"
        )


def _pipeline_file(path: Path) -> Path | None:
    """Return the LoRA of an image model: the file itself, or the only one in a directory that holds nothing else.

    Raises:
        AdapterError: There are several.
    """
    if path.is_file():
        return path
    if any((path / name).is_file() for name in (CONFIG, *MODEL_FILES)):
        return None
    found = _only_lora([one.name for one in path.iterdir()], path) if path.is_dir() else None
    return None if found is None else path / found


def _only_lora(names: Iterable[str], where: str | Path) -> str | None:
    """Return the file of a directory or repository that holds the LoRA of an image model; None where none does.

    Raises:
        AdapterError: There are several.
    """
    given = set(names)
    if usual := next((name for name in (PIPELINE, OLD_PIPELINE) if name in given), None):
        return usual
    files = sorted(name for name in given if LORA.fullmatch(name))
    if len(files) > 1:
        raise AdapterError(
            f"{where} holds several LoRAs, {some_of(files)}: name one of them, such as {where}/{files[0]}"
        )
    return files[0] if files else None


def _local(source: Source) -> Path | None:
    directory = expanded(source.path)
    if directory.is_file():
        if directory.suffix not in ONE_FILE:
            raise AdapterError(
                f"{directory} is no file of a LoRA: those of image models end in {', '.join(ONE_FILE)}, and an adapter "
                "of PEFT is a directory"
            )
        return directory
    if not directory.is_dir():
        return None
    directory = snapshot_in(directory, source.revision)
    return expanded(directory / source.subfolder) if source.subfolder else directory


def _downloaded(source: Source) -> Path:
    """Return the adapter's directory in the Hub's cache; the file, if the path goes on after the repository's id."""
    owner, _, rest = source.path.partition("/")
    name, _, file = rest.partition("/")
    if file.endswith(ONE_FILE):
        repository = f"{owner}/{name}"
        root = download(repository, source.revision, wanted=[file], error_type=AdapterNotFoundError)
        if not (root / file).is_file():
            raise AdapterNotFoundError(f"{repository} holds no {file}")
        return root / file
    prefix = f"{source.subfolder}/" if source.subfolder else ""
    adapter = (CONFIG, SAFETENSORS, PICKLE, PIPELINE, OLD_PIPELINE, f"{HEADS}/*.safetensors")
    companions = [name for patterns in GROUPS.values() for name in patterns]
    of_merges = (RECIPE_FILE, REPORT_FILE, EVALUATION_FILE)
    names = (*adapter, *STATING_LABELS, *companions, *TRAINED, CARD, *of_merges)
    root = download(
        source.path,
        source.revision,
        wanted=[prefix + name for name in names],
        error_type=AdapterNotFoundError,
    )
    if not source.subfolder and not any((root / name).is_file() for name in adapter[:-1]):
        names = listed(source.path, source.revision, root)
        lora = None if {CONFIG, *MODEL_FILES} & {*names} else _only_lora(names, source.path)
        if lora is not None:
            wanted, kind = [lora], AdapterNotFoundError
            return download(source.path, source.revision, wanted=wanted, error_type=kind) / lora
    return root / prefix


def _of_hub(source: Source) -> str:
    """Return a hint for messages: how to name a LoRA of an image model in a repository."""
    if expanded(source.path).exists():
        return ""
    return f"; a LoRA of an image model is named with its file: {source.path}/NAME.safetensors"


def _config(directory: Path) -> dict[str, Any]:
    """Return the configuration of an adapter whose tensors are there.

    Raises:
        AdapterError: It is none of PEFT's.
        AdapterNotFoundError: The tensors are missing.
    """
    try:
        config = read_config(directory / CONFIG)
    except AdapterError as error:
        raise AdapterError(f"{error}{how_to_get_an_adapter(directory)}") from error
    if not any((directory / name).is_file() for name in (SAFETENSORS, PICKLE)):
        raise AdapterNotFoundError(
            f"{directory} has neither {SAFETENSORS} nor {PICKLE}{how_to_get_an_adapter(directory)}"
        )
    return config
