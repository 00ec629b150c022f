"""Anima, and Cosmos-Predict2 that it is made of."""

import re

from pcb_peft.images.architecture import Architecture, Shapes
from pcb_peft.images.rows import Rows

BLOCK = "transformer_blocks.#"
ROWS = Rows(f"""
blocks.#.(self_attn|cross_attn).(q_proj|k_proj|v_proj|output_proj) = {BLOCK}.(attn1|attn2).(to_q|to_k|to_v|to_out.0)
blocks.#.mlp.(layer1|layer2) = {BLOCK}.ff.(net.0.proj|net.2)
blocks.#.adaln_modulation_self_attn.(1|2) = {BLOCK}.norm1.(linear_1|linear_2)
blocks.#.adaln_modulation_cross_attn.(1|2) = {BLOCK}.norm2.(linear_1|linear_2)
blocks.#.adaln_modulation_mlp.(1|2) = {BLOCK}.norm3.(linear_1|linear_2)
x_embedder.proj.1 = patch_embed.proj
t_embedder.1.(linear_1|linear_2) = time_embed.t_embedder.(linear_1|linear_2)
final_layer.adaln_modulation.(1|2) = norm_out.(linear_1|linear_2)
final_layer.linear = proj_out
""")

OWN = re.compile(
    r".*([qkv]_proj|output_proj|mlp[._]layer[12]|adaln_modulation\w*[._][12]|norm[123][._]linear_[12])$"
)
OTHER_WIDTHS = frozenset({1152, 1920, 2240, 2304, 3072})
"""Widths of models whose layers diffusers names alike: PixArt, CogVideoX, Sana, Allegro, Mochi."""
TEXT = 1024  # width of the text, other than that of the image


def is_anima(shapes: Shapes) -> bool:
    """Return whether names, or the width of the text, are not those of LTX-Video, which diffusers names alike."""
    of_text = (
        s for name, s in shapes.items() if re.search(r"(attn2[._]to|cross_attn)[._][kv]", name)
    )
    return any(map(OWN.match, shapes)) or any(s[1] == TEXT != s[0] for s in of_text)


ANIMA = Architecture(
    "Anima",
    "transformer",
    ROWS,
    ("transformer_blocks",),
    versions=("anima",),
    other_widths=OTHER_WIDTHS,
    fits=is_anima,
)
