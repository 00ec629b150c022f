"""What a merge leaves behind: PEFT loads it without a word, and does with it what the merge says."""

import dataclasses
import json
import os
import re
import stat

import helpers
import huggingface_hub
import peft
import pytest
import torch
import yaml
from helpers import ia3, lora
from safetensors.torch import load_file
from torch import nn

from pcb_peft import (
    OptionError,
    OutputError,
    UnsupportedError,
    list_spaces,
    load_adapter,
    merge,
    merge_adapters,
)
from pcb_peft.deltas.delta import LowRank
from pcb_peft.writing.manifest import MANIFEST

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def conv1d(**options):
    return lora(**{"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} | options)


def classifier(**options):
    return lora(**{"target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | options)


def weighted_sum(weights, deltas):
    """Σ wᵢ ΔWᵢ, where a module that an adapter does not touch counts as 0."""
    total = {}
    for weight, changes in zip(weights, deltas, strict=True):
        for module, delta in changes.items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def load_with_peft(workshop, kind, directory):
    """PEFT's model; there was a place for every tensor, and a tensor for every place."""
    model = peft.PeftModel.from_pretrained(workshop.model(kind).double(), directory)
    result = model.load_adapter(directory, "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "again" in key]
    model.delete_adapter("again")
    model.set_adapter("default")
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert {name: t.shape for name, t in load_file(directory / WEIGHTS).items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    return model


# ------------------------------------------------------------------------------------ what comes back


MERGES = {  # id: model, configurations, weights
    "equal ranks": ("mlp", [lora(), lora()], [1, 1]),
    "mixed ranks": ("mlp", [lora(r=2), lora(r=5), lora(r=1)], [1, 0.5, 2]),
    "one adapter": ("mlp", [lora()], [1]),
    "one adapter, scaled": ("mlp", [lora(use_rslora=True)], [-0.3]),
    "negative weights": ("mlp", [lora(), lora(r=4)], [0.7, -1.3]),
    "a weight of zero": ("mlp", [lora(), lora(r=4)], [0, 1]),
    "rsLoRA": ("mlp", [lora(use_rslora=True), lora(r=2)], [1, 1]),
    "patterns": (
        "mlp",
        [
            lora(rank_pattern={"mix": 5, "blocks.1.up": 1}, alpha_pattern={"up": 9}),
            lora(alpha_pattern={"^up": 7, "blocks.0.mix": 2}, use_rslora=True),
        ],
        [1, -2],
    ),
    "disjoint modules": (
        "mlp",
        [lora(target_modules=["up"]), lora(target_modules=["mix"])],
        [1, 3],
    ),
    "overlapping modules": (
        "mlp",
        [lora(target_modules=["up", "down"]), lora(target_modules="all-linear", r=2)],
        [1, 1],
    ),
    "a layer each": (
        "llama",
        [
            lora(target_modules=["q_proj"], layers_to_transform=[0]),
            lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
        ],
        [1, -1],
    ),
    "Conv1D": ("gpt2", [conv1d(), conv1d(r=2, use_rslora=True)], [1, -0.5]),
    "Conv1D, disjoint": ("gpt2", [conv1d(target_modules=["c_attn"]), conv1d(r=5)], [2, 1]),
}


def saved(case, *, rank_pattern=False):
    """A case of the next test: slow if it needs a whole model."""
    marks = () if MERGES[case][0] == "mlp" else pytest.mark.slow
    return pytest.param(case, rank_pattern, marks=marks)


SAVED = [
    *map(saved, MERGES),
    *(saved(case, rank_pattern=True) for case in ("mixed ranks", "patterns", "Conv1D")),
]


@pytest.mark.parametrize(("case", "rank_pattern"), SAVED)
def test_a_saved_merge_does_in_peft_what_the_sources_do_together(workshop, case, rank_pattern):
    kind, configs, weights = MERGES[case]
    directories = workshop.adapters(kind, configs)
    wanted = weighted_sum(weights, [workshop.deltas(kind, d) for d in directories])
    merged = merge_adapters(directories, "linear", weights)
    out = workshop.directory / "out"
    merged.save_pretrained(out, rank_pattern=rank_pattern)
    saved = workshop.deltas(kind, load_with_peft(workshop, kind, out))
    workshop.assert_deltas(merged, saved, 1e-6)
    workshop.assert_deltas(merged, wanted, 1e-5)
    workshop.assert_deltas(load_adapter(out), saved, 1e-6)


IA3S = {
    "outputs": ("mlp", [ia3(), ia3()], [1, 1]),
    "inputs": ("mlp", [ia3(feedforward_modules=["up", "mix"])] * 2, [0.4, -2]),
    "both": ("mlp", [ia3(feedforward_modules=["mix"])] * 3, [1, 1, 1]),
    "one adapter": ("mlp", [ia3()], [1]),
    "one adapter, scaled": ("mlp", [ia3(feedforward_modules=["mix"])], [-0.3]),
    "disjoint modules": ("mlp", [ia3(target_modules=["up"]), ia3(target_modules=["mix"])], [1, 3]),
    "Conv1D": (
        "gpt2",
        [
            ia3(
                target_modules=["c_attn", "mlp.c_proj"],
                feedforward_modules=["mlp.c_proj"],
                fan_in_fan_out=True,
            )
        ]
        * 2,
        [1, -0.5],
    ),
}


@pytest.mark.parametrize("case", IA3S)
def test_a_saved_merge_of_ia3s_is_one_plus_the_weighted_sum_of_l_minus_one(workshop, case):
    kind, configs, weights = IA3S[case]
    directories = workshop.adapters(kind, configs)
    # W∘(1 + Σ w (l − 1)) − W is Σ w (W∘l − W): PEFT's own deltas, added up
    wanted = weighted_sum(weights, [workshop.deltas(kind, d) for d in directories])
    merged = merge_adapters(directories, "linear", weights)
    merged.save_pretrained(workshop.directory / "out")
    model = load_with_peft(workshop, kind, workshop.directory / "out")
    saved = workshop.deltas(kind, model)
    workshop.assert_deltas(merged, saved, 1e-6, base=workshop.base(kind))
    workshop.assert_deltas(merged, wanted, 1e-5, base=workshop.base(kind))
    config = json.loads((workshop.directory / "out" / CONFIG).read_text())
    assert set(config) <= OLD_FIELDS | {"feedforward_modules", "init_ia3_weights"}
    assert config["target_modules"] == sorted(merged.modules)


@pytest.mark.parametrize("space", ["auto", *sorted(set(list_spaces()) - {"vector"})])
@pytest.mark.parametrize("method", ["linear", "pcb"])
def test_one_adapter_comes_back_unchanged(workshop, method, space):
    directory = workshop.adapter("mlp", lora(use_rslora=True, rank_pattern={"mix": 1}))
    merged = merge_adapters([directory], method, space=space)
    workshop.assert_deltas(merged, workshop.deltas("mlp", directory), 1e-6)
    merged.save_pretrained(workshop.directory / "out")
    saved = workshop.deltas("mlp", workshop.directory / "out")
    workshop.assert_deltas(load_adapter(directory), saved, 1e-6)


@pytest.mark.parametrize("kind", ["mlp", "gpt2"])
@pytest.mark.parametrize("method", ["linear", "pcb"])
def test_one_ia3_comes_back_unchanged(workshop, method, kind):
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if kind == "gpt2" else {}
    directory = workshop.adapter(kind, ia3(**options))
    merge_adapters([directory], method).save_pretrained(workshop.directory / "out")
    wanted, found = (
        load_file(folder / WEIGHTS) for folder in (directory, workshop.directory / "out")
    )
    assert wanted.keys() == found.keys()
    for name, values in wanted.items():
        workshop.assert_close(found[name], values, 1e-6, name)


def test_an_adapter_that_is_not_merged_can_be_saved_too(workshop):
    directory = workshop.adapter("mlp", lora(use_rslora=True, rank_pattern={"mix": 1}))
    load_adapter(directory).save_pretrained(workshop.directory / "out")
    model = load_with_peft(workshop, "mlp", workshop.directory / "out")
    workshop.assert_deltas(load_adapter(directory), workshop.deltas("mlp", model), 1e-6)


def test_a_merge_can_be_merged_again(workshop):
    directories = workshop.adapters("mlp", [lora(), lora(r=2), lora(use_rslora=True)])
    deltas = [workshop.deltas("mlp", directory) for directory in directories]
    merge_adapters(directories[:2], "linear", [1, -2]).save_pretrained(workshop.directory / "two")
    again = merge_adapters([workshop.directory / "two", directories[2]], "linear", [0.5, 3])
    workshop.assert_deltas(again, weighted_sum([0.5, -1, 3], deltas), 1e-5)
    again.save_pretrained(workshop.directory / "three")
    load_with_peft(workshop, "mlp", workshop.directory / "three")


def test_a_lower_rank_is_the_best_there_is_and_is_what_peft_loads(workshop):
    directories = workshop.adapters("mlp", [lora(), lora()])
    wanted = weighted_sum([1, 1], [workshop.deltas("mlp", d) for d in directories])
    with pytest.warns(UserWarning, match="retains .* of the merged energy"):
        merged = merge_adapters(directories, "linear", rank=1)
    merged.save_pretrained(workshop.directory / "out")
    saved = workshop.deltas("mlp", load_with_peft(workshop, "mlp", workshop.directory / "out"))
    for module, delta in wanted.items():
        u, s, vh = torch.linalg.svd(delta)
        workshop.assert_close(saved[module], s[0] * u[:, :1] @ vh[:1], 1e-5, module)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "gpt2", "llama"])
def test_a_folded_merge_is_the_base_plus_what_the_sources_do_together(workshop, kind):
    config = {"mlp": lora(), "gpt2": conv1d(), "llama": lora(target_modules="all-linear")}[kind]
    directories = workshop.adapters(kind, [config, config])
    wanted = weighted_sum([1, -2], [workshop.deltas(kind, d) for d in directories])
    merged = merge_adapters(directories, "linear", [1, -2], rank="full")
    merged.fold(workshop.base(kind), workshop.directory / "out")
    before = load_file(workshop.base(kind) / "model.safetensors")
    after = load_file(workshop.directory / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        module = name.removesuffix(".weight")
        module = f"transformer.{module}" if kind == "gpt2" and module.startswith("h.") else module
        workshop.assert_close(after[name], values + wanted.pop(module, 0), 1e-6, name)
    assert not wanted


# ------------------------------------------------------------------------------------ the configuration


OLD_FIELDS = {  # what PEFT 0.7 already knew
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    "inference_mode",
    *("target_modules", "modules_to_save", "fan_in_fan_out"),
}
LORA_FIELDS = OLD_FIELDS | {
    *("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights"),
}


def saved_config(directory):
    return json.loads((directory / CONFIG).read_text())


def test_the_configuration_is_minimal_and_says_that_the_factors_are_the_delta(workshop):
    patterns = {"rank_pattern": {"mix": 1}, "alpha_pattern": {"up": 9}}
    configs = [lora(use_rslora=True, lora_dropout=0.1, **patterns), lora(r=7, exclude_modules="up")]
    merge_adapters(workshop.adapters("mlp", configs), "linear").save_pretrained(
        workshop.directory / "out"
    )
    config = saved_config(workshop.directory / "out")
    assert set(config) <= LORA_FIELDS
    assert peft.LoraConfig(**config).target_modules == set(config["target_modules"])
    assert config["r"] == config["lora_alpha"] == 10
    assert {type(config["r"]), type(config["lora_alpha"])} == {int}
    assert config["use_rslora"] is False
    assert config["init_lora_weights"] is True
    assert config["bias"] == "none"
    assert config["lora_dropout"] == 0.0
    ranks = {
        tensor.shape[name.endswith("lora_B.weight")]
        for name, tensor in load_file(workshop.directory / "out" / WEIGHTS).items()
    }
    assert ranks == {10}


def test_the_configuration_names_an_own_rank_for_each_module_if_asked_to(workshop):
    directory = workshop.adapter("mlp", lora(rank_pattern={"mix": 1, "up": 5}, use_rslora=True))
    load_adapter(directory).save_pretrained(workshop.directory / "out", rank_pattern=True)
    config = saved_config(workshop.directory / "out")
    assert set(config) <= LORA_FIELDS | {"rank_pattern", "alpha_pattern"}
    assert config["r"] == config["lora_alpha"] == 5
    assert config["rank_pattern"] == config["alpha_pattern"]
    model = load_with_peft(workshop, "mlp", workshop.directory / "out")
    ranks = {name: m.r["default"] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert set(ranks.values()) == {1, 5}
    workshop.assert_deltas(load_adapter(directory), workshop.deltas("mlp", model), 1e-6)


class Nested(nn.Module):
    """Modules whose names end in the name of another one."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.up = nn.Linear(6, 10)


@pytest.mark.parametrize("config", [lora, ia3])
@pytest.mark.parametrize("targets", [["blocks.0.up"], ["blocks.0.up", "blocks.1.up"]])
def test_peft_finds_the_modules_again_and_no_others_of_their_last_name(workshop, config, targets):
    options = {"feedforward_modules": targets[1:]} if config is ia3 else {}
    directory = workshop.adapter(Nested(), config(target_modules=targets, **options))
    load_adapter(directory).save_pretrained(workshop.directory / "out")
    assert saved_config(workshop.directory / "out")["target_modules"] == targets
    model = peft.PeftModel.from_pretrained(Nested(), workshop.directory / "out")
    assert sorted(model.targeted_module_names) == targets


def test_ranks_of_modules_whose_names_end_in_another_s_are_told_apart(workshop):
    config = lora(target_modules=["up"], rank_pattern={"^up": 1, r"blocks\.1\.up": 2})
    directory = workshop.adapter(Nested(), config)
    load_adapter(directory).save_pretrained(workshop.directory / "out", rank_pattern=True)
    model = peft.PeftModel.from_pretrained(Nested(), workshop.directory / "out")
    layers = dict(model.base_model.model.named_modules())
    ranks = {name: layers[name].r["default"] for name in ("up", "blocks.0.up", "blocks.1.up")}
    assert ranks == {"up": 1, "blocks.0.up": 3, "blocks.1.up": 2}


def test_feedforward_modules_whose_name_ends_another_s_are_told_apart(workshop):
    config = ia3(target_modules=["up"], feedforward_modules="up")  # the outermost only
    directory = workshop.adapter(Nested(), config)
    shapes = {name: tensor.shape for name, tensor in load_file(directory / WEIGHTS).items()}
    assert set(shapes.values()) == {(1, 6), (10, 1)}
    load_adapter(directory).save_pretrained(workshop.directory / "out")
    model = peft.PeftModel.from_pretrained(Nested(), workshop.directory / "out")
    again = peft.get_peft_model_state_dict(model)
    assert {name: tensor.shape for name, tensor in again.items()} == shapes


@pytest.mark.parametrize("spelling", ["absolute", "relative"])
def test_no_local_path_leaves_the_machine(workshop, monkeypatch, spelling):
    monkeypatch.chdir(workshop.directory)
    workshop.base("llama").rename(workshop.directory / "tiny-llama")
    (workshop.directory / "secret").mkdir()
    (workshop.directory / "tiny-llama").rename(workshop.directory / "secret" / "llama")
    base = "secret/llama" if spelling == "relative" else str(workshop.directory / "secret/llama")
    directories = [
        workshop.adapter("llama", lora(target_modules=["q_proj"]), f"secret/{name}", base=base)
        for name in ("math", "code")
    ]
    if spelling == "relative":
        directories = [directory.relative_to(workshop.directory) for directory in directories]
    merged = merge_adapters(directories, "linear", base_model=base)
    merged.save_pretrained("out")
    for name in (CONFIG, "README.md"):
        text = (workshop.directory / "out" / name).read_text()
        assert "secret" not in text
        assert str(workshop.directory) not in text
    card = (workshop.directory / "out" / "README.md").read_text()
    assert re.search(r"\| math \| 1(\.0)? \|", card)
    assert "base_model_name_or_path" not in saved_config(workshop.directory / "out")
    model = peft.PeftModel.from_pretrained(workshop.model("llama"), "out")
    assert sorted(model.targeted_module_names) == list(merged.modules)


def test_what_the_base_model_is_stays_known(workshop):
    config = lora(target_modules=["q_proj"], revision="v2", task_type="CAUSAL_LM")
    directories = workshop.adapters("llama", [config, config], base="org/tiny")
    merge_adapters(directories, "linear").save_pretrained(workshop.directory / "out")
    config = saved_config(workshop.directory / "out")
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["revision"] == "v2"
    assert config["task_type"] == "CAUSAL_LM"


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-6)]
)
def test_tensors_and_heads_have_the_dtype_that_was_asked_for(workshop, dtype, tolerance):
    directory = workshop.adapter("bert", classifier())
    merged = merge_adapters([directory], "linear")
    merged.save_pretrained(workshop.directory / "out", dtype=dtype)
    tensors = load_file(workshop.directory / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    wanted = {m: d for m, d in workshop.deltas("bert", directory).items() if m != "classifier"}
    workshop.assert_deltas(load_adapter(workshop.directory / "out"), wanted, tolerance)


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_given_by_its_name(workshop, spelling):
    source = load_adapter(workshop.adapter("mlp", lora()))
    source.save_pretrained(workshop.directory / "out", dtype=spelling)
    tensors = load_file(workshop.directory / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_value_is_rounded_once(workshop, dtype):
    directory = workshop.adapter("mlp", lora(use_rslora=True))
    source = load_adapter(directory)
    source.save_pretrained(workshop.directory / "exact")
    source.save_pretrained(workshop.directory / "rounded", dtype=dtype)
    exact, rounded = (load_file(workshop.directory / n / WEIGHTS) for n in ("exact", "rounded"))
    for name, values in exact.items():
        assert torch.equal(values.to(dtype), rounded[name])


def test_values_that_a_dtype_cannot_hold_are_refused(workshop):
    directory = workshop.adapter("mlp", lora())
    workshop.edit_tensors(directory, lambda tensors: {k: t * 1e5 for k, t in tensors.items()})
    adapter = load_adapter(directory)
    with pytest.raises(OptionError, match=r"float16.*bfloat16"):
        adapter.save_pretrained(workshop.directory / "out", dtype=torch.float16)
    assert not (workshop.directory / "out").exists()
    adapter.save_pretrained(workshop.directory / "out", dtype=torch.bfloat16)


def test_a_rank_pattern_for_what_has_no_rank_is_refused(workshop):
    merged = merge_adapters([workshop.adapter("mlp", ia3())], "linear")
    with pytest.raises(OptionError, match="rank_pattern"):
        merged.save_pretrained(workshop.directory / "out", rank_pattern=True)


def test_files_are_those_of_peft_and_readable_under_the_umask(workshop):
    directories = workshop.adapters("mlp", [lora(), lora()])
    before = os.umask(0o027)
    try:
        merge_adapters(directories).save_pretrained(workshop.directory / "out")
    finally:
        os.umask(before)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (workshop.directory / "out").iterdir()
    }
    names = {WEIGHTS, CONFIG, "README.md", "merge_recipe.yaml", "merge_report.json", MANIFEST}
    assert modes == dict.fromkeys(names, 0o640)
    content = (workshop.directory / "out" / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_a_full_directory_is_replaced_only_on_request(workshop):
    first, second = workshop.adapters("mlp", [lora(), lora()])
    out = workshop.directory / "out"
    merge_adapters([first], "linear").save_pretrained(out)
    (out / "stale").touch()
    merged = merge_adapters([second], "linear")
    with pytest.raises(OutputError, match="overwrite=True"):
        merged.save_pretrained(out)
    workshop.assert_deltas(load_adapter(out), workshop.deltas("mlp", first))
    with pytest.raises(OutputError, match="stale, which pcb_peft did not write"):
        merged.save_pretrained(out, overwrite=True)
    merged.save_pretrained(out, overwrite="all")
    assert not (out / "stale").exists()
    workshop.assert_deltas(load_adapter(out), workshop.deltas("mlp", second))


def test_an_adapter_never_takes_the_place_of_what_it_was_made_from(workshop):
    first, second = workshop.adapters("mlp", [lora(), lora()])
    recipe = workshop.directory / "job" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text(f"adapters: [{first}, {second}]\nmethod: linear\n")
    merged, loaded = merge(recipe), load_adapter(second)
    before = sorted(workshop.directory.rglob("*"))
    for adapter, output in (
        (merged, first),
        (merged.scaled(2), second / "in"),
        (merged, recipe.parent),
        (loaded, second),
        (loaded.scaled(2), second.parent),
    ):
        with pytest.raises(OutputError, match="from which the output is made"):
            adapter.save_pretrained(output, overwrite="all")
    assert sorted(workshop.directory.rglob("*")) == before


def test_what_is_dense_cannot_be_saved_as_an_adapter(workshop):
    merged = merge_adapters([workshop.adapter("mlp", lora())], "linear", rank="full")
    with pytest.raises(UnsupportedError, match="give a rank, or fold it"):
        merged.save_pretrained(workshop.directory / "out")
    assert not (workshop.directory / "out").exists()


# -------------------------------------------------------------------------------------------- heads


def head_of(directory):
    tensors = load_file(directory / WEIGHTS)
    return {
        name.removeprefix("base_model.model."): values
        for name, values in tensors.items()
        if "lora_" not in name
    }


def test_heads_of_several_adapters_are_kept_in_a_file_each(workshop):
    directories = workshop.adapters("bert", [classifier(), classifier(r=2)])
    wanted = weighted_sum([1, 1], [workshop.deltas("bert", d) for d in directories])
    merged = merge_adapters(directories, "linear")
    out = workshop.directory / "out"
    merged.save_pretrained(out)
    assert sorted(path.name for path in (out / "heads").iterdir()) == [
        "adapter1.safetensors",
        "adapter2.safetensors",
    ]
    model = load_with_peft(workshop, "bert", out)
    for directory in directories:
        base = workshop.model("bert")
        result = base.load_state_dict(
            load_file(out / "heads" / f"{directory.name}.safetensors"), strict=False
        )
        assert not result.unexpected_keys
        for name, values in head_of(directory).items():
            assert torch.equal(base.state_dict()[name], values)
            assert not torch.equal(workshop.model("bert").state_dict()[name], values)
    del wanted["classifier"]
    workshop.assert_deltas(merged, wanted, 1e-5)
    assert workshop.deltas("bert", model).keys() == wanted.keys()


@pytest.mark.parametrize("others", [0, 1])
def test_the_head_of_a_single_adapter_stays_in_the_adapter(workshop, others):
    directories = workshop.adapters(
        "bert", [classifier()] + [lora(target_modules=["key"])] * others
    )
    merged = merge_adapters(directories, "linear")
    merged.save_pretrained(workshop.directory / "out")
    assert not (workshop.directory / "out" / "heads").exists()
    config = saved_config(workshop.directory / "out")
    assert config["modules_to_save"] == ["classifier"]
    assert config.get("task_type") == (None if others else "SEQ_CLS")
    model = load_with_peft(workshop, "bert", workshop.directory / "out")
    if not others:
        assert isinstance(model, peft.PeftModelForSequenceClassification)
    state = model.merge_and_unload().state_dict()
    for name, values in head_of(directories[0]).items():
        assert torch.equal(state[name], values.double())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.18's advice
def test_resized_embeddings_of_a_single_adapter_stay_in_the_adapter(workshop):
    def resized():
        model = workshop.model("llama")
        model.resize_token_embeddings(40, mean_resizing=False)
        return model

    model = workshop.peft_model(resized(), lora(target_modules=["q_proj"]))
    nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(workshop.directory / "a", save_embedding_layers=True)
    merge_adapters([workshop.directory / "a"]).save_pretrained(workshop.directory / "out")
    loaded = peft.PeftModel.from_pretrained(resized(), workshop.directory / "out")
    state, wanted = loaded.merge_and_unload().state_dict(), model.merge_and_unload().state_dict()
    assert state.keys() == wanted.keys()
    for name, values in wanted.items():
        workshop.assert_close(state[name], values, 1e-6, name)


def test_heads_can_be_refused(workshop):
    directories = workshop.adapters("bert", [classifier(), lora(target_modules=["key"])])
    with pytest.raises(UnsupportedError, match=r"^adapter1 replace.*modules_to_save.*keep-each"):
        merge_adapters(directories, heads="refuse")
    merge_adapters(directories[1:], heads="refuse")


@pytest.mark.parametrize(
    "names",
    [("merged", "other"), ("a/x", "b/x"), ("a/x", "b/x", "c/x-1")],
)
@pytest.mark.parametrize("fold", [False, True], ids=["saved", "folded"])
def test_no_head_is_lost_whatever_the_adapters_are_called(workshop, names, fold):
    directories = [
        workshop.adapter("bert", classifier(), name, seed=seed) for seed, name in enumerate(names)
    ]
    merged = merge_adapters(directories, "linear")
    if fold:
        merged.fold(workshop.base("bert"), workshop.directory / "out")
    else:
        merged.save_pretrained(workshop.directory / "out")
    files = sorted((workshop.directory / "out" / "heads").iterdir())
    kept = [load_file(file)["classifier.weight"] for file in files]
    wanted = [head_of(directory)["classifier.weight"] for directory in directories]
    assert len(kept) == len(wanted)
    for head in wanted:
        assert any(torch.equal(head, other) for other in kept)


# ------------------------------------------------------------------------------------------- the card


CARDS = {  # id: model, configuration, what the front matter says beside the rest
    "CAUSAL_LM": (
        "llama",
        lora(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        {"pipeline_tag": "text-generation"},
    ),
    "SEQ_CLS": ("bert", classifier(), {"pipeline_tag": "text-classification"}),
    "no task": ("mlp", lora(), {}),
    "(IA)³": ("mlp", ia3(), {}),
}


@pytest.mark.parametrize("case", CARDS)
def test_the_model_card_has_the_front_matter_that_the_hub_reads(workshop, case):
    kind, config, special = CARDS[case]
    directories = workshop.adapters(kind, [config, config], base="org/tiny")
    merge_adapters(directories, "linear", [1, -0.5]).save_pretrained(workshop.directory / "out")
    card = huggingface_hub.ModelCard.load(workshop.directory / "out" / "README.md")
    front = card.data.to_dict()
    tags = set(front.pop("tags"))
    assert front == {
        "library_name": "peft",
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        **special,
    }
    tuner = config.peft_type.value.lower()
    assert tags == {"base_model:adapter:org/tiny", tuner, "merge", "pcb_peft", "transformers"}
    assert re.search(r"\| adapter1 \| 1(\.0)? \|\n\| adapter2 \| -0.5 \|", card.text)
    assert "| method | linear |" in card.text


def test_the_card_of_a_merge_without_a_known_base_names_none(workshop):
    merge_adapters([workshop.adapter("mlp", lora())]).save_pretrained(workshop.directory / "out")
    text = (workshop.directory / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert "base_model" not in front
    assert front["library_name"] == "peft"


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, "float31", "int8", None]
)
def test_a_dtype_in_which_weights_are_not_stored_is_refused(workshop, tmp_path, dtype):
    merged = merge_adapters([workshop.adapter("mlp", lora())])
    with pytest.raises(OptionError, match=r"dtype is .*; it must be one of float32"):
        merged.save_pretrained(tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_name_with_a_bar_is_one_cell_of_the_card(workshop, tmp_path):
    merge_adapters([workshop.adapter("mlp", lora(), "a|b")]).save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert r"| a\|b | 1.0 |" in card.splitlines()


def test_factors_that_share_memory_are_saved_one_by_one(workshop, tmp_path):
    adapter = load_adapter(workshop.adapter("mlp", lora()))
    both, rows = torch.rand(3, 4), torch.rand(6, 3)
    deltas = {"a": LowRank(both, rows[:3]), "b": LowRank(both, rows[3:])}
    modules = helpers.adapter("shared", deltas).modules
    dataclasses.replace(adapter, modules=modules).save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    for name, delta in deltas.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], delta.lora_A)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], delta.lora_B)
