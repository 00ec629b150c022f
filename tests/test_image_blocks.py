"""Weights by block: the numbers that users of block-weight tools know, in the order in which diffusers' models run."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from pcb_peft import OptionError, load_adapter, merge, merge_adapters
from pcb_peft.commands import cli
from pcb_peft.images.depth import forward_depths
from pcb_peft.images.tables import ARCHITECTURES

BY_NAME = {one.name: one for one in ARCHITECTURES}
UNET = {"layers_per_block": 2, "sample_size": 16, "norm_num_groups": 8, "cross_attention_dim": 16}
SD = UNET | {"block_out_channels": (16, 16, 16, 16)}
XL = UNET | {
    "block_out_channels": (16, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
FLUX = {"num_layers": 2, "num_single_layers": 3, "patch_size": 1, "in_channels": 4}
FLUX |= {"attention_head_dim": 16, "num_attention_heads": 1, "joint_attention_dim": 16}
FLUX |= {"pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}


def run_order(model, *inputs, **named):
    """Modules with weights, in the order in which the forward pass reaches them for the first time."""
    seen = {}

    def note(name):
        seen.setdefault(name)  # a hook that returns something changes the inputs

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda *_, name=name: note(name))
    model(*inputs, **named)
    return list(seen)


def unet_order(config):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(**config)
    return run_order(model, torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 3, 16))


def flux_order():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(**FLUX)
    return run_order(
        model,
        torch.zeros(1, 4, 4),
        encoder_hidden_states=torch.zeros(1, 3, 16),
        pooled_projections=torch.zeros(1, 16),
        timestep=torch.zeros(1),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
        guidance=None,
    )


ORDERS = {
    "Stable Diffusion 1": (lambda: unet_order(SD), "unet", 26),
    "SDXL": (lambda: unet_order(XL), "unet", 20),
    "Flux.1": (flux_order, "transformer", 58),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ORDERS)
def test_blocks_and_depths_follow_the_forward_pass(name):
    order, component, length = ORDERS[name]
    modules, model = order(), BY_NAME[name]
    (layout,) = (one for one in model.block_layouts if len(one) == length)
    blocks = [block for module in modules if (block := model.block(module)) is not None]
    places = [layout.index(block) for block in blocks]
    assert places == sorted(places)
    if component == "unet":  # a tiny Flux has fewer blocks
        assert {*places} == {*range(1, length)}
    depths = forward_depths([f"{component}.{module}" for module in modules])
    assert len({*depths.values()}) >= 5
    ordered = [depths[f"{component}.{module}"] for module in modules if model.block(module)]
    assert ordered == sorted(ordered)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "length"), [("Stable Diffusion 1", 17), ("SDXL", 12)])
@pytest.mark.filterwarnings("ignore")
def test_the_short_lists_are_the_blocks_with_attention(name, length):
    model = BY_NAME[name]
    attentions = [m for m in ORDERS[name][0]() if ".attentions." in m]
    (layout,) = (one for one in model.block_layouts if len(one) == length)
    assert list(dict.fromkeys(map(model.block, attentions))) == list(layout[1:])


MIDDLE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
OUT = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_k"
SD_LORA = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1": 0,
    "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k": 2,
    MIDDLE: 7,
    OUT: 10,
}


def lora(path, names, width=768):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(8, 2, generator=generator)
    save_file(tensors, path)
    return str(path)


def strengths(merged, path):
    alone = load_adapter(path)
    return [(merged.delta(m).norm() / alone.delta(m).norm()).item() for m in alone.modules]


def test_each_block_has_its_number(tmp_path, capsys):
    path = lora(tmp_path / "a.safetensors", SD_LORA)
    numbers = [(place + 1) / 17 for place in range(17)]
    merged = merge_adapters([path], "linear", [{"blocks": numbers}])
    wanted = sorted(numbers[place] for place in SD_LORA.values())
    assert sorted(strengths(merged, path)) == pytest.approx(wanted, abs=1e-5)
    merged.save_pretrained(tmp_path / "out")
    again = merge(tmp_path / "out" / "merge_recipe.yaml")
    assert strengths(again, path) == strengths(merged, path)
    word = "blocks:" + ",".join(map(str, numbers))
    words = ["merge", path, "-o", str(tmp_path / "cli"), "--method", "linear", "--weights", word]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert strengths(load_adapter(tmp_path / "cli"), path) == pytest.approx(
        strengths(merged, path), abs=1e-6
    )


def test_flux_has_a_number_for_each_double_and_single_block(tmp_path):
    names = [
        "lora_unet_double_blocks_18_img_attn_proj",
        "lora_unet_single_blocks_37_modulation_lin",
    ]
    path = lora(tmp_path / "a.safetensors", names)
    numbers = [place / 57 for place in range(57)]
    found = {
        length: strengths(merge_adapters([path], "linear", [{"blocks": by_block}]), path)
        for length, by_block in {57: numbers, 58: [0.0, *numbers]}.items()
    }
    assert sorted(found[57]) == pytest.approx([18 / 57, 56 / 57], abs=1e-5)
    assert found[57] == found[58]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (13, r"13 numbers by block, and .*Stable Diffusion 1.* takes 12, 17, 20 and 26"),
        (12, r"change input_blocks\.2, which has none of the 12 numbers; give 17, 20 and 26"),
        (0, r"is not \{blocks: \[numbers\]\}"),
    ],
)
def test_other_numbers_are_refused(tmp_path, count, message):
    path = lora(tmp_path / "a.safetensors", SD_LORA)
    with pytest.raises(OptionError, match=message):
        merge_adapters([path], "linear", [{"blocks": [1.0] * count}])


def test_a_block_without_a_number_is_refused(tmp_path):
    names = [MIDDLE, "lora_unet_down_blocks_3_resnets_0_time_emb_proj"]
    path = lora(tmp_path / "a.safetensors", names)
    with pytest.raises(
        OptionError, match=r"input_blocks\.10, which has none of the 17 numbers; give 26"
    ):
        merge_adapters([path], "linear", [{"blocks": [1.0] * 17}])


def test_blocks_of_a_language_model_are_refused(workshop):
    import peft

    adapter = workshop.adapter("mlp", peft.LoraConfig(target_modules=["mix"]))
    with pytest.raises(OptionError, match="no blocks that are known"):
        merge_adapters([adapter], "linear", [{"blocks": [1.0] * 17}])


def test_a_merge_in_memory_is_pickled_with_its_weights_by_block(tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {
        f"{name}.lora_A.weight": torch.randn(2, 8),
        f"{name}.lora_B.weight": torch.randn(8, 2),
    }
    save_file(factors, tmp_path / "a.safetensors")
    numbers = [3.0 if place == 13 else 0.0 for place in range(26)]  # M00
    weights = [1, {"blocks": numbers}]
    merged = merge_adapters([tmp_path / "a.safetensors"] * 2, "linear", weights, rank="full")
    again = pickle.loads(pickle.dumps(merged)).delta(name)
    expected = 4 * load_adapter(tmp_path / "a.safetensors").delta(name)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
