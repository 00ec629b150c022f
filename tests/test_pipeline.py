"""LoRAs of image models: diffusers' and kohya's files are read, merged and written; the deltas are PEFT's."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pcb_peft import AdapterError, OptionError, UnsupportedError, load_adapter, merge_adapters
from pcb_peft.commands import cli

FILE, PREFIX = "pytorch_lora_weights.safetensors", "base_model.model."
TARGETS = {  # component: its LoRA's targets, by their paths in diffusers
    "unet": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.resnets.1.conv1",
        "mid_block.attentions.0.proj_in",
        "up_blocks.1.resnets.0.time_emb_proj",
    ),
    "text_encoder": (
        "text_model.encoder.layers.0.self_attn.q_proj",
        "text_model.encoder.layers.0.mlp.fc1",
    ),
}


class Component(nn.Module):
    """A model with these modules, the convolutions among them told by their names."""

    def __init__(self, paths):
        super().__init__()
        for path in paths:
            parent = self
            *names, last = path.split(".")
            for name in names:
                if name not in dict(parent.named_children()):
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            kernel = {"conv1": 3, "proj_in": 1}.get(last)
            layer = nn.Conv2d(4, 6, kernel) if kernel else nn.Linear(5, 6)
            parent.add_module(last, layer)


def made(workshop, name, seed=1, alpha=3, **options):
    """The tensors of a pipeline's LoRA in PEFT's names, by component, and ΔW of each module according to PEFT."""
    tensors, deltas = {}, {}
    for component, paths in TARGETS.items():
        torch.manual_seed(0)
        model = Component(paths)
        before = {k: v.double() for k, v in model.state_dict().items()}
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=list(paths), **options)
        directory = workshop.adapter(model, config, f"{name}-{component}", seed=seed)
        found = load_file(directory / "adapter_model.safetensors")
        tensors[component] = {k.removeprefix(PREFIX): v for k, v in found.items()}
        torch.manual_seed(0)
        model = peft.PeftModel.from_pretrained(Component(paths).double(), directory)
        after = model.merge_and_unload().state_dict()
        torch.manual_seed(0)
        before = Component(paths).double().state_dict()
        deltas |= {
            f"{component}.{path}": after[f"{path}.weight"] - before[f"{path}.weight"]
            for path in paths
        }
    return tensors, deltas


def kohya(tensors, alpha=3, text="lora_te"):
    """The same in kohya's names."""
    stored = {}
    for component, parts in tensors.items():
        prefix = "lora_unet" if component == "unet" else text
        for key, values in parts.items():
            path, part = key.removesuffix(".weight").rsplit(".", 1)
            name = f"{prefix}_{path.replace('.', '_')}"
            stored[f"{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = values
            stored[f"{name}.alpha"] = torch.tensor(float(alpha))
    return stored


def diffusers(tensors):
    return {f"{c}.{key}": values for c, parts in tensors.items() for key, values in parts.items()}


def older(tensors):
    """The names of diffusers' first releases."""
    renamed = {}
    for key, values in diffusers(tensors).items():
        direction = "down" if "lora_A" in key else "up"
        path = key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        if ".attn" in path:
            owner, _, layer = path.removesuffix(".0").rpartition(".")
            renamed[f"{owner}.processor.{layer}_lora.{direction}.weight"] = values
        elif path.startswith("unet"):
            renamed[f"{path}.lora.{direction}.weight"] = values
        else:
            renamed[f"{path}.lora_linear_layer.{direction}.weight"] = values
    return renamed


METADATA = {
    f"{component}.{key}": value
    for component in TARGETS
    for key, value in {"r": 2, "lora_alpha": 3, "alpha_pattern": {}, "use_rslora": False}.items()
}
FORMS = {  # how the file is written, and what it says beside its tensors
    "kohya": (kohya, {}),
    "kohya, two text encoders": (lambda tensors: kohya(tensors, text="lora_te1"), {}),
    "diffusers": (diffusers, {"lora_adapter_metadata": json.dumps(METADATA)}),
    "diffusers' first releases": (older, {"lora_adapter_metadata": json.dumps(METADATA)}),
}


def saved(workshop, tensors, name, metadata=None):
    path = workshop.directory / f"{name}.safetensors"
    save_file(dict(tensors), path, metadata={"format": "pt"} | (metadata or {}))
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rslora", [False, True])
def test_every_form_has_the_deltas_that_peft_merges(workshop, form, rslora):
    write, metadata = FORMS[form]
    tensors, wanted = made(workshop, "one", use_rslora=rslora)
    if rslora:
        metadata = {k: v.replace('rslora": false', 'rslora": true') for k, v in metadata.items()}
        if not metadata:
            pytest.skip("kohya has no rsLoRA")
    adapter = load_adapter(saved(workshop, write(tensors), "file", metadata))
    assert adapter.name == "file"
    workshop.assert_deltas(adapter, wanted)


def test_without_an_alpha_the_scaling_is_1(workshop):
    tensors, wanted = made(workshop, "one", alpha=2)
    workshop.assert_deltas(load_adapter(saved(workshop, diffusers(tensors), "file")), wanted)
    bare = {k: v for k, v in kohya(tensors).items() if not k.endswith("alpha")}
    workshop.assert_deltas(load_adapter(saved(workshop, bare, "bare")), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_files_of_both_are_merged_and_written_as_either(workshop, form, capsys):
    (one, first), (two, second) = made(workshop, "one"), made(workshop, "two", seed=2)
    paths = [saved(workshop, kohya(one), "one"), workshop.directory / "two"]
    paths[1].mkdir()
    save_file(diffusers(two), paths[1] / FILE, metadata=FORMS["diffusers"][1])
    out = workshop.directory / "out"
    words = (
        f"merge {paths[0]} {paths[1]} -o {out} --method linear --weights 1.5 -0.7 --format {form}"
    )
    assert cli.main(words.split()) == 0, capsys.readouterr().err
    wanted = {module: 1.5 * first[module] - 0.7 * second[module] for module in first}
    workshop.assert_deltas(load_adapter(out), wanted, 1e-5)
    again = load_adapter(out / FILE)
    workshop.assert_deltas(again, wanted, 1e-5)
    names = load_file(out / FILE).keys()
    assert names == (kohya(one) if form == "kohya" else diffusers(one)).keys()


def test_names_that_no_table_has_are_kept(workshop):
    tensors = {
        f"lora_unet_strange_blocks_4_proj.{part}": values
        for part, values in {
            "lora_down.weight": torch.ones(2, 5),
            "lora_up.weight": torch.ones(6, 2),
            "alpha": torch.tensor(1.0),
        }.items()
    }
    adapter = load_adapter(saved(workshop, tensors, "file"))
    assert list(adapter.modules) == ["lora_unet_strange_blocks_4_proj"]
    adapter.save_pretrained(workshop.directory / "out")
    assert load_file(workshop.directory / "out" / FILE).keys() == tensors.keys()
    with pytest.raises(UnsupportedError, match="strange_blocks_4_proj is a name that diffusers"):
        adapter.save_pretrained(workshop.directory / "other", format="diffusers")
    bare = {
        "strange.proj.lora_A.weight": torch.ones(2, 5),
        "strange.proj.lora_B.weight": torch.ones(6, 2),
    }
    with pytest.raises(UnsupportedError, match=r"strange\.proj is no name of a module"):
        load_adapter(saved(workshop, bare, "bare"))


STRANGERS = (
    *(
        "lora_unet_conv_in.dora_scale",
        "lora_unet_conv_in.hada_w1_a",
        "lora_unet_conv_in.lora_mid.weight",
    ),
    *("unet.conv_in.lora_magnitude_vector", "unet.conv_in.bias"),
)


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_not_understood_is_refused_by_name(workshop, name):
    tensors, _ = made(workshop, "one")
    path = saved(workshop, kohya(tensors) | {name: torch.ones(2, 2)}, "file")
    with pytest.raises((AdapterError, UnsupportedError), match=re.escape(name.rpartition(".")[0])):
        load_adapter(path)


def test_what_does_not_fit_is_refused(workshop):
    down, up = torch.ones(2, 5), torch.ones(6, 3)
    name = "lora_unet_conv_in.lora_"
    with pytest.raises(AdapterError, match="must have both factors"):
        load_adapter(saved(workshop, {name + "down.weight": down}, "one"))
    with pytest.raises(AdapterError, match="do not fit"):
        load_adapter(saved(workshop, {name + "down.weight": down, name + "up.weight": up}, "two"))


def test_formats_that_do_not_fit_are_refused(workshop):
    tensors, _ = made(workshop, "one")
    image = merge_adapters([saved(workshop, kohya(tensors), "file")], "linear")
    with pytest.raises(OptionError, match="belongs to a diffusion pipeline"):
        image.save_pretrained(workshop.directory / "out", format="peft")
    with pytest.raises(
        OptionError, match="format is 'comfy'; it must be peft, or one of comfyui, diffusers, kohya"
    ):
        image.save_pretrained(workshop.directory / "out", format="comfy")
    text = load_adapter(workshop.adapter("mlp", peft.LoraConfig(target_modules=["mix"])))
    with pytest.raises(UnsupportedError, match="does not belong to a diffusion pipeline"):
        text.save_pretrained(workshop.directory / "out", format="kohya")
