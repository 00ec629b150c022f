"""LoRAs of image models, folded: into a pipeline as fuse_lora of diffusers does, and into checkpoints in one file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcb_peft import BaseModelError, MismatchError, OptionError, OutputError, load_adapter
from pcb_peft.commands import cli
from pcb_peft.images.tables import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "sample_size": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ENDS = ("attn1.to_q", "ff.net.2", "proj_in", "conv1", "q_proj", "fc1")


def pair(seed, rows, columns, rank=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(
        rows, rank, generator=generator
    )


def lora(path, layers):
    """Write a LoRA in diffusers' names; layers are (out, in) by name."""
    tensors = {}
    for seed, (name, (rows, columns)) in enumerate(layers.items()):
        down, up = pair(seed, rows, columns)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(
        tensors, path, {"ss_base_model_version": "sd_v1"} if "unet." in next(iter(layers)) else {}
    )
    return path


@pytest.fixture
def pipeline(tmp_path):
    """A tiny pipeline of Stable Diffusion, saved in shards beside an fp16 variant, and a LoRA of it."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=8),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(tmp_path / "base", variant="fp16")
    made.save_pretrained(tmp_path / "base", max_shard_size="2MB")
    layers = {
        f"{component}.{name}": (module.weight.shape[0], module.weight[0].numel())
        for component in ("unet", "text_encoder")
        for name, module in getattr(made, component).named_modules()
        if name.endswith(ENDS) and isinstance(module, torch.nn.Linear)
    }
    lora(tmp_path / "lora.safetensors", layers)
    return made


def fused(pipeline, path):
    """The pipeline's weights after diffusers has fused a LoRA into them, by component."""
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return {c: getattr(pipeline, c).state_dict() for c in ("unet", "text_encoder")}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert (found[name] - values).abs().max() <= 1e-5 * values.abs().max().clamp(min=1), name


@pytest.mark.slow
def test_a_pipeline_is_folded_component_by_component(tmp_path, pipeline):
    import diffusers
    import transformers

    out, base = tmp_path / "out", tmp_path / "base"
    with pytest.warns(UserWarning, match=r"fp16.* are left out of the folded model"):
        load_adapter(tmp_path / "lora.safetensors").fold(base, out)
    wanted = fused(pipeline, tmp_path / "lora.safetensors")
    unet = diffusers.UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    encoder = transformers.CLIPTextModel.from_pretrained(out, subfolder="text_encoder")
    assert_same(unet.state_dict(), wanted["unet"])
    assert_same(encoder.state_dict(), wanted["text_encoder"])
    before = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    after = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert all("fp16" in path.name and path.parent.name in wanted for path in before - after)
    for path in after & before:
        if path.parent.name not in wanted:
            assert (out / path).read_bytes() == (base / path).read_bytes()
    card = (out / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "DiffusionPipeline.from_pretrained" in card
    assert "load_lora_weights" not in card


@pytest.mark.slow
def test_the_only_variant_is_folded_under_its_name(tmp_path, pipeline):
    for path in (tmp_path / "base").rglob("*.safetensors*"):
        if "fp16" not in path.name:
            path.unlink()
    load_adapter(tmp_path / "lora.safetensors").fold(tmp_path / "base", tmp_path / "out")
    wanted = fused(pipeline, tmp_path / "lora.safetensors")["unet"]
    (path,) = (tmp_path / "out" / "unet").glob("*.safetensors")
    assert path.name == "diffusion_pytorch_model.fp16.safetensors"
    assert_same(load_file(path), wanted)


def original(model, architecture, prefix):
    """The weights of a model in the names of the original code."""
    names = {}
    for name, values in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        found = architecture.original(module)
        names[f"{prefix}{found}.{kind}"] = values.contiguous()
    return names


@pytest.mark.slow
def test_a_checkpoint_in_one_file_is_folded(tmp_path, pipeline, capsys):
    import diffusers

    (table,) = (one for one in ARCHITECTURES if one.name == "Stable Diffusion 1")
    base, out = tmp_path / "sd.safetensors", tmp_path / "out.safetensors"
    stored = original(pipeline.unet, table, "model.diffusion_model.")
    text = {
        f"cond_stage_model.transformer.{n}": v.contiguous()
        for n, v in pipeline.text_encoder.state_dict().items()
    }
    other = {"first_stage_model.encoder.conv_in.weight": torch.ones(2, 2)}
    save_file(stored | text | other, base, {"format": "pt"})
    words = ["fold", str(tmp_path / "lora.safetensors"), str(base), "-o", str(out)]
    assert cli.main(words) == 0, capsys.readouterr().err
    wanted = fused(pipeline, tmp_path / "lora.safetensors")
    unet = diffusers.UNet2DConditionModel.from_single_file(
        str(out), config=str(tmp_path / "base" / "unet")
    )
    assert_same(unet.state_dict(), wanted["unet"])
    found = load_file(out)
    assert list(found) == list(load_file(base))
    encoder = {n: found[f"cond_stage_model.transformer.{n}"] for n in wanted["text_encoder"]}
    assert_same(encoder, wanted["text_encoder"])
    assert torch.equal(found["first_stage_model.encoder.conv_in.weight"], torch.ones(2, 2))
    assert cli.main(words) == 2
    assert cli.main([*words, "--overwrite-all"]) == 0


FUSED = {  # weight of a file in one piece: LoRAs of its parts, from the first rows to the last
    "double_blocks.0.img_attn.qkv.weight": [
        f"transformer.transformer_blocks.0.attn.to_{p}" for p in "qkv"
    ],
    "single_blocks.0.linear1.weight": [
        *(f"transformer.single_transformer_blocks.0.attn.to_{p}" for p in "qkv"),
        "transformer.single_transformer_blocks.0.proj_mlp",
    ],
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": [
        f"transformer.transformer_blocks.0.attn.to_{p}" for p in "qkv"
    ],
    "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": [
        f"text_encoder_2.text_model.encoder.layers.0.self_attn.{p}_proj" for p in "qkv"
    ],
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("missing", [False, True])
def test_parts_of_a_matrix_are_folded_into_their_rows(tmp_path, name, missing):
    rows = [8, 8, 8, 32][: len(FUSED[name])]
    parts = dict(zip(FUSED[name], rows, strict=True))
    if missing:
        del parts[FUSED[name][1]]
    lora(tmp_path / "lora.safetensors", {part: (count, 8) for part, count in parts.items()})
    torch.manual_seed(0)
    weight = torch.randn(sum(rows), 8)
    others = (
        {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1, 1)}
        if "cond" in name
        else {}
    )
    save_file({name: weight, **others}, tmp_path / "base.safetensors")
    load_adapter(tmp_path / "lora.safetensors").fold(
        tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    )
    deltas = {part: pair(seed, count, 8) for seed, (part, count) in enumerate(parts.items())}
    blocks = [
        deltas[part][1] @ deltas[part][0] if part in deltas else torch.zeros(count, 8)
        for part, count in zip(FUSED[name], rows, strict=True)
    ]
    found = load_file(tmp_path / "out.safetensors")[name]
    assert (found - weight - torch.cat(blocks)).abs().max() < 1e-5


