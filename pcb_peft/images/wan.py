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
img_emb.proj.(0|4) = condition_embedder.image_embedder.(norm1|norm2)
head.head = proj_out
blocks.#.self_attn.(norm_q|norm_k) = blocks.#.attn1.(norm_q|norm_k)
blocks.#.cross_attn.(norm_q|norm_k|norm_k_img) = blocks.#.attn2.(norm_q|norm_k|norm_added_k)
blocks.#.norm3 = blocks.#.norm2
blocks.#.modulation = blocks.#.scale_shift_table
head.modulation = scale_shift_table
""")

WAN = Architecture(
    "Wan",
    "transformer",
    ROWS,
    ("blocks",),
    sizes=({"blocks": 40}, {"blocks": 30}),
    versions=("wan",),
    modelspec="wan2.1",
)
