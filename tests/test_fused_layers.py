"""LoRA on projections that are one layer in one model, and several in another: exact both ways."""

import json

import peft
import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, WORDS
from safetensors.torch import save_file

from pcb_peft import MismatchError, merge_adapters

P = "base_model.model."
SCALING = 1.5
QUERY, KEY, INNER, WIDTH = 32, 16, 48, 32
HEIGHTS = {"q_proj": QUERY, "k_proj": KEY, "v_proj": KEY, "gate_proj": INNER, "up_proj": INNER}
FUSED = {"qkv_proj": QUERY + 2 * KEY, "gate_up_proj": 2 * INNER}
BLOCKS = {"qkv_proj": "self_attn", "gate_up_proj": "mlp", "gate_proj": "mlp", "up_proj": "mlp"}


def model_of(name):
    config = next(a for a in ARCHITECTURES if a.name == name).config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(hf, name)(config).eval()


def path(leaf):
    return f"model.layers.0.{BLOCKS.get(leaf, 'self_attn')}.{leaf}"


def written(directory, modules, base, seed=0):
    """A LoRA of rank 2 on modules of these heights, and ΔW of each."""
    directory.mkdir()
    generator, tensors, deltas = torch.Generator().manual_seed(seed), {}, {}
    for module, rows in modules.items():
        lora_A = torch.randn(2, WIDTH, generator=generator)
        lora_B = torch.randn(rows, 2, generator=generator)
        tensors |= {f"{P}{module}.lora_A.weight": lora_A, f"{P}{module}.lora_B.weight": lora_B}
        deltas[module] = SCALING * lora_B @ lora_A
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": names}
    config["base_model_name_or_path"] = str(base)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory, deltas


def check(model, base, merged, wanted, workshop, tmp_path):
    """The saved and the folded merge have these weights; the others are those of the model."""
    merged.fold(base, tmp_path / "folded")
    merged.save_pretrained(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), tmp_path / "saved")
    found = loaded.merge_and_unload().state_dict()
    folded = type(model).from_pretrained(tmp_path / "folded").state_dict()
    for name, values in model.state_dict().items():
        expected = values + wanted.get(name.removesuffix(".weight"), 0)
        workshop.assert_close(folded[name], expected, 1e-6, name)
        workshop.assert_close(found[name], expected, 1e-5, name)


def fused(deltas, leaves):
    return torch.cat([deltas.get(path(leaf), torch.zeros(HEIGHTS[leaf], WIDTH)) for leaf in leaves])


ATTENTION, GATED = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]


@pytest.mark.parametrize("leaves", [[*ATTENTION, *GATED], ["q_proj", "v_proj", "up_proj"]])
def test_a_lora_on_parts_is_one_on_the_fused_layer(leaves, workshop, tmp_path):
    model, base = model_of("Phi3ForCausalLM"), tmp_path / "base"
    model.save_pretrained(base)
    modules = {path(leaf): HEIGHTS[leaf] for leaf in leaves}
    adapter, deltas = written(tmp_path / "adapter", modules, base)
    merged = merge_adapters([adapter], "linear", base_model=str(base))
    wanted = {
        path("qkv_proj"): fused(deltas, ATTENTION),
        path("gate_up_proj"): fused(deltas, GATED),
    }
    check(model, base, merged, wanted, workshop, tmp_path)


def test_a_lora_on_a_fused_layer_is_one_on_each_part(workshop, tmp_path):
    model, base = model_of("LlamaForCausalLM"), tmp_path / "base"
    model.save_pretrained(base)
    modules = {path(leaf): rows for leaf, rows in FUSED.items()}
    adapter, deltas = written(tmp_path / "adapter", modules, base)
    merged = merge_adapters([adapter], "linear", base_model=str(base))
    wanted = {}
    for leaf, leaves in {"qkv_proj": ATTENTION, "gate_up_proj": GATED}.items():
        parts = deltas[path(leaf)].split([HEIGHTS[part] for part in leaves])
        wanted |= {path(part): delta for part, delta in zip(leaves, parts, strict=True)}
    check(model, base, merged, wanted, workshop, tmp_path)


def test_the_fused_name_in_a_checkpoint_is_split_by_the_rules_of_transformers(workshop, tmp_path):
    model, base = model_of("NomicBertForMaskedLM"), tmp_path / "base"
    model.save_pretrained(base)
    fused_name = "nomic_bert.encoder.layers.0.attn.Wqkv"
    adapter, deltas = written(tmp_path / "adapter", {fused_name: 3 * WIDTH}, base)
    merged = merge_adapters([adapter], "linear", base_model=str(base))
    parts = dict(zip(ATTENTION, deltas[fused_name].split(WIDTH), strict=True))
    prefix = "nomic_bert.layers.0.self_attn."
    wanted = {prefix + leaf: delta for leaf, delta in parts.items()}
    check(model, base, merged, wanted, workshop, tmp_path)


def test_a_fused_layer_and_its_parts_are_one_weight(workshop, tmp_path):
    model, base = model_of("Phi3ForCausalLM"), tmp_path / "base"
    model.save_pretrained(base)
    one, first = written(tmp_path / "one", {path("qkv_proj"): FUSED["qkv_proj"]}, base)
    modules = {path(leaf): HEIGHTS[leaf] for leaf in ATTENTION}
    two, second = written(tmp_path / "two", modules, base, seed=1)
    merged = merge_adapters([one, two], "linear", [2, -1], base_model=str(base))
    assert list(merged.modules) == [path("qkv_proj")]
    wanted = {path("qkv_proj"): 2 * first[path("qkv_proj")] - fused(second, ATTENTION)}
    check(model, base, merged, wanted, workshop, tmp_path)


def test_a_fused_layer_of_another_size_is_refused(tmp_path):
    model, base = hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS)), tmp_path / "base"
    model.save_pretrained(base)
    adapter, _ = written(tmp_path / "adapter", {path("qkv_proj"): 99}, base)
    with pytest.raises(MismatchError, match="qkv_proj"):
        merge_adapters([adapter], "linear", base_model=str(base))
