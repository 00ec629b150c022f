"""Who can load what: `check` reads files alone, and says what the programs did when they were run."""

import json
import subprocess
import sys
import time

import peft
import pytest
import torch
from helpers import ia3, lora
from safetensors.torch import load_file, save_file

from pcb_peft import (
    AdapterNotFoundError,
    OptionError,
    UnsupportedError,
    check,
    export,
    load_adapter,
    merge_adapters,
)
from pcb_peft.commands import export as export_command
from pcb_peft.commands.cli import main
from pcb_peft.consumers.consumer import parse_version
from pcb_peft.consumers.features import embedding_lora
from pcb_peft.consumers.files import OutputFiles, TensorShape
from pcb_peft.consumers.known import CONSUMERS
from pcb_peft.exporting.profiles import PROFILES

TARGETS = ("q_proj", "down_proj")


def found(adapter, consumer):
    """Effects and features that `check` finds for one consumer."""
    (verdict,) = check(adapter, consumer).verdicts
    return {(finding.effect, finding.found.split(" (")[0]) for finding in verdict.findings}


def test_a_plain_adapter_is_read_alike(workshop):
    saved = workshop.directory / "saved"
    load_adapter(workshop.adapter("llama", lora(*TARGETS), base="org/name")).save_pretrained(saved)
    checked = check(saved)
    servers = [one for one in checked.verdicts if not one.way]
    assert all(one.right for one in servers)
    assert checked.line.startswith("vLLM: --enable-lora · read alike by vLLM, PEFT, transformers")
    assert {one.consumer for one in checked.verdicts if one.way} == {"llama.cpp", "ollama", "mlx"}
    assert not checked.notes


@pytest.mark.parametrize(
    ("rank", "served"), [(16, None), (17, 32), (36, 64), (130, 256), (400, 512)]
)
def test_vllm_needs_the_next_rank_that_it_has(workshop, rank, served):
    adapter = workshop.adapter("llama", lora("down_proj", r=rank, lora_alpha=rank))
    (verdict,) = check(adapter, "vllm").verdicts
    assert verdict.right
    assert verdict.flags == ("--enable-lora", *([f"--max-lora-rank {served}"] if served else []))


def test_ranks_above_what_vllm_takes(workshop):
    adapter = workshop.adapter("llama", lora("down_proj", r=513, lora_alpha=513))
    assert ("refuses", "rank 513") in found(adapter, "vllm")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"use_dora": True}, {"vllm": "refuses", "openvino": "ignores", "transformers": "ignores"}),
        ({"use_rslora": True}, {"sglang": "misreads", "openvino": "ignores", "vllm": None}),
        ({"alpha_pattern": {"q_proj": 9}}, {"tensorrt-llm": "ignores", "vllm==0.31": "ignores"}),
        ({"rank_pattern": {"q_proj": 2}}, {"lorax": "refuses", "vllm==0.31": "misreads"}),
        ({"layers_to_transform": [0]}, {"lorax": "ignores", "vllm": None, "sglang": None}),
        ({"init_lora_weights": "olora"}, {"vllm": "refuses", "vllm==0.31": "misreads"}),
        ({"bias": "all"}, {"vllm": "refuses", "openvino": "ignores"}),
        ({"modules_to_save": ["lm_head"]}, {"vllm": "refuses", "sglang": "ignores"}),
        ({"modules_to_save": ["norm"]}, {"vllm": "refuses", "tensorrt-llm": "refuses"}),
        ({"trainable_token_indices": [1]}, {"vllm": "refuses", "lorax": "ignores"}),
        ({"target_modules": ["embed_tokens"]}, {"tensorrt-llm": "refuses", "vllm": None}),
    ],
)
def test_each_feature(workshop, options, expected):
    base = str(workshop.base("llama"))  # says how many layers there are
    adapter = workshop.adapter(
        "llama", lora(*TARGETS, **{"r": 4, "lora_alpha": 4} | options), base=base
    )
    for profile, consumer in (("gguf", "llama.cpp"), ("mlx", "mlx")):
        (way,) = (verdict.way for verdict in check(adapter, consumer).verdicts)
        try:
            export(adapter, profile, workshop.directory / profile, base_model=base, progress=False)
            assert f"--to {profile}" in way
        except UnsupportedError:
            assert "in its weights" in way
    for consumer, effect in expected.items():
        effects = {one for one, _ in found(adapter, consumer)}
        assert effects == ({effect} if effect else set()), consumer


def test_a_bias_beside_a_factor_is_no_factor_without_the_other(workshop):
    adapter = workshop.adapter("llama", lora("q_proj", r=4, lora_alpha=4))
    bias = {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(16)}
    workshop.edit_tensors(adapter, lambda tensors: tensors | bias)
    workshop.edit_config(adapter, lora_bias=True)
    assert found(adapter, "openvino") == {("ignores", "biases beside the LoRA")}


def test_another_kind_and_its_line(workshop):
    adapter = workshop.adapter("llama", ia3(*TARGETS))
    assert ("refuses", "(IA)³") in found(adapter, "vllm")
    assert "vLLM, SGLang, TensorRT-LLM and LoRAX/TGI, which refuse (IA)³" in check(adapter).line
    assert "OpenVINO, which ignores (IA)³" in check(adapter).line


