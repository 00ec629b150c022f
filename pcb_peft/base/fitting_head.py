"""Number of classes of a head, from the model whose head has its shapes."""

from collections.abc import Callable, Mapping
from typing import Any


def model_with_head(
    shapes: Mapping[str, tuple[int, ...]], build: Callable[[int], Any]
) -> Any | None:
    """Return a model whose parameters have the shapes of a head; None if there is none.

    Args:
        shapes: Parameter of the head to its shape. The number of classes is the length of one of them.
        build: From a number of classes to a model, which may be without values, or to None.
    """
    for classes in dict.fromkeys(shape[0] for shape in shapes.values() if shape):
        model = build(classes)
        present = {} if model is None else model.state_dict()
        if all(name in present and present[name].shape == shape for name, shape in shapes.items()):
            return model
    return None
