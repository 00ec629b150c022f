"""An adapter in a model in memory: its deltas are in the weights for a while."""

import contextlib
from collections.abc import Generator
from typing import Any

from torch import Tensor, nn

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.deltas.delta import Diagonal
from pcb_peft.errors import MismatchError


@contextlib.contextmanager
def with_adapter(model: Any, *adapters: Adapter) -> Generator[None]:
    """Give a model weights with an adapter's deltas, or with the sum of several; afterwards it has its own again.

    A weight that is tied to another changes at the end that the adapter changes, as in PEFT.

    Raises:
        MismatchError: The model has no such weight, or in another shape.
    """
    own: dict[tuple[nn.Module, str], nn.Parameter] = {}

    def change(owner: nn.Module, leaf: str, delta: Tensor) -> None:
        now = owner.get_parameter(leaf)
        own.setdefault((owner, leaf), now)
        values = (now.float() + delta.to(now.device)).to(now.dtype)
        setattr(owner, leaf, nn.Parameter(values, requires_grad=False))

    try:
        for adapter in adapters:
            for module in adapter.modules:
                delta = adapter.modules[module]
                owner, leaf = _place(model, module, adapter.name)
                weight = own.get((owner, leaf), owner.get_parameter(leaf)).detach().float().cpu()
                values = delta.delta(weight)
                if values.shape != weight.shape:
                    raise MismatchError(
                        f"{adapter.name}: {module} changes a weight of shape {tuple(values.shape)}, and in "
                        f"{type(model).__name__} it has {tuple(weight.shape)}; give the base model that it was trained "
                        "on"
                    )
                change(owner, leaf, values)
                if isinstance(delta, Diagonal) and getattr(owner, "bias", None) is not None:
                    bias = own.get((owner, "bias"), owner.get_parameter("bias"))
                    bias = bias.detach().float().cpu()
                    change(owner, "bias", delta.apply_to_bias(bias) - bias)
        yield
    finally:
        for (owner, leaf), parameter in own.items():
            setattr(owner, leaf, parameter)


def _place(model: Any, module: str, adapter: str) -> tuple[nn.Module, str]:
    """Return the layer that holds what an adapter changes, and the name of the parameter there.

    Raises:
        MismatchError: The model has no such module.
    """
    for name in (f"{module}.weight", module):
        path, _, leaf = name.rpartition(".")
        with contextlib.suppress(AttributeError):
            owner: nn.Module = model.get_submodule(path)
            owner.get_parameter(leaf)
            return owner, leaf
    raise MismatchError(
        f"{adapter} changes {module}, which {type(model).__name__} does not have; give the base model that the adapter "
        "was trained on"
    )
