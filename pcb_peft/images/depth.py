"""The order in which an image model runs through its modules: a UNet goes down, through the middle, and up again."""

import re
from collections.abc import Iterable

from pcb_peft.errors import OptionError
from pcb_peft.images.architecture import Architecture
from pcb_peft.images.names import StoredName, is_canonical, recognised, stored_name


def forward_depths(modules: Iterable[str]) -> dict[str, float]:
    """Return the depth of every module, from 0 (the first block that is changed) to 1 (the last).

    Each component has depths of its own. Modules outside of all blocks are left out.

    Raises:
        OptionError: The order is not known.

    >>> forward_depths(["unet.down_blocks.1.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in"])
    {'unet.down_blocks.1.attentions.0.proj_in': 0.0, 'unet.mid_block.attentions.0.proj_in': 1.0}
    """
    parsed = {module: stored_name(module) for module in modules}
    architectures = recognised(parsed, dict.fromkeys(parsed, (1, 1)))
    places = {module: _place(module, name, architectures) for module, name in parsed.items()}
    depths: dict[str, float] = {}
    for component in {name.prefix for name in parsed.values()}:
        inside = {
            m: p for m, p in places.items() if p is not None and parsed[m].prefix == component
        }
        order = {place: number for number, place in enumerate(sorted(set(inside.values())))}
        last = max(1, len(order) - 1)
        depths |= {module: order[place] / last for module, place in inside.items()}
    return {module: depths[module] for module in parsed if module in depths}


def of_image_model(modules: Iterable[str]) -> bool:
    """Return whether modules belong to an image model: by their component, or by names that only its trainers give.

    >>> of_image_model(["transformer.h.0.attn.c_attn"]), of_image_model(["unet.conv_in"])
    (False, True)
    """
    parsed = {module: stored_name(module) for module in modules}
    if not all(name.prefix for name in parsed.values()):
        return False
    only_images = any(name.prefix != "transformer." for name in parsed.values())
    return only_images or bool(recognised(parsed, dict.fromkeys(parsed, (1, 1))))


def _place(
    module: str, name: StoredName, architectures: Iterable[Architecture]
) -> tuple[int, ...] | None:
    """Return a module's place in the forward pass of its component, for sorting."""
    if name.text_encoder is not None and is_canonical(module):
        number = re.search(r"\.(\d+)\.", name.path)
        return (int(number[1]),) if number else None
    places = {one.depth(name.path) for one in architectures if is_canonical(module)}
    if len(places) != 1:
        raise OptionError(
            f"weights: {module} belongs to a model whose order of layers is not known, so that a gradient of weights "
            "has no meaning: give one number per adapter, or overrides for some modules"
        )
    return places.pop()
