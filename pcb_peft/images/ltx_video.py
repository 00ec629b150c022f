"""LTX-Video and LTX-2: only the layers outside its blocks have other names in the original code."""

from pcb_peft.images.anima import OTHER_WIDTHS, is_anima
from pcb_peft.images.architecture import Architecture, Shapes
from pcb_peft.images.rows import Rows

ADALN = "emb.timestep_embedder.(linear_1|linear_2)"
ATTENTIONS = "(attn1|attn2|audio_attn1|audio_attn2|audio_to_video_attn|video_to_audio_attn)"
CROSS = (
    "(av_ca_video_scale_shift_adaln_single|av_ca_audio_scale_shift_adaln_single|av_ca_a2v_gate_adaln_single|"
    "av_ca_v2a_gate_adaln_single|prompt_adaln_single|audio_prompt_adaln_single)"
)
CROSS_HERE = (
    "(av_cross_attn_video_scale_shift|av_cross_attn_audio_scale_shift|av_cross_attn_video_a2v_gate|"
    "av_cross_attn_audio_v2a_gate|prompt_adaln|audio_prompt_adaln)"
)
ROWS = Rows(f"""
transformer_blocks.#.{ATTENTIONS}.(to_q|to_k|to_v|to_out.0)
transformer_blocks.#.ff.(net.0.proj|net.2)
transformer_blocks.#.audio_ff.(net.0.proj|net.2)
(patchify_proj|audio_patchify_proj) = (proj_in|audio_proj_in)
audio_adaln_single.linear = audio_time_embed.linear
audio_adaln_single.{ADALN} = audio_time_embed.{ADALN}
audio_caption_projection.(linear_1|linear_2)
audio_proj_out
{CROSS}.linear = {CROSS_HERE}.linear
{CROSS}.{ADALN} = {CROSS_HERE}.{ADALN}
transformer_blocks.#.{ATTENTIONS}.to_gate_logits
adaln_single.linear = time_embed.linear
adaln_single.{ADALN} = time_embed.{ADALN}
caption_projection.(linear_1|linear_2)
proj_out
""")


def _fits(shapes: Shapes) -> bool:
    return not is_anima(shapes)


LTX_VIDEO = Architecture(
    "LTX-Video",
    "transformer",
    ROWS,
    ("transformer_blocks",),
    sizes=({"transformer_blocks": 28}, {"transformer_blocks": 48}),
    versions=("ltx",),
    modelspec="ltx-video",
    fits=_fits,
    other_widths=OTHER_WIDTHS,
)
