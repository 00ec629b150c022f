"""What adapters replace (modules_to_save) when they are folded."""

import json

import peft
import pytest
import transformers
from safetensors.torch import load_file

from pcb_peft import MismatchError, UnsupportedError, fold_adapter, load_adapter, merge_adapters

pytestmark = pytest.mark.slow  # whole models

HEADED = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
ENDS = ["embed_tokens", "lm_head"]
COPIES = ("", "modules_to_save.", "original_module.")
CLASSIFIER = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")


@pytest.mark.parametrize(("kind", "config"), [("llama", HEADED), ("bert", CLASSIFIER)])
def test_a_fold_replaces_what_the_adapter_replaces(workshop, tmp_path, kind, config):
    adapter = workshop.adapter(kind, config)
    fold_adapter(adapter, workshop.base(kind), tmp_path / "out")
    merged = peft.PeftModel.from_pretrained(workshop.model(kind), adapter).merge_and_unload()
    wanted = merged.state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in found.items():
        workshop.assert_close(values, wanted[name], 1e-7, name)
    assert not (tmp_path / "out" / "heads").exists()


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
@pytest.mark.parametrize("labels", [None, ["bad", "fair", "good"]])
def test_a_head_that_the_base_does_not_hold_is_a_part_of_the_folded_model(
    workshop, tmp_path, shard, labels
):
    """As in PEFT's model: its class is the classifier's, and its classes have their names."""
    adapter = workshop.adapter("bert", CLASSIFIER)
    if labels:
        (adapter / "task.json").write_text(json.dumps({"labels": labels}))
    encoder, model_class = tmp_path / "encoder", transformers.BertForSequenceClassification
    workshop.model("bert").bert.save_pretrained(encoder, max_shard_size=shard)
    load_adapter(adapter).fold(encoder, tmp_path / "out")
    folded, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    fresh = model_class.from_pretrained(encoder, num_labels=3)
    wanted = peft.PeftModel.from_pretrained(fresh, adapter).merge_and_unload().state_dict()
    for name, values in folded.state_dict().items():
        workshop.assert_close(values, wanted[name], 1e-6, name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    names = labels or ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert [config["id2label"][str(number)] for number in range(3)] == names
    assert not (tmp_path / "out" / "heads").exists()


def test_a_class_that_calls_its_model_by_another_name(workshop, tmp_path):
    """``transformer.layers.0`` of LlamaForQuestionAnswering is ``layers.0`` in the files of a LlamaModel."""
    model_class, base = transformers.LlamaForQuestionAnswering, tmp_path / "base"
    workshop.model("llama").model.save_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="QUESTION_ANS")
    adapter = workshop.adapter(model_class.from_pretrained(base), config)
    fold_adapter(adapter, base, tmp_path / "out")
    folded = model_class.from_pretrained(tmp_path / "out").state_dict()
    loaded = peft.PeftModel.from_pretrained(model_class.from_pretrained(base), adapter)
    for name, values in loaded.merge_and_unload().state_dict().items():
        workshop.assert_close(folded[name], values, 1e-6, name)


def test_a_head_of_an_unknown_class_is_written_beside_the_fold_and_said_aloud(workshop, tmp_path):
    adapter = workshop.adapter("bert", CLASSIFIER)
    workshop.edit_config(adapter, task_type="FEATURE_EXTRACTION")
    workshop.model("bert").bert.save_pretrained(tmp_path / "encoder")
    with pytest.warns(UserWarning, match=r"has no classifier.+ in heads/adapter\.safetensors"):
        load_adapter(adapter).fold(tmp_path / "encoder", tmp_path / "out")
    head = load_file(tmp_path / "out" / "heads" / "adapter.safetensors")
    saved = load_file(adapter / "adapter_model.safetensors")
    assert set(head) == {"classifier.weight", "classifier.bias"}
    for name, values in head.items():
        workshop.assert_close(values, saved[f"base_model.model.{name}"], 0, name)


def test_heads_that_several_adapters_have_are_written_beside_the_fold(workshop, tmp_path):
    adapters = workshop.adapters("llama", [HEADED, HEADED])
    merged = merge_adapters(adapters, "linear")
    merged.fold(workshop.base("llama"), tmp_path / "out")
    heads = sorted(path.name for path in (tmp_path / "out" / "heads").iterdir())
    assert heads == ["adapter1.safetensors", "adapter2.safetensors"]
    folded = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    workshop.assert_close(folded, workshop.model("llama").lm_head.weight, 0)


def test_an_adapter_with_added_tokens_is_read_as_peft_saves_it(workshop, tmp_path):
    """PEFT saves both ends three times, as it sees that the vocabulary is another one."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=ENDS)
    larger = workshop.model("llama")
    larger.resize_token_embeddings(larger.config.vocab_size + 3, mean_resizing=False)
    workshop.peft_model(larger, config).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {f"base_model.model.lm_head.{copy}weight" for copy in COPIES} < saved.keys()
    fold_adapter(tmp_path / "adapter", workshop.base("llama"), tmp_path / "out")
    fresh = workshop.model("llama")
    fresh.resize_token_embeddings(larger.config.vocab_size, mean_resizing=False)
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    wanted, found = merged.state_dict(), workshop.state(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        workshop.assert_close(values, wanted[name], 1e-6, name)


def test_all_biases_and_a_head_are_read_as_peft_saves_them(workshop, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", bias="all")
    adapter = workshop.adapter("bert", config)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {f"base_model.model.classifier.{copy}bias" for copy in COPIES} < saved.keys()
    fold_adapter(adapter, workshop.base("bert"), tmp_path / "out")
    merged = peft.PeftModel.from_pretrained(workshop.model("bert"), adapter).merge_and_unload()
    for name, values in workshop.state(tmp_path / "out").items():
        workshop.assert_close(values, merged.state_dict()[name], 1e-6, name)


@pytest.mark.parametrize("copy", ["modules_to_save", "original_module"])
def test_what_is_no_copy_of_what_peft_loads_is_refused(workshop, copy):
    adapter = workshop.adapter("llama", HEADED)
    head = "base_model.model.lm_head"

    def other(tensors):
        values = tensors.pop(f"{head}.weight")
        return tensors | {f"{head}.{copy}.weight": values}

    with pytest.raises(UnsupportedError, match=rf"lm_head\.{copy}\.weight"):
        load_adapter(workshop.edit_tensors(adapter, other))


def test_a_copy_with_other_values_is_refused(workshop):
    adapter = workshop.adapter("llama", HEADED)
    head = "base_model.model.lm_head"

    def more(tensors):
        return tensors | {f"{head}.modules_to_save.weight": tensors[f"{head}.weight"] + 1}

    with pytest.raises(UnsupportedError, match=r"lm_head\.modules_to_save\.weight"):
        load_adapter(workshop.edit_tensors(adapter, more))


def test_a_head_of_another_shape_is_refused(workshop, tmp_path):
    adapter = workshop.adapter("llama", HEADED)
    workshop.edit_tensors(
        adapter, lambda tensors: {k: v[:3] if "lm_head" in k else v for k, v in tensors.items()}
    )
    with pytest.raises(MismatchError, match=r"lm_head.weight.*\(3, 16\).*\(32, 16\)"):
        fold_adapter(adapter, workshop.base("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
