"""Names with wrappers of the model, or with the adapter's name in them, are read as PEFT would have saved them."""

import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pcb_peft import AdapterError, UnsupportedError, load_adapter, merge_adapters
from pcb_peft.formats.plain_names import without_wrappers

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKENS = torch.tensor([[1, 5, 9, 3]])


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def trained(config, seed=1):
    """A PeftModel whose adapter changes something."""
    torch.manual_seed(seed)
    model = get_peft_model(base(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


CONFIGS = {
    "LoRA": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["lm_head"],
        rank_pattern={"model.layers.1.mlp.up_proj": 2},
        alpha_pattern={"model.layers.1.mlp.up_proj": 16},
    ),
    "DoRA": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """The directory of an adapter, and the PeftModel that it came from."""
    directory = tmp_path_factory.mktemp(request.param) / "adapter"
    model = trained(CONFIGS[request.param])
    model.save_pretrained(directory)
    return directory, model


def renamed(directory, target, rename):
    """A copy of an adapter with other names in its file."""
    shutil.copytree(directory, target)
    file = target / "adapter_model.safetensors"
    save_file({rename(name): values for name, values in load_file(file).items()}, file)
    return target


def deltas(adapter, **options):
    return {module: adapter.delta(module, **options) for module in adapter.modules}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[module], other[module]) for module in one)


WRAPPED = {
    "compiled layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "checkpointed layers": lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "FSDP layers": lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."),
    "compiled model": lambda name: f"_orig_mod.{name}",
    "DDP around PEFT": lambda name: f"module.{name}",
    "DDP below PEFT": lambda name: name.replace("base_model.model.", "base_model.model.module."),
}


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_anywhere_in_a_name_change_nothing(saved, tmp_path, rename):
    directory, _ = saved
    base().save_pretrained(tmp_path / "base")
    options = {"base_model": tmp_path / "base"}
    wrapped = load_adapter(renamed(directory, tmp_path / "wrapped", rename), **options)
    plain = load_adapter(directory, **options)
    assert_same(deltas(wrapped, **options), deltas(plain, **options))
    assert wrapped.head.parameters.keys() == plain.head.parameters.keys()


def test_a_checkpoint_with_the_name_of_the_adapter_is_what_peft_loads(saved, tmp_path):
    directory, model = saved
    state = model.state_dict()
    tensors = {
        name: values.contiguous()
        for name, values in state.items()
        if ".default" in name  # what belongs to the adapter: not base_layer, not original_module
    }
    target = tmp_path / "raw"
    shutil.copytree(directory, target)
    save_file(tensors, target / "adapter_model.safetensors")
    base().save_pretrained(tmp_path / "base")
    options = {"base_model": tmp_path / "base"}
    assert_same(
        deltas(load_adapter(target, **options), **options),
        deltas(load_adapter(directory, **options), **options),
    )
    assert load_adapter(target, **options).head.parameters.keys() == (
        load_adapter(directory, **options).head.parameters.keys()
    )


def test_a_merge_of_a_wrapped_and_a_plain_adapter_does_in_peft_what_both_do(tmp_path):
    directories = []
    for seed in (1, 2):
        directories.append(tmp_path / f"plain-{seed}")
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        trained(config, seed).save_pretrained(directories[-1])
    wrapped = renamed(
        directories[0],
        tmp_path / "wrapped",
        lambda n: n.replace(".self_attn", "._orig_mod.self_attn"),
    )
    merge_adapters([wrapped, directories[1]], "linear").save_pretrained(tmp_path / "merged")
    model = PeftModel.from_pretrained(base(), directories[0])
    model.load_adapter(directories[1], "second")
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    merged = PeftModel.from_pretrained(base(), tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, model.eval()(TOKENS).logits)


def test_patterns_forget_wrappers_too(tmp_path):
    model = trained(CONFIGS["LoRA"])
    model.save_pretrained(tmp_path / "plain")
    target = renamed(
        tmp_path / "plain", tmp_path / "wrapped", lambda n: n.replace(".mlp", "._orig_mod.mlp")
    )
    file = target / "adapter_config.json"
    config = json.loads(file.read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = {k.replace(".mlp", "._orig_mod.mlp"): v for k, v in config[field].items()}
    file.write_text(json.dumps(config))
    assert_same(deltas(load_adapter(target)), deltas(load_adapter(tmp_path / "plain")))


def test_two_adapters_in_one_file_are_refused_by_name(tmp_path):
    trained(CONFIGS["DoRA"]).save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "adapter_model.safetensors"
    tensors = load_file(file)
    both = {
        name.replace(".weight", f".{adapter}.weight"): values.clone()
        for name, values in tensors.items()
        if name.endswith(".weight")
        for adapter in ("chosen", "rejected")
    }
    save_file(both, file)
    with pytest.raises(
        UnsupportedError, match=r"holds the adapters chosen, rejected.*selected_adapters"
    ):
        load_adapter(tmp_path / "one")


@pytest.mark.parametrize("with_base", [True, False])
def test_tinker_s_name_of_the_output_layer_is_read(tmp_path, with_base):
    base().save_pretrained(tmp_path / "base")
    model = trained(LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model.save_pretrained(tmp_path / "tinker", save_embedding_layers=False)
    file = tmp_path / "tinker" / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    output, tinkers = "base_model.model.lm_head.", "base_model.model.model.unembed_tokens."
    renamed = {name.replace(output, tinkers): values for name, values in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)
    given = tmp_path / "base" if with_base else None
    merged = merge_adapters([tmp_path / "tinker"], "linear", base_model=given)
    merged.save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    trained(CONFIGS["LoRA"]).save_pretrained(tmp_path / "one")
    file = tmp_path / "one" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {f"module.{name}": tensors[name].clone()}, file)
    with pytest.raises(AdapterError, match=r"are one tensor under two names"):
        load_adapter(tmp_path / "one")


def test_words_that_only_look_like_wrappers_stay():
    name = "base_model.model.modules.module_list.0.my_orig_mod.module.weight"  # LeViT has such a "module"
    assert without_wrappers(name) == name
