"""A language model and adapters of every kind, made by PEFT: what consumers are asked to load."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tiny_language import save_language_model, write_gguf

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = (
    "The capital of France is",
    "Q: What is 17 plus 25?\nA:",
    "Once upon a time, in a small village by the sea,",
)
LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "r28": {"r": 28},
    "r36": {"r": 36},
    "rslora": {"r": 5, "use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
    "rank_pattern": {"rank_pattern": {"q_proj": 4, "down_proj": 12}},
    "some_layers": {"layers_to_transform": [0, 1]},
    "pattern_of_targets": {"target_modules": r".*\.(0|1)\.self_attn\.q_proj"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied_output": {"target_modules": ["lm_head", "q_proj"]},
    "dora": {"use_dora": True},
    "olora": {"init_lora_weights": "olora"},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "token_rows": {"trainable_token_indices": [65, 101]},
    "saved_norm": {"modules_to_save": ["model.norm"]},
    "saved_output": {"modules_to_save": ["lm_head"]},
    "head": {"task_type": "SEQ_CLS"},
    "rank576": {"r": 576, "lora_alpha": 576, "target_modules": ["q_proj"]},
}


DEFAULT = {"r": 8, "lora_alpha": 16, "target_modules": ALL, "task_type": "CAUSAL_LM"}
IA3 = peft.IA3Config(
    target_modules=["k_proj", "v_proj", "down_proj"],
    feedforward_modules=["down_proj"],
    task_type="CAUSAL_LM",
)
CONFIGS = {name: peft.LoraConfig(**DEFAULT | more) for name, more in LORAS.items()} | {"ia3": IA3}


def base_model(directory: Path) -> Path:
    """Return a tiny Llama for transformers and, beside it, for llama.cpp."""
    save_language_model(directory)
    write_gguf(directory, Path(f"{directory}.gguf"))
    return directory


def adapters(base: Path, folder: Path, names: Collection[str] | None = None) -> dict[str, Path]:
    """Make adapters, all or those of some names, and return their directories."""
    wanted = [name for name in CONFIGS if names is None or name in names]
    for number, name in enumerate(wanted):
        _save(base, CONFIGS[name], folder / name, number)
    return {name: folder / name for name in wanted}


def _save(base: Path, config: peft.PeftConfig, directory: Path, seed: int) -> None:
    """Save an adapter whose trained values are all random, as PEFT would after a training."""
    torch.manual_seed(seed)
    heads = config.task_type == "SEQ_CLS"
    auto: Any = getattr(
        transformers, f"AutoModelFor{'SequenceClassification' if heads else 'CausalLM'}"
    )
    model = peft.get_peft_model(auto.from_pretrained(base, dtype=torch.float32), config)
    width = (8 / getattr(config, "r", 8)) ** 0.5
    for name, values in model.named_parameters():
        if any(part in name for part in ("lora_B", "lora_embedding_A", "token_adapter")):
            torch.nn.init.normal_(values, std=0.05 * width)
        elif values.requires_grad and "lora_" not in name:
            values.data += 0.1 * torch.randn_like(values)
        elif "magnitude" in name:
            values.data *= 1 + 0.1 * torch.randn_like(values)
    model.save_pretrained(directory)
