"""What every tuner has in common: tensors that belong to modules, and such that all modules share.

A tuner is one function, from the parts of one module to its entry; `tuner` makes a format of it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from pcb_peft.deltas.layout import CONV1D, LINEAR, Layout
from pcb_peft.errors import AdapterError, BaseModelError
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.registry import (
    PREFIX,
    AdapterContents,
    Base,
    Config,
    Format,
    LazyDelta,
    bias_entries,
    finite,
    module_of,
    saved_parameters,
    without_base,
)

SHARED = "base_model."


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What an adapter holds for one module.

    Attributes:
        module: Its path in the base model.
        config: The adapter's configuration.
        tensors: All of the adapter's.
        names: Part (``hada_w1_a``) to the tensor's name, those included that all modules share (``vera_A``).
        base: The base model, if one was given.
        everywhere: All modules that the adapter touches.
    """

    module: str
    config: Config
    tensors: Tensors
    names: Mapping[str, str]
    base: Base
    everywhere: Sequence[str]

    def read(self, part: str, *shape: int) -> Tensor:
        """A part, float32.

        Raises:
            AdapterError: It does not have the shape.
        """
        if self.shape(part) != shape:
            raise AdapterError(
                f"{self.module}: {part} has shape {self.shape(part)}; beside the other tensors it must be {shape}"
            )
        return finite(self.tensors, self._name(part))

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of a part."""
        return self.tensors.shape(self._name(part))

    def number(self, field: str) -> float:
        """A number of the configuration.

        Raises:
            AdapterError: It is none.
        """
        value = self.config.get(field)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise AdapterError(f"{self.module}: {field} is {value!r}; it must be a finite number")
        return value

    def layout(self, shape: tuple[int, int]) -> Layout:
        """How the module stores W: as the base has it if it was given, else as the configuration says it."""
        if self.base is not None:
            return self.base().layout(self.module, shape)
        return CONV1D if self.config.get("fan_in_fan_out") else LINEAR

    def base_shape(self, why: str) -> tuple[int, int]:
        """(out, in) of the module's weight, where the adapter itself does not tell.

        Raises:
            BaseModelError: No base model was given.
        """
        if self.base is None:
            raise BaseModelError(
                f"{without_base(self.module, why)}: give base_model (--base-model)"
            )
        opened = self.base()
        return opened.layout(self.module, (1, 1)).matrix_shape(opened.shape(self.module))

    def _name(self, part: str) -> str:
        if part not in self.names:
            raise AdapterError(f"{self.module} has {', '.join(self.names)} and no {part}")
        return self.names[part]


ReadEntries = Callable[[Parts], Mapping[str, LazyDelta]]


def tuner(peft_type: str, prefix: str, entry: Callable[[Parts], LazyDelta]) -> Format:
    """The format of a tuner that changes weights.

    Args:
        peft_type: PEFT's name.
        prefix: With which the names of its tensors begin.
        entry: The change of one module.
    """
    return Format(
        peft_type,
        lambda config, tensors, base: contents(
            config, tensors, base, prefix, lambda parts: {parts.module: entry(parts)}
        ),
    )


def contents(
    config: Config, tensors: Tensors, base: Base, prefix: str, entries_of: ReadEntries
) -> AdapterContents:
    """All that an adapter holds, by way of a function from the parts of one module to its entries."""
    modules, shared, rest = _by_module(tensors.names(), prefix)
    entries: dict[str, LazyDelta] = {}
    for module, names in modules.items():
        parts = Parts(module, config, tensors, names | shared, base, list(modules))
        entries |= entries_of(parts)
    biases, rest = bias_entries(config, tensors, rest, base)
    return AdapterContents(entries | biases, saved_parameters(tensors, rest))


def _by_module(
    names: Sequence[str], prefix: str
) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """The tensors of each module, those that all share, and the others."""
    modules: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    rest: list[str] = []
    for name in names:
        path, found, part = name.partition(f".{prefix}")
        if found and path != SHARED.rstrip("."):
            modules.setdefault(module_of(path), {})[prefix + part] = name
        elif name.startswith(SHARED) and not name.startswith(PREFIX):
            shared[name.removeprefix(SHARED)] = name
        else:
            rest.append(name)
    return modules, shared, rest
