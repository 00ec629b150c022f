"""Stable Diffusion 1, 2 and XL: UNets, by the names of diffusers and of the original code (SGM, "ldm")."""

import re
from collections.abc import Iterable, Iterator

from pcb_peft.images.architecture import BASE, Architecture, Shapes
from pcb_peft.images.rows import Rows

_RESNET = "(in_layers.0|in_layers.2|emb_layers.1|out_layers.0|out_layers.3|skip_connection)"
_RESNET_HERE = "(norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut)"
_ATTENTION = (
    "norm",
    "(proj_in|proj_out)",
    "transformer_blocks.#.(attn1|attn2).(to_q|to_k|to_v|to_out.0)",
    "transformer_blocks.#.(ff.net.0.proj|ff.net.2|norm1|norm2|norm3)",
)
TOP = """
input_blocks.0.0 = conv_in
time_embed.(0|2) = time_embedding.(linear_1|linear_2)
label_emb.0.(0|2) = add_embedding.(linear_1|linear_2)
out.(0|2) = (conv_norm_out|conv_out)
"""


def _resnet(original: str, diffusers: str) -> str:
    return f"{original}.{_RESNET} = {diffusers}.{_RESNET_HERE}"


def _attention(original: str, diffusers: str) -> Iterator[str]:
    return (f"{original}.{part} = {diffusers}.{part}" for part in _ATTENTION)


def _unet() -> Iterator[str]:
    """Yield the rows: three entries of input_blocks, and of output_blocks, are one block of diffusers."""
    yield TOP
    for block in range(4):
        for layer in range(3):
            down, up = 1 + 3 * block + layer, 3 * block + layer
            if layer < 2:
                yield _resnet(f"input_blocks.{down}.0", f"down_blocks.{block}.resnets.{layer}")
                yield from _attention(
                    f"input_blocks.{down}.1", f"down_blocks.{block}.attentions.{layer}"
                )
            yield _resnet(f"output_blocks.{up}.0", f"up_blocks.{block}.resnets.{layer}")
            yield from _attention(f"output_blocks.{up}.1", f"up_blocks.{block}.attentions.{layer}")
        yield f"input_blocks.{3 * block + 3}.0.op = down_blocks.{block}.downsamplers.0.conv"
        yield f"output_blocks.{3 * block + 2}.(2|1).conv = up_blocks.{block}.upsamplers.0.(conv|conv)"
    yield _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield _resnet("middle_block.2", "mid_block.resnets.1")


ROWS = Rows(*_unet())
ORDER = (
    *("conv_in", "down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block"),
    *("up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3", "conv_out"),
)
CONVOLUTIONS = {
    **dict.fromkeys(("conv_in", "conv_out", "conv1", "conv2", "samplers.0.conv"), (3, 3)),
    "conv_shortcut": (1, 1),
}


def _layout(inputs: Iterable[int], outputs: Iterable[int]) -> tuple[str, ...]:
    """Return blocks in the order of weights by block."""
    return (
        BASE,
        *(f"input_blocks.{number}" for number in inputs),
        "middle_block",
        *(f"output_blocks.{number}" for number in outputs),
    )


LAYOUTS = (_layout((1, 2, 4, 5, 7, 8), range(3, 12)), _layout(range(12), range(12)))  # 17, 26
LAYOUTS_XL = (_layout((4, 5, 7, 8), range(6)), _layout(range(9), range(9)))  # 12, 20
CONTEXT = {768: "SD1", 1024: "SD2", 2048: "SDXL"}  # inputs of attn2.to_k: width of the text
ONLY_XL = re.compile(
    r"lora_te2_|text_encoder_2\.|.*(input_blocks|middle_block|output_blocks|label_emb|add_embedding)|"
    r".*attentions[._]\d+[._]transformer_blocks[._][1-9]"
)
"""Matches names that only LoRAs of SDXL have: SD 1 and 2 have one block per attention, and names like diffusers'."""


def _context(shapes: Shapes) -> str | None:
    """Return the architecture that the width of the text, or names, mean; None where no module shows it."""
    widths = (shape[1] for name, shape in shapes.items() if "attn2" in name and name[-1] in "kv")
    by_names = "SDXL" if any(map(ONLY_XL.match, shapes)) else None
    return next((CONTEXT[width] for width in widths if width in CONTEXT), by_names)


def _fits_sd1(shapes: Shapes) -> bool:
    return _context(shapes) in (None, "SD1")


def _fits_sd2(shapes: Shapes) -> bool:
    return _context(shapes) in (None, "SD2")


def _fits_sdxl(shapes: Shapes) -> bool:
    return _context(shapes) in (None, "SDXL")


SD1 = Architecture(
    "Stable Diffusion 1",
    "unet",
    ROWS,
    ORDER,
    LAYOUTS,
    kohya="diffusers",
    loads_kohya=True,
    loads_comfyui=False,
    versions=("sd_v1", "sd_1", "stable-diffusion-v1"),
    modelspec="stable-diffusion-v1",
    fits=_fits_sd1,
    kernels=CONVOLUTIONS | {"proj_in": (1, 1), "proj_out": (1, 1)},
)
SD2 = Architecture(
    "Stable Diffusion 2",
    "unet",
    ROWS,
    ORDER,
    LAYOUTS,
    kohya="diffusers",
    loads_kohya=True,
    loads_comfyui=False,
    versions=("sd_v2", "sd_2", "stable-diffusion-v2"),
    modelspec="stable-diffusion-v2-768-v",
    fits=_fits_sd2,
    kernels=CONVOLUTIONS,
)
SDXL = Architecture(
    "SDXL",
    "unet",
    ROWS,
    ORDER,
    LAYOUTS_XL,
    loads_kohya=True,
    loads_comfyui=False,
    versions=("sdxl_base_v1-0", "sdxl", "stable-diffusion-xl"),
    modelspec="stable-diffusion-xl-v1-base",
    fits=_fits_sdxl,
    kernels=CONVOLUTIONS,
    shows=True,
)
