"""Adapters of models in memory that are no PeftModel: injected layers, PEFT's mixed models, diffusers' pipelines.

Expected values are what PEFT's own layers say that they add.
"""

import copy

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pcb_peft import OptionError, UnsupportedError, load_adapter, merge_adapters

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of a second adapter
LORA = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False)
LOHA = peft.LoHaConfig(r=2, alpha=3, target_modules=["to_v"], init_weights=False)
RSLORA = peft.LoraConfig(
    r=4, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False, use_rslora=True
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(8, 6), "to_v": nn.Linear(8, 6)})


def added(model, name):
    """ΔW of each module of an adapter, as PEFT's layers have it at present."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    have = {n: m for n, m in layers.items() if name in m._get_available_adapters()}
    return {n.removeprefix("base_model.model."): m.get_delta_weight(name) for n, m in have.items()}


def assert_merged(merged, *weighted, component=""):
    names = {component + name for deltas, _ in weighted for name in deltas}
    assert {*merged.modules} == names
    for name in names:
        wanted = sum(w * d.get(name.removeprefix(component), 0) for d, w in weighted).detach()
        assert (merged.delta(name) - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_a_model_with_injected_layers():
    model = Net()
    for name, config in (("a", LORA), ("b", RSLORA), ("c", LOHA)):
        peft.inject_adapter_in_model(copy.deepcopy(config), model, adapter_name=name)
    merged = merge_adapters([(model, "a"), (model, "b"), (model, "c")], "linear", [1, 2, 3])
    parts = [(added(model, name), weight) for name, weight in (("a", 1), ("b", 2), ("c", 3))]
    assert_merged(merged, *parts)
    with pytest.raises(OptionError, match="no adapter 'd'; its adapters are a, b, c"):
        load_adapter((model, "d"))


def test_a_mixed_model():
    model = peft.PeftMixedModel(Net(), LORA, adapter_name="a")
    model.add_adapter("b", LOHA)
    merged = merge_adapters([(model, "a"), (model, "b")], "linear", [0.5, 2])
    assert_merged(merged, (added(model, "a"), 0.5), (added(model, "b"), 2))


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_the_strength_of_an_injected_adapter_is_respected(strength):
    model = peft.inject_adapter_in_model(copy.deepcopy(RSLORA), Net(), adapter_name="a")
    model.attn["to_q"].set_scale("a", strength)
    assert_merged(merge_adapters([(model, "a")], "linear"), (added(model, "a"), 1))


def unet():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
    )


@pytest.mark.slow
def test_a_component_of_diffusers_is_saved_as_diffusers_saves_it(tmp_path):
    model = unet()
    for name, config in (("a", LORA), ("b", RSLORA)):
        model.add_adapter(copy.deepcopy(config), adapter_name=name)
    model.set_adapters(["a", "b"], [0.5, 2.0])
    merged = merge_adapters([(model, "a"), (model, "b")], "linear", [1, 3])
    assert_merged(merged, (added(model, "a"), 1), (added(model, "b"), 3), component="unet.")
    merged.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.slow
def test_a_pipeline_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    model = unet()

    class Pipeline(StableDiffusionLoraLoaderMixin):
        components = {"unet": model, "vae": None}  # noqa: RUF012
        hf_device_map = text_encoder = None

    Pipeline.unet = model
    pipeline, name = Pipeline(), "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 64, 1, 1)}
    tensors[f"{name}.lora_B.weight"] = torch.randn(64, 2, 1, 1)
    pipeline.load_lora_weights(tensors, adapter_name="style")
    merged = merge_adapters([(pipeline, "style")], "linear")
    assert_merged(merged, (added(model, "style"), 1), component="unet.")
    with pytest.raises(OptionError, match="its adapters are style"):
        load_adapter((pipeline, "other"))
    model.add_adapter(copy.deepcopy(LOHA), adapter_name="loha")
    with pytest.raises(UnsupportedError, match="of unet is a LOHA"):
        load_adapter((pipeline, "loha"))
