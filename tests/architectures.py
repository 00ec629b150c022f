"""Tiny models of many architectures, each with the layers that people put LoRA on.

What is targeted is written as a user of PEFT writes it. Inputs are the same for all models of a modality.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VERSION = int(hf.__version__.partition(".")[0])
ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
WORDS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {**WORDS, "head_dim": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
DEEPSEEK = {
    **MIXTURE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
PIXELS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
MROPE = {
    "rope_parameters" if VERSION > 4 else "rope_scaling": {
        "rope_type": "default",
        "mrope_section": [1, 1, 2],
    }
}
TOKENS = {"input_ids": torch.tensor([[1, 5, 9, 3, 7, 2, 11, 4]])}
PICTURE = {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)}
PAIR = {**TOKENS, "decoder_input_ids": torch.tensor([[0, 6, 8, 4]])}
SOUND = {
    "input_features": torch.linspace(-1, 1, 8 * 40).reshape(1, 8, 40),
    "decoder_input_ids": torch.tensor([[1, 6, 8, 4]]),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A tiny model, and what an adapter of it targets.

    Attributes:
        kind: Its kind, for the table in the documentation.
        name: Class in transformers.
        config: Makes its configuration.
        targets: PEFT's fields that say what is targeted.
        inputs: Arguments of a forward pass.
        before: The targets in transformers 4, where they are others.
    """

    kind: str
    name: str
    config: Callable[[], Any]
    targets: Mapping[str, Any]
    inputs: Mapping[str, Tensor] = dataclasses.field(default_factory=lambda: TOKENS)
    before: Mapping[str, Any] | None = None

    @property
    def installed_targets(self) -> Mapping[str, Any]:
        """PEFT's fields, for the installed transformers."""
        return self.targets if self.before is None or VERSION > 4 else self.before

    @property
    def is_installed(self) -> bool:
        """True if the installed transformers has the class."""
        return hasattr(hf, self.name)


def modules(*names: str) -> dict[str, Any]:
    return {"target_modules": list(names or LINEAR)}


def parameters(*names: str, also: list[str] = ATTENTION) -> dict[str, Any]:
    return {"target_modules": list(also), "target_parameters": list(names or STACKS)}


