"""LoRAs of image models, in the dialects of kohya, diffusers and ComfyUI."""

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save

from fuzz import folders
from fuzz.adapters import finite
from fuzz.cases import Attempt
from fuzz.tensors import mutated_safetensors
from fuzz.values import Steps
from pcb_peft import inspect_adapter, load_adapter, merge_adapters

MODULES = {  # dialect to its modules' names, with (out, in)
    "kohya": {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (8, 8),
        "lora_unet_mid_block_attentions_0_proj_in": (8, 12),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (10, 6),
    },
    "kohya flux": {
        "lora_unet_double_blocks_0_img_attn_qkv": (24, 8),
        "lora_unet_single_blocks_0_linear1": (56, 8),
    },
    "diffusers": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    },
    "diffusers flux": {
        "transformer.transformer_blocks.0.attn.to_q": (8, 8),
        "transformer.single_transformer_blocks.0.proj_mlp": (32, 8),
    },
    "comfyui": {"diffusion_model.double_blocks.0.img_attn.qkv": (24, 8)},
    "wan": {
        "diffusion_model.blocks.0.self_attn.q": (8, 8),
        "diffusion_model.blocks.0.ffn.0": (32, 8),
    },
    "bare": {"transformer_blocks.0.attn.to_q": (8, 8)},
}
PARTS = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "diffusers": ("lora_A.weight", "lora_B.weight"),
}


def prepare(directory: Path) -> Attempt:
    """Prepare the surface."""
    originals = {name: _file(name, 1) for name in MODULES}
    others = {name: _file(name, 2) for name in MODULES}

    def attempt(rng: Random, steps: Steps) -> Any:
        name = rng.choice(sorted(originals))
        steps.append(name)
        file = mutated_safetensors(originals[name], rng, steps)
        folder = folders.write(directory / "lora", {"pytorch_lora_weights.safetensors": file})
        (directory / "other.safetensors").write_bytes(others[name])
        path = folder / "pytorch_lora_weights.safetensors"
        path = path if rng.random() < 0.8 else folder
        if rng.random() < 0.03:
            folders.spoil(folder, rng, steps)
        how = rng.choice(("read", "inspect", "merge", "save", "save"))
        steps.append(how)
        if how == "inspect":
            return str(inspect_adapter(path))
        if how == "read":
            loaded = load_adapter(path)
            for module in loaded.modules:
                finite(loaded.delta(module), module)
            return how
        merged = merge_adapters([path, directory / "other.safetensors"], "linear", progress=False)
        for module in merged.modules:
            finite(merged.delta(module), module)
        if how == "save":
            written = rng.choice((None, "kohya", "diffusers", "comfyui", "peft"))
            merged.save_pretrained(directory / "out", overwrite="all", format=written)
        return how

    return attempt


def _file(name: str, seed: int) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    down, up = PARTS["kohya" if name.startswith("kohya") else "diffusers"]
    tensors: dict[str, torch.Tensor] = {}
    for module, (rows, columns) in MODULES[name].items():
        tensors[f"{module}.{down}"] = torch.randn(2, columns, generator=generator)
        tensors[f"{module}.{up}"] = torch.randn(rows, 2, generator=generator)
        if name.startswith(("kohya", "comfyui")):
            tensors[f"{module}.alpha"] = torch.tensor(2.0)
    texts = {"format": "pt"}
    if name == "diffusers":
        stated = {"unet.lora_alpha": 2, "unet.r": 2, "unet.target_modules": ["to_q"]}
        texts["lora_adapter_metadata"] = json.dumps(stated | {"unet.alpha_pattern": {"to_q": 3}})
    if name.startswith("kohya"):
        texts |= {
            "ss_network_module": "networks.lora",
            "ss_network_alpha": "2",
            "ss_base_model_version": "sd_v1",
        }
    return save(tensors, texts)
