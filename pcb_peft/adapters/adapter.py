"""An adapter: a lazy mapping from module to delta, that can be saved, or folded into its base model."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pcb_peft.adapters.source import OpenedAdapter, Source
from pcb_peft.base.model import BaseModel, lazy_base, open_base_model
from pcb_peft.deltas.delta import Delta, LowRank
from pcb_peft.deltas.dtypes import parse_dtype
from pcb_peft.deltas.replacements import (
    HEADS,
    TIES,
    Parameter,
    Replacements,
    head_files,
    modules_to_save_keys,
)
from pcb_peft.errors import AdapterError, OptionError, PcbPeftError, UnsupportedError
from pcb_peft.formats import AdapterFiles, LazyDelta, format_for, format_named, format_of
from pcb_peft.formats.checkpoint import CONFIG, Tensors, apart, refuse_overflow
from pcb_peft.formats.heads import with_biases, without_copies, write_head
from pcb_peft.formats.registry import AUTOMATIC_HEADS, PREFIX, Base, finite, refuse_pipelines
from pcb_peft.plugins.options import did_you_mean
from pcb_peft.runtime.processes import current
from pcb_peft.runtime.progress import tracker
from pcb_peft.writing.atomic import replace_directory, write_files
from pcb_peft.writing.fold import fitted, fold_deltas
from pcb_peft.writing.model_card import model_card, public_name


class DeltaMapping(Mapping[str, Delta]):
    """Module path to delta; a delta is read, or computed, each time it is asked for, and not kept."""

    def __init__(self, entries: Mapping[str, LazyDelta]) -> None:
        self.entries = dict(sorted(entries.items()))

    def __getitem__(self, module: str) -> Delta:
        if module not in self.entries:
            raise KeyError(f"no delta for {module!r}{did_you_mean(module, self.entries)}")
        return self.entries[module].load()

    def __contains__(self, module: object) -> bool:
        return module in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """What one adapter does to its base model.

    Attributes:
        name: For messages and reports.
        modules: Module path in the base model to delta.
        source: Where it was read, if from files.
        files: What it was read from.
        base: What it was read beside.
        base_model: Path or hub id, as far as it is known.
        revision: Of the base model.
        task_type: PEFT's.
        scale: What the deltas in the files were multiplied by.
        tied: What a fold does with tied weights, unless it is told otherwise.
        head: What it replaces.
        heads: What each source of a merged adapter replaces for itself, by its name.
    """

    name: str
    modules: DeltaMapping
    source: Source | None = None
    files: OpenedAdapter | None = None
    base: Base = None
    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    scale: float = 1.0
    tied: str = TIES[0]
    head: Replacements = dataclasses.field(default_factory=Replacements)
    heads: Mapping[str, Replacements] = dataclasses.field(default_factory=dict[str, Replacements])

    def on(self, base: Base) -> "Adapter":
        """The same adapter, read beside its base model, for deltas that depend on W."""
        if self.files is None:
            return self
        return read_adapter(self.name, self.source, self.files, base).scaled(self.scale)

    def scaled(self, weight: float) -> "Adapter":
        """Return the same adapter with every delta multiplied by a number.

        Heads, embeddings and token rows that the adapter replaces stay as they are. Of a merge this costs nothing: the
        adapters do not compete again.

        Args:
            weight: Any finite number; 0 leaves the base model unchanged, 1 the adapter.

        Raises:
            OptionError: `weight` is not finite.

        Example:
            >>> merged = merge_adapters(["math-lora", "code-lora"])
            >>> merged.scaled(1.4).save_pretrained("stronger")
        """
        if not math.isfinite(weight):
            raise OptionError(f"{self.name}: scaled({weight}): the weight must be a finite number")
        if weight == 1:
            return self
        entries = {
            module: dataclasses.replace(entry, load=functools.partial(_scaled, entry, weight))
            for module, entry in self.modules.entries.items()
        }
        scale = self.scale * weight  # no file holds these deltas, so there is no source
        return dataclasses.replace(self, modules=DeltaMapping(entries), source=None, scale=scale)

    def delta(self, module: str, base_model: str | Path | BaseModel | None = None) -> Tensor:
        """What is added to a module's weight W, float32, in W's own orientation.

        (out, in) for Linear, (in, out) for Conv1D: as the base model has it; without one, as the configuration says, in
        which PEFT writes the same for all modules.

        Args:
            module: Its path in the base model.
            base_model: Needed only where ΔW depends on W, as for (IA)³.

        Raises:
            KeyError: The adapter does not touch that module.
            BaseModelError: W is needed.
            MismatchError: The base model has not this module, or in another shape.
        """
        base = lazy_base(base_model)
        if base is None:
            return self.modules[module].delta()
        delta = self.on(base).modules[module]
        if own := self.head.parameters.get(f"{module}.weight"):
            return fitted(delta, module, base(), own.shape).delta(own())
        return fitted(delta, module, base()).delta(base().weight(module))

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        dtype: str | torch.dtype = torch.float32,
        rank_pattern: bool = False,
        overwrite: bool = False,
        format: str = "peft",  # noqa: A002  (as it is called where people ask for it)
    ) -> None:
        """Writes a PEFT adapter that `PeftModel.from_pretrained` loads, whole or not at all.

        The scaling is folded into the factors (r = lora_alpha, the same for all modules), so that every consumer reads
        it alike.

        Args:
            directory: Where to.
            dtype: Of the tensors; they are rounded to it once.
            rank_pattern: Let every module of a LoRA have its own rank instead of padding it with zeros.
            overwrite: Replace a directory that is not empty.
            format: "peft", or "diffusers" or "kohya" for a LoRA of an image model: pytorch_lora_weights.safetensors.

        Raises:
            UnsupportedError: The deltas are dense, or of several kinds.
            OptionError: The dtype cannot hold the values, or is none of weights; no ranks for a `rank_pattern`.
            OutputError: The directory cannot be written.
        """
        if current().is_main:
            self._save(Path(directory), dtype, rank_pattern, overwrite, format)
        current().barrier()

    def _save(
        self,
        directory: Path,
        dtype: str | torch.dtype,
        rank_pattern: bool,
        overwrite: bool,
        form: str,
    ) -> None:
        written = self.written(dtype, rank_pattern=rank_pattern, format=form)
        files = {"README.md": self._card(str(written.config.get("peft_type", "LORA"))).encode()}
        if written.config:
            files[CONFIG] = (json.dumps(written.config, indent=2, sort_keys=True) + "\n").encode()
        with replace_directory(directory, overwrite=overwrite) as target:
            path = target / written.file
            safetensors.torch.save_file(written.tensors, path, metadata={"format": "pt"})
            write_files(target, self._companions() | files)

    def written(
        self,
        dtype: str | torch.dtype = torch.float32,
        *,
        rank_pattern: bool = False,
        format: str = "peft",  # noqa: A002
    ) -> AdapterFiles:
        """The adapter as PEFT stores it: configuration and tensors. Arguments and errors are `save_pretrained`'s."""
        number_format = parse_dtype(dtype)
        biases = self._whole_biases()
        entries = {name: e for name, e in self.modules.entries.items() if name not in biases}
        kinds = {entry.kind for entry in entries.values()}
        if len(kinds) > 1 or not (kinds or self.head.rows):
            names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no deltas at all"
            raise UnsupportedError(
                f"{self.name} holds {names}: one PEFT adapter holds deltas of one kind"
            )
        kind = next(iter(kinds), None)
        if format != "peft":
            return self._written_as(format, kind, number_format, rank_pattern=rank_pattern)
        refuse_pipelines(entries)
        format_ = format_for(kind)
        ranks = [entry.rank for entry in entries.values()]
        if rank_pattern and (None in ranks or not ranks):
            raise OptionError(f"rank_pattern: {self.name} has no ranks; leave it out")
        options = {"rank_pattern": True} if rank_pattern else {}
        written = AdapterFiles({}, {})
        if kinds:
            written = format_.write(dict(DeltaMapping(entries)), number_format, **options)  # type: ignore[misc]
        written = with_biases(written, biases, entries, number_format)
        head = write_head(self.head, entries.keys(), format_, number_format)
        config = self._identity(format_.peft_type) | written.config | head.config
        tensors = apart(written.tensors | head.tensors)
        refuse_overflow(tensors)
        return AdapterFiles(config, tensors)

    def _written_as(
        self, name: str, kind: type[Delta] | None, dtype: torch.dtype, *, rank_pattern: bool
    ) -> AdapterFiles:
        """The adapter as others than PEFT store it."""
        format_ = format_named(name)
        if kind is not LowRank or self.head.parameters or self._whole_biases():
            raise UnsupportedError(
                f"{self.name}: the format {name} holds a LoRA, and nothing beside it"
            )
        written = format_.write(dict(self.modules), dtype, rank_pattern=rank_pattern)  # type: ignore[misc]
        tensors = {key: values.contiguous() for key, values in written.tensors.items()}
        refuse_overflow(tensors)
        return dataclasses.replace(written, tensors=tensors)

    def _whole_biases(self) -> Mapping[str, Callable[[], Tensor]]:
        """The biases that PEFT stores whole, beside a LoRA that has no room for their changes: what reads them."""
        return {}

    def fold(
        self,
        base_model: str | Path | BaseModel,
        output: str | Path,
        *,
        tied: str | None = None,
        overwrite: bool = False,
        progress: bool | None = None,
    ) -> None:
        """Writes the base model with W + ΔW in the place of W, shard by shard.

        What the adapter replaces (its head) is written too, in its place or, where the base has none, into a file in
        the folder ``heads``.

        Args:
            base_model: Path or hub id of a transformers checkpoint in safetensors.
            output: Where to.
            tied: What becomes of tied weights where the change of one end is not that of the other: "refuse"; "untie":
                each has weights of its own from then on, as with the adapter in PEFT; "both": both change. Default:
                what the merge was told, else "refuse".
            overwrite: Replace a directory that is not empty.
            progress: Show a bar; default: on a terminal.

        Raises:
            MismatchError: The base model has not these modules, or in other shapes.
            BaseModelError: Tied weights would change differently, and that is refused.
            OutputError: The directory cannot be written.
        """
        base = base_model if isinstance(base_model, BaseModel) else open_base_model(base_model)
        tied = tied or self.tied
        if tied not in TIES:
            raise OptionError(f"tied is {tied!r}; it must be one of {', '.join(TIES)}")
        modules = self.on(lambda: base).modules
        held = {n: new for n, new in self.head.parameters.items() if base.find(n) or base.tied(n)}
        copies = {
            copy: self.head.rows[of]
            for copy, of in self.head.copies.items()
            if base.find(f"{copy}.weight") or base.tied(f"{copy}.weight")
        }
        fold_deltas(
            modules,
            base,
            output,
            replaced=Replacements((), held, {**self.head.rows, **copies}),
            tied=tied,
            extra_files=self._companions(without=held),
            overwrite=overwrite,
            progress=tracker(progress),
        )

    def _identity(self, peft_type: str) -> dict[str, Any]:
        """The fields of the configuration that say what the adapter belongs to."""
        automatic = AUTOMATIC_HEADS.get(str(self.task_type), [])
        parts = {part for name in self.head.parameters for part in name.split(".")}
        headless = automatic and not parts.intersection(automatic)
        fields = {
            "peft_type": peft_type,
            "task_type": None if headless else self.task_type,
            "base_model_name_or_path": public_name(self.base_model),
            "revision": self.revision if public_name(self.base_model) else None,
            "inference_mode": True,
        }
        return {key: value for key, value in fields.items() if value is not None}

    def _companions(self, without: Container[str] | None = None) -> dict[str, bytes]:
        """The files that stand beside the weights.

        A folded base has its own head beside it, `without` the parameters that it holds itself.
        """
        own = {} if without is None else {self.name: self.head.without(without)}
        return head_files(own | dict(self.heads))

    def _card(self, peft_type: str) -> str:
        """The model card."""
        tags = [peft_type.lower(), "transformers"]
        return model_card(
            title=self.name,
            base_model=self.base_model,
            task_type=self.task_type,
            tags=tags,
            sources=[],
            settings=[],
        )


