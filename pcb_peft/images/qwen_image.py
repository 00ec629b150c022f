"""Qwen-Image and Qwen-Image-Edit: all programs use diffusers' names."""

from pcb_peft.images.architecture import Architecture
from pcb_peft.images.rows import Rows

ROWS = Rows("""
transformer_blocks.#.attn.(to_q|to_k|to_v|to_out.0|to_add_out|add_q_proj|add_k_proj|add_v_proj)
transformer_blocks.#.(img_mlp|txt_mlp).(net.0.proj|net.2)
transformer_blocks.#.(img_mod|txt_mod).1
img_in
txt_in
time_text_embed.timestep_embedder.(linear_1|linear_2)
norm_out.linear
proj_out
""")

QWEN_IMAGE = Architecture(
    "Qwen-Image",
    "transformer",
    ROWS,
    ("transformer_blocks",),
    sizes=({"transformer_blocks": 60},),
    loads_kohya=True,
    versions=("qwen_image", "qwen-image"),
    modelspec="qwen-image",
)
