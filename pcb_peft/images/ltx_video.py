"""LTX-Video: only the layers outside its blocks have other names in the original code."""

from pcb_peft.images.architecture import Architecture
from pcb_peft.images.rows import Rows

ROWS = Rows("""
transformer_blocks.#.(attn1|attn2).(to_q|to_k|to_v|to_out.0)
transformer_blocks.#.ff.(net.0.proj|net.2)
patchify_proj = proj_in
adaln_single.linear = time_embed.linear
adaln_single.emb.timestep_embedder.(linear_1|linear_2) = time_embed.emb.timestep_embedder.(linear_1|linear_2)
caption_projection.(linear_1|linear_2)
proj_out
""")

LTX_VIDEO = Architecture(
    "LTX-Video",
    "transformer",
    ROWS,
    ("transformer_blocks",),
    ({"transformer_blocks": 28}, {"transformer_blocks": 48}),
    versions=("ltx",),
    modelspec="ltx-video",
)
