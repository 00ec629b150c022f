"""Names of parameters: in memory, where adapters find them, and in the files of a checkpoint.

``model.layers.0.mlp.up_proj.weight`` is a name in memory: that of a parameter in the model that transformers builds.
The name in the files is another one where the checkpoint was saved from the bare model (without ``bert.``), or by an
older release of transformers, or where several parameters share one tensor (tied weights).

What the files hold decides what is tied, as it does when transformers 5 loads them: two ends that are there with
different values are two weights, whatever ``tie_word_embeddings`` says.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pcb_peft.base.architecture import Skeleton
from pcb_peft.base.conversions import Conversion, conversions_of
from pcb_peft.base.files import TensorInfo


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterNames:
    """The names of a checkpoint's parameters.

    Attributes:
        skeleton: The architecture; empty where transformers does not know it.
        tensors: Name in the files to place and shape.
        config: ``config.json``.
        read: Reads a tensor of the files.
    """

    skeleton: Skeleton
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    read: Callable[[str], Tensor]

    @functools.cached_property
    def files(self) -> Mapping[str, str]:
        """Name in memory to name in the files, for every tensor whose values are the same in both."""
        same = (name for name in sorted(self.tensors) if not self.is_converted(name))
        return {self.in_memory(name): name for name in same}

    def in_files(self, name: str) -> str | None:
        """Return the name in the files of a parameter in memory; None where the files do not hold it.

        A name that the model does not have may be one of the files, one of an older release, or a head's.
        """
        in_model = self.skeleton.in_model(name)
        if in_model is not None:
            return self.files.get(in_model)
        return name if name in self.tensors else self.files.get(self.in_memory(name))

    def in_memory(self, name: str) -> str:
        """Return the name in memory of a parameter in the files; the same name if there is none."""
        return self.skeleton.in_memory(name)

    def is_converted(self, name: str) -> bool:
        """Return whether values in the files are fused, split or permuted when the model is loaded."""
        return self.skeleton.is_converted(name)

    @functools.cached_property
    def _conversions(self) -> dict[str, Conversion]:
        return conversions_of(self.skeleton, sorted(self.tensors))

    def conversion(self, name: str) -> Conversion | None:
        """Return how a parameter in memory is made of tensors in the files; None where it is one of them."""
        return self._conversions.get(self.skeleton.in_model(name) or name)

    @functools.cached_property
    def in_model(self) -> tuple[str, ...]:
        """Names in memory of the parameters that the files hold, those of other arrangements included."""
        return tuple(dict.fromkeys([*self.files, *self._conversions]))

    def has(self, name: str) -> bool:
        """Return whether the model has a parameter of that name in memory, its own or tied to another."""
        return self.in_files(name) is not None or self.skeleton.in_model(name) is not None

    def stores(self, name: str) -> bool:
        """Return whether the files hold the values of a parameter in memory, under its name or a tied one."""
        made = self.conversion(name) is not None
        return made or self.in_files(name) is not None or bool(self.tied(name))

    def is_required(self, name: str) -> bool:
        """Return whether the model lacks values if the files do not hold the parameter of that name in the files.

        It does not if the parameter is tied to one that they hold, or is not used in memory: transformers loads such a
        checkpoint, whose index was written before its files.
        """
        if not self.skeleton.parameters:
            return not self.config.get("tie_word_embeddings")
        tied = any(self.in_files(other) for other in self.tied(name))
        return self.in_memory(name) in self.skeleton.parameters and not tied

    def tied(self, name: str) -> tuple[str, ...]:
        """Return the other names, in memory, of a parameter's values; empty where no other parameter has them.

        Where transformers does not know the architecture, ``tie_word_embeddings`` and the number of rows (one for
        every token) decide.
        """
        if self.skeleton.parameters:
            return self._ties.get(self.in_memory(name), ())
        tensor = self.tensors.get(name)
        has_token_rows = tensor is not None and tensor.shape[:1] == (self.config.get("vocab_size"),)
        if not (has_token_rows and self.config.get("tie_word_embeddings")):
            return ()
        others = self.embeddings - {name}
        same = tuple(sorted(other for other in others if self._are_same(name, other)))
        return same if others else ("the output layer",)

    @functools.cached_property
    def _ties(self) -> dict[str, tuple[str, ...]]:
        """Parameter in memory to the others that have its values."""
        ties: dict[str, tuple[str, ...]] = {}
        for name, others in self.skeleton.tied.items():
            if name not in self._own_weights:
                ties[name] = tuple(other for other in others if other not in self._own_weights)
        return ties

    @functools.cached_property
    def _own_weights(self) -> set[str]:
        """Parameters that the architecture ties to others, and for which the files hold other values."""
        own_weights: set[str] = set()
        stand_ins: dict[str, str] = {}  # for a parameter that the files do not hold
        for name, source in self.skeleton.tie_sources.items():
            source = stand_ins.get(source, source)
            if name in self.files and source not in self.files:
                stand_ins[source] = name
            elif name in self.files and not self._are_same(self.files[name], self.files[source]):
                own_weights.add(name)
        return own_weights

    def _are_same(self, one: str, other: str) -> bool:
        """Return whether two tensors of the files have the same values."""
        if self.tensors[one].shape != self.tensors[other].shape:
            return False
        return torch.equal(self.read(one), self.read(other))

    @functools.cached_property
    def embeddings(self) -> frozenset[str]:
        """Names in the files of the parameters that have a row for every token."""
        if self.skeleton.parameters:
            return frozenset(filter(None, map(self.in_files, self.skeleton.embeddings)))
        size = self.config.get("vocab_size")
        return frozenset(
            name
            for name, tensor in self.tensors.items()
            if len(tensor.shape) > 1 and tensor.shape[0] == size
        )

    @functools.cached_property
    def _stack_sources(self) -> dict[str, list[list[str]]]:
        return self.skeleton.stack_sources(self.tensors)

    def stack_sources(self, name: str) -> list[list[str]]:
        """Return the parameters in the files that make a stack in memory; empty if the stack is one tensor.

        Returns:
            For each matrix of the stack, the names in the files of its rows, from top to bottom.
        """
        return self._stack_sources.get(self.skeleton.in_model(name) or "", [])


def split_parameter_name(name: str) -> tuple[str, str]:
    """Return the module and the kind of a parameter's name: ``("norm", "bias")`` for ``norm.bias``."""
    module, _, kind = name.rpartition(".")
    return module, kind
