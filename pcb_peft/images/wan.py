"""Wan 2.1 and 2.2 (text to video, image to video), and VACE."""

from pcb_peft.images.architecture import Architecture
from pcb_peft.images.rows import Rows

BLOCKS = "(blocks|vace_blocks).#"
ROWS = Rows(f"""
{BLOCKS}.(self_attn|cross_attn).(q|k|v|o) = {BLOCKS}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)
blocks.#.cross_attn.(k_img|v_img) = blocks.#.attn2.(add_k_proj|add_v_proj)
{BLOCKS}.ffn.(0|2) = {BLOCKS}.ffn.(net.0.proj|net.2)
vace_blocks.#.(before_proj|after_proj) = vace_blocks.#.(proj_in|proj_out)
(patch_embedding|vace_patch_embedding)
text_embedding.(0|2) = condition_embedder.text_embedder.(linear_1|linear_2)
time_embedding.(0|2) = condition_embedder.time_embedder.(linear_1|linear_2)
time_projection.1 = condition_embedder.time_proj
img_emb.proj.(1|3) = condition_embedder.image_embedder.(ff.net.0.proj|ff.net.2)
img_emb.proj.(0|4) = condition_embedder.image_embedder.(norm1|norm2)
head.head = proj_out
{BLOCKS}.self_attn.(norm_q|norm_k) = {BLOCKS}.attn1.(norm_q|norm_k)
{BLOCKS}.cross_attn.(norm_q|norm_k|norm_k_img) = {BLOCKS}.attn2.(norm_q|norm_k|norm_added_k)
{BLOCKS}.norm3 = {BLOCKS}.norm2
{BLOCKS}.modulation = {BLOCKS}.scale_shift_table
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
