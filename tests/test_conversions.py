"""Weights that transformers arranges in another way when it loads them: read, folded and extracted by its own rules."""

import json

import peft
import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, STACKS, WORDS
from helpers import lora
from safetensors.torch import load_file, save_file

from pcb_peft import extract_adapter, load_adapter, merge_adapters
from pcb_peft.base.model import open_base_model

P = "base_model.model."
pytestmark = [pytest.mark.filterwarnings("ignore:The following .*_pattern keys"), pytest.mark.slow]
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
VISION_MIXTURE, NOMIC, QWEN = (
    "Qwen3VLMoeForConditionalGeneration",
    "NomicBertForMaskedLM",
    "Qwen3MoeForCausalLM",
)


def model_of(name):
    config = BY_NAME[name].config()
    config.architectures = [name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(hf, name)(config).eval()


def olmo_hybrid():
    config = hf.OlmoHybridConfig(**WORDS, layer_types=["linear_attention", "full_attention"])
    return hf.OlmoHybridForCausalLM(config)


def saved(model, directory):
    """The model as a checkpoint whose stacks of experts lie as those on the Hub do."""
    model.save_pretrained(directory)
    if type(model).__name__ == VISION_MIXTURE:
        path = directory / "model.safetensors"
        tensors = {
            name: values.transpose(1, 2).contiguous() if ".experts." in name else values
            for name, values in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    return directory


def state(directory, model):
    return type(model).from_pretrained(directory).state_dict()


@pytest.mark.parametrize("name", [VISION_MIXTURE, NOMIC, QWEN, "OlmoHybridForCausalLM"])
def test_parameters_in_memory_are_read_from_the_files(name, tmp_path):
    model = olmo_hybrid() if name.startswith("Olmo") else model_of(name)
    base = open_base_model(saved(model, tmp_path / "base"))
    loaded = state(base.directory, model)
    converted = {name: base.names.conversion(name) for name in loaded}
    assert any(converted.values())
    for parameter, conversion in converted.items():
        if conversion:
            found = {n: base.tensor(n) for n in conversion.files}
            assert torch.equal(base.values(parameter), loaded[parameter])
            parameters = {n: loaded[n] for n in conversion.parameters}
            shapes = {n: tuple(values.shape) for n, values in found.items()}
            back = conversion.store(parameters, shapes)
            assert back.keys() == found.keys()
            assert all(torch.equal(back[n], values) for n, values in found.items())


@pytest.mark.parametrize("name", [VISION_MIXTURE, NOMIC])
def test_a_fold_changes_what_peft_changes(name, workshop, tmp_path):
    model = model_of(name)
    base = saved(model, tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, **BY_NAME[name].targets)
    adapted = workshop.peft_model(type(model).from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = adapted.merge_and_unload().state_dict()
    load_adapter(tmp_path / "adapter", base_model=base).fold(base, tmp_path / "out")
    for parameter, values in state(tmp_path / "out", model).items():
        workshop.assert_close(values, wanted[parameter], 1e-6, parameter)
    before, after = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}


@pytest.mark.parametrize("kind", ["DoRA", "(IA)³"])
def test_what_depends_on_w_reads_it_from_the_fused_tensor(kind, workshop, tmp_path):
    model = model_of(NOMIC)
    base = saved(model, tmp_path / "base")
    targets = ["q_proj", "v_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=[])
    config = lora(*targets, use_dora=True) if kind == "DoRA" else config
    adapter = workshop.adapter(type(model).from_pretrained(base), config, base=str(base))
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), adapter)
    wanted = loaded.merge_and_unload().state_dict()
    load_adapter(adapter, base_model=base).fold(base, tmp_path / "out")
    for parameter, values in state(tmp_path / "out", model).items():
        workshop.assert_close(values, wanted[parameter], 1e-5, parameter)


MIXTURES = [QWEN, "GptOssForCausalLM", "Llama4ForCausalLM", "GraniteMoeForCausalLM", VISION_MIXTURE]


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", [*MIXTURES, NOMIC])
def test_what_was_trained_is_extracted_in_full_or_as_a_lora_of_each_expert(
    name, rank, workshop, tmp_path
):
    model = model_of(name)
    base = saved(model, tmp_path / "base")
    targets = dict(BY_NAME[name].targets)
    if name == QWEN:  # by the names of transformers 4, gate_up_proj would get twice the rank
        targets = {"target_modules": ["q_proj"], "target_parameters": [*STACKS, "mlp.gate.weight"]}
    config = peft.LoraConfig(r=3, lora_alpha=3, **targets)
    tuned = workshop.peft_model(type(model).from_pretrained(base), config).merge_and_unload()
    saved(tuned, tmp_path / "tuned")
    extracted = extract_adapter(tmp_path / "tuned", base, rank)
    wanted = tuned.state_dict()
    if rank:
        extracted.save_pretrained(tmp_path / "lora")
        loaded = type(model).from_pretrained(base)
        found = peft.PeftModel.from_pretrained(loaded, tmp_path / "lora").merge_and_unload()
        found = found.state_dict()
    else:
        extracted.fold(base, tmp_path / "folded")
        found = state(tmp_path / "folded", model)
    for parameter, values in found.items():
        workshop.assert_close(values, wanted[parameter], 1e-5, parameter)


def test_a_layer_without_experts_is_extracted_beside_stacks(workshop, tmp_path):
    """PEFT takes its ``gate_proj`` and ``up_proj`` for those of experts, and doubles the rank of their stack."""
    model = model_of("Glm4MoeForCausalLM")
    base, tuned = saved(model, tmp_path / "base"), tmp_path / "tuned"
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "mlp" in name and "_proj" in name:
                values += random(*values.shape[:-1], 1) @ random(1, values.shape[-1])
    saved(model, tuned)
    extract_adapter(tuned, base, rank=1).save_pretrained(tmp_path / "lora")
    loaded = type(model).from_pretrained(base)
    found = peft.PeftModel.from_pretrained(loaded, tmp_path / "lora").merge_and_unload()
    for parameter, values in found.state_dict().items():
        workshop.assert_close(values, model.state_dict()[parameter], 1e-5, parameter)


def test_a_fine_tuned_mixture_may_be_stored_in_another_arrangement(workshop, tmp_path):
    model = model_of(VISION_MIXTURE)
    base = saved(model, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_parameters=["experts.down_proj"], target_modules=[])
    tuned = workshop.peft_model(type(model).from_pretrained(base), config).merge_and_unload()
    tuned.save_pretrained(tmp_path / "tuned")  # not transposed
    names = {
        module.rpartition(".")[0] for module in extract_adapter(tmp_path / "tuned", base).modules
    }
    assert names == {f"model.language_model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}


# --------------------------------------------------------------------------- experts of other trainers


def written(directory, tensors, **config):
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({name.removesuffix(".weight").split(".")[-2] for name in tensors})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": names, **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


GPT_OSS = "GptOssForCausalLM"
EXPERTS, WIDTH, INNER, SCALING = 4, 32, 48, 1.5


def one_by_one(names):
    """A LoRA on each expert: its tensors, and ΔW by expert and name."""
    tensors, deltas = {}, {}
    for expert in range(EXPERTS):
        for name, (key, rows, cols) in names.items():
            lora_A, lora_B = random(2, cols, seed=expert), random(rows, 2, seed=expert)
            path = f"{P}model.layers.0.mlp.experts.{key.format(expert)}.lora_"
            tensors |= {f"{path}A.weight": lora_A, f"{path}B.weight": lora_B}
            deltas[expert, name] = SCALING * lora_B @ lora_A
    return tensors, deltas


def wanted_gpt_oss(model, deltas):
    """Gate and up lie in turn in the columns of one matrix (in, out)."""
    values = {name: v.clone() for name, v in model.state_dict().items()}
    prefix = "model.layers.0.mlp.experts."
    for (expert, name), delta in deltas.items():
        stack = values[f"{prefix}{'down_proj' if name == 'down' else 'gate_up_proj'}"][expert]
        columns = {"gate": slice(0, None, 2), "up": slice(1, None, 2)}.get(name, slice(None))
        stack[:, columns] += delta.T
    return values


SPLIT = {
    "gate_up": ("gate_up_projs.{}", 2 * INNER, WIDTH),
    "down": ("down_projs.{}", WIDTH, INNER),
}
SINGLE = {
    "gate": ("{}.gate_proj", INNER, WIDTH),
    "up": ("{}.up_proj", INNER, WIDTH),
    "down": ("{}.down_proj", WIDTH, INNER),
}


@pytest.mark.parametrize("names", [SPLIT, SINGLE], ids=["split", "single"])
def test_experts_of_gpt_oss_one_by_one(names, workshop, tmp_path):
    model = model_of(GPT_OSS)
    base = saved(model, tmp_path / "base")
    tensors, deltas = one_by_one(names)
    router = f"{P}model.layers.1.mlp.router.linear.lora_"
    factors = random(2, WIDTH, seed=9), random(EXPERTS, 2, seed=9)
    tensors |= {f"{router}A.weight": factors[0], f"{router}B.weight": factors[1]}
    adapter = written(tmp_path / "adapter", tensors, base_model_name_or_path=str(base))
    wanted = wanted_gpt_oss(model, deltas)
    wanted["model.layers.1.mlp.router.weight"] += SCALING * factors[1] @ factors[0]
    merged = merge_adapters([adapter], "linear", base_model=str(base))
    merged.fold(base, tmp_path / "folded")
    merged.save_pretrained(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), tmp_path / "saved")
    found = loaded.merge_and_unload().state_dict()
    folded = state(tmp_path / "folded", model)
    for parameter, values in wanted.items():
        workshop.assert_close(folded[parameter], values, 1e-6, parameter)
        workshop.assert_close(found[parameter], values, 1e-5, parameter)


def test_experts_one_by_one_and_stacked_are_the_same_weights(workshop, tmp_path):
    model = model_of(GPT_OSS)
    base = saved(model, tmp_path / "base")
    tensors, deltas = one_by_one(SINGLE)
    old = written(tmp_path / "old", tensors, base_model_name_or_path=str(base))
    merge_adapters([old], "linear", base_model=str(base)).save_pretrained(tmp_path / "new")
    both = merge_adapters([old, tmp_path / "new"], "ties", density=1.0, base_model=str(base))
    assert len(both.modules) == 2 * EXPERTS
    both.fold(base, tmp_path / "folded")
    folded = state(tmp_path / "folded", model)
    for parameter, values in wanted_gpt_oss(model, deltas).items():
        workshop.assert_close(folded[parameter], values, 1e-5, parameter)


@pytest.mark.parametrize("name", [QWEN, GPT_OSS, "MixtralForCausalLM"])
def test_three_dimensional_tensors_hold_one_lora_per_expert(name, workshop, tmp_path):
    """One side may be shared by all experts: it has one matrix."""
    model = model_of(name)
    inner = 24 if name == QWEN else INNER
    count = 3 if name == "MixtralForCausalLM" else EXPERTS
    base = saved(model, tmp_path / "base")
    path = f"{P}model.layers.0.mlp.experts."
    tensors = {
        f"{path}w1.lora_A.weight": random(1, 2, WIDTH),
        f"{path}w1.lora_B.weight": random(count, inner, 2),
        f"{path}w3.lora_A.weight": random(1, 2, WIDTH, seed=1),
        f"{path}w3.lora_B.weight": random(count, inner, 2, seed=1),
        f"{path}w2.lora_A.weight": random(count, 2, inner),
        f"{path}w2.lora_B.weight": random(1, WIDTH, 2),
    }
    adapter = written(
        tmp_path / "adapter",
        tensors,
        base_model_name_or_path=str(base),
        target_modules="all-linear",
    )
    deltas = {}
    for key, part in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        products = (
            SCALING * tensors[f"{path}{key}.lora_B.weight"] @ tensors[f"{path}{key}.lora_A.weight"]
        )
        deltas |= {(expert, part): delta for expert, delta in enumerate(products)}
    if name == GPT_OSS:
        wanted = wanted_gpt_oss(model, deltas)
    else:
        wanted = {n: v.clone() for n, v in model.state_dict().items()}
        for (expert, part), delta in deltas.items():
            stack = "down_proj" if part == "down" else "gate_up_proj"
            rows = {"gate": slice(0, inner), "up": slice(inner, None)}.get(part, slice(None))
            wanted[f"model.layers.0.mlp.experts.{stack}"][expert][rows] += delta
    merged = merge_adapters([adapter], "linear", base_model=str(base))
    merged.fold(base, tmp_path / "folded")
    merged.save_pretrained(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), tmp_path / "saved")
    found, folded = loaded.merge_and_unload().state_dict(), state(tmp_path / "folded", model)
    for parameter, values in wanted.items():
        workshop.assert_close(folded[parameter], values, 1e-6, parameter)
        workshop.assert_close(found[parameter], values, 1e-5, parameter)