def _scaled(entry: LazyDelta, weight: float) -> Delta:
    return entry.load().scaled(weight)


def read_adapter(name: str, source: Source | None, files: OpenedAdapter, base: Base) -> Adapter:
    """The adapter that is in files.

    Raises:
        PcbPeftError: They hold none, or what cannot be read.
    """
    config = files.config
    where = source.path if source else f"adapter {name!r}"
    tensors = without_copies(files.tensors)
    try:
        contents = format_of(config).read(config, tensors, base)
    except PcbPeftError as error:
        raise type(error)(f"{where}: {error}") from error
    if not (contents.modules or contents.rows):
        raise AdapterError(f"{where}: the files hold no delta of peft_type {config['peft_type']}")
    names = set(tensors.names())
    for parameter in contents.saved:
        if parameter.rpartition(".")[0] in contents.modules and PREFIX + parameter in names:
            raise UnsupportedError(
                f"{where}: {parameter} replaces a parameter of a module that has a delta too, and is not where PEFT "
                "keeps such (base_layer): PEFT would not load it"
            )
    words = config.get("modules_to_save") or []
    return Adapter(
        name=name,
        modules=DeltaMapping(contents.modules),
        source=source,
        files=files,
        base=base,
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision"),
        task_type=config.get("task_type"),
        head=Replacements(
            modules_to_save_keys(contents.saved, words),
            contents.saved,
            contents.rows,
            contents.copies,
        ),
        heads={
            kept: _kept(f"{where}/{HEADS}/{kept}", tensors) for kept, tensors in files.heads.items()
        },
    )


def _kept(where: str, tensors: Tensors) -> Replacements:
    """What stands in a file beside a merged adapter: the head of one of its sources."""
    try:
        parameters = {
            name: Parameter(tensors.shape(name), functools.partial(finite, tensors, name))
            for name in tensors.names()
        }
    except KeyError as error:
        raise AdapterError(f"{where} holds numbers of type {error}: they are no weights") from error
    return Replacements(modules_to_save_keys(parameters, ()), parameters)
