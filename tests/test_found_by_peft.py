"""What is written is looked up as PEFT looks it up, in the base model as transformers builds it."""

import json
import warnings

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from pcb_peft import MismatchError, merge_adapters
from pcb_peft.commands.cli import main

pytestmark = pytest.mark.slow  # whole models

P = "base_model.model."
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MIXTURE = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}


@pytest.fixture
def llama(tmp_path):
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def mixture(tmp_path):
    config = hf.Qwen2MoeConfig(
        **SIZES, **MIXTURE, shared_expert_intermediate_size=12, mlp_only_layers=[1]
    )
    hf.Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def written(directory, modules, base, rank=2, seed=0, **config):
    """A LoRA with tensors of these names: module to (out, in)."""
    directory.mkdir()
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, (rows, cols) in modules.items():
        tensors[f"{P}{module}.lora_A.weight"] = torch.randn(rank, cols, generator=generator)
        tensors[f"{P}{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({module.rpartition(".")[2] for module in modules})
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names}
    fields |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def changes(base, adapter):
    """What PEFT adds to each weight that it changes; it must find tensors for all that it adapts."""
    model_class = hf.AutoModelForCausalLM
    before = model_class.from_pretrained(base).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = peft.PeftModel.from_pretrained(model_class.from_pretrained(base), adapter)
    after = adapted.merge_and_unload().state_dict()
    return {n: after[n] - before[n] for n in before if not torch.equal(after[n], before[n])}


def test_the_report_of_a_saved_merge_counts_the_modules_that_load(llama, tmp_path):
    adapter = written(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (16, 16)}, llama)
    merged = merge_adapters([adapter, adapter], "linear")
    saved = merged.save_pretrained(tmp_path / "out")
    found = f"1 of 1 modules load in PEFT {peft.__version__} on LlamaForCausalLM of transformers {hf.__version__}"
    assert found in saved.report.notes
    assert f"\n{found}.\n" in (tmp_path / "out" / "README.md").read_text()
    assert saved.modules.entries == merged.modules.entries


def test_the_command_says_how_many_modules_load(llama, tmp_path, capsys):
    modules = {f"model.layers.{i}.mlp.up_proj": (24, 16) for i in (0, 1)}
    adapter = str(written(tmp_path / "a", modules, llama))
    assert main(["merge", adapter, adapter, "-o", str(tmp_path / "out")]) == 0
    assert "2 of 2 modules load in PEFT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "shape", "found"),
    [
        pytest.param("model.layers.7.mlp.up_proj", (24, 16), "layers.7", id="no such layer"),
        pytest.param("model.layers.0.mlp.up_proj", (20, 16), "size mismatch", id="other shape"),
    ],
)
def test_what_peft_would_not_load_is_not_written(llama, tmp_path, module, shape, found):
    modules = {"model.layers.0.self_attn.q_proj": (16, 16), module: shape}
    adapter = written(tmp_path / "a", modules, llama)
    merged = merge_adapters([adapter, adapter], "linear")
    with pytest.raises(MismatchError, match=found):
        merged.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_peft_itself_loses_are_said_to_be_so(tmp_path):
    """transformers renames ``shared_expert.``; PEFT does it to adapters, too, and there the dot is the s."""
    if not hasattr(hf, "LagunaConfig"):
        pytest.skip(f"transformers {hf.__version__} has no Laguna")
    layers = {"mlp_layer_types": ["dense", "sparse"], "num_attention_heads_per_layer": [2, 2]}
    experts = {**MIXTURE, "shared_expert_intermediate_size": 12, "head_dim": 8}
    config = hf.LagunaConfig(**SIZES, **experts, **layers, layer_types=["full_attention"] * 2)
    hf.LagunaForCausalLM(config).save_pretrained(tmp_path / "base")
    module = "model.layers.1.mlp.shared_experts.up_proj"
    path = written(tmp_path / "one", {module: (12, 16)}, tmp_path / "base")
    merged = merge_adapters([path], "linear")
    with pytest.raises(MismatchError, match=rf"gives {module} another name"):
        merged.save_pretrained(tmp_path / "out")
    merged.fold(tmp_path / "base", tmp_path / "folded")
    before, after = (
        hf.LagunaForCausalLM.from_pretrained(tmp_path / name).state_dict()[f"{module}.weight"]
        for name in ("base", "folded")
    )
    assert torch.allclose(after - before, merged.delta(module), atol=1e-6)


