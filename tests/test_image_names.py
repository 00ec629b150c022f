"""One weight, one name: LoRAs of image models in the names of several trainers meet on the weights that they change.

Expected values come from the factors themselves. `tests/test_image_loading.py` asks diffusers.
"""

import hashlib
import json
import re

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pcb_peft import (
    AdapterError,
    MismatchError,
    OptionError,
    UnsupportedError,
    check,
    inspect_adapter,
    load_adapter,
    merge,
    merge_adapters,
)
from pcb_peft.commands import cli
from pcb_peft.images.tables import ARCHITECTURES

FILE = "pytorch_lora_weights.safetensors"
Q = "transformer_blocks_0_attn1_to_q"
XL = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SAME = {  # one weight: its canonical name, and names of several programs for it
    f"unet.{XL}": (
        f"lora_unet_input_blocks_4_1_{Q}",
        f"lora_unet_down_blocks_1_attentions_0_{Q}",
        f"lycoris_down_blocks_1_attentions_0_{Q}",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        f"unet.{XL.removesuffix('to_q')}processor.to_q",
    ),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
    ),
    "transformer.transformer_blocks.3.attn.to_out.0": (
        "lora_unet_double_blocks_3_img_attn_proj",
        "diffusion_model.double_blocks.3.img_attn.proj",
        "lora_transformer_transformer_blocks_3_attn_to_out_0",
        "transformer_blocks.3.attn.to_out.0",
    ),
    "transformer.blocks.7.attn2.to_k": (
        "lora_unet_blocks_7_cross_attn_k",
        "diffusion_model.blocks.7.cross_attn.k",
    ),
    "transformer.layers.2.attention.to_out.0": (
        "lora_unet_layers_2_attention_to_out_0",
        "diffusion_model.layers.2.attention.out",
    ),
    "transformer.transformer_blocks.0.ff_context.net.0.proj": (
        "lora_unet_joint_blocks_0_context_block_mlp_fc1",
        "diffusion_model.joint_blocks.0.context_block.mlp.fc1",
    ),
    "transformer.transformer_blocks.0.attn1.to_q": (
        f"lora_unet_{Q}",
        "diffusion_model.transformer_blocks.0.attn1.to_q",
    ),
}


def factors(seed, rows=32, columns=32, rank=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(
        rows, rank, generator=generator
    )


def named(module, down, up, alpha=None):
    """A LoRA's tensors in the form that goes with the name of the module."""
    if module.startswith("l"):
        stored = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        return stored | {f"{module}.alpha": torch.tensor(float(alpha or len(down)))}
    middle = "" if "." in module and module[0] == "u" else ".default"
    return {f"{module}.lora_A{middle}.weight": down, f"{module}.lora_B{middle}.weight": up}


def written(path, *tensors, **metadata):
    save_file(
        {key: value for part in tensors for key, value in part.items()}, path, metadata or None
    )
    return path


def assert_near(actual, expected):
    assert (actual.double() - expected.double()).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("canonical", SAME)
def test_names_of_one_weight_meet_on_it(tmp_path, canonical):
    names = (canonical, *SAME[canonical])
    paths, wanted = [], 0
    for seed, name in enumerate(names, 1):
        down, up = factors(seed)
        wanted = wanted + up.double() @ down.double() * seed
        paths.append(written(tmp_path / f"{seed}.safetensors", named(name, down, up)))
    merged = merge_adapters(paths, "linear", range(1, len(names) + 1))
    assert list(merged.modules) == [canonical]
    assert_near(merged.delta(canonical), wanted)


FUSED = "lora_unet_double_blocks_0_img_attn_qkv"
PARTS = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]


def test_a_matrix_that_one_keeps_whole_and_another_in_parts_is_merged_in_parts(tmp_path):
    down, up = factors(1, rows=96)
    parts = {name: factors(seed) for seed, name in enumerate(PARTS, 2)}
    whole = written(tmp_path / "whole.safetensors", named(FUSED, down, up, alpha=2))
    split = written(tmp_path / "parts.safetensors", *(named(n, *f) for n, f in parts.items()))
    merged = merge_adapters([whole, split], "linear", [0.7, -0.4])
    assert {*merged.modules} == {*PARTS}
    for place, (name, (a, b)) in enumerate(parts.items()):
        wanted = 0.35 * up[32 * place : 32 * place + 32] @ down - 0.4 * b @ a
        assert_near(merged.delta(name), wanted)
    merged.save_pretrained(tmp_path / "kohya", format="kohya")
    stored = load_file(tmp_path / "kohya" / FILE)
    assert {name.partition(".")[0] for name in stored} == {FUSED}
    again = load_adapter(tmp_path / "kohya").delta(
        "transformer.transformer_blocks.0.attn.{to_q,to_k,to_v}"
    )
    assert_near(again, torch.cat([merged.delta(name) for name in PARTS]))


