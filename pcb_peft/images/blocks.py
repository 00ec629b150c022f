"""Weights by block, as tools for block weights take them: one number per block, in the order of the forward pass.

::

    Stable Diffusion 1, 2   17   BASE, IN01, IN02, IN04, IN05, IN07, IN08, M00, OUT03 … OUT11 (those with attention)
                            26   BASE, IN00 … IN11, M00, OUT00 … OUT11
    SDXL                    12   BASE, IN04, IN05, IN07, IN08, M00, OUT00 … OUT05 (those with attention)
                            20   BASE, IN00 … IN08, M00, OUT00 … OUT08
    Flux.1                  57   19 double blocks, 38 single blocks
                            58   BASE, and these
    other transformers           as many as they have blocks; or BASE, and these

BASE is the weight of text encoders and of layers outside of the blocks; where it is not given, it is 1.
"""

from collections.abc import Iterable

from pcb_peft.errors import OptionError
from pcb_peft.images.architecture import BASE, Architecture
from pcb_peft.images.names import is_canonical, recognised, stored_name
from pcb_peft.images.rows import parts_of
from pcb_peft.runtime.shown import enumerated


class BlockWeights(tuple[float, ...]):
    """The weights of one adapter, one per block."""

    __slots__ = ()


def weights_in_blocks(weights: BlockWeights, modules: Iterable[str]) -> dict[str, float]:
    """Return the weight of every module.

    Args:
        weights: One per block.
        modules: All modules of the merge.

    Raises:
        OptionError: The model has another number of blocks, or its blocks are not known.

    >>> numbers = BlockWeights([0.5, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    >>> weights_in_blocks(numbers, ["unet.mid_block.attentions.0.proj_in", "text_encoder_2.text_projection"])
    {'unet.mid_block.attentions.0.proj_in': 1, 'text_encoder_2.text_projection': 0.5}
    """
    paths = list(modules)
    parsed = {module: stored_name(module) for module in paths}
    models = recognised(parsed, dict.fromkeys(paths, (1, 1)))
    layouts = list(dict.fromkeys(layout for one in models for layout in one.block_layouts))
    fitting = [layout for layout in layouts if len(layout) == len(weights)]
    if not fitting:
        names = enumerated([one.name for one in models]) or "a model that is not known"
        lengths = enumerated(sorted({str(len(layout)) for layout in layouts}, key=int))
        allowed = f"takes {lengths}" if lengths else "has no blocks that are known"
        raise OptionError(
            f"weights: {len(weights)} numbers by block, and {names} {allowed}; their order is in docs/image-models.md"
        )
    blocks = {module: _block(module, models) for module in paths}
    outside = sorted({*blocks.values()} - {BASE, *fitting[0]})
    if outside and not any({*blocks.values()} <= {BASE, *one} for one in fitting):
        enough = [one for one in layouts if {*blocks.values()} <= {BASE, *one}]
        raise OptionError(
            f"weights: the LoRAs change {', '.join(outside[:3])}, which has none of the {len(weights)} numbers; give "
            f"{enumerated(sorted({str(len(one)) for one in enough}, key=int)) or 'overrides for some modules'}"
        )
    known = [one for one in fitting if {*blocks.values()} <= {BASE, *one}]
    numbers = [dict(zip(layout, weights, strict=True)) for layout in known]
    found = [{m: one.get(block, 1.0) for m, block in blocks.items()} for one in numbers]
    if any(one != found[0] for one in found[1:]):
        names = enumerated([one.name for one in models])
        raise OptionError(
            f"weights: the LoRAs may be of {names}, in which the {len(weights)} numbers mean different blocks; give "
            "overrides for some modules"
        )
    return found[0]


def _block(module: str, models: Iterable[Architecture]) -> str:
    """Return the block that a module lies in; BASE where it lies in none.

    Raises:
        OptionError: The module is of no model that is known.
    """
    if not is_canonical(module):
        raise OptionError(
            f"weights: {module} is no module of a model whose blocks are known: give one number"
        )
    path = parts_of(module.partition(".")[2])[0].removesuffix(".bias")
    if module.startswith("text_encoder"):
        return BASE
    return next((block for one in models if (block := one.block(path)) is not None), BASE)
