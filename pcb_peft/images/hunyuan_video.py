"""HunyuanVideo: 20 double blocks, 40 single blocks, a refiner of the text; ComfyUI's names come last."""

import re

from pcb_peft.images.architecture import Architecture, Shapes, has_proportions
from pcb_peft.images.rows import Rows

DOUBLE = "transformer_blocks.#"
SINGLE = "single_transformer_blocks.#"
REFINER = "context_embedder.token_refiner.refiner_blocks.#"
ROWS = Rows(f"""
double_blocks.#.img_attn_qkv = {DOUBLE}.attn.{{to_q,to_k,to_v}}
double_blocks.#.txt_attn_qkv = {DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj}}
double_blocks.#.(img_attn_proj|txt_attn_proj) = {DOUBLE}.attn.(to_out.0|to_add_out)
double_blocks.#.img_mlp.(fc1|fc2) = {DOUBLE}.ff.(net.0.proj|net.2)
double_blocks.#.txt_mlp.(fc1|fc2) = {DOUBLE}.ff_context.(net.0.proj|net.2)
double_blocks.#.(img_mod|txt_mod).linear = {DOUBLE}.(norm1|norm1_context).linear
single_blocks.#.linear1 = {SINGLE}.{{attn.to_q,attn.to_k,attn.to_v,proj_mlp}}
single_blocks.#.linear2 = {SINGLE}.proj_out
single_blocks.#.modulation.linear = {SINGLE}.norm.linear
txt_in.individual_token_refiner.blocks.#.self_attn_qkv = {REFINER}.attn.{{to_q,to_k,to_v}}
txt_in.individual_token_refiner.blocks.#.self_attn_proj = {REFINER}.attn.to_out.0
txt_in.individual_token_refiner.blocks.#.mlp.(fc1|fc2) = {REFINER}.ff.(net.0.proj|net.2)
txt_in.individual_token_refiner.blocks.#.adaLN_modulation.1 = {REFINER}.norm_out.linear
txt_in.input_embedder = context_embedder.proj_in
img_in.proj = x_embedder.proj
(time_in|guidance_in).mlp.(0|2) = time_text_embed.(timestep_embedder|guidance_embedder).(linear_1|linear_2)
vector_in.(in_layer|out_layer) = time_text_embed.text_embedder.(linear_1|linear_2)
txt_in.t_embedder.mlp.(0|2) = context_embedder.time_text_embed.timestep_embedder.(linear_1|linear_2)
txt_in.c_embedder.(linear_1|linear_2) = context_embedder.time_text_embed.text_embedder.(linear_1|linear_2)
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 ~ norm_out.linear
double_blocks.#.img_attn.qkv = {DOUBLE}.attn.{{to_q,to_k,to_v}}
double_blocks.#.txt_attn.qkv = {DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj}}
double_blocks.#.(img_attn|txt_attn).proj = {DOUBLE}.attn.(to_out.0|to_add_out)
double_blocks.#.img_mlp.(0|2) = {DOUBLE}.ff.(net.0.proj|net.2)
double_blocks.#.txt_mlp.(0|2) = {DOUBLE}.ff_context.(net.0.proj|net.2)
double_blocks.#.(img_mod|txt_mod).lin = {DOUBLE}.(norm1|norm1_context).linear
single_blocks.#.modulation.lin = {SINGLE}.norm.linear
txt_in.individual_token_refiner.blocks.#.self_attn.qkv = {REFINER}.attn.{{to_q,to_k,to_v}}
txt_in.individual_token_refiner.blocks.#.self_attn.proj = {REFINER}.attn.to_out.0
txt_in.individual_token_refiner.blocks.#.mlp.(0|2) = {REFINER}.ff.(net.0.proj|net.2)
""")


LIKE_FLUX = re.compile(r".*(img|txt)_(attn\.|mlp[._][02]|mod[._]lin$)")
MORE_THAN_FLUX = re.compile(
    r".*(individual_token_refiner|token_refiner|double_blocks[._]19|single_blocks[._]3[89])"
)


def _fits(shapes: Shapes) -> bool:
    """Return whether linear1 has 7 d rows, and whether names like those of Flux are not all that there is."""
    whole = has_proportions(shapes, {"linear1": (7, 1), "linear2": (1, 5)})
    as_flux = any(map(LIKE_FLUX.match, shapes))
    return whole and (not as_flux or any(map(MORE_THAN_FLUX.match, shapes)))


HUNYUAN_VIDEO = Architecture(
    "HunyuanVideo",
    "transformer",
    ROWS,
    ("transformer_blocks", "single_transformer_blocks"),
    sizes=({"transformer_blocks": 20, "single_transformer_blocks": 40},),
    versions=("hunyuan_video", "hunyuan-video"),
    modelspec="hunyuan-video",
    fits=_fits,
)
