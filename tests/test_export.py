"""Exports: what is written computes, in the program that reads it, what the adapter computes in PEFT."""

import copy
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import models
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from helpers import distance, ia3, lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_language import save_language_model, write_gguf

from pcb_peft import (
    MismatchError,
    OptionError,
    UnsupportedError,
    check,
    export,
    inspect_adapter,
    load_adapter,
    merge_adapters,
)
from pcb_peft.base.model import lazy_base
from pcb_peft.commands.cli import main
from pcb_peft.data.live_adapters import with_adapter
from pcb_peft.data.models import load_base
from pcb_peft.exporting.profiles import PROFILES
from pcb_peft.exporting.verify import Verification, verify

pytestmark = pytest.mark.slow  # whole models

TARGETS = ("q_proj", "k_proj", "down_proj")
GOLDEN = Path(__file__).parent / "golden" / "gguf.safetensors"
IDS = torch.arange(8)[None]


def mixed(workshop, **options):
    """A LoRA that servers read in five different ways."""
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 7}}
    config = lora(*TARGETS, use_rslora=True, layers_to_transform=[1], **patterns | options)
    return workshop.adapter("llama", config, base=str(workshop.base("llama")))


def exported(adapter, profile, output, **options):
    return export(adapter, profile, output, progress=False, **options)


