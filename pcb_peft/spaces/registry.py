"""Spaces: the coordinates in which adapters compete, and where each is registered.

A space makes stacked blocks of the deltas of one module, and a delta of the merged blocks. Its keyword-only parameters
are its options.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from pcb_peft.deltas.delta import Delta
from pcb_peft.plugins.registry import Plugin, Registry
from pcb_peft.plugins.renamed import renamed_keywords
from pcb_peft.tasks.blocks import Block

Encode: TypeAlias = Callable[..., "Projection"]
Function = TypeVar("Function", bound=Encode)


@dataclasses.dataclass(frozen=True, slots=True)
class Projection:
    """One module's deltas in the coordinates of a space.

    Attributes:
        blocks: One stack of task vectors, or more where a delta has several parts.
        decode: A function from the merged blocks to the merged delta.
        energy: The fraction of Σ_t ‖λ_t ΔW_t‖²_F that the blocks hold.
        project_statistic: For each task statistic by name, the function that projects it onto the one block.
    """

    blocks: tuple[Block, ...]
    decode: Callable[[Sequence[Tensor]], Delta]
    energy: float = 1.0
    project_statistic: Mapping[str, Callable[[Tensor], Tensor]] = dataclasses.field(
        default_factory=dict[str, Callable[[Tensor], Tensor]]
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Space(Plugin):
    """A space and what the engine has to know about it.

    Attributes:
        name: Its name in recipes and on the command line.
        function: ``function(deltas, weights, **options) -> Projection``, given the deltas of one module, at least one,
            all of the same shape, and their weights. An adapter that does not touch the module has a zero delta.
        accepts: The kinds of delta that it can encode.
        low_rank_output: Whether every delta that it decodes has low rank, so that nothing has to be truncated after the
            merge. Encoding may still lose energy: `Projection.energy` says how much it keeps.
        statistics: The task statistics that its projections can project.
    """

    accepts: tuple[type[Delta], ...]
    low_rank_output: bool
    statistics: tuple[str, ...] = ()

    def __call__(
        self, deltas: Sequence[Delta], weights: Sequence[float], **options: Any
    ) -> Projection:
        return self.function(deltas, weights, **options)


_REGISTRY = Registry[Space]("space", entry_points="pcb_peft.spaces")


@renamed_keywords(lossless="low_rank_output", shows="statistics")
def space(
    name: str,
    *,
    accepts: tuple[type[Delta], ...],
    low_rank_output: bool,
    statistics: tuple[str, ...] = (),
) -> Callable[[Function], Function]:
    """Register a function as a space; the function itself stays as it is.

    The arguments are the attributes of `Space`. A name that another space has is refused with an OptionError.
    """

    def register(function: Function) -> Function:
        entry = Space(name, function, accepts, low_rank_output, statistics)
        _REGISTRY.add(name, entry, defined_by=function)
        return function

    return register


def list_spaces() -> dict[str, Space]:
    """Return all spaces by name.

    Returns:
        Names and spaces, in alphabetical order, those of other installed packages included.

    Example:
        >>> from pcb_peft import list_spaces
        >>> list_spaces()["dense"].low_rank_output
        False
    """
    return _REGISTRY.list()


def get_space(name: str) -> Space:
    """Return the space of that name.

    Raises:
        OptionError: There is none.
    """
    return _REGISTRY.get(name)