def _vision_language(text: str, vision: str, whole: str, **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        words = {**WORDS, "head_dim": 8} if "Gemma" in text else WORDS
        pixels = {**PIXELS, "projection_dim": 16} if "CLIP" in vision else PIXELS
        return getattr(hf, whole)(
            text_config=getattr(hf, text)(**words),
            vision_config=getattr(hf, vision)(**pixels),
            **options,
        )

    return config


DENSE, EXPERTS, VISION = "dense language model", "mixture of experts", "vision and language"
PAIRS, STATES, ENCODERS = "encoder and decoder", "state space", "encoder"

ARCHITECTURES = [
    Architecture(DENSE, "LlamaForCausalLM", lambda: hf.LlamaConfig(**WORDS), modules()),
    Architecture(
        DENSE,
        "Qwen2ForCausalLM",
        lambda: hf.Qwen2Config(**WORDS, tie_word_embeddings=True),
        modules(),
    ),
    Architecture(
        DENSE,
        "Gemma3ForCausalLM",
        lambda: hf.Gemma3TextConfig(**WORDS, head_dim=8, sliding_window=16),
        modules(),
    ),
    Architecture(
        DENSE, "Phi3ForCausalLM", lambda: hf.Phi3Config(**WORDS), modules("qkv_proj", "down_proj")
    ),
    Architecture(
        DENSE,
        "GPT2LMHeadModel",
        lambda: hf.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4),
        {**modules("c_attn", "c_proj", "c_fc"), "fan_in_fan_out": True},
    ),
    Architecture(
        DENSE,
        "GPTNeoXForCausalLM",
        lambda: hf.GPTNeoXConfig(**{k: v for k, v in WORDS.items() if "key_value" not in k}),
        modules("query_key_value", "dense_h_to_4h"),
    ),
    Architecture(
        EXPERTS,
        "MixtralForCausalLM",
        lambda: hf.MixtralConfig(**WORDS, num_local_experts=3, num_experts_per_tok=2),
        modules("q_proj", "w1", "w2", "w3"),
    ),
    Architecture(
        EXPERTS,
        "Qwen2MoeForCausalLM",
        lambda: hf.Qwen2MoeConfig(**MIXTURE, num_experts=4, shared_expert_intermediate_size=24),
        modules(),
    ),
    Architecture(
        EXPERTS,
        "Qwen3MoeForCausalLM",
        lambda: hf.Qwen3MoeConfig(**MIXTURE, num_experts=4),
        modules("q_proj", "gate", "gate_proj", "up_proj", "down_proj"),
    ),
    Architecture(
        EXPERTS, "DeepseekV3ForCausalLM", lambda: hf.DeepseekV3Config(**DEEPSEEK), modules()
    ),
    Architecture(
        EXPERTS,
        "Glm4MoeForCausalLM",
        lambda: hf.Glm4MoeConfig(**{**DEEPSEEK, "num_key_value_heads": 2}),
        modules(),
    ),
    Architecture(
        EXPERTS,
        "Llama4ForCausalLM",
        lambda: hf.Llama4TextConfig(
            **WORDS,
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
        ),
        parameters(),
    ),
    Architecture(
        EXPERTS,
        "GptOssForCausalLM",
        lambda: hf.GptOssConfig(
            **WORDS, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
        ),
        parameters(*STACKS, "router.weight"),
    ),
    Architecture(
        EXPERTS,
        "GraniteMoeForCausalLM",
        lambda: hf.GraniteMoeConfig(**WORDS, num_local_experts=4, num_experts_per_tok=2),
        parameters(),
        before=parameters("input_linear.weight", "output_linear.weight"),
    ),
    Architecture(
        EXPERTS,
        "NemotronHForCausalLM",
        lambda: hf.NemotronHConfig(
            **WORDS,
            head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
            hybrid_override_pattern="ME*",
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=1,
            n_group=1,
            topk_group=1,
        ),
        parameters("experts.up_proj", "experts.down_proj", also=["q_proj", "in_proj"]),
    ),
    Architecture(
        EXPERTS,
        "DbrxForCausalLM",
        lambda: hf.DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            vocab_size=64,
            attn_config={"kv_n_heads": 2, "rope_theta": 10000, "clip_qkv": 8},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        modules("Wqkv", "out_proj"),
    ),
    Architecture(
        EXPERTS,
        "Qwen3VLMoeForConditionalGeneration",
        lambda: hf.Qwen3VLMoeConfig(
            text_config={
                **MIXTURE,
                "num_experts": 4,
                **MROPE,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        ),
        parameters(),
    ),
    Architecture(
        VISION,
        "LlavaForConditionalGeneration",
        _vision_language("LlamaConfig", "CLIPVisionConfig", "LlavaConfig", image_token_id=60),
        modules("q_proj", "up_proj", "down_proj"),
    ),
    Architecture(
        VISION,
        "Gemma3ForConditionalGeneration",
        _vision_language(
            "Gemma3TextConfig",
            "SiglipVisionConfig",
            "Gemma3Config",
            mm_tokens_per_image=4,
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
        ),
        modules(),
    ),
    Architecture(
        VISION,
        "Qwen2VLForConditionalGeneration",
        lambda: hf.Qwen2VLConfig(
            text_config={
                **WORDS,
                **MROPE,
            },
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        ),
        modules("q_proj", "qkv", "down_proj"),
    ),
    Architecture(
        PAIRS,
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
        ),
        modules("q", "v", "wi"),
        PAIR,
    ),
    Architecture(
        PAIRS,
        "BartForConditionalGeneration",
        lambda: hf.BartConfig(
            vocab_size=64,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
        ),
        modules("q_proj", "v_proj", "fc1"),
        PAIR,
    ),
    Architecture(
        PAIRS,
        "WhisperForConditionalGeneration",
        lambda: hf.WhisperConfig(
            vocab_size=64,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=20,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        modules("q_proj", "v_proj", "fc2"),
        SOUND,
    ),
    Architecture(  # two models of text in one
        PAIRS,
        "MusicgenForConditionalGeneration",
        lambda: hf.MusicgenConfig(
            text_encoder={
                "model_type": "t5",
                "vocab_size": 64,
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 48,
                "num_layers": 1,
                "num_heads": 4,
                "pad_token_id": 0,
            },
            audio_encoder={
                "model_type": "encodec",
                "hidden_size": 16,
                "num_filters": 4,
                "codebook_size": 64,
                "upsampling_ratios": [2, 2],
                "num_lstm_layers": 1,
            },
            decoder={
                "vocab_size": 64,
                "hidden_size": 32,
                "ffn_dim": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_codebooks": 2,
                "max_position_embeddings": 64,
                "pad_token_id": 0,
                "bos_token_id": 0,
            },
        ),
        modules("q", "v", "q_proj", "v_proj", "fc1"),
        {**TOKENS, "decoder_input_ids": torch.tensor([[0, 6, 8, 4], [0, 3, 5, 7]])},
    ),
    Architecture(
        STATES,
        "MambaForCausalLM",
        lambda: hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8),
        modules("in_proj", "x_proj"),
    ),
    Architecture(
        STATES,
        "Mamba2ForCausalLM",
        lambda: hf.Mamba2Config(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
        ),
        modules("in_proj"),
    ),
    Architecture(
        ENCODERS,
        "BertForSequenceClassification",
        lambda: hf.BertConfig(**ENCODER),
        {**modules("query", "value", "dense"), "task_type": "SEQ_CLS"},
    ),
    Architecture(
        ENCODERS,
        "ModernBertForMaskedLM",
        lambda: hf.ModernBertConfig(**ENCODER, cls_token_id=1, sep_token_id=2),
        modules("Wqkv", "Wi"),
    ),
    Architecture(
        ENCODERS,
        "NomicBertForMaskedLM",
        lambda: hf.NomicBertConfig(**ENCODER),
        modules("q_proj", "v_proj", "up_proj", "down_proj"),
    ),
    Architecture(
        ENCODERS,
        "ViTForImageClassification",
        lambda: hf.ViTConfig(**{**PIXELS, "num_labels": 3}),
        {**modules("q_proj", "v_proj", "fc1"), "modules_to_save": ["classifier"]},
        PICTURE,
        before={**modules("query", "value"), "modules_to_save": ["classifier"]},
    ),
]


def table() -> str:
    """The table of the documentation: ``PYTHONPATH=tests python -m architectures`` prints it."""
    lines = ["| kind | class in transformers | what the LoRAs target |", "|---|---|---|"]
    for one in ARCHITECTURES:
        targets = [*one.targets["target_modules"], *one.targets.get("target_parameters", [])]
        lines.append(f"| {one.kind} | `{one.name}` | {', '.join(targets)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
