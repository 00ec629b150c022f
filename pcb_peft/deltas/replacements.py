"""Values that an adapter replaces in the base model instead of adding to them: parameters, and rows of embeddings."""

import dataclasses
import typing
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from typing import Literal, TypeAlias

import safetensors.torch
import torch
from torch import Tensor

HEADS = "heads"  # folder beside an adapter

Tied: TypeAlias = Literal["refuse", "untie", "both"]
"""What a fold does with tied weights that would change differently."""

HeadPolicy: TypeAlias = Literal["keep-each", "average", "first", "refuse"]
"""What a merge does with parameters that several adapters replace."""

TIES: tuple[Tied, ...] = typing.get_args(Tied)
POLICIES: tuple[HeadPolicy, ...] = typing.get_args(HeadPolicy)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """A whole parameter, before it is read.

    Attributes:
        shape: Its shape.
        load: Reads it, float32.
    """

    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        return self.load()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some rows of a weight: PEFT's trainable tokens.

    Attributes:
        indices: Which, in the order of the values.
        load: Reads them, (rows, width), float32.
    """

    indices: tuple[int, ...]
    load: Callable[[], Tensor]

    def put_into(self, weight: Tensor) -> Tensor:
        """The weight with these rows in the place of its own."""
        return weight.index_copy(0, torch.tensor(self.indices), self.load().to(weight.dtype))


@dataclasses.dataclass(frozen=True, slots=True)
class Replacements:
    """What an adapter replaces; most often a classification head.

    Attributes:
        modules: The names under which PEFT is told to save parameters (its modules_to_save).
        parameters: By parameter path in the base model.
        rows: Module path to rows of its weight.
        copies: Module to the one that it was tied to when the adapter was trained; it has that one's rows.
    """

    modules: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict[str, Parameter])
    rows: Mapping[str, Rows] = dataclasses.field(default_factory=dict[str, Rows])
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def __bool__(self) -> bool:
        return bool(self.parameters or self.rows)

    def only(self, names: Container[str]) -> "Replacements":
        """Some of its parameters, without rows."""
        some = {name: values for name, values in self.parameters.items() if name in names}
        return Replacements(modules_to_save_keys(some, self.modules), some)

    def without(self, names: Container[str]) -> "Replacements":
        """The other parameters, without rows."""
        return self.only({name for name in self.parameters if name not in names})

    def within(self, stores: Callable[[str], bool]) -> "Replacements":
        """Return the parameters and rows that a base model has a place for, rows of copies included.

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

    def groups(self) -> dict[str, set[str]]:
        """The parameters that PEFT saves together, by the word that says so."""
        groups: dict[str, set[str]] = {}
        for name in self.parameters:
            groups.setdefault(modules_to_save_key(name, self.modules), set()).add(name)
        return groups

    def read(self) -> dict[str, Tensor]:
        """All parameters, by path."""
        return {name: values() for name, values in self.parameters.items()}


def modules_to_save_key(parameter: str, words: Iterable[str]) -> str:
    """The word by which PEFT is told to save a parameter: it ends the path of a module around it.

    The path of the parameter's own module, where none of the words does.
    """
    path = parameter.split(".")
    around = [".".join(path[:end]) for end in range(1, len(path))]
    return next((w for w in words if any(m.endswith(w) for m in around)), around[-1])


def modules_to_save_keys(parameters: Iterable[str], words: Collection[str]) -> tuple[str, ...]:
    """The words by which PEFT is told to save parameters."""
    needed = {modules_to_save_key(name, words) for name in parameters}
    return tuple(w for w in words if w in needed) + tuple(sorted(needed.difference(words)))


def head_files(heads: Mapping[str, Replacements]) -> dict[str, bytes]:
    """One file per adapter that has a head: ``model.load_state_dict(load_file(...), strict=False)`` loads it."""
    return {
        f"{HEADS}/{name}.safetensors": safetensors.torch.save(
            {key: values.contiguous() for key, values in head.read().items()},
            metadata={"format": "pt"},
        )
        for name, head in heads.items()
        if head.parameters
    }
