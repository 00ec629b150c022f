"""Reading: from the files of an adapter to an `Adapter`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import linalg

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.adapters.source import NESTED, OpenedAdapter, Source
from pcb_peft.deltas.delta import Delta, LowRank, Rescaled
from pcb_peft.deltas.replacements import (
    ReplacedParameter,
    Replacements,
    Task,
    modules_to_save_keys,
)
from pcb_peft.errors import AdapterError, MismatchError, PcbPeftError, UnsupportedError
from pcb_peft.files.adapter_config import AGAIN, checked_config
from pcb_peft.files.json_text import parse_json
from pcb_peft.files.schema import checked
from pcb_peft.files.tensors import refuse_empty, refuse_other_numbers
from pcb_peft.formats import AdapterContents, Base, LazyDelta, format_of
from pcb_peft.formats.checkpoint import CONFIG, ReadFinite, SafetensorsFile
from pcb_peft.formats.heads import without_copies
from pcb_peft.formats.keys import AUTOMATIC_HEADS, PREFIX
from pcb_peft.formats.plain_names import with_plain_names, with_plain_patterns
from pcb_peft.writing.model_card import CARD, read_card
from pcb_peft.writing.targets import existing

Stated = TypeVar("Stated")

_LARGEST = 1e15  # of a change: no training comes near, and its square is still a float32


def read_adapter(name: str, source: Source | None, files: OpenedAdapter, base: Base) -> Adapter:
    """Return the adapter that files hold.

    Raises:
        PcbPeftError: They hold no adapter, or one that cannot be read.
    """
    config = with_plain_patterns(files.config)
    where = source.path if source else f"adapter {name!r}"
    if not files.tensors.names():
        raise AdapterError(f"{files.tensors.where} holds no tensors; {AGAIN}")
    refuse_other_numbers(files.tensors)
    refuse_empty(files.tensors)
    tensors = without_copies(with_plain_names(files.tensors))
    if nested := next((n for n in tensors.names() if n.startswith(PREFIX + PREFIX)), None):
        raise UnsupportedError(f"{where}: {nested} is from a PeftModel in another; {NESTED}")
    try:
        format_ = format_of(config)
        config = checked_config(config, CONFIG)
        contents = format_.read(config, tensors, base)
    except PcbPeftError as error:
        raise type(error)(f"{where}: {error}") from error
    if not (contents.modules or contents.rows):
        raise AdapterError(f"{where}: the files hold no delta of peft_type {config['peft_type']}")
    _refuse_replaced_targets(contents, set(tensors.names()), where)
    rows = {new.shape[0] for new in contents.saved.values() if new.shape}
    labels = files.labels if len(files.labels) in rows else ()  # others are the base model's
    task = Task(config.get("task_type"), labels, config.get("auto_mapping") or None)
    return Adapter(
        name=name,
        modules=DeltaMapping(_checked(contents.modules, where)),
        source=source,
        files=files,
        reopen=functools.partial(read_adapter, name, source, files),
        base=base,
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision"),
        task_type=task.task_type,
        auto_mapping=task.auto_mapping,
        head=Replacements(
            modules_to_save_keys(contents.saved, config.get("modules_to_save") or []),
            contents.saved,
            contents.rows,
            contents.copies,
            task,
        ),
        companions=files.companions,
        licences={name: _licence(files)},
        heads={owner: _kept_head(head) for owner, head in files.heads.items()},
        inputs=_inputs(source, config),
        image=contents.image,
    )


def _licence(files: OpenedAdapter) -> dict[str, Any]:
    """Return the licence that the card beside an adapter states."""
    return {} if files.directory is None else read_card(files.directory / CARD).licence


def _checked(entries: Mapping[str, LazyDelta], where: str) -> dict[str, LazyDelta]:
    """Return deltas that are checked when they are first read: their values and shapes are seen only then."""
    return {
        module: dataclasses.replace(entry, load=CheckedLoad(entry.load, f"{where}: {module}"))
        for module, entry in entries.items()
    }


@dataclasses.dataclass(slots=True)
class CheckedLoad:
    """Reads a delta, and checks it the first time.

    Attributes:
        load: Reads the delta.
        where: The adapter and the module, for messages.
        checked: True if it was read before.
    """

    load: Callable[[], Delta]
    where: str
    checked: bool = False

    def __call__(self) -> Delta:
        delta = self.load()
        if not self.checked:
            _check(delta, self.where)
            self.checked = True
        return delta


def _check(delta: Delta, where: str) -> None:
    """Refuse a delta that cannot be merged.

    Raises:
        AdapterError: It has values that no training makes.
        MismatchError: It has another shape than the weight that it belongs to.
    """
    if not _size(delta) < _LARGEST:
        raise AdapterError(
            f"{where}: its change has values that are no numbers, or larger than {_LARGEST:.0e}; the training failed, "
            "or the file is damaged: use a checkpoint from before"
        )
    stored = delta.layout.shape
    if (
        stored is not None
        and delta.layout.matrix_shape(stored) != delta.shape
        and not delta.multiplies
    ):
        raise MismatchError(
            f"{where}: the adapter's (out, in) is {delta.shape}, and the weight has shape {stored}; give the base "
            "model that the adapter was trained on"
        )


def _size(delta: Delta) -> float:
    """Return a bound on the values of a delta, without its matrix where it has factors."""
    if isinstance(delta, Rescaled):
        return max(_size(delta.added), float(delta.gain.abs().max()))
    if isinstance(delta, LowRank):
        factors = (delta.lora_A, delta.lora_B)
        return abs(delta.scaling) * math.prod(float(linalg.vector_norm(f)) for f in factors)
    return delta.norm()


def _inputs(source: Source | None, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the adapter's directory, and its base model's if it is on this disk."""
    base = config.get("base_model_name_or_path")
    local = [base] if isinstance(base, str) and existing(Path(base) / "config.json") else []
    return existing(*([] if source is None else [source.directory]), *local)