def test_a_fused_lora_alone_keeps_its_rank(tmp_path):
    paths = [
        written(tmp_path / f"{s}.safetensors", named(FUSED, *factors(s, rows=96))) for s in (1, 2)
    ]
    merged = merge_adapters(paths, "linear")
    (name,) = merged.modules
    assert name == "transformer.transformer_blocks.0.attn.{to_q,to_k,to_v}"
    merged.save_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / FILE)[f"{FUSED}.lora_down.weight"].shape == (8, 32)
    merged.save_pretrained(tmp_path / "parts", format="diffusers")
    parts = load_adapter(tmp_path / "parts")
    assert {*parts.modules} == {*PARTS}
    assert_near(torch.cat([parts.delta(part) for part in PARTS]), merged.delta(name))


def test_one_weight_under_two_names_in_one_file_is_refused(tmp_path):
    names = (f"lora_unet_input_blocks_4_1_{Q}", f"lora_unet_down_blocks_1_attentions_0_{Q}")
    path = written(tmp_path / "a.safetensors", *(named(name, *factors(1)) for name in names))
    with pytest.raises(AdapterError, match="are one weight under two names"):
        load_adapter(path)
    tensors = named(PARTS[0], *factors(1)) | named(FUSED, *factors(2, rows=96))
    with pytest.raises(AdapterError, match="are one weight under two names"):
        load_adapter(written(tmp_path / "b.safetensors", tensors))


@pytest.mark.parametrize("how", ["metadata", "shapes"])
def test_two_base_models_are_refused_by_name(tmp_path, how):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    widths = (768, 2048) if how == "shapes" else (64, 64)
    said = ({"ss_base_model_version": v} for v in ("sd_v1", "sdxl_base_v1-0"))
    paths = [
        written(
            tmp_path / f"{width}-{seed}.safetensors",
            named(name, *factors(seed, columns=width)),
            **(next(said) if how == "metadata" else {}),
        )
        for seed, width in enumerate(widths)
    ]
    with pytest.raises(MismatchError, match=r"LoRA of Stable Diffusion 1.*, and .* of SDXL"):
        merge_adapters(paths, "linear")


def test_names_that_may_mean_one_weight_are_refused(tmp_path):
    names = ("lora_unet_strange_blocks_0_to_q", "transformer.strange_blocks.0.to_q")
    paths = [
        written(tmp_path / f"{s}.safetensors", named(name, *factors(s)))
        for s, name in enumerate(names)
    ]
    with pytest.raises(MismatchError, match="whether they have weights in common cannot be told"):
        merge_adapters(paths, "linear")


def test_one_alpha_stands_in_the_whole_file(tmp_path):
    names = (
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_unet_mid_block_attentions_0_proj_out",
    )
    tensors = [named(n, *factors(3, rank=r), alpha=1) for n, r in zip(names, (4, 8), strict=True)]
    merged = merge_adapters([written(tmp_path / "a.safetensors", *tensors)], "linear")
    merged.save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / FILE)
    assert {float(value) for key, value in stored.items() if key.endswith("alpha")} == {8.0}
    for name, rank in zip(names, (4, 8), strict=True):
        down, up = stored[f"{name}.lora_down.weight"], stored[f"{name}.lora_up.weight"]
        first, second = factors(3, rank=rank)
        assert len(down) == rank
        assert_near(8 / rank * up @ down, second @ first / rank)


def test_a_name_that_no_reader_looks_up_is_not_written(tmp_path):
    name = "transformer.transformer_blocks.0.attn1.to_q"
    path = written(tmp_path / "ltx.safetensors", named(name, *factors(1)))
    with pytest.raises(UnsupportedError, match="diffusers does not read kohya's names of LTX"):
        load_adapter(path).save_pretrained(tmp_path / "out", format="kohya")
    load_adapter(path).save_pretrained(tmp_path / "out", format="comfyui")
    name = "diffusion_model.transformer_blocks.0.attn1.to_q"
    assert f"{name}.lora_B.weight" in load_file(tmp_path / "out" / FILE)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.name)
def test_tables_lead_there_and_back(architecture):
    for template in architecture.rows.names:
        name = template.replace("#", "7")
        original = architecture.original(name)
        assert original is not None
        assert architecture.canonical(original, ".") == name
        assert architecture.canonical(original.replace(".", "_"), "_") == name


