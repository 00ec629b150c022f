"""Wan 2.1 and 2.2 (text to video, image to video)."""

from pcb_peft.images.architecture import Architecture
from pcb_peft.images.rows import Rows

ROWS = Rows("""
blocks.#.(self_attn|cross_attn).(q|k|v|o) = blocks.#.(attn1|attn2).(to_q|to_k|to_v|to_out.0)
blocks.#.cross_attn.(k_img|v_img) = blocks.#.attn2.(add_k_proj|add_v_proj)
blocks.#.ffn.(0|2) = blocks.#.ffn.(net.0.proj|net.2)
patch_embedding
text_embedding.(0|2) = condition_embedder.text_embedder.(linear_1|linear_2)
time_embedding.(0|2) = condition_embedder.time_embedder.(linear_1|linear_2)
time_projection.1 = condition_embedder.time_proj
img_emb.proj.(1|3) = condition_embedder.image_embedder.(ff.net.0.proj|ff.net.2)
head.head = proj_out
""")

WAN = Architecture(
    "Wan",
    "transformer",
    ROWS,
    ("blocks",),
    ({"blocks": 40}, {"blocks": 30}),
    versions=("wan",),
    modelspec="wan2.1",
)
