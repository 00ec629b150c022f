"""Files of image LoRAs, loaded by diffusers: their effect on a tiny model is the weighted sum of the sources' effects.

These tests need diffusers, which this package does not.
"""

import itertools
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcb_peft import UnsupportedError, merge_adapters
from pcb_peft.images.rows import parts_of
from pcb_peft.images.tables import ARCHITECTURES

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

FILE = "pytorch_lora_weights.safetensors"
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
}
JOINT = {"in_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
FLUX = JOINT | {"patch_size": 1, "num_single_layers": 1, "joint_attention_dim": 32}
MODELS = {  # loader, class, configuration, component, formats that can be written
    "SD1": ("StableDiffusion", "UNet2DConditionModel", UNET, "unet", ("diffusers", "kohya")),
    "Flux": (
        "Flux",
        "FluxTransformer2DModel",
        FLUX | {"pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]},
        "transformer",
        ("diffusers",),
    ),
    "SD3": (
        "SD3",
        "SD3Transformer2DModel",
        JOINT
        | {"sample_size": 32, "patch_size": 1, "caption_projection_dim": 32, "out_channels": 4}
        | {"joint_attention_dim": 32, "pooled_projection_dim": 64},
        "transformer",
        ("diffusers",),
    ),
    "Flux.2": (
        "Flux2",
        "Flux2Transformer2DModel",
        FLUX | {"timestep_guidance_channels": 256, "axes_dims_rope": [4, 4, 4, 4]},
        "transformer",
        ("diffusers", "kohya", "comfyui"),
    ),
    "Qwen-Image": (
        "QwenImage",
        "QwenImageTransformer2DModel",
        JOINT
        | {"patch_size": 2, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 16}
        | {"axes_dims_rope": (8, 4, 4)},
        "transformer",
        ("diffusers", "kohya", "comfyui"),
    ),
    "Wan": (
        "Wan",
        "WanTransformer3DModel",
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12}
        | {"in_channels": 16, "out_channels": 16, "text_dim": 32, "freq_dim": 64, "ffn_dim": 32}
        | {"num_layers": 1, "rope_max_seq_len": 32},
        "transformer",
        ("diffusers", "comfyui"),
    ),
    "LTX-Video": (
        "LTXVideo",
        "LTXVideoTransformer3DModel",
        {"in_channels": 8, "out_channels": 8, "patch_size": 1, "patch_size_t": 1, "num_layers": 1}
        | {"num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32}
        | {"caption_channels": 32},
        "transformer",
        ("diffusers", "comfyui"),
    ),
    "HunyuanVideo": (
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10}
        | {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1}
        | {"patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 16}
        | {"pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
        "transformer",
        ("diffusers",),
    ),
    "Z-Image": (
        "ZImage",
        "ZImageTransformer2DModel",
        {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 16, "axes_dims": [8, 4, 4], "in_channels": 4},
        "transformer",
        ("diffusers", "kohya"),
    ),
}
CASES = [(name, form) for name, model in MODELS.items() for form in model[-1]]


class Pipeline:
    """The parts of a pipeline that diffusers' loaders look at."""

    hf_device_map = None
    text_encoder = text_encoder_2 = text_encoder_3 = transformer_2 = None

    def __init__(self, component, model):
        self.components = {component: model}
        setattr(self, component, model)


def model_of(name):
    _, kind, config, *_ = MODELS[name]
    return getattr(diffusers, kind)(**config)


def effects(name, path):
    """ΔW of every module, as diffusers applies it after loading a file."""
    from diffusers.loaders import lora_pipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    loader, _, _, component, _ = MODELS[name]
    model = model_of(name)
    mixin = getattr(lora_pipeline, f"{loader}LoraLoaderMixin")
    pipeline = type("Tiny", (Pipeline, mixin), {})(component, model)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    return {n: sum(m.get_delta_weight(a) for a in m.active_adapters).detach() for n, m in layers}


def targets(model):
    """Linear layers inside of blocks: attention and MLP."""
    return {
        n: (m.in_features, m.out_features)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
        and any(
            f"{word}." in f"{n}." for word in ("to_q", "to_k", "to_v", "to_out.0", "ff", "img_mlp")
        )
        and "refiner" not in n
    }


def sources(name, directory):
    """Two files in diffusers' names, of mixed ranks, and the weighted sum of what they add to each weight."""
    component, sums, paths = MODELS[name][3], {}, []
    layers = targets(model_of(name))
    for seed, weight in ((1, 0.7), (2, -0.4)):
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for place, (path, (columns, rows)) in enumerate(layers.items()):
            rank = 2 + 2 * (place % 2)
            down = torch.randn(rank, columns, generator=generator)
            up = torch.randn(rows, rank, generator=generator)
            tensors[f"{component}.{path}.lora_A.weight"] = down
            tensors[f"{component}.{path}.lora_B.weight"] = up
            sums[path] = sums.get(path, 0) + weight * up @ down
        paths.append(directory / f"{seed}.safetensors")
        save_file(tensors, paths[-1])
    return paths, sums


@pytest.mark.parametrize(("name", "form"), CASES, ids=itertools.starmap("{}-{}".format, CASES))
def test_diffusers_loads_the_merge(tmp_path, name, form):
    paths, wanted = sources(name, tmp_path)
    merge_adapters(paths, "linear", [0.7, -0.4]).save_pretrained(tmp_path / "out", format=form)
    found = effects(name, tmp_path / "out" / FILE)
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        assert (found[path] - delta).norm() <= 1e-5 * delta.norm(), path


REFUSED = [(name, "kohya") for name in MODELS if "kohya" not in MODELS[name][-1]]


@pytest.mark.parametrize(("name", "form"), REFUSED)
def test_what_diffusers_would_not_find_is_refused(tmp_path, name, form):
    merged = merge_adapters(sources(name, tmp_path)[0], "linear")
    with pytest.raises(UnsupportedError, match="save it as format='diffusers'"):
        merged.save_pretrained(tmp_path / "out", format=form)


ABSENT = "attn2|add_|to_add_out|ff_context|image_embedder|guidance_embedder|adaLN_modulation"


@pytest.mark.parametrize("name", [name for name in MODELS if name != "SD1"])
def test_every_name_of_a_table_is_a_module_of_diffusers(name):
    """All but those that a model of one block has not."""
    wanted = "Stable Diffusion 3" if name == "SD3" else name
    (table,) = (one for one in ARCHITECTURES if one.name.replace("Flux.1", "Flux") == wanted)
    modules = dict(model_of(name).named_modules())
    names = [part for one in table.rows.names for part in parts_of(one.replace("#", "0"))]
    unknown = [one for one in names if one not in modules]
    assert not [one for one in unknown if not re.search(ABSENT, one)]
    assert len(unknown) < len(names) / 2


def test_kohyas_names_of_sdxl_load_as_what_they_mean(tmp_path):
    """SGM names and diffusers' names of one weight, in two files."""
    config = {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "sample_size": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64,
        "transformer_layers_per_block": (1, 2, 2),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    MODELS["SDXL"] = ("StableDiffusionXL", "UNet2DConditionModel", config, "unet", ())
    end, wanted, paths = "transformer_blocks_0_attn1_to_q", 0, []
    for seed, start in enumerate(("input_blocks_4_1", "down_blocks_1_attentions_0"), 1):
        generator = torch.Generator().manual_seed(seed)
        down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
        wanted = wanted + seed * up @ down
        name = f"lora_unet_{start}_{end}"
        tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors | {f"{name}.alpha": torch.tensor(4.0)}, paths[-1])
    merge_adapters(paths, "linear", [1, 2]).save_pretrained(tmp_path / "out")
    assert any("input_blocks_4_1" in name for name in load_file(tmp_path / "out" / FILE))
    ((_, delta),) = effects("SDXL", tmp_path / "out" / FILE).items()
    assert (delta - wanted).norm() <= 1e-5 * wanted.norm()
