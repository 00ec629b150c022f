"""The base model, as far as reading an adapter needs it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor, nn

from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.layout import LINEAR, Layout, ParameterForm
from pcb_peft.deltas.replacements import ReplacedParameter
from pcb_peft.errors import AdapterError, BaseModelError, MismatchError
from pcb_peft.formats.checkpoint import Tensors, read_finite
from pcb_peft.formats.keys import AUTOMATIC_HEADS, TUNER_PART, parameter_of
from pcb_peft.formats.lazy_delta import Config, LazyDelta, vector_delta

TRAINED_BIAS = (
    "its bias was trained (PEFT's `bias`), and the adapter stores the new bias, not the change"
)


class Weights(Protocol):
    """The weights of a base model.

    Attributes:
        source: Name of the model for messages.
        residual: True where an initialisation such as PiSSA has already taken its part out of W, and W's biases are
            the trained ones: in a PeftModel in memory.
    """

    @property
    def source(self) -> str: ...
    @property
    def residual(self) -> bool: ...
    def weight(self, module: str) -> Tensor: ...
    def shape(self, module: str) -> tuple[int, ...]: ...
    def bias(self, module: str) -> Tensor | None: ...
    def layer(self, module: str) -> nn.Module | None: ...
    def layout(self, module: str, shape: tuple[int, int]) -> Layout: ...
    def own_parameters(self, module: str) -> dict[str, ParameterForm]: ...


Base: TypeAlias = Callable[[], Weights] | None
"""The base model, opened when it is asked for; None where the caller gave none."""


def missing_base(module: str, why: str) -> BaseModelError:
    """Return the error that says that the base model is needed, and how to give it."""
    return BaseModelError(f"{module}: {why}: give base_model (--base-model)")


def base_weight(
    base: Base | ReplacedParameter,
    module: str,
    shape: tuple[int, int],
    why: str,
    layout: Layout = LINEAR,
) -> tuple[Tensor, Layout]:
    """Return W of a module as a matrix (out, in), float32, and how it is stored.

    Args:
        base: The base model; or the W that the adapter brings along in place of the base model's.
        module: Path of the module.
        shape: (out, in) according to the adapter.
        why: Why W is needed, for the message.
        layout: How W is stored according to the adapter.

    Raises:
        BaseModelError: No base model was given.
        MismatchError: The base model has no such module, or W has another shape.
    """
    if base is None:
        raise missing_base(module, why)
    if isinstance(base, ReplacedParameter):  # of an embedding or an output layer
        layout = layout if layout.lookup else LINEAR
        return layout.matrix(base()), layout
    model = base()
    layout = layout if layout.lookup else model.layout(module, shape)
    stored = model.weight(module)
    weight = layout.matrix(stored).float() if stored.ndim else stored
    if tuple(weight.shape) != shape:
        raise MismatchError(
            f"{module}: the adapter's (out, in) is {shape}, that of {model.source} {tuple(weight.shape)}; "
            "give the base that the adapter was trained on"
        )
    return weight, layout


@dataclasses.dataclass(frozen=True, slots=True)
class BaseWeight:
    """Reads W of one module each time it is called; arguments and errors are those of `base_weight`."""

    base: Base | ReplacedParameter
    module: str
    shape: tuple[int, int]
    why: str
    layout: Layout = LINEAR

    def __call__(self) -> Tensor:
        return self.read()[0]

    def read(self) -> tuple[Tensor, Layout]:
        """Return W (out, in), float32, and how it is stored."""
        return base_weight(self.base, self.module, self.shape, self.why, self.layout)


def vector_entry(tensors: Tensors, name: str, parameter: str, base: Base, why: str) -> LazyDelta:
    """Return the change of a vector (n,) of the base model whose new values the adapter holds.

    Args:
        tensors: The adapter's tensors.
        name: Tensor with the new values.
        parameter: Path of the vector in the base model.
        base: The base model.
        why: Why the base model is needed, for the message.

    Raises:
        AdapterError: The new values are no vector.
    """
    shape = tensors.shape(name)
    if len(shape) != 1:
        raise AdapterError(
            f"{name} has shape {shape}; it must have 1 dimension, as {parameter} has"
        )
    old = BaseWeight(base, parameter, (*shape, 1), why)
    load = functools.partial(_vector_change, tensors, name, old)
    return LazyDelta(LowRank, old.shape, load, 1, f"{parameter}: {why}" if base is None else "")


def _vector_change(tensors: Tensors, name: str, old: BaseWeight) -> LowRank:
    return vector_delta(read_finite(tensors, name) - old()[:, 0])


def bias_entries(
    config: Config, tensors: Tensors, names: Sequence[str], base: Base
) -> tuple[dict[str, LazyDelta], list[str]]:
    """Return the trained biases of the base model (PEFT's `bias`) as deltas, and the names of the other tensors."""
    if config.get("bias", "none") == "none":
        return {}, list(names)
    heads = [
        *(config.get("modules_to_save") or []),
        *AUTOMATIC_HEADS.get(str(config.get("task_type")), []),
    ]
    entries: dict[str, LazyDelta] = {}
    for name in names:
        parameter = parameter_of(name)
        in_head = any(f".{head}." in f".{parameter}" for head in heads)
        if parameter.endswith(".bias") and not in_head and not TUNER_PART.search(parameter):
            entries[parameter] = vector_entry(tensors, name, parameter, base, TRAINED_BIAS)
    rest = [name for name in names if parameter_of(name) not in entries]
    if base and entries and base().residual:  # the model in memory has the trained biases itself
        entries = {}
    return entries, rest
