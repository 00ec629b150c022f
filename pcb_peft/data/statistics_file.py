"""Task statistics: one matrix per module, measured on an adapter's texts, in a file that names its adapter by hash."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.source import Source
from pcb_peft.errors import AdapterError, MismatchError, OptionError
from pcb_peft.files.tensors import SafetensorsFile, read_finite, refuse_other_numbers
from pcb_peft.runtime.hashing import sha256_of_file
from pcb_peft.runtime.paths import expanded
from pcb_peft.runtime.shown import quoted, shown
from pcb_peft.version import __version__
from pcb_peft.writing.atomic import write_file_atomically
from pcb_peft.writing.targets import Overwrite
from pcb_peft.writing.tensors_file import save_tensors

KINDS: dict[str, Callable[[tuple[int, int]], tuple[int, int]]] = {
    "gram": lambda shape: (shape[1], shape[1]),
    "gradient": lambda shape: shape,
}
"""For each kind of statistic, its shape for a ΔW of shape (out, in).

"gram": XᵀX / n, for the n tokens that reach the module while the adapter is in the model. "gradient": ∂L/∂W of the mean
loss at W + ΔW.
"""

FORMAT = "pcb_peft statistics 1"

StatisticsLike: TypeAlias = "str | Path | Source | TaskStatistics"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TaskStatistics:
    """One statistic of one adapter's task; a module's matrix is read when it is asked for.

    Attributes:
        kind: "gram" or "gradient".
        shapes: The shape of each module's statistic.
        load: Reads the statistic of a module, float32.
        count: Number of tokens ("gram") or labels ("gradient") that it is the mean over.
        sha256: Hash of the tensors' file of the adapter that it was measured with; None if nobody checks.
        source: The file that it was read from, with the file's own hash; None if it is in memory.

    Example:
        >>> import torch
        >>> from pcb_peft import TaskStatistics
        >>> grams = {"layers.0.q_proj": torch.eye(8)}
        >>> shapes = {module: tuple(gram.shape) for module, gram in grams.items()}
        >>> TaskStatistics("gram", shapes, grams.__getitem__).name
        'statistics'
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str], Tensor]
    count: int = 0
    sha256: str | None = None
    source: Source | None = None

    @property
    def name(self) -> str:
        """The file's name, or "statistics" if it is in memory."""
        return self.source.name if self.source else "statistics"

    def of(self, module: str, shape: tuple[int, int]) -> Tensor:
        """Return a module's statistic; zeros if the adapter does not change the module.

        Args:
            module: The module's path.
            shape: (out, in) of its ΔW.
        """
        return self.load(module) if module in self.shapes else torch.zeros(KINDS[self.kind](shape))


