"""Quantised base models: folds, and changes that depend on W, beside the values that the libraries compute with."""

import copy
import json
import shutil

import models
import peft
import pytest
import torch
import transformers
from helpers import content, ia3, lora
from quantised_models import GOLDEN, golden, plain, quantised
from safetensors.torch import load_file, save_file

from pcb_peft import (
    BaseModelError,
    MismatchError,
    extract_adapter,
    fold_adapter,
    load_adapter,
    merge,
    merge_adapters,
)
from pcb_peft.base.model import open_base_model
from pcb_peft.commands.cli import main
from pcb_peft.data.models import load_base

SCHEMES = ("nf4", "int8", "compressed")
TARGETS = ("q_proj", "down_proj")
TOKENS = torch.arange(12).reshape(2, 6)
ROUNDING = 2**-8  # of bfloat16


def loaded(directory):
    """The model, and nothing missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    return model.eval()


def adapter_on(workshop, model, config=None, name="adapter"):
    return workshop.adapter(model, config or lora(*TARGETS), name)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fold_computes_what_the_adapter_was_trained_on(workshop, tmp_path, scheme):
    base, dequantised = quantised(scheme, tmp_path / "q"), plain(tmp_path / "d", scheme)
    adapter = adapter_on(workshop, loaded(dequantised))
    fold_adapter(adapter, base, tmp_path / "folded", dequantize=True, progress=False)
    expected = peft.PeftModel.from_pretrained(loaded(dequantised), adapter)
    with torch.no_grad():
        wanted = expected(TOKENS).logits
        found = loaded(tmp_path / "folded")(TOKENS).logits
        bare = loaded(plain(tmp_path / "p"))(TOKENS).logits
    assert (found - wanted).norm() < 0.01 * wanted.norm() < 0.1 * (bare - wanted).norm()
    state = expected.merge_and_unload().state_dict()
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    assert folded.keys() == golden("plain/").keys()
    for name, values in folded.items():
        if f"{scheme}/values/{name}" in load_file(GOLDEN):
            assert values.dtype == torch.bfloat16
            torch.testing.assert_close(values.float(), state[name], rtol=ROUNDING, atol=1e-6)
        else:
            assert torch.equal(values, state[name])
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def test_shards_and_files_that_describe_the_quantisation(workshop, tmp_path):
    one, many = quantised("nf4", tmp_path / "one"), quantised("nf4", tmp_path / "many", shards=3)
    for name in ("quantize_config.json", "generation_config.json"):
        (many / name).write_text("{}")
    adapter = adapter_on(workshop, loaded(plain(tmp_path / "p")))
    for base in (one, many):
        fold_adapter(adapter, base, base.with_suffix(".out"), dequantize=True, progress=False)
    written = content(many.with_suffix(".out"))
    assert "generation_config.json" in written
    assert "quantize_config.json" not in written
    index = json.loads(written["model.safetensors.index.json"])
    single = load_file(tmp_path / "one.out" / "model.safetensors")
    assert index["weight_map"].keys() == single.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in single.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many.out" / file)[name], single[name])


def test_a_quantised_base_is_refused_with_both_ways_out(workshop, tmp_path, capsys):
    base = quantised("nf4", tmp_path / "q")
    adapter = adapter_on(workshop, loaded(plain(tmp_path / "p")))
    ways = (
        r"is quantised \(it holds .+dequantize=True \(--dequantize\).+model that it was made from"
    )
    with pytest.raises(BaseModelError, match=ways):
        fold_adapter(adapter, base, tmp_path / "out")
    with pytest.raises(BaseModelError, match=ways):
        extract_adapter(base, tmp_path / "p", rank=2)
    assert main(["fold", str(adapter), str(base), "-o", str(tmp_path / "out")]) == 2
    assert "--dequantize" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_distance_between_the_bases(workshop, tmp_path, capsys):
    base, original = quantised("nf4", tmp_path / "q"), plain(tmp_path / "p")
    adapter = adapter_on(workshop, loaded(original))
    values, before = golden("nf4/values/"), golden("plain/")
    deltas = {m: load_adapter(adapter).delta(m) for m in load_adapter(adapter).modules}
    distance = sum((values[f"{m}.weight"] - before[f"{m}.weight"]).square().sum() for m in deltas)
    expected = float((distance / sum(x.square().sum() for x in deltas.values())).sqrt())
    options = {"dequantize": True, "progress": False}
    one = fold_adapter(adapter, base, tmp_path / "a", compare_base=original, **options)
    other = fold_adapter(adapter, original, tmp_path / "b", compare_base=base, progress=False)
    assert one.base_gap.ratio == pytest.approx(expected, rel=1e-5)
    assert other.base_gap.ratio == pytest.approx(expected, rel=1e-5)
    assert fold_adapter(adapter, base, tmp_path / "c", **options).base_gap is None
    words = [
        "fold",
        adapter,
        base,
        "-o",
        tmp_path / "d",
        "--dequantize",
        "--compare-base",
        original,
    ]
    assert main([str(word) for word in words]) == 0
    assert f"differ by {expected:.3g} times ‖ΔW‖" in capsys.readouterr().out
    merged = merge_adapters([adapter], "linear", [0.002], progress=False)
    folded = merged.fold(base, tmp_path / "e", dequantize=True, compare_base=original)
    assert folded.base_gap.ratio == pytest.approx(500 * expected, rel=1e-5)
    assert str(folded.base_gap) in folded.report.notes
    assert "only a fold into the one" in str(folded.base_gap)
    with pytest.raises(MismatchError, match=r"not in the base model|not the same model"):
        fold_adapter(
            adapter,
            base,
            tmp_path / "f",
            compare_base=models.save(models.original("llama"), tmp_path / "l"),
            **options,
        )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_changes_that_depend_on_the_weight(workshop, tmp_path, scheme):
    base, dequantised = quantised(scheme, tmp_path / "q"), plain(tmp_path / "d", scheme)
    dora = adapter_on(workshop, loaded(dequantised), lora(*TARGETS, use_dora=True), "dora")
    vector = adapter_on(workshop, loaded(dequantised), ia3(*TARGETS), "vector")
    merged = merge_adapters(
        [dora, vector], "linear", rank="full", base_model=base, dequantize=True, progress=False
    )
    before = loaded(dequantised).double().state_dict()
    wanted = dict.fromkeys(before, 0)
    for adapter in (dora, vector):
        model = peft.PeftModel.from_pretrained(loaded(dequantised).double(), adapter)
        after = model.merge_and_unload().state_dict()
        wanted = {name: wanted[name] + after[name] - before[name] for name in before}
    for module in merged.modules:
        workshop.assert_close(merged.delta(module), wanted[f"{module}.weight"], 1e-5, module)
    read = load_adapter(dora, base_model=base, dequantize=True)
    module = next(iter(merged.modules))
    assert read.delta(module, base, dequantize=True).norm() > 0
    merged.fold(base, tmp_path / "folded", progress=False)  # as its recipe says
    (tmp_path / "recipe.yaml").write_text(merged.recipe.to_yaml())
    assert "dequantize: true" in merged.recipe.to_yaml()
    again = merge(tmp_path / "recipe.yaml", progress=False)
    assert torch.equal(again.delta(module), merged.delta(module))


def test_extraction_from_a_quantised_base(tmp_path):
    base, dequantised = quantised("nf4", tmp_path / "q"), plain(tmp_path / "d", "nf4")
    tuned = shutil.copytree(dequantised, tmp_path / "t")
    tensors, name = load_file(tuned / "model.safetensors"), "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"] += torch.ones(64, 1) @ torch.arange(64.0)[None]
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    found = extract_adapter(tuned, base, rank=1, dequantize=True, progress=False)
    expected = torch.arange(64.0).expand(64, 64)
    torch.testing.assert_close(found.delta(name), expected, rtol=1e-4, atol=1e-4)


def test_stacked_experts_in_mxfp4(workshop, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2}
    config = transformers.GptOssConfig(
        **sizes,
        vocab_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    base = models.save(model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    experts = "model.layers.0.mlp.experts"
    for part, rows in (("gate_up_proj", 64), ("down_proj", 32)):
        blocks = torch.randint(0, 256, (2, rows, 1, 16), dtype=torch.uint8)
        scales = torch.randint(118, 123, (2, rows, 1), dtype=torch.uint8)
        values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        model.get_parameter(f"{experts}.{part}").data.copy_(values)
        del tensors[f"{experts}.{part}"]
        tensors |= {f"{experts}.{part}_blocks": blocks, f"{experts}.{part}_scales": scales}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    described = json.loads((base / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "mxfp4"}
    (base / "config.json").write_text(json.dumps(described))
    target = lora("q_proj", target_parameters=["mlp.experts.down_proj"])
    adapter = workshop.adapter(copy.deepcopy(model), target)
    fold_adapter(adapter, base, tmp_path / "folded", dequantize=True, progress=False)
    plain_model, options = copy.deepcopy(model), {"dtype": torch.float32, "dequantize": True}
    expected = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        wanted, found = expected(TOKENS).logits, loaded(tmp_path / "folded")(TOKENS).logits
        bare, there = (m(TOKENS).logits for m in (plain_model, load_base(base, None, **options)))
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    torch.testing.assert_close(there, bare, rtol=1e-5, atol=1e-6)


def test_an_open_quantised_base_can_be_pickled(tmp_path):
    import pickle

    base = open_base_model(quantised("nf4", tmp_path / "q"), dequantize=True)
    again = pickle.loads(pickle.dumps(base))
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(again.weight(name), base.weight(name))
    assert base.shape(name) == (64, 64)
