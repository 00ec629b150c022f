"""Flux.2 (dev, Klein): the single blocks are fused in diffusers too."""

from pcb_peft.images.architecture import Architecture, Shapes, has_proportions
from pcb_peft.images.rows import Rows

DOUBLE = "transformer_blocks.#"
SINGLE = "single_transformer_blocks.#.attn"
ROWS = Rows(f"""
double_blocks.#.img_attn.qkv = {DOUBLE}.attn.{{to_q,to_k,to_v}}
double_blocks.#.txt_attn.qkv = {DOUBLE}.attn.{{add_q_proj,add_k_proj,add_v_proj}}
double_blocks.#.(img_attn|txt_attn).proj = {DOUBLE}.attn.(to_out.0|to_add_out)
double_blocks.#.img_mlp.(0|2) = {DOUBLE}.ff.(linear_in|linear_out)
double_blocks.#.txt_mlp.(0|2) = {DOUBLE}.ff_context.(linear_in|linear_out)
single_blocks.#.(linear1|linear2) = {SINGLE}.(to_qkv_mlp_proj|to_out)
img_in = x_embedder
txt_in = context_embedder
time_in.(in_layer|out_layer) = time_guidance_embed.timestep_embedder.(linear_1|linear_2)
guidance_in.(in_layer|out_layer) = time_guidance_embed.guidance_embedder.(linear_1|linear_2)
double_stream_modulation_(img|txt).lin = double_stream_modulation_(img|txt).linear
single_stream_modulation.lin = single_stream_modulation.linear
final_layer.linear = proj_out
final_layer.adaLN_modulation.1 ~ norm_out.linear
""")


def _fits(shapes: Shapes) -> bool:
    """Return whether the matrices have this model's proportions: 9 d rows in linear1, 6 d in img_mlp.0."""
    sizes = {"linear1": (9, 1), "linear2": (1, 4), "img_mlp.0": (6, 1), "txt_mlp.0": (6, 1)}
    sizes |= {"img_mlp.2": (1, 3), "txt_mlp.2": (1, 3)}
    return has_proportions(shapes, sizes)


FLUX2 = Architecture(
    "Flux.2",
    "transformer",
    ROWS,
    ("transformer_blocks", "single_transformer_blocks"),
    sizes=(
        {"transformer_blocks": 8, "single_transformer_blocks": 48},
        {"transformer_blocks": 5, "single_transformer_blocks": 20},
        {"transformer_blocks": 8, "single_transformer_blocks": 24},
    ),
    loads_kohya=True,
    versions=("flux2", "flux-2", "flux.2"),
    modelspec="flux-2-dev",
    fits=_fits,
)
