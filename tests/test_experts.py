"""Experts: the layouts of older versions of PEFT, and the names of older versions of transformers."""

import json

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from pcb_peft import BaseModelError, UnsupportedError, load_adapter, merge_adapters

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
RANK, EXPERTS = 2, 3
P = "base_model.model."
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
    pytest.mark.slow,
]


def experts(parameters, **options):
    return peft.LoraConfig(
        **{"r": RANK, "lora_alpha": 3, "target_modules": [], "target_parameters": parameters}
        | options
    )


def exchanged(tensors):
    """The same change, with lora_A and lora_B of each expert transposed and exchanged, as older versions hold it."""
    result = {}
    for name, lora_A in tensors.items():
        if not name.endswith("lora_A.weight"):
            continue
        other = name.replace("lora_A", "lora_B")
        lora_B = tensors[other]
        by_expert = lora_A.reshape(EXPERTS, RANK, -1)  # expert after expert
        by_rank = lora_B.reshape(-1, RANK, EXPERTS)  # rank after rank
        result[name] = torch.einsum("ore->ero", by_rank).reshape(EXPERTS * RANK, -1)
        result[other] = torch.einsum("eri->ire", by_expert).reshape(-1, RANK * EXPERTS)
    return {name: values.contiguous() for name, values in result.items()}


@pytest.mark.parametrize(
    ("kind", "parameters", "version", "is_exchanged", "asks"),
    [
        pytest.param("mixtral", BOTH, "0.17.1", True, False, id="shapes of both tell"),
        pytest.param("mixtral", BOTH, None, True, False, id="no version: shapes of both tell"),
        pytest.param("mixtral", BOTH, "0.21.2", True, True, id="the base before the version"),
        pytest.param("mixtral", BOTH[1:], "0.19.1", True, True, id="shapes of the base tell"),
        pytest.param("square mixtral", BOTH[1:], "0.17.1", True, True, id="0.17 exchanges"),
        pytest.param("square mixtral", BOTH[1:], None, True, True, id="no version: before 0.18"),
        pytest.param("square mixtral", BOTH[1:], "0.19.0", True, False, id="0.19.0 exchanges"),
        pytest.param("square mixtral", BOTH[1:], "0.19.1", False, False, id="0.19.1 does not"),
        pytest.param("gpt_oss", BOTH, "0.18.0", False, False, id="transposed, 0.18"),
        pytest.param("gpt_oss", BOTH[1:], "0.18.0", False, True, id="transposed, 0.18, one"),
        pytest.param("gpt_oss", BOTH[1:], "0.19.0", True, False, id="transposed, 0.19.0"),
    ],
)
def test_a_layout_is_told_by_shapes_or_by_the_version(
    workshop, kind, parameters, version, is_exchanged, asks
):
    directory = workshop.adapter(kind, experts(parameters))
    wanted = workshop.changes(kind, directory)
    if is_exchanged:
        workshop.edit_tensors(directory, exchanged)
    workshop.edit_config(directory, peft_version=version)
    base = workshop.base(kind)
    if asks and kind != "mixtral":
        with pytest.raises(UnsupportedError, match="give base_model"):
            load_adapter(directory)
    adapter = load_adapter(directory, base_model=base if asks else None)
    for parameter, change in wanted.items():
        found = [adapter.delta(f"{parameter}.{e}", base_model=base) for e in range(EXPERTS)]
        workshop.assert_close(torch.stack(found), change, 1e-5, parameter)


