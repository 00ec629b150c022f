"""Reading what PEFT writes: the deltas are those of PEFT's merge_and_unload, and nothing is skipped in silence."""

import json
import pickle
import re

import peft
import pytest
import torch
from safetensors.torch import load_file

from pcb_peft import AdapterError, BaseModelError, UnsupportedError, load_adapter

# PEFT 0.21 asks transformers 5.23 for it

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
EVERY_LAYER = ["up", "down", "mix", "head"]


def lora(**options):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": EVERY_LAYER} | options)


def ia3(**options):
    return peft.IA3Config(**{"target_modules": EVERY_LAYER, "feedforward_modules": []} | options)


PATTERNS = {"rank_pattern": {"mix": 2, "blocks.1.up": 5}, "alpha_pattern": {"down": 11, "mix": 7}}
LORAS = {  # id: model, options of LoraConfig, number of modules
    "plain": ("mlp", {}, 8),
    "rank 1": ("mlp", {"r": 1}, 8),
    "a rank above the dimensions": ("mlp", {"r": 24, "target_modules": ["up"]}, 3),
    "rsLoRA": ("mlp", {"use_rslora": True}, 8),
    "rank_pattern": ("mlp", {"rank_pattern": {"mix": 2, "blocks.1.down": 5}}, 8),
    "alpha_pattern": ("mlp", {"alpha_pattern": {"mix": 2, "blocks.1.down": 9}}, 8),
    "a pattern for one of equal names": ("mlp", {"alpha_pattern": {"^up": 2}}, 8),
    "both patterns": ("mlp", PATTERNS | {"alpha_pattern": {"down": 11, "mix": 7}}, 8),
    "both patterns and rsLoRA": ("mlp", PATTERNS | {"use_rslora": True}, 8),
    "regular expressions as keys": (
        "mlp",
        {"rank_pattern": {r"blocks\.\d+\.(up|mix)": 4}, "alpha_pattern": {r".*\.1\.[a-u].*": 2}},
        8,
    ),
    "targets as a string": ("mlp", {"target_modules": "head"}, 1),
    "targets as a regular expression": ("mlp", {"target_modules": r"blocks\.\d\.(up|mix)"}, 4),
    "all-linear": ("llama", {"target_modules": "all-linear"}, 14),
    "all-linear, Conv1D": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}, 8),
    "exclude_modules": ("mlp", {"exclude_modules": ["blocks.0.up", "head"]}, 6),
    "layers_to_transform": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        2,
    ),
    "layers_pattern": (
        "mlp",
        {"target_modules": ["mix"], "layers_to_transform": 1, "layers_pattern": "blocks"},
        1,
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 6),
    "Conv1D, rsLoRA, patterns": (
        "gpt2",
        {
            "target_modules": ["c_attn", "c_proj"],
            "fan_in_fan_out": True,
            "use_rslora": True,
            "rank_pattern": {"c_attn": 5},
            "alpha_pattern": {"h.1.attn.c_proj": 2},
        },
        6,
    ),
    "gaussian": ("mlp", {"init_lora_weights": "gaussian"}, 8),
    "orthogonal": ("mlp", {"init_lora_weights": "orthogonal", "r": 4}, 8),
    "dropout": ("mlp", {"lora_dropout": 0.3}, 8),
}


@pytest.mark.parametrize("case", LORAS)
def test_a_lora_has_the_deltas_that_peft_merges(workshop, case):
    kind, options, count = LORAS[case]
    directory = workshop.adapter(kind, lora(**options))
    wanted = workshop.deltas(kind, directory)
    assert len(wanted) == count
    workshop.assert_deltas(load_adapter(directory), wanted)