def configuration(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def test_a_merge_of_classifiers_is_not_said_to_be_served_but_loaded_with_a_head(workshop, tmp_path):
    configs = [lora("query", task_type="SEQ_CLS") for _ in range(2)]
    merged = merge_adapters(workshop.adapters("bert", configs), "linear", progress=False)
    done = exported(merged, "portable", tmp_path / "out")
    assert f'load_merged("BASE_MODEL", "{tmp_path / "out"}", head="adapter1")' in done.next_steps
    assert "vllm serve" not in done.next_steps


def test_portable_is_what_every_server_reads(workshop, tmp_path):
    adapter = mixed(workshop)
    done = exported(adapter, "portable", tmp_path / "out", verified=True)
    config = configuration(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert not {"rank_pattern", "alpha_pattern", "layers_to_transform"} & config.keys()
    assert config["target_modules"] == sorted(config["target_modules"])
    shapes = {x.shape[0] for name, x in tensors_of(tmp_path / "out").items() if "lora_A" in name}
    assert shapes == {3}
    assert done.energy == 1
    assert f" --enable-lora --lora-modules merged={tmp_path / 'out'}" in done.next_steps
    assert done.verification.passed
    assert done.verification.effect > 0.1
    servers = ["vllm==0.10", "sglang", "tensorrt-llm", "openvino", "peft==0.11"]
    assert check(tmp_path / "out", servers).right
    workshop.assert_deltas(load_adapter(tmp_path / "out"), workshop.deltas("llama", adapter), 1e-5)


def tensors_of(directory):
    return load_file(directory / "adapter_model.safetensors")


def test_dense_fills_the_layers_without_a_lora(workshop, tmp_path):
    exported(mixed(workshop), "portable", tmp_path / "out", dense=True)
    assert check(tmp_path / "out", "lorax").right
    adapter = load_adapter(tmp_path / "out")
    assert len(adapter.modules) == 6
    assert not adapter.delta("model.layers.0.self_attn.q_proj").any()
    assert adapter.delta("model.layers.1.self_attn.q_proj").any()


def test_a_family_of_adapters_is_swapped_without_recompiling(workshop, tmp_path):
    large = exported(mixed(workshop), "portable", tmp_path / "large", dense=True, pad_to_rank=8)
    small = workshop.adapter("llama", lora("q_proj", r=2), "little")
    exported(small, "portable", tmp_path / "small", like_adapter=large.output)
    one, other = tensors_of(tmp_path / "large"), tensors_of(tmp_path / "small")
    assert {name: x.shape for name, x in one.items()} == {
        name: x.shape for name, x in other.items()
    }
    found = load_adapter(tmp_path / "small")
    for module, delta in workshop.deltas("llama", small).items():
        workshop.assert_close(found.delta(module), delta, 1e-6)
    with pytest.raises(MismatchError, match=r"which little does not.+--like"):
        exported(large.output, "portable", tmp_path / "x", like_adapter=small)
    with pytest.raises(OptionError, match=r"has rank 3, and is to be padded to 2.+--max-rank 2"):
        exported(mixed(workshop), "portable", tmp_path / "x", pad_to_rank=2)


def test_peft_gets_the_smallest_exact_form(workshop, tmp_path):
    adapter = mixed(workshop)
    twice = merge_adapters([adapter, adapter], "linear", progress=False)
    exported(twice, "peft", tmp_path / "out", base_model=workshop.base("llama"), verified=True)
    ranks = check(tmp_path / "out", "peft")
    assert ranks.right
    found = load_adapter(tmp_path / "out")
    assert {m.rsplit(".")[-1]: e.rank for m, e in found.modules.entries.items()} == {
        "q_proj": 2,
        "k_proj": 3,
        "down_proj": 3,
    }
    for module, delta in workshop.deltas("llama", adapter).items():
        workshop.assert_close(found.delta(module), 2 * delta, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_transformers_gets_a_whole_model(workshop, tmp_path, dtype):
    adapter, base = mixed(workshop), workshop.base("llama")
    done = exported(adapter, "transformers", tmp_path / "out", dtype=dtype, verified=True)
    assert (done.verification.error > 1e-4) == bool(dtype)  # rounded to 8 bits
    folded = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in folded.values()} == {getattr(torch, dtype or "float32")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == (dtype or "float32")
    model = peft.PeftModel.from_pretrained(workshop.model("llama"), adapter)
    for name, values in model.merge_and_unload().state_dict().items():
        if dtype:
            assert torch.equal(folded[name], values.to(torch.bfloat16)), name
        else:
            workshop.assert_close(folded[name], values, 1e-6, name)
    assert base.exists()


@pytest.mark.filterwarnings("ignore:.*newly initialized")
def test_the_line_that_loads_a_classifier_loads_it_with_its_head(workshop, tmp_path):
    base, auto = workshop.base("llama"), transformers.AutoModelForSequenceClassification
    fresh = functools.partial(auto.from_pretrained, base, num_labels=3, pad_token_id=0)
    adapter = workshop.adapter(fresh(), lora("q_proj", task_type="SEQ_CLS"), base=str(base))
    done = exported(adapter, "transformers", tmp_path / "out", verified=True)
    assert done.verification.error < 1e-4 < done.verification.effect
    assert "not for transformers" not in done.check.line
    model = eval(done.usage[0], {auto.__name__: auto})
    wanted = peft.PeftModel.from_pretrained(fresh(), adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, wanted(IDS).logits)


def test_the_lines_that_load_a_merge_of_classifiers_load_it_with_a_head(workshop, tmp_path):
    base, auto = workshop.base("llama"), transformers.AutoModelForSequenceClassification
    first, second = (
        workshop.adapter(
            auto.from_pretrained(base, num_labels=classes),
            lora("q_proj", task_type="SEQ_CLS"),
            name,
        )
        for name, classes in (("first", 3), ("second", 4))
    )
    merge_adapters([first, second], "linear").save_pretrained(tmp_path / "merged")
    done = exported(tmp_path / "merged", "transformers", tmp_path / "out", base_model=base)
    assert "not for transformers, which ignores the heads beside the model" in done.check.line
    found: dict = {"safetensors": safetensors, "auto": auto}
    for line in done.usage:
        exec(line.replace(auto.__name__, "auto"), found)
    (head,) = (v for k, v in tensors_of(first).items() if "lora_" not in k)
    torch.testing.assert_close(found["model"].score.weight, head, check_dtype=False)


def test_an_unchanged_copy_of_a_layer_is_no_obstacle(workshop, tmp_path):
    adapter = workshop.adapter("llama", lora(*TARGETS), base=str(workshop.base("llama")))
    head = load_file(workshop.base("llama") / "model.safetensors")["lm_head.weight"]
    name = "base_model.model.lm_head.weight"
    workshop.edit_tensors(adapter, lambda tensors: tensors | {name: head})
    workshop.edit_config(adapter, modules_to_save=["lm_head"])
    exported(adapter, "portable", tmp_path / "out", verified=True)
    assert name not in tensors_of(tmp_path / "out")
    workshop.edit_tensors(adapter, lambda tensors: tensors | {name: head + 1})
    with pytest.raises(
        UnsupportedError, match=r"layers stored whole \(lm_head.weight\).+--to transf"
    ):
        exported(adapter, "portable", tmp_path / "out2")


@pytest.mark.filterwarnings("ignore:Model has .tie_word")
def test_a_lora_on_a_tied_output_layer_beside_its_copy(workshop, tmp_path):
    model = models.original("llama", tie_word_embeddings=True)
    base = models.save(model, tmp_path / "tied")
    adapter = workshop.adapter(copy.deepcopy(model), lora("lm_head", "q_proj"), base=str(base))
    name = "base_model.model.lm_head.base_layer.weight"
    head = model.lm_head.weight.detach().clone()
    workshop.edit_tensors(adapter, lambda tensors: tensors | {name: head})
    exported(adapter, "portable", tmp_path / "out", verified=True)
    assert name not in tensors_of(tmp_path / "out")
    with pytest.raises(UnsupportedError, match="which the base model ties"):
        exported(adapter, "gguf", tmp_path / "x")


def test_a_profile_that_holds_more_is_a_way_out(workshop, tmp_path):
    adapter = workshop.adapter("llama", lora("embed_tokens"), base=str(workshop.base("llama")))
    with pytest.raises(UnsupportedError, match=r"or to='peft' \(--to peft\), if your program"):
        exported(adapter, "portable", tmp_path / "out")
    exported(adapter, "peft", tmp_path / "out", verified=True)
    assert check(tmp_path / "out", "vllm").right


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(*TARGETS, use_dora=True), r"DoRA \(6 modules\)"),
        (ia3(*TARGETS), r"\(IA\)³ \(6 modules\)"),
        (lora("embed_tokens"), r"a LoRA on embeddings \(model.embed_tokens\)"),
        (lora("q_proj", trainable_token_indices=[1]), "trained token rows"),
        (
            lora("q_proj", modules_to_save=["norm"]),
            r"layers stored whole \(model.layers.0.input_layernorm.weight, .+ and 2 more\)",
        ),
    ],
)
@pytest.mark.parametrize("profile", ["portable", "gguf", "mlx"])
def test_what_a_profile_cannot_hold_is_refused_by_name(workshop, tmp_path, config, words, profile):
    if profile == "mlx" and getattr(config, "use_dora", False):
        pytest.skip("mlx-lm has a DoRA of its own")
    adapter = workshop.adapter("llama", config, base=str(workshop.base("llama")))
    with pytest.raises(
        UnsupportedError, match=rf"{words}.+{profile} cannot.+a fold, which is exact"
    ):
        exported(adapter, profile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_price_of_a_lora_is_measured(workshop, tmp_path):
    base = str(workshop.base("llama"))
    adapter = workshop.adapter("llama", ia3("q_proj", "v_proj"), base=base)
    deltas = workshop.deltas("llama", adapter)
    squares = [np.linalg.svd(x.numpy(), compute_uv=False) ** 2 for x in deltas.values()]
    expected = sum(s[:4].sum() for s in squares) / sum(s.sum() for s in squares)
    with pytest.raises(UnsupportedError, match=r"100.0% at rank 16.+measured on 4 of 4 modules"):
        exported(adapter, "portable", tmp_path / "out")
    done = exported(adapter, "portable", tmp_path / "out", max_rank=4, verified=True)
    assert done.energy == pytest.approx(expected, rel=1e-5)
    assert configuration(tmp_path / "out")["r"] == 4
    whole = exported(adapter, "portable", tmp_path / "all", max_rank=16)
    assert whole.energy == pytest.approx(1)
    for module, delta in deltas.items():
        assert distance(load_adapter(tmp_path / "all").delta(module), delta) < 1e-5
    alone = workshop.adapter("llama", ia3("q_proj"), "alone")
    with pytest.raises(UnsupportedError, match=r"--max-rank 64 --base-model MODEL"):
        exported(alone, "portable", tmp_path / "x")


def test_ranks_above_what_servers_take(workshop, tmp_path):
    adapter = workshop.adapter("llama", lora("q_proj", r=70, lora_alpha=70))
    with pytest.warns(UserWarning, match="rank 70 is more than servers usually"):
        exported(adapter, "portable", tmp_path / "out")
    adapter = workshop.adapter("llama", lora("q_proj", r=600), "higher")
    with pytest.raises(OptionError, match=r"servers take 512 at most.+--max-rank 64"):
        exported(adapter, "portable", tmp_path / "x")


def golden(kind):
    with safe_open(GOLDEN, framework="pt") as file:
        described = json.loads(file.metadata()["models"])
    parts = {"peft": {}, "gguf": {}}
    for name, values in load_file(GOLDEN).items():
        owner, part, rest = name.split("/", 2)
        if owner == kind:
            parts[part][rest] = values
    return described[kind], parts["peft"], parts["gguf"]


@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"],
)
def test_gguf_is_what_the_official_converter_writes(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    described, tensors, expected = golden(kind)
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(described["config"]))
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    modules = sorted(
        {name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors}
    )
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": modules}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    done = exported(
        tmp_path / "adapter", "gguf", tmp_path / "out.gguf", base_model=tmp_path / "base"
    )
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == described["architecture"]
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 3
    found = {one.name: torch.tensor(one.data.copy()) for one in reader.tensors}
    assert found.keys() == expected.keys()
    for name, values in found.items():  # the scaling 2 is in lora_B
        assert torch.equal(values, expected[name] * (2 if name.endswith("lora_b") else 1)), name
    assert "llama-server -m model.gguf --lora" in done.usage[0]
    assert "ADAPTER" in done.usage[1]


