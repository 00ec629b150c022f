"""The base model in memory with an adapter's head: for one call, or for a while."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.canonical import CLASSIFIERS
from pcb_peft.data.live_heads import refuse_made_up
from pcb_peft.errors import MismatchError, UnsupportedError

Head = dict[str, Tensor]
"""An adapter's own parameters, such as its classifier, by their names in the base model."""


def head_of(adapter: Adapter, model: Any) -> Head:
    """Return the parameters that an adapter replaces, on the model's device.

    Raises:
        UnsupportedError: It replaces rows of an embedding, or it is a classifier without its head.
        MismatchError: The model has no such parameters, or the adapter lacks a layer of its head.
    """
    if adapter.head.rows:
        raise UnsupportedError(
            f"{adapter.name} replaces rows of an embedding, and distillation cannot switch these between texts"
        )
    if adapter.task_type in CLASSIFIERS and not adapter.head.parameters:
        raise UnsupportedError(
            f"{adapter.name} is a classifier without a classification head in its files, so what it answers is not "
            "known; save it with its head (modules_to_save)"
        )
    if adapter.task_type in CLASSIFIERS:
        refuse_made_up(model, adapter.head.parameters, adapter.name)
    known = dict(model.named_parameters())
    for name in adapter.head.parameters:
        if name not in known:
            raise MismatchError(
                f"{adapter.name} replaces {name}, which {type(model).__name__} does not have; give the base model that "
                "the adapter was trained on"
            )
    return {
        name: load().to(known[name].device, known[name].dtype)
        for name, load in adapter.head.parameters.items()
    }


def call(model: Any, head: Head, batch: Mapping[str, Tensor], **options: Any) -> Any:
    """Run the model with the parameters of a head in the place of its own."""
    return torch.func.functional_call(model, head, (), {**batch, **options}, strict=False)


@contextlib.contextmanager
def head_in_place(model: Any, head: Head) -> Generator[None]:
    """Put the parameters of a head into the model; afterwards they are what they were."""
    parameters = {name: model.get_parameter(name) for name in head}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = head[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
