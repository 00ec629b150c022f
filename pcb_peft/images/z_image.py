"""Z-Image (Turbo, Base)."""

from pcb_peft.images.architecture import Architecture, Shapes
from pcb_peft.images.lumina2 import is_lumina2
from pcb_peft.images.rows import Rows

BLOCKS = "(layers|noise_refiner|context_refiner).#"
ROWS = Rows(f"""
{BLOCKS}.attention.qkv = {BLOCKS}.attention.{{to_q,to_k,to_v}}
{BLOCKS}.attention.out = {BLOCKS}.attention.to_out.0
{BLOCKS}.feed_forward.(w1|w2|w3)
{BLOCKS}.adaLN_modulation.(0|1)
cap_embedder.#
t_embedder.mlp.#
x_embedder = all_x_embedder.2-1
final_layer.(linear|adaLN_modulation.1) = all_final_layer.2-1.(linear|adaLN_modulation.1)
""")


def _fits(shapes: Shapes) -> bool:
    return not is_lumina2(shapes)


Z_IMAGE = Architecture(
    "Z-Image",
    "transformer",
    ROWS,
    ("noise_refiner", "context_refiner", "layers"),
    sizes=({"noise_refiner": 2, "context_refiner": 2, "layers": 30},),
    kohya="diffusers",
    comfyui="diffusers",
    loads_kohya=True,
    versions=("zimage", "z_image", "z-image"),
    modelspec="z-image",
    fits=_fits,
)
