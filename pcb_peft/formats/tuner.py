"""The reading of every tuner: some tensors belong to one module, some are shared by all.

A tuner is one function, from the tensors of one module to its entry; `tuner` makes a format of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from pcb_peft.deltas.layout import CONV1D, LINEAR, Layout
from pcb_peft.errors import AdapterError
from pcb_peft.formats.base_weights import Base, Weights, bias_entries, missing_base
from pcb_peft.formats.checkpoint import Tensors, read_finite
from pcb_peft.formats.heads import saved_parameters
from pcb_peft.formats.keys import PREFIX, module_of
from pcb_peft.formats.lazy_delta import AdapterContents, Config, LazyDelta
from pcb_peft.formats.registry import Format
from pcb_peft.runtime.shown import quoted

SHARED = "base_model."
"""Prefix of a tensor that all modules share (``base_model.vera_A``)."""

NO_INPUT_SIZE = "the adapter does not say how many inputs the module has"


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleTensors:
    """The tensors that an adapter holds for one module.

    Attributes:
        path: Path of the module in the base model.
        config: The adapter's configuration.
        tensors: All tensors of the adapter.
        names: Part (``hada_w1_a``) to the tensor's name, also for parts that all modules share (``vera_A``).
        base: The base model, if one was given.
        all_paths: All modules that the adapter touches.
    """

    path: str
    config: Config
    tensors: Tensors
    names: Mapping[str, str]
    base: Base
    all_paths: Sequence[str]

    def read(self, part: str, *shape: int) -> Tensor:
        """Return a part in float32.

        Raises:
            AdapterError: It does not have the shape.
        """
        if self.shape(part) != shape:
            raise AdapterError(
                f"{self.path}: {part} has shape {self.shape(part)}; beside the other tensors it must be {shape}"
            )
        return read_finite(self.tensors, self._name(part))

    def shape(self, part: str, *dimensions: int, empty: bool = False) -> tuple[int, ...]:
        """Return the shape of a part.

        Args:
            part: The part.
            dimensions: Numbers of dimensions that it may have: 2 for a matrix; none: it may have any.
            empty: True if it may hold no values at all.

        Raises:
            AdapterError: It has another number of dimensions, or no values.
        """
        shape = self.tensors.shape(self._name(part))
        if dimensions and (len(shape) not in dimensions or (0 in shape and not empty)):
            allowed = " or ".join(map(str, dimensions))
            raise AdapterError(
                f"{self.path}: {part} has shape {shape}; it must have {allowed} dimensions, and values"
            )
        return shape

    def number(self, field: str) -> float:
        """Return a number of the configuration.

        Raises:
            AdapterError: The field does not hold a finite number.
        """
        value = self.config.get(field)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise AdapterError(
                f"{self.path}: {field} is {quoted(value)}; it must be a finite number"
            )
        return value

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Return how the module stores W: as the base model has it if it was given, else as the configuration says."""
        if self.base is not None:
            return self.base().layout(self.path, shape)
        return CONV1D if self.config.get("fan_in_fan_out") else LINEAR

    def base_model(self, why: str) -> Weights:
        """Return the base model.

        Raises:
            BaseModelError: No base model was given; `why` says what it is needed for.
        """
        if self.base is None:
            raise missing_base(self.path, why)
        return self.base()

    def base_shape(self, why: str) -> tuple[int, int]:
        """Return (out, in) of the module's weight from the base model; errors are those of `base_model`."""
        model = self.base_model(why)
        return model.layout(self.path, (1, 1)).matrix_shape(model.shape(self.path))

    def _name(self, part: str) -> str:
        if part not in self.names:
            raise AdapterError(f"{self.path} has {', '.join(self.names)} and no {part}")
        return self.names[part]


ReadEntries = Callable[[ModuleTensors], Mapping[str, LazyDelta]]
"""From the tensors of one module to its entries; a module's bias is an entry of its own."""


def tuner(peft_type: str, prefix: str, entry: Callable[[ModuleTensors], LazyDelta]) -> Format:
    """Return the format of a tuner that changes weights.

    Args:
        peft_type: PEFT's name.
        prefix: Beginning of the names of the tuner's tensors.
        entry: From the tensors of one module to its change.
    """
    return Format(peft_type, functools.partial(_read, prefix, entry), defined_by=entry)


def _read(
    prefix: str,
    entry: Callable[[ModuleTensors], LazyDelta],
    config: Config,
    tensors: Tensors,
    base: Base,
) -> AdapterContents:
    return contents(config, tensors, base, prefix, lambda module: {module.path: entry(module)})


def contents(
    config: Config, tensors: Tensors, base: Base, prefix: str, entries_of: ReadEntries
) -> AdapterContents:
    """Return everything that an adapter holds, by way of a function that reads one module."""
    modules, shared, rest = _by_module(tensors.names(), prefix)
    entries: dict[str, LazyDelta] = {}
    for path, names in modules.items():
        entries |= entries_of(
            ModuleTensors(path, config, tensors, names | shared, base, list(modules))
        )
    biases, rest = bias_entries(config, tensors, rest, base)
    return AdapterContents(entries | biases, saved_parameters(tensors, rest))


def _by_module(
    names: Sequence[str], prefix: str
) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Return the tensors of each module, those that all modules share, and the others."""
    modules: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    rest: list[str] = []
    for name in names:
        path, infix, part = name.partition(f".{prefix}")
        if infix and path != SHARED.rstrip("."):
            modules.setdefault(module_of(path), {})[prefix + part] = name
        elif name.startswith(SHARED) and not name.startswith(PREFIX):
            shared[name.removeprefix(SHARED)] = name
        else:
            rest.append(name)
    return modules, shared, rest