def two_loras(directory, name=f"lora_unet_input_blocks_4_1_{Q}", **metadata):
    paths = [directory / f"{seed}.safetensors" for seed in (1, 2)]
    return [
        str(written(path, named(name, *factors(seed)), **metadata))
        for seed, path in enumerate(paths)
    ]


def of_blocks(path, double, single):
    """A LoRA in diffusers' names, such as ai-toolkit writes, of a model with these numbers of blocks."""
    names = [f"transformer.transformer_blocks.{n}.ff.net.2" for n in range(double)]
    names += [f"transformer.single_transformer_blocks.{n}.proj_out" for n in range(single)]
    return written(path, *(named(name, *factors(1, rank=1)) for name in names))


@pytest.mark.parametrize(
    ("double", "single", "name"),
    [(19, 38, "double_blocks.3.img_mlp.2"), (20, 40, "double_blocks.3.img_mlp.fc2")],
)
def test_the_number_of_blocks_tells_models_apart(tmp_path, double, single, name):
    path = of_blocks(tmp_path / "a.safetensors", double, single)
    merge_adapters([path], "linear").save_pretrained(tmp_path / "out", format="comfyui")
    assert any(
        key.startswith(f"diffusion_model.{name}.") for key in load_file(tmp_path / "out" / FILE)
    )


def test_names_that_depend_on_the_model_are_not_written_where_it_is_not_known(tmp_path):
    path = of_blocks(tmp_path / "a.safetensors", 2, 3)
    with pytest.raises(UnsupportedError, match=r"may be a module of .*Flux.1 or HunyuanVideo"):
        merge_adapters([path], "linear", format="comfyui")


READERS = ("diffusers", "comfyui", "kohya")


@pytest.mark.parametrize("to", READERS)
def test_a_lora_is_converted_without_a_merge(tmp_path, capsys, to):
    path = two_loras(tmp_path)[0]
    words = ["export", path, "--to", to, "-o", str(tmp_path / "out.safetensors")]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert cli.main(words) == 2
    assert cli.main([*words, "--overwrite"]) == 0
    before, after = load_adapter(path), load_adapter(tmp_path / "out.safetensors")
    assert list(after.modules) == list(before.modules)
    for module in before.modules:
        assert_near(after.delta(module), before.delta(module))
    found = {reader: check(tmp_path / "out.safetensors", reader).right for reader in READERS}
    readers = {"diffusers": {"diffusers"}, "comfyui": {"comfyui"}, "kohya": set(READERS)}
    assert {reader for reader, right in found.items() if right} == readers[to]


def test_a_name_that_a_program_lacks_is_refused_by_export(tmp_path, capsys):
    path = of_blocks(tmp_path / "a.safetensors", 20, 40)
    assert cli.main(["export", str(path), "--to", "kohya", "-o", str(tmp_path / "out")]) == 2
    assert "diffusers does not read kohya's names of HunyuanVideo" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [True, False])
def test_a_format_that_cannot_be_written_is_refused_before_the_merge(
    tmp_path, monkeypatch, capsys, dry
):
    from pcb_peft.merging import engine

    monkeypatch.setattr(engine, "_choose_directions", lambda *_: pytest.fail("it was merged"))
    words = ["merge", *two_loras(tmp_path), "-o", str(tmp_path / "out"), "--format", "peft"]
    assert cli.main([*words, "--dry-run"] if dry else words) == 2
    assert "belongs to a diffusion pipeline" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_default_format_is_the_one_that_they_came_in_and_the_recipe_says_it(tmp_path):
    paths = two_loras(tmp_path)
    merged = merge_adapters(paths, "linear")
    merged.save_pretrained(tmp_path / "out")
    assert "\nformat: kohya\n" in (tmp_path / "out" / "merge_recipe.yaml").read_text()
    assert all("lora_unet_input_blocks" in name for name in load_file(tmp_path / "out" / FILE))
    merged.save_pretrained(tmp_path / "other", format="diffusers")
    recipe = tmp_path / "other" / "merge_recipe.yaml"
    assert "\nformat: diffusers\n" in recipe.read_text()
    merge(recipe).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "other" / FILE).read_bytes()