PATTERN_ORDERS = [
    {"p": 2, "blocks.0.u": 3, "up": 4},
    {"blocks.0.mix": 3, "mix": 9, ".*": 2},
    {"mix": 9, "blocks.0.mix": 3, ".*": 2},
    {".*": 2, "mix": 9, "blocks.0.mix": 3},
    {r"m.x": 7, "mix": 9},
    {"mix": 9, r"m.x": 7},
]


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("pattern", PATTERN_ORDERS, ids=lambda pattern: ", ".join(pattern))
def test_the_first_pattern_in_the_order_of_the_file_wins(workshop, pattern):
    directory = workshop.adapter("mlp", lora())
    workshop.edit_config(directory, alpha_pattern=pattern)
    workshop.assert_deltas(load_adapter(directory), workshop.deltas("mlp", directory))


def test_rank_and_alpha_are_looked_up_independently_of_each_other(workshop):
    directory = workshop.adapter("mlp", lora(rank_pattern={"up": 2, "mix": 4}))
    workshop.edit_config(directory, alpha_pattern={"blocks.*up": 9, "mix": 1, "blocks.0.mix": 7})
    workshop.assert_deltas(load_adapter(directory), workshop.deltas("mlp", directory))


def test_what_a_configuration_leaves_out_is_what_peft_takes_for_it(workshop):
    directory = workshop.adapter("mlp", lora(r=8, lora_alpha=8))
    kept = {"peft_type", "target_modules"}
    config = json.loads((directory / CONFIG).read_text())
    workshop.edit_config(directory, remove=config.keys() - kept)
    workshop.assert_deltas(load_adapter(directory), workshop.deltas("mlp", directory))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(workshop, dtype):
    directory = workshop.adapter("mlp", lora(), dtype=dtype)
    assert {tensor.dtype for tensor in load_file(directory / WEIGHTS).values()} == {dtype}
    workshop.assert_deltas(load_adapter(directory), workshop.deltas("mlp", directory))


@pytest.mark.parametrize("config", [lora(), ia3()], ids=["LoRA", "(IA)³"])
def test_a_pickled_adapter_is_read_like_any_other(workshop, config):
    directory = workshop.adapter("mlp", config, safetensors=False)
    assert not (directory / WEIGHTS).exists()
    base = workshop.base("mlp")
    workshop.assert_deltas(load_adapter(directory), workshop.deltas("mlp", directory), base=base)


def test_safetensors_go_before_a_pickled_file_as_in_peft(workshop):
    directory = workshop.adapter("mlp", lora())
    workshop.adapter("mlp", lora(), seed=2, safetensors=False)
    assert (directory / PICKLE).exists()
    workshop.assert_deltas(load_adapter(directory), workshop.deltas("mlp", directory))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("stated", [True, False])
def test_given_the_base_the_orientation_is_the_base_s_and_not_the_configuration_s(workshop, stated):
    targets = ["c_attn", "attn.c_proj"]
    directory = workshop.adapter("gpt2", lora(target_modules=targets, fan_in_fan_out=True))
    workshop.edit_config(directory, fan_in_fan_out=stated)
    adapter, wanted = load_adapter(directory), workshop.deltas("gpt2", directory)
    workshop.assert_deltas(adapter, wanted, base=workshop.base("gpt2"))
    linear = workshop.adapter("llama", lora(target_modules=["q_proj", "k_proj"]), "linear")
    workshop.edit_config(linear, fan_in_fan_out=stated)
    wanted = workshop.deltas("llama", linear)
    workshop.assert_deltas(load_adapter(linear), wanted, base=workshop.base("llama"))


