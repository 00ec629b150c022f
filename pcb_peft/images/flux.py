"""Flux.1 (dev, schnell, Kontext, Fill) and Chroma: 19 double blocks, 38 single blocks; XLabs' names come last."""

from pcb_peft.images.architecture import Architecture, Shapes, has_proportions
from pcb_peft.images.rows import Rows

DOUBLE = "transformer_blocks.#"
SINGLE = "single_transformer_blocks.#"
ROWS = Rows(f"""
double_blocks.#.img_attn.qkv = {DOUBLE}.attn.{{to_q,to_k,to_v}}
double_blocks.#.txt_attn.qkv = {DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj}}
double_blocks.#.(img_attn|txt_attn).proj = {DOUBLE}.attn.(to_out.0|to_add_out)
double_blocks.#.img_mlp.(0|2) = {DOUBLE}.ff.(net.0.proj|net.2)
double_blocks.#.txt_mlp.(0|2) = {DOUBLE}.ff_context.(net.0.proj|net.2)
double_blocks.#.(img_mod|txt_mod).lin = {DOUBLE}.(norm1|norm1_context).linear
single_blocks.#.linear1 = {SINGLE}.{{attn.to_q,attn.to_k,attn.to_v,proj_mlp}}
single_blocks.#.linear2 = {SINGLE}.proj_out
single_blocks.#.modulation.lin = {SINGLE}.norm.linear
img_in = x_embedder
txt_in = context_embedder
time_in.(in_layer|out_layer) = time_text_embed.timestep_embedder.(linear_1|linear_2)
guidance_in.(in_layer|out_layer) = time_text_embed.guidance_embedder.(linear_1|linear_2)
vector_in.(in_layer|out_layer) = time_text_embed.text_embedder.(linear_1|linear_2)
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 ~ norm_out.linear
distilled_guidance_layer.(in_proj|out_proj)
distilled_guidance_layer.layers.#.(in_layer|out_layer) = distilled_guidance_layer.layers.#.(linear_1|linear_2)
double_blocks.#.processor.qkv_lora1 = {DOUBLE}.attn.{{to_q,to_k,to_v}}
double_blocks.#.processor.qkv_lora2 = {DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj}}
double_blocks.#.processor.(proj_lora1|proj_lora2) = {DOUBLE}.attn.(to_out.0|to_add_out)
single_blocks.#.processor.qkv = {SINGLE}.attn.{{to_q,to_k,to_v}}
single_blocks.#.processor.proj = {SINGLE}.proj_out
""")


def _fits(shapes: Shapes) -> bool:
    """Return whether the matrices have this model's proportions: 7 d rows in linear1, 4 d in img_mlp.0."""
    sizes = {"linear1": (7, 1), "linear2": (1, 5), "img_mlp.0": (4, 1), "txt_mlp.0": (4, 1)}
    sizes |= {"img_mlp.2": (1, 4), "txt_mlp.2": (1, 4), "net.0.proj": (4, 1)}
    return has_proportions(shapes, sizes)


FLUX = Architecture(
    "Flux.1",
    "transformer",
    ROWS,
    ("transformer_blocks", "single_transformer_blocks"),
    sizes=({"transformer_blocks": 19, "single_transformer_blocks": 38},),
    loads_kohya=True,
    down_up=True,
    versions=("flux1", "flux-1"),
    modelspec="flux-1-dev",
    fits=_fits,
    text_encoders=dict.fromkeys(
        ("lora_te3_", "text_encoders.t5xxl.transformer."), "text_encoder_2"
    ),
)
