"""The models that are measured: the base, single adapters, merges, controls; each put where PEFT loads it."""

import dataclasses
from pathlib import Path

from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.loading import AdapterLike, load_adapter
from pcb_peft.adapters.source import Source
from pcb_peft.base.canonical import LANGUAGE_MODELS
from pcb_peft.data.live_heads import Head
from pcb_peft.deltas.delta import Dense
from pcb_peft.deltas.replacements import ReplacedParameter
from pcb_peft.evaluation.cache import OutcomeCache
from pcb_peft.formats.checkpoint import CONFIG
from pcb_peft.runtime.paths import expanded


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One model that is measured.

    Attributes:
        name: For messages.
        title: The name that tables give it.
        digest: SHA-256 of what it adds to the base model.
        source: Where PEFT finds the adapter; None for a whole model.
        checkpoint: A whole model, such as a folded merge; None for an adapter, or the base model.
        adapter: What was read of it.
    """

    name: str
    title: str
    digest: str
    source: Source | None = None
    checkpoint: str | None = None
    adapter: Adapter | None = None

    def head_for(self, own: Adapter | None) -> Head | None:
        """The classification head for a task: the merge's only one, the one it keeps for the task, or the adapter's."""
        if self.adapter is not None:
            if head := head_of(self.adapter):
                return head
            kept = self.adapter.heads.get(own.name) if own else None
            if kept:
                return kept.read()
        return head_of(own)


BASE = Subject(name="base", title="base", digest="")
"""The base model alone."""


def head_of(adapter: Adapter | None) -> dict[str, Tensor] | None:
    """Read the classification head that an adapter replaces; None where it has none."""
    return {name: read() for name, read in head_parameters(adapter).items()} or None


def head_parameters(adapter: Adapter | None) -> dict[str, ReplacedParameter]:
    """The parameters of an adapter's classification head, before they are read; empty where it has none."""
    if adapter is None or adapter.task_type in LANGUAGE_MODELS:
        return {}
    parameters = adapter.head.parameters
    return {name: new for name, new in parameters.items() if "embed" not in name.lower()}


@dataclasses.dataclass(frozen=True, slots=True)
class SubjectMaker:
    """Makes things measurable.

    Attributes:
        base_model: The base model.
        dequantize: Compute its weights from their codes, where it is quantised.
        scratch: A directory for what has to be saved.
        cache: Knows the hashes of large files.
    """

    base_model: str
    dequantize: bool
    scratch: Path
    cache: OutcomeCache

    def make(self, given: AdapterLike, name: str) -> Subject:
        """Make something measurable: what is in memory is saved first, a dense merge as a whole model.

        Args:
            given: An adapter, a merge, or the directory of a folded model.
            name: For messages.

        Raises:
            PcbPeftError: It cannot be read, or cannot be saved.
        """
        if isinstance(given, str | Path) and _is_checkpoint(expanded(given)):
            directory = expanded(given)
            digest = self.cache.directory_digest(directory)
            title = directory.resolve().name
            return Subject(name=name, title=title, digest=digest, checkpoint=str(directory))
        adapter = load_adapter(given, base_model=self.base_model, dequantize=self.dequantize)
        if adapter.source is None or adapter.source.sha256 is None:
            return self._saved(adapter, name)
        return _in_files(adapter, adapter.source, name)

    def _saved(self, adapter: Adapter, name: str) -> Subject:
        target = self.scratch / name
        if any(entry.kind is Dense for entry in adapter.modules.entries.values()):
            adapter.fold(self.base_model, target, dequantize=self.dequantize, progress=False)
            digest = self.cache.directory_digest(target)
            return Subject(
                name=name,
                title=adapter.name,
                digest=digest,
                checkpoint=str(target),
                adapter=adapter,
            )
        adapter.save_pretrained(target)
        saved = load_adapter(target)
        source = saved.source or Source(str(target))
        saved = dataclasses.replace(saved, name=adapter.name, task_type=adapter.task_type)
        return _in_files(saved, source, name)


def _in_files(adapter: Adapter, source: Source, name: str) -> Subject:
    return Subject(
        name=name,
        title=adapter.name,
        digest=f"{source.sha256} {source.config_sha256}",
        source=source,
        adapter=adapter,
    )


def _is_checkpoint(directory: Path) -> bool:
    """True for a whole model of transformers."""
    return (directory / "config.json").is_file() and not (directory / CONFIG).is_file()