IA3S = {  # id: model, options of IA3Config, number of modules
    "outputs": ("mlp", {}, 8),
    "inputs": ("mlp", {"feedforward_modules": EVERY_LAYER}, 8),
    "inputs of some, by regular expression": ("mlp", {"feedforward_modules": r"blocks\.1.*"}, 8),
    "targets as a regular expression": ("mlp", {"target_modules": r"blocks\.\d\.(up|mix)"}, 4),
    "exclude_modules": ("mlp", {"exclude_modules": ["mix"]}, 6),
    "llama": (
        "llama",
        {
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        6,
    ),
    "Conv1D": (
        "gpt2",
        {
            "target_modules": ["c_attn", "attn.c_proj", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
        6,
    ),
}


@pytest.mark.parametrize("case", IA3S)
def test_an_ia3_has_the_deltas_that_peft_merges(workshop, case):
    kind, options, count = IA3S[case]
    directory = workshop.adapter(kind, ia3(**options))
    changes, base = workshop.changes(kind, directory), workshop.base(kind)
    wanted = workshop.deltas(kind, directory)
    assert len(wanted) == count
    adapter = load_adapter(directory)
    workshop.assert_deltas(adapter, wanted, base=base)
    for name, bias in load_file(base / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if kind == "bias" and module in adapter.modules:
            change = adapter.modules[module].apply_to_bias(bias) - bias
            workshop.assert_close(change, changes.get(name, torch.zeros_like(bias)), 1e-6, name)


def test_the_delta_of_an_ia3_asks_for_the_base_model(workshop):
    adapter = load_adapter(workshop.adapter("mlp", ia3()))
    with pytest.raises(BaseModelError, match="give base_model"):
        adapter.delta("up")


def test_a_module_that_is_not_touched_is_named_with_what_is_near(workshop):
    adapter = load_adapter(workshop.adapter("mlp", lora(target_modules=["mix"])))
    with pytest.raises(KeyError, match=r"blocks\.0\.mixx.*did you mean 'blocks\.0\.mix'"):
        adapter.delta("blocks.0.mixx")


# ------------------------------------------------------------------------------------------ heads


def test_saved_modules_are_a_head_and_no_delta(workshop):
    directory = workshop.adapter("bert", lora(target_modules=["query"], task_type="SEQ_CLS"))
    adapter, tensors = load_adapter(directory), load_file(directory / WEIGHTS)
    assert set(adapter.modules) == {f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)}
    head = adapter.head.read()
    assert adapter.head.modules == ("classifier",)
    assert set(head) == {"classifier.weight", "classifier.bias"}
    for name, values in head.items():
        assert torch.equal(values, tensors[f"base_model.model.{name}"])


def test_resized_embeddings_are_kept_as_replaced_parameters(workshop):
    model = workshop.model("llama")
    model.resize_token_embeddings(40, mean_resizing=False)
    peft_model = workshop.peft_model(model, lora(target_modules=["q_proj"]))
    peft_model.save_pretrained(workshop.directory / "a", save_embedding_layers=True)
    adapter = load_adapter(workshop.directory / "a")
    head = adapter.head.read()
    assert torch.equal(head["model.embed_tokens.weight"], model.get_input_embeddings().weight)
    assert torch.equal(head["lm_head.weight"], model.get_output_embeddings().weight)


# --------------------------------------------------------------------------------------- laziness


def test_loading_reads_no_values_and_a_delta_reads_them_anew(workshop):
    directory = workshop.adapter("mlp", lora())
    other = workshop.adapter("mlp", lora(), "other", seed=2)
    wanted = workshop.deltas("mlp", other)
    adapter = load_adapter(directory)
    content = (other / WEIGHTS).read_bytes()
    with (directory / WEIGHTS).open("r+b") as file:  # the same file, with other values
        file.write(content)
    workshop.assert_deltas(adapter, wanted)


def test_one_delta_reads_the_tensors_of_its_module_and_no_others(workshop):
    directory = workshop.adapter("mlp", lora())
    spoilt = "base_model.model.blocks.1.mix.lora_A.weight"
    workshop.edit_tensors(directory, lambda t: t | {spoilt: t[spoilt] * torch.nan})
    adapter = load_adapter(directory)
    assert adapter.delta("blocks.0.mix").isfinite().all()
    with pytest.raises(AdapterError, match=r"blocks\.1\.mix\.lora_A\.weight holds NaN"):
        adapter.delta("blocks.1.mix")


# --------------------------------------------------------------------- what is refused, and how it is said


def on(target, config=lora, **options):
    return config(target_modules=[target], **options)


ODD = {  # what PEFT can build and this package does not read yet: config, words of the message
    "PiSSA, randomised": (
        on("linear", init_lora_weights="pissa_niter_4"),
        "pissa_niter_4.*path_initial_model",
    ),
    "two parameters of an unknown module": (
        lora(target_modules=[], target_parameters=["inner.experts", "inner.others"]),
        "order of the parameters",
    ),
    "a matrix that is no weight": (
        lora(target_modules=[], target_parameters=["inner.others"]),
        "inner.others",
    ),
    "Lily": (peft.LilyConfig(target_modules=["linear"]), "peft_type LILY.*no single ΔW"),
    "Uni-LoRA": (peft.UniLoraConfig(target_modules=["linear"]), "does not say which modules"),
    "TinyLoRA": (peft.TinyLoraConfig(target_modules=["linear"]), "order of the model's layers"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_not_supported_is_refused_by_name(workshop, case):
    config, words = ODD[case]
    directory = workshop.adapter("odd", config)
    with pytest.raises(UnsupportedError, match=f"adapter: .*{words}"):
        load_adapter(directory)


def test_prompt_tuning_is_refused_by_name(workshop):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    directory = workshop.adapter("llama", config)
    with pytest.raises(UnsupportedError, match="peft_type PROMPT_TUNING is not supported"):
        load_adapter(directory)


def test_repeated_layers_are_refused_by_name(workshop):
    config = lora(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(UnsupportedError, match="layer_replication"):
        load_adapter(workshop.adapter("llama", config))


STATED = {  # what needs data or special layers to be built: what the configuration says of it
    "use_qalora": True,
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 3},
    "init_lora_weights": "corda",
    "layer_replication": [[0, 1]],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [*STATED.items(), ("init_lora_weights", "lora_ga"), ("init_lora_weights", "loftq")],
)
def test_what_the_configuration_says_is_not_supported_is_refused_by_name(workshop, field, value):
    directory = workshop.edit_config(workshop.adapter("mlp", lora()), **{field: value})
    with pytest.raises(UnsupportedError, match=f"{field} = "):
        load_adapter(directory)


P = "base_model.model."
STRANGERS = {  # tensors that no format explains, in a file that is otherwise in order
    "a third factor": P + "up.lora_C.weight",
    "a magnitude": P + "up.lora_magnitude_vector",
    "a bias of lora_B": P + "up.lora_B.bias",
    "a trained bias": P + "up.bias",
    "an adapter's name inside": P + "blocks.0.up.lora_A.default.weight",
    "a lora_A alone": P + "blocks.7.up.lora_A.weight",
    "a lora_B alone": P + "blocks.7.up.lora_B.weight",
    "an embedding": P + "table.lora_embedding_A",
    "an (IA)³ with a weight": P + "blocks.0.up.ia3_l.weight",
    "a LoHa": P + "blocks.0.up.hada_w1_a",
    "a sampler": P + "up.lora_monteclora_sampler.std",
    "a token row": P + "table.token_adapter.trainable_tokens_delta",
    "without PEFT's prefix": "blocks.0.up.weight",
    "of another library": "unet.down.lora.up.weight",
    "a prompt": "prompt_embeddings",
}


@pytest.mark.parametrize("config", [lora(), ia3()], ids=["LoRA", "(IA)³"])
@pytest.mark.parametrize("case", STRANGERS)
def test_an_unexplained_tensor_is_never_skipped(workshop, case, config):
    name = STRANGERS[case]
    directory = workshop.adapter("mlp", config)
    workshop.edit_tensors(directory, lambda tensors: tensors | {name: torch.ones(10, 1)})
    with pytest.raises(AdapterError, match=re.escape(name.removeprefix(P))):
        load_adapter(directory)


def test_factors_without_peft_s_prefix_are_refused(workshop):
    directory = workshop.adapter("mlp", lora())
    workshop.edit_tensors(directory, lambda t: {k.removeprefix(P): v for k, v in t.items()})
    with pytest.raises(AdapterError, match=r"blocks\.0\.down.*base_model\.model\."):
        load_adapter(directory)


TUNERS = {  # one that is read alone, one that is read by way of PEFT's layer: config, one of its tensors
    "LoHa": (peft.LoHaConfig(target_modules=["mix"], r=3), "hada_w2_b"),
    "OFT": (peft.OFTConfig(target_modules=["mix"], r=2, oft_block_size=0), "oft_R.weight"),
}
DAMAGES = {  # what becomes of that tensor: tensors to put in its place, words of the message
    "of another shape": (lambda name, values: {name: values[:, :1].clone()}, "cannot load|must be"),
    "not finite": (lambda name, values: {name: values * torch.nan}, "holds NaN"),
    "beside a stranger": (
        lambda name, values: {name: values, f"{name.replace('mix', 'up')}.x": values.clone()},
        r"blocks\.0\.up|no place for",
    ),
    "and one of no tuner": (
        lambda name, values: {name: values, f"{P}blocks.0.up.lora_C.weight": values.clone()},
        "lora_C",
    ),
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tuner_is_refused_by_name(workshop, tuner, damage):
    config, part = TUNERS[tuner]
    change, words = DAMAGES[damage]
    directory, base = workshop.adapter("mlp", config), workshop.base("mlp")
    name = f"{P}blocks.0.mix.{part}"
    workshop.edit_tensors(
        directory,
        lambda tensors: (
            {k: v for k, v in tensors.items() if k != name} | change(name, tensors[name])
        ),
    )
    with pytest.raises(AdapterError, match=words):
        [delta.norm() for delta in load_adapter(directory, base_model=base).modules.values()]


def test_a_part_that_is_missing_is_named(workshop):
    directory = workshop.adapter("mlp", TUNERS["LoHa"][0])
    name = f"{P}blocks.0.mix.hada_w2_b"
    workshop.edit_tensors(directory, lambda t: {k: v for k, v in t.items() if k != name})
    with pytest.raises(AdapterError, match=r"blocks\.0\.mix has .* and no hada_w2_b"):
        load_adapter(directory).delta("blocks.0.mix")


# ------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_tensor_that_is_not_finite_is_refused_by_name(workshop, part, value):
    directory = workshop.adapter("mlp", lora())
    spoilt = f"{P}up.{part}.weight"
    workshop.edit_tensors(
        directory, lambda t: t | {spoilt: t[spoilt].index_fill(0, torch.tensor(1), value)}
    )
    with pytest.raises(
        AdapterError, match=rf"{directory}.*up\.{part}\.weight holds NaN or infinite"
    ):
        load_adapter(directory).delta("up")


def test_an_initialisation_that_is_not_known_is_refused(workshop):
    directory = workshop.adapter("mlp", lora())
    workshop.edit_config(directory, init_lora_weights="of tomorrow")
    with pytest.raises(UnsupportedError, match="init_lora_weights = 'of tomorrow' is not known"):
        load_adapter(directory)


@pytest.mark.parametrize("plain", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_weights_is_read(workshop, plain):
    directory = workshop.adapter("mlp", lora())
    expected = workshop.deltas("mlp", directory)
    workshop.edit_config(directory, init_lora_weights=plain)
    workshop.assert_deltas(load_adapter(directory), expected)


def test_a_head_that_is_not_finite_is_refused_by_name(workshop):
    directory = workshop.adapter("bert", lora(target_modules=["query"], task_type="SEQ_CLS"))
    workshop.edit_tensors(
        directory, lambda t: t | {f"{P}classifier.bias": torch.tensor([1, torch.nan, 2])}
    )
    with pytest.raises(AdapterError, match=r"classifier\.bias holds NaN"):
        load_adapter(directory).save_pretrained(workshop.directory / "out")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
@pytest.mark.parametrize("safetensors", [True, False])
def test_a_file_that_is_cut_off_is_refused_by_its_path(workshop, safetensors, kept):
    directory = workshop.adapter("mlp", lora(), safetensors=safetensors)
    path = directory / (WEIGHTS if safetensors else PICKLE)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(AdapterError, match=path.name):
        load_adapter(directory)


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, torch.ones(3)], ids=["list", "3", "tensor"])
def test_a_pickled_file_that_holds_something_else_is_refused_by_its_path(workshop, content):
    directory = workshop.adapter("mlp", lora(), safetensors=False)
    torch.save(content, directory / PICKLE)
    with pytest.raises(AdapterError, match=PICKLE):
        load_adapter(directory)


def test_a_pickled_file_runs_no_code(workshop):
    class Attack:
        def __reduce__(self):
            return (workshop.directory.joinpath("ran").touch, ())

    directory = workshop.adapter("mlp", lora(), safetensors=False)
    (directory / PICKLE).write_bytes(pickle.dumps({"a": Attack()}))
    with pytest.raises(AdapterError, match="weights_only"):
        load_adapter(directory)
    assert not (workshop.directory / "ran").exists()


def test_a_missing_lora_b_is_named(workshop):
    directory = workshop.adapter("mlp", lora())
    workshop.edit_tensors(
        directory, lambda t: {k: v for k, v in t.items() if k != P + "blocks.0.mix.lora_B.weight"}
    )
    with pytest.raises(AdapterError, match=r"blocks\.0\.mix has .*lora_A\.weight and no lora_B"):
        load_adapter(directory)


@pytest.mark.parametrize(
    "fields",
    [{"r": 4}, {"rank_pattern": {"mix": 2}}, {"rank_pattern": {r"blocks\.\d\.mix": 7}}],
    ids=str,
)
def test_ranks_that_are_not_those_of_the_configuration_are_named(workshop, fields):
    directory = workshop.edit_config(workshop.adapter("mlp", lora()), **fields)
    with pytest.raises(
        AdapterError, match=r"mix: lora_A has rank 3.*says [247]|down: lora_A has rank 3.*says 4"
    ):
        load_adapter(directory)


def test_factors_of_different_ranks_are_refused(workshop):
    directory = workshop.adapter("mlp", lora())
    name = P + "blocks.0.mix.lora_B.weight"
    workshop.edit_tensors(directory, lambda t: t | {name: t[name][:, :2].clone()})
    with pytest.raises(
        AdapterError, match=r"blocks\.0\.mix: lora_A \(3, 10\) and lora_B \(10, 2\)"
    ):
        load_adapter(directory)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": "3"},
        {"lora_alpha": None},
        {"lora_alpha": "5"},
        {"alpha_pattern": ["mix"]},
        {"rank_pattern": {"mix": "3"}},
        {"alpha_pattern": {"(": 3}},
    ],
    ids=str,
)
def test_a_configuration_of_wrong_types_is_refused_by_field(workshop, fields):
    directory = workshop.edit_config(workshop.adapter("mlp", lora()), **fields)
    with pytest.raises(AdapterError, match=f"adapter: .*({'|'.join(fields)}|rank|alpha)"):
        load_adapter(directory)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"r": 3}', "\xff"], ids=repr)
def test_a_configuration_that_is_none_is_refused_by_its_path(workshop, content):
    directory = workshop.adapter("mlp", lora())
    (directory / CONFIG).write_text(content, encoding="latin-1")
    with pytest.raises(AdapterError, match=CONFIG):
        load_adapter(directory)


@pytest.mark.parametrize("config", [lora(), ia3()], ids=["LoRA", "(IA)³"])
def test_an_adapter_without_a_delta_is_refused(workshop, config):
    directory = workshop.edit_tensors(workshop.adapter("mlp", config), lambda _: {})
    with pytest.raises(AdapterError, match="holds no tensors"):
        load_adapter(directory)


def test_missing_files_are_named(workshop):
    directory = workshop.adapter("mlp", lora())
    (directory / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"neither {WEIGHTS} nor {PICKLE}"):
        load_adapter(directory)
    (directory / CONFIG).unlink()
    with pytest.raises(AdapterError, match=f"holds no {CONFIG}$"):
        load_adapter(directory)


def test_adapters_in_subfolders_are_pointed_out(workshop):
    for name in ("math", "code"):
        workshop.adapter("mlp", lora(), f"both/{name}")
    with pytest.raises(AdapterError, match=r"there are adapters in its subfolders code, math"):
        load_adapter(workshop.directory / "both")
