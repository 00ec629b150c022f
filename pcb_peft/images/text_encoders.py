"""Text encoders of pipelines: CLIP (names of transformers 4 and 5, OpenCLIP, and the first diffusers), and T5."""

from pcb_peft.images.rows import Rows

_LAYER = "encoder.layers.#.(self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|self_attn.out_proj|mlp.fc1|mlp.fc2)"
_CLIP = f"""
{_LAYER} = text_model.{_LAYER}
embeddings.(token_embedding|position_embedding) = text_model.embeddings.(token_embedding|position_embedding)
text_projection
"""
_T5 = """
encoder.block.#.layer.#.SelfAttention.(q|k|v|o)
encoder.block.#.layer.#.DenseReluDense.(wi|wi_0|wi_1|wo)
shared
"""
_OPEN_CLIP = """
transformer.resblocks.#.attn.in_proj = text_model.encoder.layers.#.self_attn.{q_proj,k_proj,v_proj}
transformer.resblocks.#.attn.out_proj = text_model.encoder.layers.#.self_attn.out_proj
transformer.resblocks.#.mlp.(c_fc|c_proj) = text_model.encoder.layers.#.mlp.(fc1|fc2)
"""
_OLD = "text_model.encoder.layers.#.self_attn"
_OLD_DIFFUSERS = f"""
{_OLD}.(to_q|to_k|to_v|to_out) = {_OLD}.(q_proj|k_proj|v_proj|out_proj)
"""
ROWS = Rows(_CLIP, _T5, _OPEN_CLIP, _OLD_DIFFUSERS)


def canonical(path: str, separator: str) -> str | None:
    """Return a module's name in a text encoder, with CLIP's ``text_model`` that transformers 5 leaves out.

    >>> canonical("encoder_layers_0_mlp_fc1", "_")
    'text_model.encoder.layers.0.mlp.fc1'
    """
    known = ROWS.to_diffusers.get(path, separator)
    return known or ROWS.in_diffusers.get(path, separator)
