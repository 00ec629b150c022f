"""What was measured of an adapter on texts: one matrix per module, in a file that knows which adapter it belongs to."""

import dataclasses
import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.source import Source
from pcb_peft.errors import AdapterError, MismatchError, OptionError, OutputError
from pcb_peft.version import __version__

KINDS: dict[str, Callable[[tuple[int, int]], tuple[int, int]]] = {
    "gram": lambda shape: (shape[1], shape[1]),
    "gradient": lambda shape: shape,
}
"""From a statistic to the shape that it has for a ΔW (out, in). "gram": XᵀX / n, of the n tokens that the module sees
with the adapter in the model; "gradient": ∂L/∂W there, of the mean loss."""

FORMAT = "pcb_peft statistics 1"

StatisticsLike: TypeAlias = "str | Path | Source | TaskStatistics"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TaskStatistics:
    """One statistic of one adapter; a tensor is read when it is asked for.

    Attributes:
        kind: A key of `KINDS`.
        shapes: By module.
        load: From a module to the statistic, float32.
        count: Of tokens or examples that it was taken over.
        sha256: Of the adapter's tensors' file; None vouches for it without one.
        source: The file, with its own hash.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str], Tensor]
    count: int = 0
    sha256: str | None = None
    source: Source | None = None

    @property
    def name(self) -> str:
        """Of the file, if there is one."""
        return self.source.name if self.source else "statistics"

    def of(self, module: str, shape: tuple[int, int]) -> Tensor:
        """The statistic of a module whose ΔW is (out, in); zero for one that the adapter does not touch."""
        return self.load(module) if module in self.shapes else torch.zeros(KINDS[self.kind](shape))


def save_statistics(statistics: TaskStatistics, path: Path, *, overwrite: bool = False) -> None:
    """Writes the file, whole or not at all.

    Raises:
        OutputError: It is there already, or cannot be written.
    """
    check_file(path, overwrite=overwrite)
    metadata = {
        "format": FORMAT,
        "kind": statistics.kind,
        "count": str(statistics.count),
        "adapter_sha256": statistics.sha256 or "",
        "version": __version__,
    }
    tensors = {module: statistics.load(module).contiguous() for module in statistics.shapes}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raises OutputError where a file cannot be written, or must not."""
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise OutputError(f"{path} is a directory, or lies in none that can be written")
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} exists; name another file, or allow its replacement: overwrite=True, --overwrite"
        )


def open_statistics(given: StatisticsLike) -> TaskStatistics:
    """The statistics in a file.

    Raises:
        AdapterError: It holds none, or others than the hash says.
    """
    if isinstance(given, TaskStatistics):
        return given
    source = given if isinstance(given, Source) else Source(str(given))
    path = Path(source.path).expanduser()
    try:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            metadata: dict[str, str] = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"statistics {path} cannot be read: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("kind") not in KINDS:
        raise AdapterError(f"{path} holds no statistics: `pcb-peft collect` writes them")
    if source.sha256 not in (None, digest.hexdigest()):
        raise AdapterError(
            f"{path} has changed: it has SHA-256 {digest.hexdigest()}, the recipe says {source.sha256}; restore it, or "
            "take sha256 out of the recipe"
        )

    def load(module: str) -> Tensor:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            return file.get_tensor(module)

    return TaskStatistics(
        metadata["kind"],
        shapes,
        load,
        int(metadata["count"]),
        metadata["adapter_sha256"],
        dataclasses.replace(source, sha256=digest.hexdigest()),
    )


def check_statistics(statistics: Sequence[TaskStatistics], adapters: Sequence[Adapter]) -> None:
    """Whether there is one for each adapter, of one kind, that was taken of that adapter.

    Raises:
        OptionError: There are more, or fewer, or several kinds.
        MismatchError: They belong to something else, or lack a module.
    """
    if len(statistics) != len(adapters):
        raise OptionError(
            f"{len(adapters)} adapters and {len(statistics)} statistics: give one file per adapter, in order"
        )
    kinds = sorted({some.kind for some in statistics})
    if len(kinds) > 1:
        raise OptionError(f"statistics are of kinds {' and '.join(kinds)}: give files of one kind")
    for some, adapter in zip(statistics, adapters, strict=True):
        where = some.source.path if some.source else f"the statistics of {adapter.name}"
        digest = adapter.source.sha256 if adapter.source else None
        if some.sha256 is not None and some.sha256 != digest:
            raise MismatchError(
                f"{where}: collected with an adapter whose tensors have SHA-256 {some.sha256}, but {adapter.name} has "
                f"{digest}; give the files in the adapters' order, or collect anew from the saved adapter"
            )
        for module, entry in adapter.modules.entries.items():
            wanted = KINDS[some.kind](entry.shape)
            if some.shapes.get(module) != wanted:
                raise MismatchError(
                    f"{where}: {module} has shape {some.shapes.get(module)}, and {wanted} is needed; collect anew"
                )
