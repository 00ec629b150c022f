"""What a space is, and the shelf on which they stand.

A space says in which coordinates adapters compete: it makes stacked blocks of the deltas of one module, and a delta of
the merged blocks. Its keyword-only parameters are its options.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from pcb_peft.deltas.delta import Delta
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import Option, did_you_mean, options_of
from pcb_peft.tasks.blocks import Block

Encode: TypeAlias = Callable[..., "Projection"]

_REGISTRY: dict[str, "Space"] = {}


@dataclasses.dataclass(frozen=True, slots=True)
class Projection:
    """One module's deltas in the coordinates of a space.

    Attributes:
        blocks: One stack, or more where a delta has several parts.
        decode: From the merged blocks to the merged delta.
        energy: Fraction of Σ_t ‖λ_t ΔW_t‖²_F that the blocks hold.
        project_statistic: Name of a statistic to the function that projects it into the coordinates of the one block.
    """

    blocks: tuple[Block, ...]
    decode: Callable[[Sequence[Tensor]], Delta]
    energy: float = 1.0
    project_statistic: Mapping[str, Callable[[Tensor], Tensor]] = dataclasses.field(
        default_factory=dict[str, Callable[[Tensor], Tensor]]
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Space:
    """A space and what the engine has to know of it.

    Attributes:
        name: As recipes and the command line call it.
        function: ``function(deltas, weights, **options) -> Projection``: the deltas of one module, at least one, all of
            the same shape, and their weights. (An adapter that does not touch the module brings a zero.)
        accepts: The kinds of delta that it can take.
        lossless: What it decodes has a low rank without any truncation.
        statistics: The statistics that its projections show.
    """

    name: str
    function: Encode
    accepts: tuple[type[Delta], ...]
    low_rank_output: bool
    statistics: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Option]:
        return options_of(self.function)

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def __call__(
        self, deltas: Sequence[Delta], weights: Sequence[float], **options: Any
    ) -> Projection:
        return self.function(deltas, weights, **options)


def space(
    name: str,
    *,
    accepts: tuple[type[Delta], ...],
    low_rank_output: bool,
    statistics: tuple[str, ...] = (),
) -> Callable[[Encode], Encode]:
    """Puts a function on the shelf; the function itself stays as it is. The arguments are `Space`'s."""

    def register(function: Encode) -> Encode:
        _REGISTRY[name] = Space(name, function, accepts, low_rank_output, statistics)
        return function

    return register


def list_spaces() -> dict[str, Space]:
    """All spaces, by name."""
    return dict(sorted(_REGISTRY.items()))


def get_space(name: str) -> Space:
    """The space of that name.

    Raises:
        OptionError: There is none.
    """
    if name not in _REGISTRY:
        known = ", ".join(list_spaces())
        raise OptionError(f"no space {name!r}{did_you_mean(name, _REGISTRY)}; there are {known}")
    return _REGISTRY[name]
