"""Embedding matrices and token rows that adapters replace: PEFT does with the merge what it does with the sources."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from models import roberta
from safetensors.torch import load_file, save_file
from torch import nn

from pcb_peft import (
    AdapterError,
    MismatchError,
    OptionError,
    Recipe,
    Source,
    UnsupportedError,
    estimate_merge,
    load_adapter,
    merge,
    merge_adapters,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
    pytest.mark.slow,
]
WRAPPED_TWICE = (
    "base_layer.trainable_tokens_delta"  # PEFT's fault with a second adapter on tied ends
)
FILE, EMBED, HEAD = "adapter_model.safetensors", "model.embed_tokens", "lm_head"


def lora(*targets, **options):
    return peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), **options)


def tokens(*indices, **options):
    return peft.TrainableTokensConfig(token_indices=list(indices), **options)


def model_of(workshop, vocabulary=32, tied=False, seed=0):
    """The tiny llama; new rows of a larger vocabulary have values of their own."""
    model = workshop.model("llama")
    if tied:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig.from_dict(
                model.config.to_dict() | {"tie_word_embeddings": True}
            )
        )
        state = workshop.model("llama").state_dict()
        model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    if vocabulary != 32:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.eval()


def made(workshop, name, config, *, seed=1, embeddings="auto", **model):
    """An adapter that PEFT saved with its embeddings, if it is told to or decides to."""
    peft_model = workshop.peft_model(model_of(workshop, **model), config, seed=seed)
    peft_model.save_pretrained(workshop.directory / name, save_embedding_layers=embeddings)
    return workshop.directory / name


def loaded(directory, model):
    """What PEFT makes of it: there is a place for each tensor and a tensor for each place."""
    twice = peft.PeftModel.from_pretrained(copy.deepcopy(model), directory)
    result = twice.load_adapter(directory, "again")
    missing = [key for key in result.missing_keys if "again" in key]
    assert not result.unexpected_keys
    assert not [key for key in missing if WRAPPED_TWICE not in key]
    return peft.PeftModel.from_pretrained(model, directory).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(32)[None]).logits


def merged_state(directory, model):
    return loaded(directory, model).merge_and_unload().state_dict()


ALONE = {
    "LoRA on the embedding": (lora("embed_tokens", "q_proj"), {}),
    "... of a larger vocabulary": (lora("embed_tokens"), {"vocabulary": 40, "embeddings": True}),
    "LoRA on both ends": (lora("embed_tokens", "lm_head"), {}),
    "LoRA beside a larger vocabulary": (lora("q_proj"), {"vocabulary": 40, "embeddings": True}),
    "DoRA on the embedding": (lora("embed_tokens", use_dora=True), {}),
    "DoRA on the output layer": (lora("lm_head", use_dora=True), {}),
    "PiSSA on the output layer": (lora("lm_head", init_lora_weights="pissa"), {}),
    "(IA)³ on the output layer": (
        peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
        {},
    ),
    "rows": (lora("q_proj", trainable_token_indices=[5, 3]), {}),
    "rows of both ends": (
        lora("q_proj", trainable_token_indices={"embed_tokens": [5, 3], "lm_head": [1]}),
        {},
    ),
    "rows of a larger vocabulary": (
        lora("q_proj", trainable_token_indices=[5, 35]),
        {"vocabulary": 40, "embeddings": True},
    ),
    "rows alone": (tokens(5, 3), {}),
    "rows alone, of both ends": (tokens(5, 3, target_modules=["embed_tokens", "lm_head"]), {}),
    "rows alone, of a larger vocabulary": (
        tokens(5, 35),
        {"vocabulary": 40, "embeddings": True},
    ),
}
TIED = ["... of a larger vocabulary", "rows", "rows alone", "rows of a larger vocabulary"]


@pytest.mark.parametrize(
    ("name", "tied"), [*((n, False) for n in ALONE), *((n, True) for n in TIED)]
)
def test_one_adapter_comes_back_from_a_merge_as_it_was(workshop, tmp_path, name, tied):
    config, options = ALONE[name]
    adapter = made(workshop, "a", config, tied=tied, **options)
    merge_adapters([adapter], "linear").save_pretrained(tmp_path / "out")
    size = options.get("vocabulary", 32)
    source = peft.PeftModel.from_pretrained(model_of(workshop, size, tied, seed=7), adapter)
    found = loaded(tmp_path / "out", model_of(workshop, size, tied, seed=7))
    workshop.assert_close(logits(found), logits(source.eval()), 1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_delta_is_added_to_the_matrix_that_the_adapters_share(workshop, tmp_path, dora):
    adapters = [
        made(workshop, f"a{seed}", lora("embed_tokens", use_dora=dora), seed=seed, vocabulary=40)
        for seed in (1, 2)
    ]
    base = model_of(workshop, 40).state_dict()[f"{EMBED}.weight"]
    assert f"base_model.model.{EMBED}.base_layer.weight" in load_file(adapters[0] / FILE)
    merge_adapters(adapters, "linear", [0.5, 2]).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/heads").exists()
    # a base whose new rows are others: the adapter brings its own
    changes = [
        merged_state(adapter, model_of(workshop, 40, seed=7))[f"{EMBED}.weight"] - base
        for adapter in adapters
    ]
    found = merged_state(tmp_path / "out", model_of(workshop, 40, seed=8))[f"{EMBED}.weight"]
    workshop.assert_close(found, base + 0.5 * changes[0] + 2 * changes[1], 1e-6)


def test_matrices_that_differ_follow_the_policy(workshop, tmp_path):
    names = {f"{EMBED}.weight", f"{HEAD}.weight"}
    states = [model_of(workshop, 40, seed=seed).state_dict() for seed in (1, 2)]
    adapters = [
        made(workshop, f"a{seed}", lora("q_proj"), vocabulary=40, seed=seed, embeddings=True)
        for seed in (1, 2)
    ]
    for adapter, state in zip(adapters, states, strict=True):  # `made` has given both the same
        saved = {f"base_model.model.{name}": state[name] for name in names}
        workshop.edit_tensors(adapter, lambda tensors, saved=saved: tensors | saved)
    merge_adapters(adapters, "linear", [3, 1], heads="average").save_pretrained(tmp_path / "mean")
    found = merged_state(tmp_path / "mean", model_of(workshop, 40))
    for name in names:
        workshop.assert_close(found[name], 0.75 * states[0][name] + 0.25 * states[1][name], 1e-6)
    merge_adapters(adapters, "linear").save_pretrained(tmp_path / "each")
    loaded(tmp_path / "each", model_of(workshop, 40))
    for adapter, state in zip(adapters, states, strict=True):
        kept = load_file(tmp_path / "each/heads" / f"{adapter.name}.safetensors")
        assert kept.keys() == names
        assert not model_of(workshop, 40).load_state_dict(kept, strict=False).unexpected_keys
        assert all(torch.equal(kept[name], state[name]) for name in names)


# -------------------------------------------------------------------------------------------- token rows


def rows_of(directory, model, name=EMBED):
    """Which rows of a matrix PEFT changes, and to what."""
    before = model.state_dict()[f"{name}.weight"].clone()
    after = merged_state(directory, model)[f"{name}.weight"]
    return {i: after[i] for i in range(len(before)) if not torch.equal(after[i], before[i])}


PAIRS = {
    "lists": (lora("q_proj", trainable_token_indices=[9, 3]), [4, 2]),
    "a mapping": (lora("q_proj", trainable_token_indices={"embed_tokens": [9, 3]}), [4, 2]),
    "alone": (tokens(9, 3), [4, 2]),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_disjoint_rows_are_all_in_the_result(workshop, tmp_path, name, alone, tied):
    config, other = PAIRS[name]
    second = tokens(*other) if alone else lora("v_proj", trainable_token_indices=other)
    adapters = [
        made(workshop, "a", config, tied=tied),
        made(workshop, "b", second, seed=2, tied=tied),
    ]
    merge_adapters(adapters, "linear", [0.3, 5]).save_pretrained(tmp_path / "out")
    for end in (EMBED, HEAD) if tied else (EMBED,):
        wanted = {}
        for adapter in adapters:
            wanted |= rows_of(adapter, model_of(workshop, tied=tied), end)
        found = rows_of(tmp_path / "out", model_of(workshop, tied=tied), end)
        assert sorted(found) == sorted(wanted) == [2, 3, 4, 9]
        assert all(torch.equal(found[index], wanted[index]) for index in found)
    kind = json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_type"]
    assert kind == ("TRAINABLE_TOKENS" if alone and name == "alone" else "LORA")


@pytest.fixture
def rivals(workshop):
    """Two adapters with a row each of their own, one that differs, and one that both have alike."""
    adapters = [
        made(workshop, "a", lora("q_proj", trainable_token_indices=[1, 7, 8])),
        made(workshop, "b", lora("q_proj", trainable_token_indices=[8, 2, 7]), seed=2),
    ]
    key = f"base_model.model.{EMBED}.token_adapter.trainable_tokens_delta"
    shared = load_file(adapters[0] / FILE)[key][2]

    def shares(tensors):
        tensors[key][0] = shared
        return tensors

    workshop.edit_tensors(adapters[1], shares)
    return adapters


def test_rows_that_differ_are_refused_with_the_way_out(rivals):
    with pytest.raises(UnsupportedError, match=r"embed_tokens: a, b replace row 7 .*'average'"):
        merge_adapters(rivals, "linear")
    with pytest.raises(UnsupportedError, match=r"a, b replace parameters.*token rows"):
        merge_adapters(rivals, "linear", heads="refuse")


@pytest.mark.parametrize("policy", ["average", "first"])
def test_rows_that_differ_follow_the_policy_one_by_one(workshop, rivals, tmp_path, policy):
    first, second = (rows_of(adapter, model_of(workshop)) for adapter in rivals)
    merged = merge_adapters(rivals, "linear", [3, 1], heads=policy)
    how = "the weighted average" if policy == "average" else "the first"
    assert merged.report.notes == (f"{EMBED}: {how}, of rows 7",)
    merged.save_pretrained(tmp_path / "out")
    found = rows_of(tmp_path / "out", model_of(workshop))
    mean = 0.75 * first[7] + 0.25 * second[7]
    wanted = {1: first[1], 2: second[2], 8: first[8], 7: mean if policy == "average" else first[7]}
    assert found.keys() == wanted.keys()
    for index, row in wanted.items():
        workshop.assert_close(found[index], row, 1e-6 if index == 7 else 0)


def test_rows_beside_a_delta_on_the_same_module_cannot_be_saved(workshop, tmp_path):
    adapters = [
        made(workshop, "a", lora("embed_tokens"), embeddings=False),
        made(workshop, "b", lora("q_proj", trainable_token_indices=[1])),
    ]
    merged = merge_adapters(adapters, "linear")
    with pytest.raises(UnsupportedError, match=r"embed_tokens has a delta and token rows.*fold"):
        merged.save_pretrained(tmp_path / "out")


def test_a_merge_of_rows_alone_has_neither_ranks_nor_modules(workshop, tmp_path):
    adapters = [made(workshop, "a", tokens(1)), made(workshop, "b", tokens(2))]
    merged = merge_adapters(adapters)
    with pytest.raises(OptionError, match=r"rank_pattern: merged has no ranks"):
        merged.save_pretrained(tmp_path / "out", rank_pattern=True)
    with pytest.raises(OptionError, match=r"matches no module.*the adapters hold no deltas"):
        merge_adapters(adapters, overrides=[{"modules": "*", "method": "ties"}])


def test_a_merge_of_rows_alone_has_a_cost(workshop, tmp_path):
    paths = [made(workshop, "a", tokens(1)), made(workshop, "b", tokens(2))]
    recipe = Recipe.parse(adapters=tuple(Source(str(path)) for path in paths))
    found = estimate_merge(recipe)
    merge(recipe).save_pretrained(tmp_path / "out")
    assert found.written == sum(rows.nbytes for rows in load_file(tmp_path / "out" / FILE).values())
    assert (found.modules, found.values, found.passes) == (0, 0, 0)


def test_rows_that_an_adapter_cannot_hold_are_not_dropped(workshop, tmp_path):
    ia3 = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    merged = merge_adapters([made(workshop, "a", ia3), made(workshop, "b", tokens(1))], "linear")
    with pytest.raises(UnsupportedError, match=r"IA3 holds no token rows .*embed_tokens.*fold"):
        merged.save_pretrained(tmp_path / "ia3")
    both = {"target_modules": ["embed_tokens", "lm_head"]}
    adapters = [
        made(workshop, "c", tokens(1, **both)),
        made(workshop, "d", tokens(2, target_modules=["lm_head"])),
    ]
    with pytest.raises(UnsupportedError, match=r"have different token rows.*fold"):
        merge_adapters(adapters, "linear").save_pretrained(tmp_path / "tokens")


@pytest.mark.parametrize("indices", [[1], [1, 1], [1, -2], [1, "x"], None])
def test_rows_that_the_configuration_does_not_number_are_refused(workshop, indices):
    adapter = made(workshop, "a", lora("q_proj", trainable_token_indices=[1, 2]))
    workshop.edit_config(adapter, trainable_token_indices=indices)
    why = r"trainable_tokens_delta has shape \(2, 16\)|trainable_token_indices\.1 is (-2|'x'); it must"
    with pytest.raises(AdapterError, match=why):
        load_adapter(adapter)


def test_rows_of_different_widths_are_refused(workshop, tmp_path):
    directory = tmp_path / "narrow"
    directory.mkdir()
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [9], "target_modules": [EMBED]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{EMBED}.trainable_tokens_delta": torch.zeros(1, 4)}, directory / FILE
    )
    with pytest.raises(MismatchError, match=r"embed_tokens: .*'a': 16, 'narrow': 4"):
        merge_adapters([made(workshop, "a", tokens(1)), directory], "linear")


def test_a_live_model_has_them_too(workshop):
    model = workshop.peft_model(model_of(workshop), tokens(1, 2))
    head = load_adapter((model, "default")).head
    wanted = model.get_input_embeddings().trainable_tokens_delta["default"]
    assert head.rows[EMBED].indices == (1, 2)
    assert torch.equal(head.rows[EMBED].load(), wanted)
    assert not isinstance(wanted, nn.Embedding)


def test_a_delta_on_a_part_of_what_another_adapter_replaces_is_folded_and_not_saved(workshop):
    base = workshop.directory / "base"
    roberta().save_pretrained(base)
    headed = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    inside = peft.LoraConfig(r=2, target_modules=["query", "classifier.dense"])
    one, two = (
        workshop.adapter(roberta(), config, name, seed=seed)
        for seed, (name, config) in enumerate({"headed": headed, "inside": inside}.items())
    )
    merged = merge_adapters([one, two], "linear")
    with pytest.raises(UnsupportedError, match=r"classifier\.dense.* has a delta.*fold"):
        merged.save_pretrained(workshop.directory / "out")
    merged.fold(base, workshop.directory / "folded")
    name = "classifier.dense.weight"
    found = workshop.state(workshop.directory / "folded")[name]
    head = load_file(one / "adapter_model.safetensors")[f"base_model.model.{name}"]
    delta = load_adapter(two).delta("classifier.dense")
    workshop.assert_close(found, head + delta, 1e-6)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_heads_and_rows_go_through_a_pickle_and_a_deep_copy(workshop, twin_of):
    rows = lora("q_proj", trainable_token_indices={"embed_tokens": [3, 1]})
    adapter = load_adapter(made(workshop, "rows", rows))
    head = load_adapter(made(workshop, "head", lora("q_proj", modules_to_save=["lm_head"])))
    assert torch.equal(twin_of(adapter).head.rows[EMBED].load(), adapter.head.rows[EMBED].load())
    name = f"{HEAD}.weight"
    assert torch.equal(twin_of(head).head.parameters[name](), head.head.parameters[name]())
