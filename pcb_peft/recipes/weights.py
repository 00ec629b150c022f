"""The weights of a merge: one λ per adapter, a gradient over the layers, or a number per block of an image model.

``weights=[1.0, [0.2, 0.8]]``: the first adapter counts with 1 everywhere, the second with 0.2 in the first layer, 0.8
in the last, and evenly in between. ``{"blocks": [1, 0, …]}`` has a number per block (`pcb_peft.images.blocks`).
"""

import functools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

from pcb_peft.base.paths import layer_of
from pcb_peft.errors import OptionError
from pcb_peft.images.blocks import BlockWeights, weights_in_blocks
from pcb_peft.images.depth import forward_depths, of_image_model
from pcb_peft.recipes.fields import LARGEST
from pcb_peft.runtime.shown import quoted

Weight: TypeAlias = float | tuple[float, ...]
"""λ of one adapter: a number, or a gradient: its values from the first layer to the last, evenly spaced."""

WeightsLike: TypeAlias = Sequence[float | Sequence[float] | Mapping[str, Sequence[float]]]
"""Weights as users write them: per adapter a number, a list of numbers, or ``{"blocks": numbers}``."""


def read_weights(given: Any) -> tuple[Weight, ...]:
    """Parse weights: numbers, lists of numbers, and numbers by block.

    >>> read_weights([1, [0.2, 0.8]])
    (1.0, (0.2, 0.8))

    Raises:
        OptionError: They are anything else.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise OptionError(
            f"weights is {quoted(given)}; it must be a list with one weight per adapter"
        )
    return tuple(map(_weight, given))


def _weight(value: Any) -> Weight:
    if isinstance(value, BlockWeights):
        return value
    if isinstance(value, Mapping):
        by_block: Any = cast("Mapping[str, Any]", value).get("blocks")
        if len(value) != 1 or not isinstance(by_block, list | tuple) or not by_block:
            raise OptionError(f"weights: {quoted(value)} is not {{blocks: [numbers]}}")
        return BlockWeights(map(_finite, by_block))
    return (
        tuple(map(_finite, value)) if isinstance(value, list | tuple) and value else _finite(value)
    )


def _finite(value: Any) -> float:
    if not (_is_number(value) and -LARGEST <= value <= LARGEST):  # NaN is not, either
        raise OptionError(
            f"weights: {quoted(value)} is not a finite number, nor a list of them, each at most {LARGEST:,}"
        )
    return float(value)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real)


def plain(weights: Sequence[Weight]) -> list[float | list[float] | dict[str, list[float]]]:
    """Weights as plain data, for YAML."""
    return [
        {"blocks": list(weight)}
        if isinstance(weight, BlockWeights)
        else (list(weight) if isinstance(weight, tuple) else weight)
        for weight in weights
    ]


def number_of_layers(modules: Iterable[str]) -> int:
    """The number of layers of a model with these modules; 1 where no path has a number."""
    return 1 + max((layer_of(module) or 0 for module in modules), default=0)


def at_depth(weights: Sequence[Weight], module: str, layers: int) -> tuple[float, ...]:
    """The weights of one module, a number per adapter.

    Args:
        weights: One per adapter.
        module: Its path. A module outside of all layers gets the mean of a gradient's ends.
        layers: The number of layers in the model.
    """
    layer = layer_of(module)
    return _at(weights, None if layer is None else layer / max(1, layers - 1))


def weights_by_module(
    weights: Sequence[Weight], modules: Iterable[str]
) -> Callable[[str], tuple[float, ...]]:
    """Return a function from a module to its weights, in a model whose layers are those of all `modules`.

    Raises:
        OptionError: A gradient over the modules of an image model whose order is not known, or numbers by block that
            are not as many as the model has blocks.
    """
    paths = list(modules)
    if any(isinstance(weight, BlockWeights) for weight in weights):
        columns = [_by_module(weight, paths) for weight in weights]
        by_module = {module: tuple([column[module] for column in columns]) for module in paths}
        return by_module.__getitem__
    if any(isinstance(weight, tuple) for weight in weights) and of_image_model(paths):
        return functools.partial(_at_place, weights, forward_depths(paths))
    return functools.partial(at_depth, weights, layers=number_of_layers(paths))


def _by_module(weight: Weight, paths: Sequence[str]) -> dict[str, float]:
    """Return the weight of one adapter in each module."""
    if isinstance(weight, BlockWeights):
        return weights_in_blocks(weight, paths)
    alone = weights_by_module([weight], paths)
    return {module: alone(module)[0] for module in paths}


def _at_place(
    weights: Sequence[Weight], depths: Mapping[str, float], module: str
) -> tuple[float, ...]:
    return _at(weights, depths.get(module))


def _at(weights: Sequence[Weight], depth: float | None) -> tuple[float, ...]:
    """Return the weights at a depth from 0 to 1."""
    return tuple(
        interpolated(weight, depth) if isinstance(weight, tuple) else weight for weight in weights
    )


def interpolated(values: tuple[float, ...], depth: float | None) -> float:
    """Return the value of a gradient at a depth from 0 to 1; the mean of its ends for no depth."""
    if depth is None:
        return (values[0] + values[-1]) / 2
    position = depth * (len(values) - 1)
    below = min(int(position), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)