def test_gguf_has_one_alpha_and_therefore_one_rank(workshop, tmp_path):
    gguf = pytest.importorskip("gguf")
    adapter = mixed(workshop)
    exported(adapter, "gguf", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    tensors = {one.name: torch.tensor(one.data.copy()) for one in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    for name, module in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
        lora_A, lora_B = (tensors[f"blk.1.{name}.weight.lora_{side}"] for side in "ab")
        delta = alpha / len(lora_A) * lora_B @ lora_A  # as llama.cpp scales
        wanted = workshop.deltas("llama", adapter)[f"model.layers.1.{module}"]
        if name == "attn_q":  # rows in another order
            assert distance(delta.norm(dim=0), wanted.norm(dim=0)) < 1e-5
        else:
            assert distance(delta, wanted) < 1e-5


def test_gguf_refuses_what_llama_cpp_would_abort_on(workshop, tmp_path):
    pytest.importorskip("gguf")
    adapter = workshop.adapter("llama", lora("lm_head"))
    base = models.save(models.original("llama", tie_word_embeddings=True), tmp_path / "tied")
    for profile in ("gguf", "mlx"):
        with pytest.raises(
            UnsupportedError, match=r"lm_head, which the base model ties.+--tied unt"
        ):
            exported(adapter, profile, tmp_path / "x", base_model=base)
    other = workshop.adapter("gpt2", lora("c_attn", fan_in_fan_out=True), "other")
    with pytest.raises(UnsupportedError, match=r"is a gpt2: LoRAs are written as GGUF for llama"):
        exported(other, "gguf", tmp_path / "x", base_model=workshop.base("gpt2"))
    with pytest.raises(OptionError, match=r"llama.cpp's names.+--base-model"):
        exported(workshop.adapter("llama", lora("q_proj"), "no"), "gguf", tmp_path / "x")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gguf_in_a_directory_and_other_dtypes(workshop, tmp_path, dtype):
    gguf = pytest.importorskip("gguf")
    exported(mixed(workshop), "gguf", tmp_path / "out", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {kind}
    exported(mixed(workshop), "gguf", tmp_path / "plain")
    plain = gguf.GGUFReader(tmp_path / "plain" / "adapter.gguf")
    for one, other in zip(reader.tensors, plain.tensors, strict=True):
        assert one.shape.tolist() == other.shape.tolist()
        values = gguf.dequantize(one.data, one.tensor_type)
        assert np.allclose(values, other.data, rtol=2**-7, atol=1e-3)
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    flags = [one.flags for one in check(tmp_path / "out").verdicts]
    assert flags == [("--lora",), ("ADAPTER in its Modelfile",)]


def test_mlx_computes_the_same(workshop, tmp_path):
    pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    configs = (
        lora(*TARGETS),
        lora("lm_head", "up_proj", use_rslora=True),
        lora(*TARGETS, use_dora=True),
    )
    for number, config in enumerate(configs):
        adapter = workshop.adapter("llama", config, base=str(workshop.base("llama")))
        done = exported(adapter, "mlx", tmp_path / str(number), verified=True)
        assert done.verification.consumer == "mlx-lm"
        assert done.verification.error < 1e-3 < 0.1 < done.verification.effect
    exported(mixed(workshop), "mlx", tmp_path / "mixed", verified=True)
    configs = (lora("q_proj", use_dora=True), lora("k_proj"))
    both = workshop.adapters("llama", configs)
    merged = merge_adapters(both, "linear", base_model=workshop.base("llama"), progress=False)
    exported(merged, "mlx", tmp_path / "both", verified=True)


def test_a_result_that_does_nothing_or_something_else_fails(workshop, tmp_path):
    adapter = load_adapter(mixed(workshop))
    base = lazy_base(workshop.base("llama"))
    exported(adapter, "portable", tmp_path / "out")
    for factor in (0, 2):
        workshop.edit_tensors(
            tmp_path / "out",
            lambda tensors, factor=factor: {
                name: x * (factor if "lora_B" in name else 1) for name, x in tensors.items()
            },
        )
        found = verify(adapter, tmp_path / "out", PROFILES["portable"], base)
        assert not found.passed
        with pytest.raises(MismatchError, match="computes NOT as the adapter"):
            found.demand()
    nothing = dataclasses.replace(adapter.scaled(0))
    exported(nothing, "portable", tmp_path / "zero")
    found = verify(nothing, tmp_path / "zero", PROFILES["portable"], base)
    assert not found.passed
    assert "cannot be told from the bare base model" in str(found)


@pytest.mark.parametrize(
    ("limit", "error", "effect", "passed"),
    [
        (1e-3, 5e-4, 4e-3, False),  # as large as an effect that rounding makes
        (1e-3, 5e-4, 6e-3, True),
        (0.02, 8e-3, 0.05, True),  # llama.cpp's rounding, and a weak adapter
        (0.2, 0.02, 0.16, True),  # bfloat16's
        (0.2, 0.1, 0.16, False),
        (0.2, 0.3, 3, False),
    ],
)
def test_an_effect_is_as_large_as_the_rounding_asks_for(limit, error, effect, passed):
    assert Verification("PEFT", error, effect, limit).passed == passed


def test_a_cut_is_verified_beside_the_adapter_of_lower_rank_and_its_loss_is_told(
    workshop, tmp_path
):
    adapter, options = mixed(workshop), {"max_rank": 1, "verified": True}
    done = exported(adapter, "portable", tmp_path / "out", **options).verification
    assert done.error < 1e-4 < 0.01 < done.cut
    assert "before the cut" in str(done)
    worse = load_adapter(tmp_path / "out").scaled(1.1)
    base = lazy_base(workshop.base("llama"))
    verified = verify(
        worse, tmp_path / "out", PROFILES["portable"], base, uncut=load_adapter(adapter)
    )
    assert not verified.passed


def test_token_rows_and_a_cut(workshop, tmp_path):
    base = workshop.base("llama")
    config = lora("q_proj", trainable_token_indices=[1, 3])
    adapter = workshop.adapter("llama", config, base=str(base))
    done = exported(adapter, "peft", tmp_path / "out", max_rank=1, verified=True).verification
    assert done.error < 1e-4 < done.cut


def test_llama_cpp_verifies_with_the_base_model_in_its_own_format(workshop, tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    base = save_language_model(tmp_path / "base")
    auto = transformers.AutoModelForCausalLM
    adapter = workshop.adapter(auto.from_pretrained(base), lora(*TARGETS), base=str(base))
    done = exported(adapter, "gguf", tmp_path / "x.gguf", verified=True).verification
    assert "it needs the base model as a GGUF file" in done.skipped
    file = write_gguf(base, base / "model.gguf")
    for output in ("out", "out.gguf"):
        done = exported(adapter, "gguf", tmp_path / output, verified=True).verification
        assert done.error < 5e-3 < 0.1 < done.effect
    again, opened = load_adapter(adapter).scaled(2), lazy_base(base)
    assert not verify(again, tmp_path / "out.gguf", PROFILES["gguf"], opened).passed
    write_gguf(save_language_model(tmp_path / "untied", tied=False), file)
    skipped = verify(again, tmp_path / "out.gguf", PROFILES["gguf"], opened).skipped
    assert f"{file} alone computes something else" in skipped
    file.write_bytes(b"GGUF")
    with pytest.raises(MismatchError, match=r"llama.cpp does not load .*model.gguf"):
        verify(again, tmp_path / "out.gguf", PROFILES["gguf"], opened)


def test_a_merge_is_verified_in_memory_beside_the_weighted_sum_of_its_sources(workshop, tmp_path):
    base = workshop.base("llama")
    configs = [lora(*TARGETS), lora("q_proj", "lm_head", use_rslora=True), ia3("k_proj")]
    first, *others = workshop.adapters("llama", configs)
    sources = [shutil.copytree(first, tmp_path / "first"), *others]
    for method, same in (("linear", True), ("ties", False)):
        options = {"weights": [0.5, 0.3, 0.7], "rank": 16, "base_model": base, "progress": False}
        merged = merge_adapters(sources, method, **options)
        done = exported(merged, "portable", tmp_path / method, verified=True).verification
        assert done.passed
        assert done.error < 1e-3 < 0.1 < done.effect
        assert (done.sources < 1e-3) == same
        options = {"base_model": base, "verified": True}
        again = exported(tmp_path / method, "peft", tmp_path / f"{method}2", **options)
        assert (again.verification.sources < 1e-3) == same
    assert "from those of the weighted sum of its sources" in str(done)
    shutil.rmtree(sources[0])
    done = exported(tmp_path / "linear", "peft", tmp_path / "gone", **options).verification
    assert done.sources is None
    assert "not compared with the weighted sum of its sources: " in str(done)
    assert f"{sources[0]} is neither a directory" in str(done)


@pytest.mark.filterwarnings("ignore:Model has .tie_word")
def test_a_tied_weight_changes_at_one_end_as_in_peft(workshop, tmp_path):
    model = models.original("llama", tie_word_embeddings=True)
    base = models.save(model, tmp_path / "tied")
    adapter = workshop.adapter(copy.deepcopy(model), lora("lm_head", "q_proj"))
    right = peft.PeftModel.from_pretrained(load_base(base, "CAUSAL_LM"), adapter)
    changed = load_base(base, "CAUSAL_LM")
    with torch.no_grad(), with_adapter(changed, load_adapter(adapter)):
        torch.testing.assert_close(changed(IDS).logits, right(IDS).logits)
    assert changed.lm_head.weight is changed.model.embed_tokens.weight


def test_stacked_experts_are_verified_from_files(workshop, tmp_path):
    stacks = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    config, options = lora("q_proj", **stacks), {"base_model": workshop.base("mixtral")}
    adapters = workshop.adapters("mixtral", [config, config])
    merged = merge_adapters(adapters, "linear", progress=False, **options)
    with pytest.raises(OptionError, match="save it, and export what was saved"):
        exported(merged, "portable", tmp_path / "x", verified=True, **options)
    merged.save_pretrained(tmp_path / "merged")
    done = exported(tmp_path / "merged", "portable", tmp_path / "y", verified=True, **options)
    assert done.verification.passed
    assert done.verification.sources is None
    options |= {"max_rank": 1, "verified": True}
    done = exported(tmp_path / "merged", "portable", tmp_path / "z", **options)
    assert "stacked experts that were cut" in str(done)


def test_classifiers_are_verified_with_each_head(workshop, tmp_path):
    configs = [lora("query", task_type="SEQ_CLS") for _ in range(2)]
    adapters = workshop.adapters("bert", configs)
    merged = merge_adapters(adapters, "linear", progress=False)
    merged.save_pretrained(tmp_path / "merged")
    options = {"base_model": workshop.base("bert"), "verified": True}
    for number, one in enumerate((merged, tmp_path / "merged")):
        for profile in ("peft", "transformers"):
            done = exported(one, profile, tmp_path / f"{profile}{number}", **options)
            assert done.verification.passed
            assert done.verification.sources < 1e-5 < done.verification.effect
        assert "not for transformers, which ignores the heads beside the model" in done.check.line
        assert "strict=False)  # the head" in done.next_steps
    one = exported(
        adapters[0], "peft", tmp_path / "one", base_model=workshop.base("bert"), verified=True
    )
    assert one.verification.effect > 1e-3


def test_the_command_and_a_merge_for_a_profile(workshop, tmp_path, capsys):
    adapter, out = mixed(workshop), tmp_path / "out"
    words = ["export", str(adapter), "--to", "portable", "-o", str(out), "--max-rank", "2"]
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert 0.3 < answer["energy"] < 1
    assert answer["check"]["verdicts"][0]["flags"] == ["--enable-lora"]
    merge = ["merge", str(adapter), "--method", "linear", "-o", str(tmp_path / "m")]
    assert main([*merge, "--for", "mlx"]) == 0
    assert (tmp_path / "m" / "adapters.safetensors").is_file()
    assert "mlx_lm.generate" in capsys.readouterr().out
    assert main([*merge, "--overwrite"]) == 0
    assert "vLLM: --enable-lora" in capsys.readouterr().out
    assert main([*merge, "--for", "peft", "--overwrite", "--verify", "--json"]) == 0
    assert "computes as the adapter" in json.loads(capsys.readouterr().out)["verification"]


def test_one_file_as_output(workshop, tmp_path, capsys):
    pytest.importorskip("gguf")
    adapter, file = mixed(workshop), tmp_path / "m.gguf"
    words = [
        "merge",
        str(adapter),
        "--method",
        "linear",
        "--base-model",
        str(workshop.base("llama")),
    ]
    words += ["--for", "gguf", "-o", str(file)]
    assert main(words) == 0
    first = file.read_bytes()
    assert main(words) == 2
    assert f"{file} exists" in capsys.readouterr().err
    made = inspect_adapter(file).made
    assert made is not None
    assert made.method == "linear"
    assert main([*words, "--overwrite"]) == 0
    assert file.read_bytes() == first
    file.write_text("no adapter")
    assert main([*words, "--overwrite"]) == 2
    assert "is a file that pcb_peft did not write" in capsys.readouterr().err
    assert main(["export", str(adapter), "--to", "peft", "-o", str(tmp_path / "x.gguf")]) == 2
    assert "the profile peft is a directory" in capsys.readouterr().err


def test_a_lora_beside_an_ia3_does_not_explode_in_silence(workshop, tmp_path, capsys):
    kind = models.save(
        models.original("llama", hidden_size=80, intermediate_size=88), tmp_path / "b"
    )
    model = models.original("llama", hidden_size=80, intermediate_size=88)

    one = workshop.adapter(copy.deepcopy(model), lora("q_proj"), "one")
    two = workshop.adapter(copy.deepcopy(model), ia3("q_proj"), "two")
    with pytest.warns(UserWarning, match=r"rank 80 and takes 100 KiB.+--rank 0.95.+--fold"):
        merged = merge_adapters([one, two], "linear", base_model=kind, progress=False)
    assert max(line.rank for line in merged.report.modules.values()) == 80
    assert merge_adapters([one, two], "linear", base_model=kind, rank=8, progress=False)
    words = ["merge", str(one), str(two), "--base-model", str(kind), "--dry-run"]
    assert main(words) == 0
    assert "has rank 80 and takes" in capsys.readouterr().out
