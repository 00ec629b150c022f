"""One weight, one name: transformers' own classes and conversions say which names mean the same."""

import json

import pytest
import torch
import transformers as hf

from pcb_peft.base.architecture import built_on_meta
from pcb_peft.base.canonical import canonical_names

TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
UP = "mlp.up_proj"


def llava():
    vision = hf.CLIPVisionConfig(**VISION, projection_dim=16)
    return hf.LlavaForConditionalGeneration, hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=vision
    )


def gemma3():
    text = hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16)
    vision = hf.SiglipVisionConfig(**VISION)
    return hf.Gemma3ForConditionalGeneration, hf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )


def names_of(directory, model_class, config, **options):
    config.architectures = [model_class.__name__]
    config.save_pretrained(directory)
    return canonical_names(directory, **options)


def modules(model_class, config):
    """The linear layers of a class as transformers builds it: the truth about its names."""
    with torch.device("meta"):
        model = model_class(config)
    return {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}


@pytest.mark.slow
@pytest.mark.parametrize("family", [llava, gemma3])
def test_every_module_of_the_text_classes_is_one_of_the_whole_model(tmp_path, family):
    model_class, config = family()
    names, all_modules = names_of(tmp_path, model_class, config), modules(model_class, config)
    text = config.get_text_config()
    for auto in (hf.AutoModelForCausalLM, hf.AutoModel):
        own = modules(auto._model_mapping[type(text)], text)
        found = {name: names.find(name) for name in own}
        assert set(found.values()) <= all_modules
        assert len(set(found.values())) == len(own)
        assert all(
            there.rpartition(".")[2] == name.rpartition(".")[2] for name, there in found.items()
        )
    assert {name: names.find(name) for name in all_modules} == {name: name for name in all_modules}


@pytest.mark.parametrize("family", [llava, gemma3])
def test_names_of_older_versions_are_converted(tmp_path, family):
    names = names_of(tmp_path, *family())
    old = f"language_model.model.layers.1.{UP}"  # before transformers 4.52
    assert names.find(old) == f"model.language_model.layers.1.{UP}"
    assert names.of([[old]]) == [{old: f"model.language_model.layers.1.{UP}"}]


def test_the_class_may_be_named_in_the_configuration_of_the_text_model(tmp_path):
    """As transformers 4 writes it for Qwen2-VL."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    text = {**TEXT, "rope_parameters": rope, "rope_scaling": rope}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision)
    names_of(tmp_path, hf.Qwen2VLForConditionalGeneration, config)
    fields = json.loads((tmp_path / "config.json").read_text())
    named = fields.pop("architectures", None) or fields["text_config"]["architectures"]
    fields["text_config"]["architectures"] = named
    (tmp_path / "config.json").write_text(json.dumps(fields))
    module = f"model.language_model.layers.0.{UP}"
    found = canonical_names(tmp_path).loaded_as([module])
    assert (found.name, canonical_names(tmp_path).find(module)) == (*named, module)


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model."])
def test_adapters_that_agree_keep_the_names_of_their_class(tmp_path, prefix):
    names = names_of(tmp_path, *gemma3())
    adapters = [[f"{prefix}layers.{layer}.{UP}"] for layer in (0, 1)]
    assert names.of(adapters) == [{name: name for name in adapter} for adapter in adapters]


def test_adapters_that_do_not_agree_get_the_names_of_the_checkpoint(tmp_path):
    names = names_of(tmp_path, *gemma3())
    expected = f"model.language_model.layers.0.{UP}"
    prefixes = ("", "model.", "model.language_model.", "language_model.model.")
    found = names.of([[f"{prefix}layers.0.{UP}"] for prefix in prefixes])
    assert [list(one.values()) for one in found] == [[expected]] * 4


def test_a_module_that_is_in_no_class_has_no_name(tmp_path):
    names = names_of(tmp_path, *gemma3())
    assert names.find("model.layers.0.mlp.sideways_proj") is None
    assert names.of([["model.layers.7.mlp.up_proj"]]) == [{"model.layers.7.mlp.up_proj": None}]


def test_the_class_of_a_task_is_looked_at(tmp_path):
    config = hf.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    names = names_of(tmp_path, hf.BertModel, config, task_types=["SEQ_CLS"])
    adapter = ["bert.encoder.layer.0.output.dense", "classifier"]
    assert names.of([adapter]) == [{name: name for name in adapter}]
    assert names.find(adapter[0]) == "encoder.layer.0.output.dense"


def test_experts_by_either_name(tmp_path):
    config = hf.Qwen3MoeConfig(
        **TEXT, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    )
    names = names_of(tmp_path, hf.Qwen3MoeForCausalLM, config)
    for expert in ("experts.3.up_proj", "experts.gate_up_proj.3", "experts.down_proj"):
        assert names.find(f"model.layers.0.mlp.{expert}") == f"model.layers.0.mlp.{expert}"
        assert names.find(f"layers.0.mlp.{expert}") == f"model.layers.0.mlp.{expert}"


def test_an_unknown_architecture_has_no_names(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    assert not canonical_names(tmp_path)


def test_a_configuration_is_built_once(tmp_path):
    names = names_of(tmp_path, *gemma3())
    assert names.skeleton is canonical_names(tmp_path).skeleton
    assert built_on_meta(tmp_path) is built_on_meta(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["num_hidden_layers"] = 1
    fields["text_config"].pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    module = f"model.language_model.layers.1.{UP}"
    assert (names.find(module), canonical_names(tmp_path).find(module)) == (module, None)
