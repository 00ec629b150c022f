"""The weights of a PeftModel in memory, without its adapters, as a base model."""

from typing import Any

from torch import Tensor, nn

from pcb_peft.deltas.layout import Layout, ParameterForm, layout_of, own_parameters_of
from pcb_peft.errors import BaseModelError, MismatchError, UnsupportedError

WRAPPERS = ("base_layer", "original_module")


class LiveModel:
    """The weights of a PeftModel, as its memory holds them.

    Attributes:
        source: Name for messages.
        residual: True: an initialisation such as PiSSA has taken its part out of W already.
    """

    source = "the model in memory"
    residual = True

    def __init__(self, model: Any) -> None:
        """Take the weights of a PeftModel.

        Raises:
            UnsupportedError: Adapters are merged into the weights at present.
        """
        root = model.get_base_model()
        if any(getattr(layer, "merged", False) for layer in root.modules()):
            raise UnsupportedError(
                "the model's weights hold merged adapters; call model.unmerge_adapter() first"
            )
        self._layers = {_unwrapped(name): layer for name, layer in root.named_modules()}
        self._parameters = {_unwrapped(name): value for name, value in root.named_parameters()}

    def weight(self, module: str) -> Tensor:
        """Return W of a module, as it is stored.

        Raises:
            MismatchError: The model has no such module.
        """
        for name in (f"{module}.weight", module):
            if name in self._parameters:
                return self._parameters[name].detach().cpu()
        raise MismatchError(f"{module} is not in {self.source}")

    def shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's weight, as it is stored; errors are those of `weight`."""
        return tuple(self.weight(module).shape)

    def bias(self, module: str) -> Tensor | None:
        """Return the bias of a module, or None where it has none."""
        bias = self._parameters.get(f"{module}.bias")
        return None if bias is None else bias.detach().cpu()

    def layer(self, module: str) -> nn.Module | None:
        """Return a layer of the same class as a module, whose values must not be used; None where it is not known."""
        layer = self._layers.get(module)
        return None if layer is None or any(layer.children()) else layer

    def layout(self, module: str, shape: tuple[int, int]) -> Layout:
        """Return how a module stores W."""
        del shape
        weight = self.weight(module)
        if weight.ndim != 2:
            return Layout(shape=tuple(weight.shape))
        return layout_of(self._layers.get(module))

    def own_parameters(self, module: str) -> dict[str, ParameterForm]:
        """Return the parameters that a module holds itself, in their order."""
        return own_parameters_of(self._layers.get(module))


class LiveBase:
    """The weights of a PeftModel, taken when they are first asked for; they do not go along to other processes."""

    def __init__(self, model: Any | None) -> None:
        self._model = model
        self._weights: LiveModel | None = None

    def __call__(self) -> LiveModel:
        """Return the weights.

        Raises:
            UnsupportedError: Adapters are merged into the weights at present.
            BaseModelError: The model is in the memory of another process.
        """
        if self._model is None:
            raise BaseModelError(
                f"{LiveModel.source} is not in this process: give base_model (--base-model)"
            )
        self._weights = self._weights or LiveModel(self._model)
        return self._weights

    def __reduce__(self) -> tuple[type["LiveBase"], tuple[None]]:
        return LiveBase, (None,)


def _unwrapped(name: str) -> str:
    """Return a name without PEFT's wrappers.

    A wrapper and the layer inside it get the same name; the layer comes later in a model's order and stays.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
