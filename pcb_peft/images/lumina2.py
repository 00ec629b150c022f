"""Lumina-Image 2.0 (Neta Lumina …): its keys and values have a third of the queries' rows."""

from pcb_peft.images.architecture import Architecture, Shapes
from pcb_peft.images.rows import Rows

BLOCKS = "(layers|noise_refiner|context_refiner).#"
WIDTH = 2304
ROWS = Rows(f"""
{BLOCKS}.attention.qkv = {BLOCKS}.attn.{{to_q*3,to_k,to_v}}
{BLOCKS}.attention.out = {BLOCKS}.attn.to_out.0
{BLOCKS}.feed_forward.(w1|w2|w3) = {BLOCKS}.feed_forward.(linear_1|linear_2|linear_3)
(layers|noise_refiner).#.adaLN_modulation.1 = (layers|noise_refiner).#.norm1.linear
x_embedder
t_embedder.mlp.(0|2) = time_caption_embed.timestep_embedder.(linear_1|linear_2)
cap_embedder.1 = time_caption_embed.caption_embedder.1
final_layer.adaLN_modulation.1 = norm_out.linear_1
final_layer.linear = norm_out.linear_2
""")


def is_lumina2(shapes: Shapes) -> bool:
    """Return whether matrices have this model's width, or names that Z-Image, which has the same, lacks."""
    of_blocks = ((n, s) for n, s in shapes.items() if "layers" in n or "refiner" in n)
    return any(
        shape[1] == WIDTH or ".attn." in name or "_attn_" in name for name, shape in of_blocks
    )


LUMINA2 = Architecture(
    "Lumina-Image 2",
    "transformer",
    ROWS,
    ("noise_refiner", "context_refiner", "layers"),
    versions=("lumina",),
    modelspec="lumina-2",
    fits=is_lumina2,
)