def test_vectors_of_layers_that_the_model_has_fused_are_refused_by_name(tmp_path):
    hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, pad_token_id=0)).save_pretrained(tmp_path / "base")
    split = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    config = peft.IA3Config(
        target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    peft.get_peft_model(split, config).save_pretrained(tmp_path / "a")
    merged = merge_adapters([tmp_path / "a"], "linear", base_model=tmp_path / "base")
    with pytest.raises(MismatchError, match=r"not find model\.layers\.0\.self_attn\.v_proj.+ fold"):
        merged.save_pretrained(tmp_path / "out")


def test_without_the_configuration_nothing_is_looked_up(tmp_path):
    adapter = written(tmp_path / "a", {"model.layers.7.mlp.up_proj": (24, 16)}, "nobody/nothing")
    saved = merge_adapters([adapter, adapter], "linear").save_pretrained(tmp_path / "out")
    assert not any("load in PEFT" in note for note in saved.report.notes)


@pytest.mark.parametrize("rank_pattern", [False, True])
def test_layers_that_share_their_names_with_experts_load(mixture, tmp_path, rank_pattern):
    """PEFT takes every ``up_proj`` of such a model for one of an expert."""
    modules = {
        "model.layers.0.mlp.shared_expert.up_proj": (12, 16),
        "model.layers.1.mlp.down_proj": (16, 24),
        "model.layers.0.mlp.gate": (3, 16),  # the router
        "model.layers.0.self_attn.q_proj": (16, 16),
    }
    one = written(tmp_path / "one", modules, mixture)
    two = written(tmp_path / "two", dict(list(modules.items())[:2]), mixture, seed=1)
    merged = merge_adapters([one, two], "linear", base_model=str(mixture))
    merged.save_pretrained(tmp_path / "out", rank_pattern=rank_pattern)
    found = changes(mixture, tmp_path / "out")
    assert found.keys() == {f"{module}.weight" for module in modules}
    for module in modules:
        assert torch.dist(found[f"{module}.weight"], merged.delta(module)) < 1e-5


def test_modules_whose_paths_end_alike_stay_apart(tmp_path):
    """PEFT takes a name for the end of a path."""
    text = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    vision = {**text, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = hf.CLIPConfig(text_config=text, vision_config={**vision, "num_hidden_layers": 2})
    hf.CLIPModel(config).save_pretrained(tmp_path / "clip")
    modules = {"text_model.encoder.layers.0.mlp.fc1": (24, 16)}
    module, model_class = next(iter(modules)), hf.CLIPModel
    assert module in dict(model_class(config).named_modules())
    adapter = written(tmp_path / "a", modules, tmp_path / "clip", task_type=None)
    merged = merge_adapters([adapter, adapter], "linear")
    saved = merged.save_pretrained(tmp_path / "out")
    assert any("1 of 1 modules load in PEFT" in note for note in saved.report.notes)


def experts(layers=2):
    shapes = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}": shape
        for layer in range(layers)
        for expert in range(3)
        for name, shape in shapes.items()
    }


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("kind", ["Qwen2Moe", "Qwen3Moe"])  # PEFT converts names of one of them
def test_experts_one_by_one_load_even_with_a_rank_pattern(kind, tmp_path):
    mixture = tmp_path / "mixture"
    config = getattr(hf, f"{kind}Config")(**SIZES, **MIXTURE, shared_expert_intermediate_size=12)
    getattr(hf, f"{kind}ForCausalLM")(config).save_pretrained(mixture)
    modules = {**experts(), "model.layers.0.self_attn.q_proj": (16, 16)}
    both = [written(tmp_path / name, modules, mixture, seed=s) for s, name in enumerate("ab")]
    merged = merge_adapters(both, "linear", rank=0.8, base_model=str(mixture))
    assert len({entry.rank for entry in merged.modules.entries.values()}) > 1
    merged.save_pretrained(tmp_path / "out", rank_pattern=True)
    found = changes(mixture, tmp_path / "out")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    wanted = [
        torch.cat(
            [merged.delta(f"model.layers.0.mlp.experts.{e}.{p}_proj") for p in ("gate", "up")]
        )
        for e in range(3)
    ]
    assert torch.dist(found[name], torch.stack(wanted)) < 1e-4


def test_a_router_under_two_names_is_one(mixture, tmp_path):
    """Before transformers 5 it was a linear layer; now it is a parameter."""
    router = {"model.layers.0.mlp.gate": (3, 16)}
    old = written(tmp_path / "old", router, "somewhere/base", peft_version="0.17.0")
    fields = {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    new = written(tmp_path / "new", router, "somewhere/base", seed=1, **fields)
    merged = merge_adapters([old, new], "linear", [2, 3])
    merged.save_pretrained(tmp_path / "out")
    found = changes(mixture, tmp_path / "out")
    assert list(found) == ["model.layers.0.mlp.gate.weight"]
    parts = [changes(mixture, new), changes(mixture, written(tmp_path / "b", router, "", **fields))]
    name = "model.layers.0.mlp.gate.weight"
    assert torch.dist(found[name], 2 * parts[1][name] + 3 * parts[0][name]) < 1e-4
