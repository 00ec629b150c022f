"""Values that an adapter replaces in the base model instead of adding to them: parameters, and rows of embeddings."""

import dataclasses
import json
import typing
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from pcb_peft.runtime.paths import portable_names

HEADS = "heads"  # folder beside an adapter
NAME = "name"  # key in the metadata of a head's file: the name of the adapter that it belongs to

Tied: TypeAlias = Literal["refuse", "untie", "both"]
"""Policy of a fold for tied weights that would change differently."""

HeadPolicy: TypeAlias = Literal["keep-each", "average", "first", "refuse"]
"""Policy of a merge for parameters that several adapters replace."""

TIES: tuple[Tied, ...] = typing.get_args(Tied)
POLICIES: tuple[HeadPolicy, ...] = typing.get_args(HeadPolicy)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ReplacedParameter:
    """A whole parameter that takes the place of the base model's, before it is read.

    Attributes:
        shape: Shape of the parameter.
        load: Reads the values, float32.
    """

    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        return self.load()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows of a weight that take the place of the base model's: PEFT's trainable tokens.

    Attributes:
        indices: Numbers of the rows, in the order of the values.
        load: Reads the values (rows, width), float32.
    """

    indices: tuple[int, ...]
    load: Callable[[], Tensor]

    def put_into(self, weight: Tensor) -> Tensor:
        """Return the weight with these rows in the place of its own."""
        return weight.index_copy(0, torch.tensor(self.indices), self.load().to(weight.dtype))


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """The task that a head was trained for, as far as it is known.

    Attributes:
        task_type: PEFT's task type, such as SEQ_CLS.
        labels: Names of the classes, in the order of the head's rows.
        auto_mapping: The class of the model, as PEFT states it where there is no task type.
    """

    task_type: str | None = None
    labels: tuple[str, ...] = ()
    auto_mapping: Mapping[str, Any] | None = None

    def as_metadata(self) -> dict[str, str]:
        """Return the texts that a safetensors file keeps beside the head."""
        fields = {
            "task_type": self.task_type,
            "labels": json.dumps(self.labels, ensure_ascii=False) if self.labels else None,
            "auto_mapping": json.dumps(self.auto_mapping) if self.auto_mapping else None,
        }
        return {key: value for key, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True, slots=True)
class Replacements:
    """Parameters and rows that an adapter replaces; most often a classification head.

    Attributes:
        modules: Names in PEFT's modules_to_save under which the parameters are saved.
        parameters: Path of a parameter in the base model to its new values.
        rows: Module path to the new rows of its weight.
        copies: Module to the module that it was tied to when the adapter was trained, whose rows it has.
        task: The task that the head was trained for.
    """

    modules: tuple[str, ...] = ()
    parameters: Mapping[str, ReplacedParameter] = dataclasses.field(
        default_factory=dict[str, ReplacedParameter]
    )
    rows: Mapping[str, TokenRows] = dataclasses.field(default_factory=dict[str, TokenRows])
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    task: Task = Task()

    def __bool__(self) -> bool:
        return bool(self.parameters or self.rows)

    @property
    def classes(self) -> int | None:
        """The number of classes of a classification head; None if no matrix is replaced.

        Of several layers it is that of the last one, whose output no other layer reads: a head of DistilBERT is a
        `pre_classifier` (384, 384) and a `classifier` (6, 384).
        """
        shapes = [new.shape for new in self.parameters.values() if len(new.shape) == 2]
        given, read = {rows for rows, _ in shapes}, {columns for _, columns in shapes}
        return min(given - read or given, default=None)

    def joined(self, other: "Replacements") -> "Replacements":
        """Return these replacements, and those of another adapter; where both replace a parameter, the other's.

        The task is the one that both name, or the only one that is named.
        """
        tasks = [one.task for one in (self, other) if one.parameters and one.task != Task()]
        return Replacements(
            tuple(dict.fromkeys([*self.modules, *other.modules])),
            {**self.parameters, **other.parameters},
            {**self.rows, **other.rows},
            {**self.copies, **other.copies},
            tasks[0] if tasks and tasks[1:] in ([], tasks[:1]) else Task(),
        )

    def only(self, names: Container[str]) -> "Replacements":
        """Return the parameters of these names, without rows."""
        parameters = {name: new for name, new in self.parameters.items() if name in names}
        keys = modules_to_save_keys(parameters, self.modules)
        return Replacements(keys, parameters, task=self.task)

    def without(self, names: Container[str]) -> "Replacements":
        """Return the parameters that do not have these names, without rows."""
        return self.only({name for name in self.parameters if name not in names})

    def within(self, stores: Callable[[str], bool]) -> "Replacements":
        """Return the parameters that a base model has a place for, and all rows, those of copies included.

        Args:
            stores: Says whether the base model stores a parameter.
        """
        parameters = {name: new for name, new in self.parameters.items() if stores(name)}
        copies = {
            copy: self.rows[original]
            for copy, original in self.copies.items()
            if stores(f"{copy}.weight")
        }
        return Replacements((), parameters, {**self.rows, **copies})

    def renamed(self, names: Mapping[str, str]) -> "Replacements":
        """Return the same replacements with other names for some modules.

        Args:
            names: Present name of a module to its new one.
        """
        parameters: dict[str, ReplacedParameter] = {}
        for name, new in self.parameters.items():
            module, _, kind = name.rpartition(".")
            parameters[f"{names[module]}.{kind}" if module in names else name] = new
        return Replacements(
            modules_to_save_keys(parameters, self.modules),
            parameters,
            {names.get(module, module): rows for module, rows in self.rows.items()},
            {names.get(copy, copy): names.get(of, of) for copy, of in self.copies.items()},
            self.task,
        )

    def groups(self) -> dict[str, set[str]]:
        """Return the parameters that PEFT saves together, by their name in modules_to_save."""
        groups: dict[str, set[str]] = {}
        for name in self.parameters:
            groups.setdefault(modules_to_save_key(name, self.modules), set()).add(name)
        return groups

    def read(self) -> dict[str, Tensor]:
        """Read all parameters, by path."""
        return {name: new() for name, new in self.parameters.items()}


def modules_to_save_key(parameter: str, keys: Iterable[str]) -> str:
    """Return the name in PEFT's modules_to_save that saves a parameter.

    It ends the path of a module around the parameter: ``score`` saves ``model.score.weight``.

    Args:
        parameter: Path of the parameter.
        keys: Names in modules_to_save. If none of them fits, the path of the parameter's own module is returned.
    """
    path = parameter.split(".")
    around = [".".join(path[:end]) for end in range(1, len(path))]
    fitting = (key for key in keys if any(module.endswith(key) for module in around))
    return next(fitting, around[-1] if around else parameter)


def modules_to_save_keys(parameters: Iterable[str], keys: Collection[str]) -> tuple[str, ...]:
    """Return the names in PEFT's modules_to_save that save some parameters, those of `keys` first."""
    needed = {modules_to_save_key(name, keys) for name in parameters}
    return tuple(key for key in keys if key in needed) + tuple(sorted(needed.difference(keys)))


def head_files(heads: Mapping[str, Replacements]) -> dict[str, bytes]:
    """Return one file per adapter that has a head: its path to its content, in which its task is stated, too.

    A file whose name cannot be the adapter's, such as that of ``team/math``, says the adapter's name, too.
    """
    files = portable_names(name for name, head in heads.items() if head.parameters)
    return {
        f"{HEADS}/{file}.safetensors": _file_content(
            heads[name].read(),
            {**heads[name].task.as_metadata(), **({} if file == name else {NAME: name})},
        )
        for name, file in files.items()
    }


def _file_content(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file, always the same: the library writes several texts in any order."""
    contiguous = {key: values.contiguous() for key, values in tensors.items()}
    content = safetensors.torch.save(contiguous, metadata={"format": "pt"})
    if not texts:
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] |= texts
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[end:]
