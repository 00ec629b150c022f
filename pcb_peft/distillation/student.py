"""A merge whose lora_B is trained: what it adds to the outputs of the base model's layers."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.deltas.delta import Delta, Diagonal, LowRank
from pcb_peft.deltas.layout import Layout
from pcb_peft.deltas.rank import triplets
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats import LazyDelta, in_memory

LINEAR = ("Linear", "Conv1D")  # Conv1D of transformers: a linear layer that stores W as (in, out)


class LoraStudent(nn.Module):
    """ΔW = B A for one layer. A has orthonormal rows and stays; B is trained."""

    def __init__(self, delta: Delta) -> None:
        super().__init__()
        u, s, vh = triplets(delta)
        self.layout: Layout = delta.layout
        self.lora_A: Tensor
        self.register_buffer("lora_A", vh.float())
        self.trained = nn.Parameter((u * s).float())

    def hook(self, _layer: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add B A x to a layer's output."""
        x = inputs[0].to(self.lora_A.dtype)
        return output + functional.linear(functional.linear(x, self.lora_A), self.trained).to(
            output
        )

    def attach(self, layer: Any) -> Any:
        """Add it to a layer; returns the hook's handle."""
        return layer.register_forward_hook(self.hook)

    @property
    def size(self) -> float:
        """The root mean square of B, by which steps are measured."""
        return float(self.trained.detach().square().mean().sqrt())

    def delta(self) -> LowRank:
        """Return the delta as it is now."""
        values = self.trained.detach().cpu().clone()
        return LowRank(self.lora_A.cpu().clone(), values, layout=self.layout)


class Ia3Student(nn.Module):
    """The vector l of an (IA)³ for one layer, which is trained."""

    def __init__(self, delta: Diagonal) -> None:
        super().__init__()
        self.feedforward, self.layout = delta.feedforward, delta.layout
        self.trained = nn.Parameter(delta.l.float().clone())

    def attach(self, layer: Any) -> Any:
        """Scale a layer's input, or output; returns the hook's handle."""
        if self.feedforward:
            return layer.register_forward_pre_hook(self.scale_input)
        return layer.register_forward_hook(self.scale_output)

    def scale_input(self, _layer: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Multiply a layer's input by l."""
        return inputs[0] * self.trained.to(inputs[0].dtype), *inputs[1:]

    def scale_output(self, _layer: object, _inputs: object, output: Tensor) -> Tensor:
        """Multiply a layer's output by l."""
        return output * self.trained.to(output.dtype)

    @property
    def size(self) -> float:
        """The root mean square of l − 1, by which steps are measured."""
        return float((self.trained.detach() - 1).square().mean().sqrt())

    def delta(self) -> Diagonal:
        """Return the delta as it is now."""
        values = self.trained.detach().cpu().clone()
        return Diagonal(values, self.feedforward, layout=self.layout)


class Student(nn.Module):
    """A merge that is being trained.

    Args:
        merged: The adapter to begin with; it is not changed.
        model: The base model.

    Raises:
        UnsupportedError: The merge changes what is no linear layer, or by something else than a LoRA or an (IA)³.
    """

    def __init__(self, merged: Adapter, model: Any) -> None:
        super().__init__()
        self.by_module: dict[str, LoraStudent | Ia3Student] = {}
        for module in merged.modules:
            check_layer(model, module, merged.name)
            delta = merged.modules[module]
            if delta.norm() > 0:
                self.by_module[module] = _student(delta, module)
        self.parts = nn.ModuleList(self.by_module.values())

    @contextlib.contextmanager
    def attached(self, model: Any) -> Generator[None]:
        """Let the model answer as the base model with the merge."""
        handles = [
            part.attach(model.get_submodule(module)) for module, part in self.by_module.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sizes(self) -> list[float]:
        """Return the size of each trained parameter, in the order of `parameters`."""
        return [part.size for part in self.by_module.values()]

    def deltas(self, merged: Mapping[str, LazyDelta]) -> DeltaMapping:
        """Return the deltas as they are now; a module that the merge does not change stays so."""
        trained = {module: in_memory(part.delta()) for module, part in self.by_module.items()}
        return DeltaMapping({**merged, **trained})


def check_layer(model: Any, module: str, owner: str) -> None:
    """Raises UnsupportedError for a module that is no linear layer, or not there."""
    layer = dict(model.named_modules()).get(module)
    if type(layer).__name__ not in LINEAR:
        kind = "is not in the model" if layer is None else f"is a {type(layer).__name__}"
        raise UnsupportedError(
            f"{owner} changes {module}, which {kind}: distillation trains what is added to linear layers; leave the "
            "module out of the merge"
        )


def _student(delta: Delta, module: str) -> LoraStudent | Ia3Student:
    if isinstance(delta, Diagonal):
        return Ia3Student(delta)
    if isinstance(delta, LowRank):
        return LoraStudent(delta)
    raise UnsupportedError(
        f"{module} has a dense delta, or a DoRA's: distillation trains a LoRA or an (IA)³; merge with an integer rank"
    )
