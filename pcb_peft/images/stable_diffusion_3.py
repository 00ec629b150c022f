"""Stable Diffusion 3 and 3.5: joint blocks of an image stream and a text stream."""

from pcb_peft.images.architecture import Architecture
from pcb_peft.images.rows import Rows

JOINT = "transformer_blocks.#"
ROWS = Rows(f"""
joint_blocks.#.x_block.attn.qkv = {JOINT}.attn.{{to_q,to_k,to_v}}
joint_blocks.#.x_block.attn2.qkv = {JOINT}.attn2.{{to_q,to_k,to_v}}
joint_blocks.#.context_block.attn.qkv = {JOINT}.attn.{{add_q_proj,add_k_proj,add_v_proj}}
joint_blocks.#.x_block.(attn|attn2).proj = {JOINT}.(attn|attn2).to_out.0
joint_blocks.#.context_block.attn.proj = {JOINT}.attn.to_add_out
joint_blocks.#.x_block.mlp.(fc1|fc2) = {JOINT}.ff.(net.0.proj|net.2)
joint_blocks.#.context_block.mlp.(fc1|fc2) = {JOINT}.ff_context.(net.0.proj|net.2)
joint_blocks.#.x_block.adaLN_modulation.1 = {JOINT}.norm1.linear
joint_blocks.#.context_block.adaLN_modulation.1 ~ {JOINT}.norm1_context.linear
x_embedder.proj = pos_embed.proj
context_embedder
t_embedder.mlp.(0|2) = time_text_embed.timestep_embedder.(linear_1|linear_2)
y_embedder.mlp.(0|2) = time_text_embed.text_embedder.(linear_1|linear_2)
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 ~ norm_out.linear
""")

SD3 = Architecture(
    "Stable Diffusion 3",
    "transformer",
    ROWS,
    ("transformer_blocks",),
    sizes=({"transformer_blocks": 24}, {"transformer_blocks": 38}),
    loads_comfyui=False,
    versions=("sd3", "stable-diffusion-3"),
    modelspec="stable-diffusion-3-medium",
)