def test_a_merge_of_two_layouts_is_written_in_that_of_the_installed_peft(workshop, tmp_path):
    one, two = workshop.adapters("mixtral", [experts(BOTH), experts(BOTH)])
    changes = [workshop.changes("mixtral", adapter) for adapter in (one, two)]
    workshop.edit_config(workshop.edit_tensors(two, exchanged), peft_version="0.17.0")
    merge_adapters([one, two], "linear", [0.5, -1]).save_pretrained(tmp_path / "out")
    found = workshop.changes("mixtral", tmp_path / "out")
    for parameter, change in changes[0].items():
        workshop.assert_close(found[parameter], 0.5 * change - changes[1][parameter], 1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_version"] == peft.__version__


def test_adapters_that_touch_different_parameters_merge(workshop, tmp_path):
    one, two = workshop.adapters("mixtral", [experts(BOTH[:1]), experts(BOTH[1:], r=3)])
    merge_adapters([one, two], "linear").save_pretrained(tmp_path / "out")
    found = workshop.changes("mixtral", tmp_path / "out")
    for adapter in (one, two):
        for parameter, change in workshop.changes("mixtral", adapter).items():
            workshop.assert_close(found[parameter], change, 1e-5, parameter)


# ------------------------------------------------------------------------- names of transformers 4


def named_as_in_version_4(directory, **options):
    """A LoRA on the experts one by one, as people with transformers 4 have it."""
    directory.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in (0, 1):
        for expert in range(EXPERTS):
            for name, (rows, cols) in {"w1": (12, 16), "w2": (16, 12), "w3": (12, 16)}.items():
                key = f"{P}model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.lora_"
                tensors[key + "A.weight"] = torch.randn(RANK, cols, generator=generator)
                tensors[key + "B.weight"] = torch.randn(rows, RANK, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3"]}
    (directory / "adapter_config.json").write_text(json.dumps(config | options))
    return directory


def test_names_of_version_4_fold_as_peft_loads_them(workshop, tmp_path):
    adapter = named_as_in_version_4(tmp_path / "old")
    base = workshop.base("mixtral")
    changes = workshop.changes("mixtral", adapter)
    load_adapter(adapter).fold(base, tmp_path / "folded")
    before, after = workshop.state(base), workshop.state(tmp_path / "folded")
    for parameter, change in changes.items():
        workshop.assert_close(after[parameter] - before[parameter], change, 1e-5, parameter)


def test_names_of_version_4_merge_with_those_of_version_5(workshop, tmp_path):
    old = named_as_in_version_4(tmp_path / "old")
    new = workshop.adapter("mixtral", experts(BOTH), "new")
    base = workshop.base("mixtral")
    changes = [workshop.changes("mixtral", adapter) for adapter in (old, new)]
    merged = merge_adapters([old, new], "linear", [2, -0.5], base_model=base)
    merged.save_pretrained(tmp_path / "out")
    found = workshop.changes("mixtral", tmp_path / "out")
    for parameter, change in changes[0].items():
        wanted = 2 * change - 0.5 * changes[1][parameter]
        workshop.assert_close(found[parameter], wanted, 1e-5, parameter)


def test_without_the_base_different_names_of_the_same_experts_are_refused(workshop, tmp_path):
    old = named_as_in_version_4(tmp_path / "old")
    new = workshop.adapter("mixtral", experts(BOTH), "new")
    with pytest.raises(
        BaseModelError, match=r"new names experts .* old one by one.*give base_model"
    ):
        merge_adapters([old, new], "linear")


def test_a_fold_leaves_what_no_expert_touches(workshop, tmp_path):
    adapter = workshop.adapter("mixtral", experts(BOTH[1:]))
    base = workshop.base("mixtral")
    load_adapter(adapter).fold(base, tmp_path / "out")
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("w2.weight")}


# ------------------------------------------------------- names and layouts that PEFT does not explain


def small(**options):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {**sizes, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, **options}


def qwen3_moe():
    options = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**small(**options)))


def llama4():
    options = {"intermediate_size_mlp": 24, "num_local_experts": 3, "interleave_moe_layer_step": 1}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**small(**options)))


def nemotron():
    mixture = {"n_routed_experts": 3, "moe_intermediate_size": 12, "n_group": 1, "topk_group": 1}
    shared = {"moe_shared_expert_intermediate_size": 12, "num_experts_per_tok": 2}
    options = {**mixture, **shared, "hybrid_override_pattern": "E*", "num_hidden_layers": 2}
    return hf.NemotronHForCausalLM(hf.NemotronHConfig(**small(**options)))


PLAIN = ["q_proj", "gate_proj", "up_proj", "down_proj"]
ALONE = {"target_modules": [*PLAIN, "gate"]}  # PEFT makes bare names of these
STACKS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
NO_GATE = {**STACKS, "target_parameters": ["experts.up_proj", "experts.down_proj"]}
MIXTURES = [
    pytest.param(qwen3_moe, ALONE, id="bare names"),
    pytest.param(qwen3_moe, {"target_modules": "all-linear"}, id="all linear"),
    pytest.param(llama4, STACKS, id="in before out"),
    pytest.param(nemotron, NO_GATE, id="no gate"),
]


@pytest.mark.parametrize("beside_base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize(("make", "targets"), MIXTURES)
def test_a_mixture_is_merged_saved_and_folded_as_peft_loads_it(
    make, targets, beside_base, workshop, tmp_path
):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        torch.nn.init.normal_(
            next(v for n, v in model.named_parameters() if "gate.weight" in n or "router" in n)
        )
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapters, changes = [], []
    for seed in (1, 2):
        config = peft.LoraConfig(r=2, lora_alpha=3, **targets)
        loaded = type(model).from_pretrained(base)
        adapters.append(tmp_path / f"adapter{seed}")
        adapted = workshop.peft_model(loaded, config, seed=seed)
        adapted.save_pretrained(adapters[-1])
        before, after = model.state_dict(), adapted.merge_and_unload().state_dict()
        changes.append({name: after[name] - before[name] for name in before})
    given = str(base) if beside_base else None
    merged = merge_adapters(adapters, "linear", [2, -0.5], base_model=given)
    merged.save_pretrained(tmp_path / "saved")
    merged.fold(base, tmp_path / "folded")
    loaded = type(model).from_pretrained(base)
    saved = peft.PeftModel.from_pretrained(loaded, tmp_path / "saved").merge_and_unload()
    folded = type(model).from_pretrained(tmp_path / "folded")
    for name, values in model.state_dict().items():
        wanted = values + 2 * changes[0][name] - 0.5 * changes[1][name]
        workshop.assert_close(saved.state_dict()[name], wanted, 1e-5, name)
        workshop.assert_close(folded.state_dict()[name], wanted, 1e-5, name)