def test_what_peft_writes_today_needs_peft_0_14(workshop):
    for name, config in (("lora", lora(*TARGETS)), ("ia3", ia3(*TARGETS))):
        adapter = workshop.adapter("llama", config, name)
        assert not check(adapter, "peft==0.11").right
        assert check(adapter, "peft==0.14").right
        load_adapter(adapter).save_pretrained(workshop.directory / f"{name}-saved")
        assert check(workshop.directory / f"{name}-saved", "peft==0.11").right


def test_a_lora_on_embeddings_and_the_copy_that_peft_saves_beside_it(workshop):
    base = workshop.base("llama")
    adapter = workshop.adapter("llama", lora("embed_tokens"), base=str(base))
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    rows = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    workshop.edit_tensors(adapter, lambda tensors: tensors | {name: rows})
    assert check(adapter, ["vllm", "sglang"]).right
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 30}))
    assert found(adapter, "vllm") == {
        ("refuses", "a LoRA on 32 embeddings, for a vocabulary of 30")
    }


def test_transformers_drops_magnitudes(workshop):
    """The rule on `load_adapter`, as the installed transformers behaves."""
    adapter = workshop.adapter("llama", lora(*TARGETS, use_dora=True))
    ids = torch.arange(6)[None]
    model = workshop.model("llama")
    right = peft.PeftModel.from_pretrained(workshop.model("llama"), adapter)
    model.load_adapter(str(adapter))
    with torch.no_grad():
        difference = (model(ids).logits - right(ids).logits).norm()
    assert (difference > 0.01) == (("ignores", "DoRA") in found(adapter, "transformers"))


def test_heads_that_are_kept_apart(workshop):
    configs = [lora("query", task_type="SEQ_CLS") for _ in range(2)]
    merged = merge_adapters(workshop.adapters("bert", configs), "linear", progress=False)
    merged.save_pretrained(workshop.directory / "merged")
    checked = check(workshop.directory / "merged")
    assert any("choose one: pcb-peft head" in note for note in checked.notes)
    assert any(note.startswith("heads of tasks: servers are made") for note in checked.notes)
    assert ("ignores", "the heads beside the adapter: adapter1, adapter2") in found(
        workshop.directory / "merged", "peft"
    )


def test_files_that_only_their_owner_can_read(workshop):
    adapter = workshop.adapter("llama", lora(*TARGETS))
    (adapter / "adapter_model.safetensors").chmod(0o600)
    assert any("adapter_model.safetensors" in note for note in check(adapter).notes)


def test_broken_adapters(workshop):
    adapter = workshop.adapter("llama", lora(*TARGETS))
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    half = {
        name: x for name, x in tensors.items() if "layers.0.self_attn.q_proj.lora_B" not in name
    }
    save_file(half, path)
    assert any("one factor without the other" in what for _, what in found(adapter, "vllm"))
    save_file({f"{name[:-7]}.default.weight": x for name, x in tensors.items()}, path)
    assert any("without PEFT's names" in what for _, what in found(adapter, "lorax"))
    save_file(tensors, path)
    workshop.edit_config(adapter, r=64)
    assert any("r = 64" in what for _, what in found(adapter, "sglang"))


def test_a_folded_model_and_the_trap_of_mlx(workshop):
    base = workshop.base("llama")
    assert check(base, ["vllm", "mlx", "transformers"]).right
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (base / "config.json").write_text(json.dumps(config))
    assert found(base, "mlx") == {("misreads", "rope_theta = 1000000.0 inside rope_parameters")}
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
    assert check(base, "mlx").right


def test_words_that_are_not_known(workshop, tmp_path):
    adapter = workshop.adapter("llama", lora(*TARGETS))
    with pytest.raises(OptionError, match=r"no consumer 'vlm' is known; did you mean 'vllm'\?"):
        check(adapter, "vlm")
    with pytest.raises(OptionError, match="has no version"):
        check(adapter, "vllm==new")
    with pytest.raises(AdapterNotFoundError, match="neither an adapter"):
        check(tmp_path / "nothing")


def test_every_rule_has_words_and_a_source():
    for consumer in CONSUMERS.values():
        assert parse_version(consumer.newest)
        for rule in consumer.rules:
            assert rule.words
            assert rule.source
            assert parse_version(rule.since or "0") < parse_version(rule.until or "9999")


def test_the_command(workshop, capsys):
    adapter = workshop.adapter("llama", lora(*TARGETS, use_dora=True))
    assert main(["check", str(adapter)]) == 0
    assert "rejects DoRA" in capsys.readouterr().out
    assert main(["check", str(adapter), "--for", "vllm==0.32", "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdicts"][0]["loads"] is False


def test_a_mixture_of_many_experts_is_checked_in_no_time(tmp_path):
    """Each module was looked for among all tensors, which took minutes."""
    name = "base_model.model.model.layers.0.mlp.experts.{}.up_proj.lora_{}.weight"
    names = [name.format(number, factor) for number in range(10_000) for factor in "AB"]
    tensors = dict.fromkeys(names, TensorShape("F32", (2, 2)))
    files = OutputFiles(tmp_path, "peft", {"peft_type": "LORA", "r": 2}, tensors)
    start = time.process_time()
    assert embedding_lora(files) == ""
    assert time.process_time() - start < 2


@pytest.mark.slow
def test_a_check_imports_no_torch(workshop):
    adapter = workshop.adapter("llama", lora(*TARGETS))
    code = (
        "import sys\nfrom pcb_peft.consumers.check import check\n"
        f"check({str(adapter)!r})\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_words_of_the_command_line_are_the_profiles():
    assert tuple(PROFILES) == export_command.PROFILES