def save_statistics(
    statistics: TaskStatistics, path: Path, *, overwrite: Overwrite = False
) -> None:
    """Write task statistics to a file, whole or not at all.

    Args:
        statistics: What to write.
        path: The file.
        overwrite: Replace the file if it exists: True, if it holds statistics; "all", whatever it is.

    Raises:
        OutputError: The file exists, or cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "kind": statistics.kind,
        "count": str(statistics.count),
        "adapter_sha256": statistics.sha256 or "",
        "version": __version__,
    }
    tensors = {module: statistics.load(module).contiguous() for module in statistics.shapes}
    write_file_atomically(
        path,
        lambda file: save_tensors(tensors, file, metadata),
        overwrite=overwrite,
        is_ours=holds_statistics,
    )


def holds_statistics(path: Path) -> bool:
    """Return whether a file is one that `save_statistics` wrote."""
    try:
        return SafetensorsFile(path).metadata().get("format") == FORMAT
    except AdapterError:
        return False


def open_statistics(statistics: StatisticsLike) -> TaskStatistics:
    """Open a file of task statistics; what is open already is returned as it is.

    Args:
        statistics: A path, a `Source` with the hash that the file must have, or `TaskStatistics`.

    Returns:
        The statistics; each module's matrix is read when it is asked for.

    Raises:
        AdapterError: The file holds no statistics, or has another hash.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from pcb_peft import TaskStatistics, open_statistics
        >>> from pcb_peft.data.statistics_file import save_statistics
        >>> grams = {"layers.0.q_proj": torch.eye(8)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "math.safetensors")
        ...     save_statistics(TaskStatistics("gram", {"layers.0.q_proj": (8, 8)}, grams.__getitem__), file)
        ...     open_statistics(file).shapes
        {'layers.0.q_proj': (8, 8)}
    """
    if isinstance(statistics, TaskStatistics):
        return statistics
    source = statistics if isinstance(statistics, Source) else Source(str(statistics))
    path = expanded(source.path)
    try:
        file = SafetensorsFile(path)
        sha256 = sha256_of_file(path)
    except (OSError, ValueError, AdapterError) as error:
        raise AdapterError(f"statistics {path} cannot be read: {shown(error)}") from error
    metadata = file.metadata()
    if metadata.get("format") != FORMAT or metadata.get("kind") not in KINDS:
        raise AdapterError(
            f"{path} is not a file of task statistics; `pcb-peft collect` writes them"
        )
    refuse_other_numbers(file)
    if source.sha256 not in (None, sha256):
        raise AdapterError(
            f"{path} has changed: its SHA-256 is {sha256}, but the recipe says {shown(source.sha256)}; restore the "
            "file, or take sha256 out of the recipe"
        )

    return TaskStatistics(
        kind=metadata["kind"],
        shapes={name: file.shape(name) for name in file.names()},
        load=functools.partial(read_finite, file),
        count=_count(path, metadata),
        sha256=metadata.get("adapter_sha256") or None,
        source=dataclasses.replace(source, sha256=sha256),
    )


def _count(path: Path, metadata: Mapping[str, str]) -> int:
    """Return the number of tokens or labels that a file of statistics is the mean over."""
    stated = metadata.get("count", "")
    if not re.fullmatch("[0-9]{1,18}", stated):
        raise AdapterError(
            f"{path}: count is {quoted(stated)}; it must be a whole number: collect the statistics again"
        )
    return int(stated)


def check_statistics(
    statistics: Sequence[TaskStatistics], adapters: Sequence[Adapter], *, hashed: bool = True
) -> None:
    """Check that there is one statistic for each adapter, all of one kind, measured with that adapter.

    Args:
        statistics: Statistics, in the adapters' order.
        adapters: The adapters.
        hashed: False if the adapters' files were not read, so that their hashes may be unknown.

    Raises:
        OptionError: There are more or fewer, or several kinds.
        MismatchError: One was measured with another adapter, or lacks a module.
    """
    if len(statistics) != len(adapters):
        raise OptionError(
            f"there are {len(adapters)} adapters and {len(statistics)} statistics; give one file per adapter, in order"
        )
    kinds = sorted({one.kind for one in statistics})
    if len(kinds) > 1:
        raise OptionError(
            f"the statistics are of kinds {' and '.join(kinds)}; give files of one kind"
        )
    for one, adapter in zip(statistics, adapters, strict=True):
        _check_adapter(one, adapter, hashed=hashed)


def _check_adapter(statistics: TaskStatistics, adapter: Adapter, *, hashed: bool) -> None:
    """Check that statistics belong to an adapter.

    Raises:
        MismatchError: They do not.
    """
    source = statistics.source
    where = source.path if source else f"the statistics of {adapter.name}"
    sha256 = adapter.source.sha256 if adapter.source else None
    known = hashed or sha256 is not None
    if known and statistics.sha256 is not None and statistics.sha256 != sha256:
        raise MismatchError(
            f"{where}: collected with an adapter whose tensors have SHA-256 {statistics.sha256}, but {adapter.name} "
            f"has {sha256}; give the files in the adapters' order, or collect them again from the saved adapter"
        )
    for module, entry in adapter.modules.entries.items():
        needed = KINDS[statistics.kind](entry.shape)
        shape = statistics.shapes.get(module)
        if shape != needed:
            state = "is missing" if shape is None else f"has shape {shape}, but {needed} is needed"
            raise MismatchError(f"{where}: {module} {state}; collect the statistics again")
