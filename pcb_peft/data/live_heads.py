"""Heads in models of transformers: a classifier gets the values of a head, and as many classes as it has."""

import copy
import re
import warnings
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pcb_peft.base.fitting_head import model_with_head
from pcb_peft.data.models import made_up
from pcb_peft.errors import MismatchError
from pcb_peft.runtime.shown import some_of

Head = Mapping[str, Tensor]
"""A classification head: its parameters by their names in the base model."""

MISSING_KEY = re.compile(r"'([^']+)'")
"""A parameter in PEFT's warning about those that an adapter's files lack."""

WRAPPED = re.compile(r"\.(original_module|modules_to_save\.default)(?=\.)")
"""PEFT's two copies of a module that it trains whole, in the names of their parameters."""


def give_head(model: Any, head: Head, name: str = "the adapter") -> None:
    """Give a model a head of these values, with as many classes.

    Args:
        model: A classifier of transformers.
        head: Parameters by name.
        name: What messages call the adapter.

    Raises:
        MismatchError: The model has no such head.
    """
    present = model.state_dict()
    if all(key in present and present[key].shape == value.shape for key, value in head.items()):
        put_head(model, head, name)
        return
    classes = _classes(model, head)
    if classes is None:
        shapes = {key: tuple(value.shape) for key, value in head.items()}
        raise MismatchError(
            f"the head of {name} has {shapes}, which does not fit {type(model).__name__}; give the base model and the "
            "class that the adapter was trained on"
        )
    model.config.num_labels = classes
    fresh = _skeleton(model, classes).state_dict()
    for key in fresh:
        if key in present and fresh[key].shape != present[key].shape:
            _replace(model, key, fresh[key].shape)
    if hasattr(model, "num_labels"):
        model.num_labels = classes
    put_head(model, head, name)


def refuse_made_up(model: Any, head: Container[str], name: str) -> None:
    """Refuse a classifier of which neither the base model nor the adapter has all parameters.

    The pooler of DeBERTa is such a case: PEFT saves it only where it is told to (modules_to_save).

    Args:
        model: As `load_model` has loaded it.
        head: The parameters that the adapter brings.
        name: What messages call the adapter.

    Raises:
        MismatchError: Some are in neither of them.
    """
    lacking = sorted(key for key in made_up(model) if key not in head)
    if lacking:
        modules = sorted({key.rpartition(".")[0] for key in lacking})
        raise MismatchError(
            f"{name}: {some_of(lacking)} of {type(model).__name__} are neither in the base model nor in the adapter: "
            "transformers makes them up, and did so when the adapter was trained, so that nobody knows what it "
            f"answered; train it again with them among its modules_to_save ({', '.join(modules)})"
        )


def put_head(model: nn.Module, head: Head, name: str = "the adapter") -> None:
    """Copy a head's values into a model, also where PEFT has wrapped the head.

    Raises:
        MismatchError: The model has no parameter of that name, or in another shape.
    """
    parameters: dict[str, list[Tensor]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(WRAPPED.sub("", key), []).append(parameter)
    with torch.no_grad():
        for key, value in head.items():
            places = parameters.get(key, [])
            if not places or any(place.shape != value.shape for place in places):
                raise MismatchError(f"the head of {name}: {key} is not in {type(model).__name__}")
            for place in places:
                place.copy_(value)


def _classes(model: Any, head: Head) -> int | None:
    """Number of classes of a head: the number that gives the model's head the shapes of this one."""
    shapes = {key: tuple(value.shape) for key, value in head.items()}
    fitting = model_with_head(shapes, lambda classes: _skeleton(model, classes))
    return None if fitting is None else fitting.config.num_labels


def _skeleton(model: Any, classes: int) -> nn.Module:
    """The same architecture with so many classes, without values."""
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    with torch.device("meta"):
        return type(model)(config)


def _replace(model: nn.Module, key: str, shape: torch.Size) -> None:
    """Give a parameter another shape; its layer learns of it."""
    module, _, kind = key.rpartition(".")
    layer = model.get_submodule(module)
    old = getattr(layer, kind)
    setattr(layer, kind, nn.Parameter(old.new_zeros(shape), requires_grad=False))
    if isinstance(layer, nn.Linear):
        layer.out_features = shape[0]


def wrapped_by_peft(base: Any, place: Mapping[str, Any], name: str, head: Head) -> Any:
    """The base model with an adapter, by PEFT.

    Args:
        base: A model of transformers.
        place: What `PeftModel.from_pretrained` is called with, beside the model.
        name: What messages call the adapter.
        head: Parameters that the adapter's files may lack, because the base model has them already.

    Raises:
        MismatchError: The adapter does not fit the base model.
    """
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(base, **place)
        except (RuntimeError, ValueError, KeyError) as error:
            raise MismatchError(f"{name} does not fit the base model: {error}") from error
    heads = {key.rpartition(".")[0] for key in head}
    for message in (str(warning.message) for warning in told):
        keys = MISSING_KEY.findall(message) if "missing adapter keys" in message else []
        lacking = [key for key in keys if not any(f".{module}." in key for module in heads)]
        if lacking:
            raise MismatchError(
                f"{name} does not fit {type(base).__name__}: its files lack {', '.join(lacking[:3])}; give the base "
                "model that it was trained on"
            )
    return model