def test_a_single_file_is_written_where_its_name_is_given(tmp_path, capsys):
    paths, out = two_loras(tmp_path), tmp_path / "merged.safetensors"
    words = ["merge", *paths, "-o", str(out), "--method", "linear"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert out.is_file()
    with safe_open(out, "pt") as file:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(file.metadata()["pcb_peft.recipe"])
    again = merge(recipe).save_pretrained(tmp_path / "again.safetensors")
    made = inspect_adapter(out).made
    assert (made.method, made.notes) == ("linear", again.report.notes)
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    assert cli.main(words) == 2
    assert cli.main([*words, "--overwrite"]) == 0
    out.write_bytes((tmp_path / "1.safetensors").read_bytes())
    assert cli.main([*words, "--overwrite"]) == 2
    assert "did not write" in capsys.readouterr().err


def test_an_adapter_of_peft_is_no_single_file(tmp_path, workshop):
    adapter = workshop.adapter("mlp", peft.LoraConfig(target_modules=["mix"]))
    merged = merge_adapters([adapter], "linear")
    with pytest.raises(OptionError, match="an adapter of PEFT is a directory"):
        merged.save_pretrained(tmp_path / "merged.safetensors")


def test_a_directory_may_hold_one_file_of_any_name(tmp_path):
    tensors = named(f"lora_unet_input_blocks_4_1_{Q}", *factors(1))
    written(tmp_path / "my_style.safetensors", tensors)
    assert list(load_adapter(tmp_path).modules) == [f"unet.{XL}"]
    written(tmp_path / "other.safetensors", tensors)
    with pytest.raises(AdapterError, match=r"several LoRAs, my_style.safetensors, other"):
        load_adapter(tmp_path)


def test_folders_of_the_hubs_cache_are_read_under_the_repositorys_name(tmp_path):
    repository, commit = tmp_path / "models--owner--my-style", "0123456789abcdef" * 2
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    tensors = named(f"lora_unet_input_blocks_4_1_{Q}", *factors(1))
    written(repository / "blobs" / "5f3a", tensors)
    (snapshot / "my style.safetensors").symlink_to("../../blobs/5f3a")
    for path, name in {
        repository: "my-style",
        snapshot: "my-style",
        snapshot / "my style.safetensors": "my style",
    }.items():
        adapter = load_adapter(path)
        assert list(adapter.modules) == [f"unet.{XL}"]
        assert adapter.name == name


SAID = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "4"}


def test_kohyas_names_that_diffusers_does_not_read_are_written_if_one_source_has_them(tmp_path):
    (down, up), (other_down, other_up) = factors(1), factors(2)
    paths = [
        written(tmp_path / "a.safetensors", named("lora_unet_blocks_0_self_attn_q", down, up)),
        written(
            tmp_path / "b.safetensors",
            named("diffusion_model.blocks.0.self_attn.q", other_down, other_up),
        ),
    ]
    with pytest.raises(UnsupportedError, match="diffusers does not read kohya's names of Wan"):
        merge_adapters(paths[1:], "linear", format="kohya")
    merged = merge_adapters(paths, "linear", [1, 2], format="kohya")
    merged.save_pretrained(tmp_path / "out.safetensors", format="kohya")
    stored = load_file(tmp_path / "out.safetensors")
    start = "lora_unet_blocks_0_self_attn_q"
    scaling = stored[f"{start}.alpha"] / len(stored[f"{start}.lora_down.weight"])
    found = scaling * stored[f"{start}.lora_up.weight"] @ stored[f"{start}.lora_down.weight"]
    assert_near(found, up @ down + 2 * other_up @ other_down)


OTHERS = {  # modules of models that diffusers names nearly alike: names, width
    "Sana": (("attn1.to_q", "attn2.to_k"), 2240),
    "CogVideoX": (("attn1.to_q", "attn1.to_out.0"), 1920),
    "PixArt": (("attn1.to_q", "ff.net.2"), 1152),
    "CogView4": (("attn1.to_q", "norm1.linear"), 4096),
    "Ideogram 4": (("attn.to_q", "adaln_modulation"), 32),
}


