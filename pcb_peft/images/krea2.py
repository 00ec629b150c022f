"""Krea 2: gated attention of fewer keys than queries, and a transformer over the layers of its text encoder."""

from pcb_peft.images.architecture import Architecture
from pcb_peft.images.rows import Rows

BLOCKS = "(blocks|txtfusion.layerwise_blocks|txtfusion.refiner_blocks).#"
BLOCKS_HERE = "(transformer_blocks|text_fusion.layerwise_blocks|text_fusion.refiner_blocks).#"
ROWS = Rows(f"""
{BLOCKS}.attn.(wq|wk|wv|wo|gate) = {BLOCKS_HERE}.attn.(to_q|to_k|to_v|to_out.0|to_gate)
{BLOCKS}.mlp.(gate|up|down) = {BLOCKS_HERE}.ff.(gate|up|down)
txtfusion.projector = text_fusion.projector
txtmlp.(1|3) = txt_in.(linear_1|linear_2)
tmlp.(0|2) = time_embed.(linear_1|linear_2)
tproj.1 = time_mod_proj
first = img_in
last.linear = final_layer.linear
""")

KREA2 = Architecture(
    "Krea 2",
    "transformer",
    ROWS,
    ("transformer_blocks",),
    sizes=({"transformer_blocks": 28},),
    versions=("krea2", "krea-2"),
)