FINAL = {  # layer of a file in one piece: diffusers', which has scale before shift
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "model.diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1": (
        "transformer_blocks.1.norm1_context.linear"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FINAL)
def test_halves_are_folded_in_the_order_of_the_file(tmp_path, name):
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    down, up = pair(1, 16, 8)
    module = f"transformer.{FINAL[name]}"
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    weight, bias = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.ones(16)
    start = name.removesuffix("final_layer.adaLN_modulation.1").removesuffix(
        "joint_blocks.1.context_block.adaLN_modulation.1"
    )
    block = "joint_blocks.0.x_block.attn" if start else "double_blocks.0.img_attn"
    qkv = {f"{start}{block}.qkv.weight": torch.zeros(24, 8)}
    save_file(
        {f"{name}.weight": weight, f"{name}.bias": bias, **qkv}, tmp_path / "base.safetensors"
    )
    load_adapter(tmp_path / "lora.safetensors").fold(
        tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    )
    found = load_file(tmp_path / "out.safetensors")
    converted = utilities.swap_scale_shift(found[f"{name}.weight"], 0)
    wanted = utilities.swap_scale_shift(weight, 0) + up @ down
    assert (converted - wanted).norm() <= 1e-5 * wanted.norm()
    assert torch.equal(found[f"{name}.bias"], bias)


def test_bases_and_outputs_that_do_not_fit_are_refused(tmp_path):
    name = "transformer.transformer_blocks.0.attn.to_q"
    adapter = load_adapter(lora(tmp_path / "lora.safetensors", {name: (8, 8)}))
    base = tmp_path / "base.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(24, 8)}, base)
    with pytest.raises(OptionError, match=r"name it out\.safetensors"):
        adapter.fold(base, tmp_path / "out")
    with pytest.raises(OutputError, match=r"base\.safetensors"):
        adapter.fold(base, base, overwrite="all")
    save_file({"double_blocks.3.img_attn.qkv.weight": torch.zeros(24, 8)}, base)
    with pytest.raises(MismatchError, match=name):
        adapter.fold(base, tmp_path / "out.safetensors")
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(24, 8)}, base)
    with pytest.raises(BaseModelError, match="no image model that is known"):
        adapter.fold(base, tmp_path / "out.safetensors")


@pytest.mark.parametrize("extra", [[], ["--dry-run"]])
def test_a_merge_is_folded_into_one_file(tmp_path, capsys, extra):
    name = "transformer.transformer_blocks.0.attn.to_k"
    paths = [lora(tmp_path / f"{n}.safetensors", {name: (8, 8)}) for n in (1, 2)]
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(24, 8)}, base)
    words = [
        "merge",
        *map(str, paths),
        "-o",
        str(out),
        "--method",
        "linear",
        "--weights",
        "1",
        "0.5",
    ]
    assert cli.main([*words, "--fold", "--base-model", str(base), *extra]) == 0, (
        capsys.readouterr().err
    )
    if extra:
        return
    down, up = pair(0, 8, 8)
    found = load_file(out)["double_blocks.0.img_attn.qkv.weight"]
    assert (found[8:16] - 1.5 * up @ down).abs().max() < 1e-5
    assert not found[:8].any()
    assert not found[16:].any()