@pytest.mark.parametrize("model", OTHERS)
def test_a_model_that_is_not_known_is_filed_under_no_other(tmp_path, model):
    names, width = OTHERS[model]
    start = "transformer.transformer_blocks.0"
    made = [named(f"{start}.{name}", torch.ones(2, width), torch.ones(width, 2)) for name in names]
    path = written(tmp_path / "a.safetensors", *made)
    merged = merge_adapters([path], "linear", [0.5])
    merged.save_pretrained(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert not [key for key in file.metadata() if key.startswith(("ss_", "modelspec"))]
        assert {*file.keys()} >= {f"{start}.{names[0]}.lora_A.weight"}


@pytest.mark.parametrize("metadata", [SAID, {}])
def test_web_uis_are_told_the_base_model(tmp_path, metadata):
    merged = merge_adapters(two_loras(tmp_path, **metadata), "linear")
    merged.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        stated = file.metadata()
    assert stated["ss_base_model_version"] == "sdxl_base_v1-0"
    assert stated["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "load_lora_weights" in card
    assert "transformers" not in card
    assert stated["ss_network_dim"] == stated["ss_network_alpha"].removesuffix(".0") == "8"
    assert stated["modelspec.merged_from"] == "1, 2"
    assert stated["modelspec.title"] == "1 + 2"
    models = json.loads(stated["sd_merge_models"])
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    assert list(models) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def test_hashes_are_those_of_sd_scripts(tmp_path):
    """From the tensors' bytes, and from a part of the file that has the metadata of its training alone."""
    names = [f"lora_unet_input_blocks_4_1_transformer_blocks_{n}_ff_net_2" for n in range(3)]
    tensors = [named(name, *factors(1, rows=30000, columns=640)) for name in names]
    path = written(tmp_path / "a.safetensors", *tensors, **SAID, sshs_model_hash="old")
    load_adapter(path).save_pretrained(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        stated = file.metadata()
    content = (tmp_path / "out.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert stated["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    assert stated["modelspec.hash_sha256"] == f"0x{stated['sshs_model_hash']}"
    training = {key: value for key, value in stated.items() if key.startswith("ss_")}
    save_file(load_file(tmp_path / "out.safetensors"), tmp_path / "trained.safetensors", training)
    part = (tmp_path / "trained.safetensors").read_bytes()[0x100000:0x110000]
    assert len(part) == 0x10000
    assert stated["sshs_legacy_hash"] == hashlib.sha256(part).hexdigest()[:8]


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
def test_what_a_file_says_of_its_own_form_is_not_handed_on(tmp_path, form):
    """An alpha in the metadata would count twice: it is in the factors now."""
    down, up = factors(1)
    alpha = {"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": False}
    path = written(
        tmp_path / "a.safetensors",
        named(f"unet.{XL}", down, up),
        lora_adapter_metadata=json.dumps(alpha),
        ss_network_alpha="1",
        ss_base_model_version="sdxl_base_v1-0",
        ss_tag_frequency="{}",
    )
    load_adapter(path).save_pretrained(tmp_path / "out.safetensors", format=form)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        stated = file.metadata()
    assert not {"lora_adapter_metadata", "ss_network_alpha"} & stated.keys()
    assert stated["ss_tag_frequency"] == "{}"
    again = load_adapter(tmp_path / "out.safetensors")
    assert_near(again.delta(f"unet.{XL}"), 2 * up @ down)


ORDERED = {  # architecture: modules in the order of the forward pass
    "SD": [
        f"unet.{block}.attentions.0.transformer_blocks.0.attn1.to_q"
        for block in (
            *("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"),
            *("up_blocks.1", "up_blocks.2", "up_blocks.3"),
        )
    ],
    "Flux": [f"lora_unet_double_blocks_{block}_img_attn_proj" for block in (0, 1, 9, 10)]
    + [f"lora_unet_single_blocks_{block}_modulation_lin" for block in (0, 2, 11)],
}


@pytest.mark.parametrize("architecture", ORDERED)
def test_a_gradient_of_weights_follows_the_forward_pass(tmp_path, architecture):
    names = ORDERED[architecture]
    tensors = (named(name, *factors(seed)) for seed, name in enumerate(names))
    path = written(tmp_path / "a.safetensors", *tensors)
    merged, alone = merge_adapters([path], "linear", [[0.0, 1.0]]), load_adapter(path)
    strengths = {m: (merged.delta(m).norm() / alone.delta(m).norm()).item() for m in alone.modules}
    by_place = sorted(strengths.values())
    assert by_place == pytest.approx([place / 6 for place in range(7)])
    order = sorted(strengths, key=strengths.get)
    assert [m.split(".")[1:3] for m in order] == [
        one.split(".")[1:3] for one in map(canonical_of, names)
    ]


def canonical_of(name):
    """The canonical name of a module, from its number and kind alone."""
    if name.startswith("unet."):
        return name
    kind, number = re.match(r"lora_unet_(double|single)_blocks_(\d+)", name).groups()
    return f"transformer.{'single_' * (kind == 'single')}transformer_blocks.{number}"


def test_a_gradient_over_an_unknown_order_is_refused(tmp_path):
    path = written(tmp_path / "a.safetensors", named("lora_unet_strange_0_proj", *factors(1)))
    with pytest.raises(OptionError, match="order of layers is not known"):
        merge_adapters([path], "linear", [[0.0, 1.0]])
