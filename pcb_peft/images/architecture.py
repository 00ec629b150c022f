"""An architecture of image and video models: the names of its modules, and what is written about it."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from pcb_peft.images.rows import Rows

Shapes = Mapping[str, tuple[int, int]]
"""Module, in the original code's names or in diffusers', to (out, in) of its delta."""


def _any_shapes(_: Shapes) -> bool:
    return True


def has_proportions(shapes: Shapes, proportions: Mapping[str, tuple[int, int]]) -> bool:
    """Return whether matrices have as many rows for each column as those of a model have.

    Args:
        shapes: The modules.
        proportions: End of a module's name to rows and columns, in any unit.

    >>> has_proportions({"lora_unet_double_blocks_0_img_mlp_0": (96, 32)}, {"img_mlp.0": (4, 1)})
    False
    """
    ends = {end.replace(".", "_"): sizes for end, sizes in proportions.items()}
    return all(
        shape[0] * columns == shape[1] * rows
        for name, shape in shapes.items()
        for end, (rows, columns) in ends.items()
        if name.replace(".", "_").endswith(end)
    )


BASE = "BASE"
"""Name of what lies outside of the blocks, in lists of weights by block."""
LAST = 1000  # number of what changes the size, at the end of a block


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """One architecture.

    Attributes:
        name: Name for messages: "SDXL".
        component: Component of a diffusers pipeline that the rows belong to.
        rows: The modules.
        order: Beginnings of diffusers' names in the order of the forward pass.
        unet_layouts: Blocks in the original code's names, in the order in which weights by block are given.
        sizes: Numbers of blocks of the models of this architecture, by the beginnings of their names.
        kohya: Column that kohya's trainers take their names from: "original" or "diffusers".
        comfyui: Column that ComfyUI's names are taken from.
        loads_kohya: True if diffusers reads what kohya's trainers write.
        loads_comfyui: True if diffusers reads ComfyUI's names.
        down_up: True if diffusers reads ComfyUI's names only with ``lora_down`` and ``lora_up`` after them.
        versions: Beginnings of ``ss_base_model_version`` and ``modelspec.architecture`` that mean this architecture;
            the first is written where the sources say nothing.
        modelspec: Value of ``modelspec.architecture``, without ``/lora``; empty where a LoRA does not show that it is
            of this model and not of another with the same layers.
        fits: From shapes of some modules to whether they can be this architecture's.
        shows: True if a LoRA of it shows by its names or shapes that it is one: others are not written as one.
        other_widths: Widths of models that are not known here and name their layers alike.
        text_encoders: Component by kohya's prefix, where it is not the usual one.
        kernels: End of a convolution's name to its kernel.
    """

    name: str
    component: str
    rows: Rows
    order: Sequence[str]
    unet_layouts: Sequence[tuple[str, ...]] = ()
    sizes: Sequence[Mapping[str, int]] = ()
    kohya: str = "original"
    comfyui: str = "original"
    loads_kohya: bool = False
    loads_comfyui: bool = True
    down_up: bool = False
    versions: Sequence[str] = ()
    modelspec: str = ""
    fits: Callable[[Shapes], bool] = _any_shapes
    shows: bool = False
    other_widths: frozenset[int] = frozenset()
    text_encoders: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    kernels: Mapping[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict[str, tuple[int, ...]]
    )

    def kernel(self, path: str) -> tuple[int, ...] | None:
        """Return the kernel of a convolution, by diffusers' name without the component; None for other layers."""
        return next((size for end, size in self.kernels.items() if path.endswith(end)), None)

    def canonical(self, path: str, separator: str) -> str | None:
        """Return diffusers' name of a path in any of the names in use, without the component; None if it is unknown."""
        known = self.rows.to_diffusers.get(path, separator)
        return known or self.rows.in_diffusers.get(path, separator)

    def original(self, path: str) -> str | None:
        """Return the original code's name of a module that has a canonical one."""
        return self.rows.to_original.get(path)

    def blocks_of(self, paths: Iterable[str]) -> dict[str, int]:
        """Return how many blocks a model with these canonical names has at least, by the beginnings of the names."""
        counts: dict[str, int] = {}
        starts = {start for size in self.sizes for start in size}
        for start, _, rest in (path.partition(".") for path in paths):
            number = rest.partition(".")[0]
            if start in starts and number.isdecimal():
                counts[start] = max(counts.get(start, 0), int(number) + 1)
        return counts

    @property
    def block_layouts(self) -> list[tuple[str, ...]]:
        """The blocks that weights by block are given for, in their order; several lists, which differ in length."""
        blocks = [
            tuple([f"{start}.{number}" for start in size for number in range(size[start])])
            for size in self.sizes
        ]
        return [*self.unet_layouts, *blocks, *((BASE, *one) for one in blocks)]

    def block(self, path: str) -> str | None:
        """Return the block of a module, by diffusers' name without the component; None outside of the blocks."""
        if self.unet_layouts:
            parts = (self.original(path) or "").split(".")
            found = parts[0] if parts[0] == "middle_block" else ".".join(parts[:2])
            return found if any(found in layout for layout in self.unet_layouts) else None
        start, _, rest = path.partition(".")
        number = rest.partition(".")[0]
        known = number.isdecimal() and any(start in size for size in self.sizes)
        return f"{start}.{number}" if known else None

    def depth(self, path: str) -> tuple[int, ...] | None:
        """Return a module's place in the forward pass, for sorting; None if it lies in none of the blocks."""
        for place, start in enumerate(self.order):
            if path.startswith(f"{start}."):
                rest = path.removeprefix(f"{start}.").split(".")
                if "samplers" in rest[0]:  # at the end of a block
                    return place, LAST
                return place, next((int(part) for part in rest if part.isdecimal()), 0)
        return (self.order.index(path), 0) if path in self.order else None
