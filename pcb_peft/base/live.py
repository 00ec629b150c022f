"""The weights of a PeftModel in memory, without its adapters, as a base model."""

from typing import Any

from torch import Tensor, nn

from pcb_peft.deltas.layout import Layout, held_by, layout_of
from pcb_peft.errors import MismatchError, UnsupportedError

WRAPPERS = ("base_layer", "original_module")


class LiveModel:
    """What the adapters of a PeftModel change, where its memory holds it.

    Attributes:
        source: For messages.
        residual: Initialisations such as PiSSA have been at the weights already.
    """

    source = "the model in memory"
    residual = True

    def __init__(self, model: Any) -> None:
        """Raises UnsupportedError where adapters are merged into the weights at present."""
        root = model.get_base_model()
        if any(getattr(layer, "merged", False) for layer in root.modules()):
            raise UnsupportedError(
                "the model's weights hold merged adapters; call model.unmerge_adapter() first"
            )
        self._layers = {_unwrapped(name): layer for name, layer in root.named_modules()}
        self._parameters = {_unwrapped(name): value for name, value in root.named_parameters()}

    def weight(self, module: str) -> Tensor:
        """W of a module, as it is stored.

        Raises:
            MismatchError: The model has no such module.
        """
        for name in (f"{module}.weight", module):
            if name in self._parameters:
                return self._parameters[name].detach().cpu()
        raise MismatchError(f"{module} is not in {self.source}")

    def shape(self, module: str) -> tuple[int, ...]:
        """Of a module's weight, as it is stored; raises what `weight` raises."""
        return tuple(self.weight(module).shape)

    def bias(self, module: str) -> Tensor | None:
        """The bias of a module, or None where it has none."""
        bias = self._parameters.get(f"{module}.bias")
        return None if bias is None else bias.detach().cpu()

    def layer(self, module: str) -> nn.Module | None:
        """A layer like that of a module, whose values are not to be used; None where it cannot be told."""
        layer = self._layers.get(module)
        return None if layer is None or any(layer.children()) else layer

    def layout(self, module: str, shape: tuple[int, int]) -> Layout:
        """How a module stores W."""
        del shape
        weight = self.weight(module)
        if weight.ndim != 2:
            return Layout(shape=tuple(weight.shape))
        return layout_of(self._layers.get(module))

    def held(self, module: str) -> dict[str, tuple[tuple[int, ...], bool]]:
        """As `BaseModel.held`."""
        return held_by(self._layers.get(module))


def _unwrapped(name: str) -> str:
    """A name without PEFT's wrappers; of a wrapper and what it wraps, the inner one comes later and stays."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
