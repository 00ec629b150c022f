"""HiDream-I1: all programs use the same names."""

from pcb_peft.images.architecture import Architecture
from pcb_peft.images.rows import Rows

EXPERTS = "(shared_experts|experts.#)"
ROWS = Rows(f"""
double_stream_blocks.#.block.attn1.(to_q|to_k|to_v|to_out|to_q_t|to_k_t|to_v_t|to_out_t)
single_stream_blocks.#.block.attn1.(to_q|to_k|to_v|to_out)
(double_stream_blocks|single_stream_blocks).#.block.ff_i.{EXPERTS}.(w1|w2|w3)
double_stream_blocks.#.block.ff_t.(w1|w2|w3)
(double_stream_blocks|single_stream_blocks).#.block.adaLN_modulation.1
t_embedder.timestep_embedder.(linear_1|linear_2)
p_embedder.pooled_embedder.(linear_1|linear_2)
x_embedder.proj
caption_projection.#.linear
final_layer.linear
final_layer.adaLN_modulation.1
""")

HIDREAM = Architecture(
    "HiDream",
    "transformer",
    ROWS,
    ("double_stream_blocks", "single_stream_blocks"),
    versions=("hidream",),
    modelspec="hidream-i1",
)
