"""Number of classes of a head, from the model whose head has its shapes."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pcb_peft.base.architecture import TRANSFORMERS_ERRORS
from pcb_peft.base.canonical import AUTO_CLASSES
from pcb_peft.base.config import bounded_modules

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter of a head to its shape. The number of classes is the length of one of them."""


def classes_of_head(shapes: Shapes, config: Any, task_type: str) -> int | None:
    """Return the number of classes of a head; None if the model of its task has no such head.

    Of several layers only the last one has a row per class, and names do not say which one that is.

    Args:
        shapes: Of the head.
        config: The base model's configuration.
        task_type: A key of `AUTO_CLASSES`, such as SEQ_CLS.
    """
    import transformers

    rows = {shape[0] for shape in shapes.values()}
    if len(rows) == 1:
        return rows.pop()
    auto: Any = getattr(transformers, AUTO_CLASSES[task_type])

    def build(classes: int) -> nn.Module | None:
        try:
            return without_values(auto.from_config, config, classes, trust_remote_code=False)
        except TRANSFORMERS_ERRORS:
            return None

    fitting = model_with_head(shapes, build)
    return None if fitting is None else fitting.config.num_labels


def without_values(build: Callable[..., Any], config: Any, classes: int, **options: Any) -> Any:
    """Return a model of a configuration with so many classes, without values."""
    changed = copy.deepcopy(config)
    changed.num_labels = classes
    with torch.device("meta"), bounded_modules():
        return build(changed, **options)


def model_with_head(shapes: Shapes, build: Callable[[int], Any]) -> Any | None:
    """Return a model whose parameters have the shapes of a head; None if there is none.

    Args:
        shapes: Of the head.
        build: From a number of classes to a model, which may be without values, or to None.
    """
    for classes in dict.fromkeys(shape[0] for shape in shapes.values() if shape):
        model = build(classes)
        present = {} if model is None else model.state_dict()
        if all(name in present and present[name].shape == shape for name, shape in shapes.items()):
            return model
    return None
