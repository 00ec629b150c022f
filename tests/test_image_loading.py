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

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

FILE = "pytorch_lora_weights.safetensors"
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "sample_size": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
}
XL = UNET | {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
WIDE = {"attention_head_dim": 128, "num_attention_heads": 24}  # diffusers' converters know no other
JOINT = {"in_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
FLUX = JOINT | {"patch_size": 1, "num_single_layers": 1, "joint_attention_dim": 32}
ALL = ("diffusers", "kohya", "comfyui")
MODELS = {  # loader, class, configuration, component, formats that diffusers loads
    "SD1": ("StableDiffusion", "UNet2DConditionModel", UNET, "unet", ALL[:2]),
    "SDXL": ("StableDiffusionXL", "UNet2DConditionModel", XL, "unet", ALL[:2]),
    "Flux": (
        "Flux",
        "FluxTransformer2DModel",
        FLUX | {"pooled_projection_dim": 32, "axes_dims_rope": [16, 56, 56]} | WIDE,
        "transformer",
        ALL,
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
        ALL,
    ),
    "Qwen-Image": (
        "QwenImage",
        "QwenImageTransformer2DModel",
        JOINT
        | {"patch_size": 2, "in_channels": 16, "out_channels": 4, "joint_attention_dim": 16}
        | {"axes_dims_rope": (8, 4, 4)},
        "transformer",
        ALL,
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
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 24, "attention_head_dim": 128}
        | {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1}
        | {"patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": 16}
        | {"pooled_projection_dim": 8, "rope_axes_dim": (16, 56, 56)},
        "transformer",
        ("diffusers", "comfyui"),
    ),
    "Z-Image": (
        "ZImage",
        "ZImageTransformer2DModel",
        {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 16, "axes_dims": [8, 4, 4], "in_channels": 4},
        "transformer",
        ALL,
    ),
    "HiDream": (
        "HiDreamImage",
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1}
        | {"num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4}
        | {"caption_channels": [32, 16], "text_emb_dim": 64, "num_routed_experts": 4}
        | {"num_activated_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32)}
        | {"llama_layers": (0, 1)},
        "transformer",
        ("diffusers", "comfyui"),
    ),
    "Lumina-Image 2": (
        "Lumina2",
        "Lumina2Transformer2DModel",
        {
            "num_layers": 1,
            "num_refiner_layers": 1,
            "cap_feat_dim": 16,
        },  # its converter knows one width
        "transformer",
        ("diffusers", "comfyui"),
    ),
    "Anima": (
        "Anima",
        "CosmosTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"num_layers": 1, "text_embed_dim": 1024, "adaln_lora_dim": 4, "max_size": (4, 32, 32)},
        "transformer",
        ("diffusers", "comfyui"),
    ),
    "Krea 2": (
        "Krea2",
        "Krea2Transformer2DModel",
        {"in_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "intermediate_size": 32, "text_hidden_dim": 32}
        | {"num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
        | {"text_intermediate_size": 32, "num_layerwise_text_blocks": 1}
        | {"num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6)},
        "transformer",
        ("diffusers", "comfyui"),
    ),
}
VERSIONS = {  # what trainers write
    "SD1": "sd_v1",
    "SDXL": "sdxl_base_v1-0",
    "SD3": "sd3-m",
    "Flux": "flux1",
    "Flux.2": "flux2",
    "Qwen-Image": "qwen_image",
    "Z-Image": "zimage",
    "Wan": "wan2.1",
    "LTX-Video": "ltxv",
    "HunyuanVideo": "hunyuan_video",
    "HiDream": "hidream",
    "Lumina-Image 2": "lumina",
    "Anima": "anima",
    "Krea 2": "krea2",
}
CASES = [(name, form) for name, model in MODELS.items() for form in model[-1]]


class Pipeline:
    """The parts of a pipeline that diffusers' loaders look at."""

    hf_device_map = None
    text_encoder = text_encoder_2 = text_encoder_3 = transformer_2 = None

    def __init__(self, component, model):
        self.components = {component: model}
        setattr(self, component, model)


@pytest.fixture(autouse=True)
def _diffusers():
    pytest.importorskip("diffusers")


def model_of(name):
    import diffusers

    _, kind, config, *_ = MODELS[name]
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**config)
    for module in model.modules():
        for key, values in list(module.named_parameters(recurse=False)):
            zeros = torch.nn.Parameter(torch.zeros(()).expand(values.shape), requires_grad=False)
            setattr(module, key, zeros)
    return model


def effects(name, path):
    """ΔW x of every module, as diffusers applies it after loading a file, for some random x."""
    from diffusers.loaders import lora_pipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    loader, _, _, component, _ = MODELS[name]
    model = model_of(name)
    mixin = getattr(lora_pipeline, f"{loader}LoraLoaderMixin")
    pipeline = type("Tiny", (Pipeline, mixin), {})(component, model)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    return {
        n: sum(
            m.scaling[a] * m.lora_B[a].weight @ (m.lora_A[a].weight @ probe(m.in_features))
            for a in m.active_adapters
        ).detach()
        for n, m in layers
    }


def probe(columns):
    return torch.randn(columns, 8, generator=torch.Generator().manual_seed(columns))


PARTS = (
    *(
        "to_q.",
        "to_k.",
        "to_v.",
        "to_out.0.",
        "proj_mlp.",
        "ff.",
        "ff_i.",
        "feed_forward.",
        "img_mlp.",
    ),
    "layers.0.norm1.linear.",  # of Lumina-Image 2, whose converter wants all layers of a block
)
FEW = ("attn1.to_q", "attn2.to_out.0", "ff.net.2")  # of a UNet, which has many layers


def targets(model):
    """Linear layers inside of blocks: attention and MLP."""
    return {
        n: (m.in_features, m.out_features)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
        and "refiner" not in n
        and (n.endswith(FEW) if "attentions." in n else any(word in f"{n}." for word in PARTS))
    }


def sources(name, directory):
    """Two files in diffusers' names, of mixed ranks, and the weighted sum of what they add, times x."""
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
            sums[path] = sums.get(path, 0) + weight * up @ (down @ probe(columns))
        paths.append(directory / f"{seed}.safetensors")
        save_file(tensors, paths[-1], {"ss_base_model_version": VERSIONS[name]})
    return paths, sums


@pytest.mark.parametrize(("name", "form"), CASES, ids=itertools.starmap("{}-{}".format, CASES))
def test_diffusers_loads_the_merge(tmp_path, name, form):
    paths, wanted = sources(name, tmp_path)
    merge_adapters(paths, "linear", [0.7, -0.4]).save_pretrained(tmp_path / "out", format=form)
    found = effects(name, tmp_path / "out" / FILE)
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        assert (found[path] - delta).norm() <= 1e-5 * delta.norm(), path


class Checkpoint(dict):
    """A checkpoint in the original code's names, with zeros for what it does not list."""

    def __missing__(self, key):
        return torch.zeros(12, 12)

    def pop(self, key):
        return super().pop(key, self[key])


CONVERTERS = {"SD1": "ldm_unet_checkpoint", "SDXL": "ldm_unet_checkpoint"} | {
    "SD3": "sd3_transformer_checkpoint_to_diffusers"
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_comfyuis_names_are_those_of_the_original_checkpoint(tmp_path, name):
    """ComfyUI looks up a checkpoint's names; diffusers' converter of checkpoints says what they are."""
    from diffusers.loaders import single_file_utils

    paths, wanted = sources(name, tmp_path)
    merged = merge_adapters(paths, "linear", [0.7, -0.4])
    merged.save_pretrained(tmp_path / "out.safetensors", format="comfyui")
    stored = load_file(tmp_path / "out.safetensors")
    checkpoint = Checkpoint()
    if name != "SD3":  # the converter counts blocks
        sides = ("input_blocks", "middle_block", "output_blocks")
        checkpoint |= {f"model.diffusion_model.{s}.{n}.9": None for s in sides for n in range(9)}
    for key in [key for key in stored if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        effect = stored[f"{module}.lora_B.weight"] @ (stored[key] @ probe(stored[key].shape[1]))
        checkpoint[f"model.{module}.weight"] = effect
    convert = getattr(single_file_utils, f"convert_{CONVERTERS[name]}")
    converted = convert(checkpoint, config={"layers_per_block": 2})
    for path, delta in wanted.items():
        found = converted[f"{path}.weight"]
        assert (found - delta).norm() <= 1e-5 * delta.norm(), path


COUNTS = {
    "transformer_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
    "blocks": "num_layers",
    "layers": "n_layers",
    "noise_refiner": "n_refiner_layers",
    "context_refiner": "n_refiner_layers",
}


UNCOUNTED = ("HiDream", "Lumina-Image 2", "Anima")  # models that are known by other marks


@pytest.mark.parametrize(
    "name", [name for name in MODELS if "unet" not in MODELS[name] and name not in UNCOUNTED]
)
def test_the_usual_numbers_of_blocks_are_those_of_diffusers(name):
    from inspect import signature

    import diffusers

    if name == "SD3":
        pytest.skip("no model that was published has diffusers' 18 blocks")
    default = signature(getattr(diffusers, MODELS[name][1]).__init__).parameters
    (table,) = (one for one in ARCHITECTURES if one.name.replace("Flux.1", "Flux") == name)
    assert {start: default[COUNTS[start]].default for start in table.sizes[0]} in table.sizes


REFUSED = [(name, "kohya") for name in MODELS if "kohya" not in MODELS[name][-1]]


@pytest.mark.parametrize(("name", "form"), REFUSED)
def test_what_diffusers_would_not_find_is_refused(tmp_path, name, form):
    merged = merge_adapters(sources(name, tmp_path)[0], "linear")
    with pytest.raises(UnsupportedError, match="save it as format='diffusers'"):
        merged.save_pretrained(tmp_path / "out", format=form)


ABSENT = "attn2|add_|to_add_out|ff_context|image_embedder|guidance_embedder|adaLN_modulation|norm_|table|distilled"


@pytest.mark.parametrize("name", [name for name in MODELS if "unet" not in MODELS[name]])
def test_every_name_of_a_table_is_a_module_of_diffusers(name):
    """All but those that a model of one block has not."""
    wanted = "Stable Diffusion 3" if name == "SD3" else name
    (table,) = (one for one in ARCHITECTURES if one.name.replace("Flux.1", "Flux") == wanted)
    modules = dict(model_of(name).named_modules())
    names = [part for one in table.rows.names for part in parts_of(one.replace("#", "0"))]
    names = [one for one in names if not re.search("audio|cross_attn|adaln|gate_logits|vace", one)]
    # of LTX-2, and of VACE
    unknown = [one for one in names if one not in modules]
    assert not [one for one in unknown if not re.search(ABSENT, one)]
    assert len(unknown) < len(names) / 2


def test_kohyas_names_of_sdxl_load_as_what_they_mean(tmp_path):
    """SGM names and diffusers' names of one weight, in two files."""
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
    assert (delta - wanted @ probe(64)).norm() <= 1e-5 * delta.norm()