def _refuse_replaced_targets(contents: AdapterContents, names: set[str], where: str) -> None:
    """Refuse a parameter that is replaced and has a delta, unless PEFT finds it inside its own layer."""
    for parameter in contents.saved:
        if parameter.rpartition(".")[0] in contents.modules and PREFIX + parameter in names:
            raise UnsupportedError(
                f"{where}: {parameter} replaces a parameter of a module that has a delta too, and its name lacks "
                "PEFT's base_layer: PEFT would not load it"
            )


def _kept_head(tensors: SafetensorsFile) -> Replacements:
    """Return the head of one source of a merged adapter, from its file beside the adapter."""
    if not tensors.names():
        raise AdapterError(f"{tensors.where} holds no head; {AGAIN}")
    refuse_other_numbers(tensors)
    refuse_empty(tensors)
    parameters = {
        name: ReplacedParameter(tensors.shape(name), ReadFinite(tensors, name))
        for name in tensors.names()
    }
    task = _task_of(tensors)
    # PEFT wraps these as a whole, and cannot wrap a layer inside them once more
    automatic = AUTOMATIC_HEADS.get(str(task.task_type), ())
    return Replacements(modules_to_save_keys(parameters, automatic), parameters, task=task)


def _task_of(tensors: SafetensorsFile) -> Task:
    """Return the task that the texts in a head's file name.

    Raises:
        AdapterError: They are damaged.
    """
    texts = tensors.metadata()

    def stated(key: str, schema: type[Stated], default: str) -> Stated:
        where = f"{tensors.where}: {key}"
        content = parse_json(texts.get(key, default), where, AdapterError, AGAIN)
        return checked(content, schema, where, AdapterError, AGAIN)

    mapping = stated("auto_mapping", dict[str, Any], "{}")
    return Task(texts.get("task_type"), tuple(stated("labels", list[str], "[]")), mapping or None)
