"""Folding what changes a model's two ends: the folded model says what PEFT's says before it merges anything."""

import json

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_replaced import EMBED, HEAD, logits, lora, model_of, tokens

from pcb_peft import (
    BaseModelError,
    MismatchError,
    OptionError,
    fold_adapter,
    load_adapter,
    merge_adapters,
)
from pcb_peft.commands import cli

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.slow,
]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGER = {"vocabulary": 40, "embeddings": True}

ONE_END = {  # what changes one end of tied weights
    "LoRA on the embedding": (lora("embed_tokens", "q_proj"), {}),
    "... of a larger vocabulary": (lora("embed_tokens"), LARGER),
    "DoRA on the embedding": (lora("embed_tokens", use_dora=True), {}),
    "LoRA on the output layer": (lora("lm_head"), {}),
    "DoRA on the output layer": (lora("lm_head", use_dora=True), {}),
    "the embedding replaced": (lora("q_proj", modules_to_save=["embed_tokens"]), {}),
    "the output layer replaced": (lora("q_proj", modules_to_save=["lm_head"]), {}),
}
TWO_CHANGES = {
    "LoRA on both ends": (lora("embed_tokens", "lm_head"), {}),
    "... of a larger vocabulary, both": (lora("embed_tokens", "lm_head"), LARGER),
    "other rows at each end": (
        lora("q_proj", trainable_token_indices={"embed_tokens": [1, 3], "lm_head": [3, 2]}),
        {},
    ),
}
ALIKE = {  # both ends change alike, in PEFT too
    "rows": (lora("q_proj", trainable_token_indices=[5, 3]), {}),
    "rows of the embedding": (lora("q_proj", trainable_token_indices={"embed_tokens": [5]}), {}),
    "rows alone": (tokens(5, 3), {}),
    "rows of a larger vocabulary": (lora("q_proj", trainable_token_indices=[5, 35]), LARGER),
    "rows alone of a larger vocabulary": (tokens(5, 35), LARGER),
    "a larger vocabulary": (lora("q_proj"), LARGER),
    "ensure_weight_tying": (lora("embed_tokens", ensure_weight_tying=True), {}),
    "... of what is replaced": (
        lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        {},
    ),
}


def pair(workshop, config, options, tied):
    """An adapter that PEFT saved, and the model that it saved it from, in which nothing is merged."""
    vocabulary = options.get("vocabulary", 32)
    model = workshop.peft_model(model_of(workshop, vocabulary, tied), config)
    saves = options.get("embeddings", "auto")
    model.save_pretrained(workshop.directory / "adapter", save_embedding_layers=saves)
    return workshop.directory / "adapter", model.eval()


def base_of(workshop, *, tied, shard="1GB"):
    model_of(workshop, tied=tied).save_pretrained(workshop.directory / "base", max_shard_size=shard)
    return workshop.directory / "base"


def opened(directory):
    """The folded model; transformers finds all that it looks for, and nothing else."""
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(notes.values()), notes
    return model.eval()


@pytest.mark.parametrize("shard", ["1GB", "3KB"])
@pytest.mark.parametrize("name", [*ONE_END, *TWO_CHANGES])
def test_untied_ends_do_what_peft_s_model_does_before_it_merges(workshop, tmp_path, name, shard):
    adapter, model = pair(workshop, *(ONE_END | TWO_CHANGES)[name], tied=True)
    base = base_of(workshop, tied=True, shard=shard)
    fold_adapter(adapter, base, tmp_path / "out", tied="untie")
    folded = opened(tmp_path / "out")
    workshop.assert_close(logits(folded), logits(model), 1e-5)
    assert folded.config.tie_word_embeddings is False
    if shard != "1GB":
        check_index(base, tmp_path / "out", {f"{HEAD}.weight"})


@pytest.mark.parametrize("policy", ["refuse", "untie", "both"])
@pytest.mark.parametrize("name", ALIKE)
def test_what_changes_both_ends_alike_is_applied_once(workshop, tmp_path, name, policy):
    adapter, model = pair(workshop, *ALIKE[name], tied=True)
    fold_adapter(adapter, base_of(workshop, tied=True), tmp_path / "out", tied=policy)
    folded = opened(tmp_path / "out")
    workshop.assert_close(logits(folded), logits(model), 1e-5)
    assert folded.config.tie_word_embeddings is True
    assert f"{HEAD}.weight" not in load_file(tmp_path / "out" / SINGLE)


@pytest.mark.parametrize("name", ONE_END)
def test_both_ends_may_follow_the_change_of_one(workshop, tmp_path, name):
    config, options = ONE_END[name]
    adapter, model = pair(workshop, config, options, tied=True)
    fold_adapter(adapter, base_of(workshop, tied=True), tmp_path / "out", tied="both")
    end = HEAD if "output layer" in name else EMBED
    wanted = model.merge_and_unload().get_submodule(end).weight
    folded = opened(tmp_path / "out")
    assert folded.lm_head.weight is folded.model.embed_tokens.weight
    workshop.assert_close(folded.lm_head.weight, wanted, 1e-6)


@pytest.mark.parametrize("name", [*ONE_END, *TWO_CHANGES])
def test_a_change_of_one_end_is_refused_by_default(workshop, tmp_path, name):
    adapter, _ = pair(workshop, *(ONE_END | TWO_CHANGES)[name], tied=True)
    base = base_of(workshop, tied=True)
    policies = [None, "refuse"] + ["both"] * (name in TWO_CHANGES)
    for policy in policies:
        with pytest.raises(BaseModelError, match=r"is tied to .*tied='untie' \(--tied untie\)"):
            fold_adapter(adapter, base, tmp_path / "out", tied=policy)
    assert not (tmp_path / "out").exists()


OWN = ["LoRA on both ends", "... of a larger vocabulary, both", "other rows at each end"]
OWN += ["the output layer replaced", "rows", "rows of a larger vocabulary", "a larger vocabulary"]


@pytest.mark.parametrize("shard", ["1GB", "3KB"])
@pytest.mark.parametrize("name", OWN)
def test_ends_that_are_not_tied_change_each_by_itself(workshop, tmp_path, name, shard):
    config, options = (ONE_END | TWO_CHANGES | ALIKE)[name]
    adapter, model = pair(workshop, config, options, tied=False)
    base = base_of(workshop, tied=False, shard=shard)
    fold_adapter(adapter, base, tmp_path / "out")
    folded = opened(tmp_path / "out")
    workshop.assert_close(logits(folded), logits(model), 1e-5)
    assert folded.config.vocab_size == options.get("vocabulary", 32)
    if shard != "1GB":
        check_index(base, tmp_path / "out", set())
    if not options:
        for path in base.glob("*.safetensors"):
            assert header(path) == header(tmp_path / "out" / path.name)
        for name in ("config.json", INDEX):
            if (base / name).is_file():
                assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def header(path):
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def check_index(base, out, added):
    """The index says where every tensor is and how many bytes and numbers there are."""
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (base, out))
    assert after["weight_map"].keys() == before["weight_map"].keys() | added
    tensors = {}
    for name, file in after["weight_map"].items():
        with safe_open(out / file, framework="pt") as opened_file:
            tensors[name] = opened_file.get_tensor(name)
            assert opened_file.metadata() == {"format": "pt"}
        assert len(header(out / file)) % 8 == 0
    wanted = {
        "total_size": sum(t.numel() * t.element_size() for t in tensors.values()),
        "total_parameters": sum(t.numel() for t in tensors.values()),
    }
    assert after["metadata"].items() <= wanted.items()


def test_a_larger_vocabulary_at_one_end_only_is_refused(workshop, tmp_path):
    adapter, _ = pair(workshop, *ONE_END["... of a larger vocabulary"], tied=False)
    with pytest.raises(MismatchError, match=r"embed_tokens.*\(40, 16\).*\(32, 16\).*lm_head.* 32"):
        fold_adapter(adapter, base_of(workshop, tied=False), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_row_beyond_the_vocabulary_is_refused(workshop, tmp_path):
    adapter, _ = pair(workshop, tokens(35), {"vocabulary": 40, "embeddings": False}, tied=False)
    with pytest.raises(MismatchError, match=r"embed_tokens.*rows up to 35.*\(32, 16\)"):
        fold_adapter(adapter, base_of(workshop, tied=False), tmp_path / "out")


def test_the_texts_of_a_nested_configuration_change_too(workshop, tmp_path):
    """Llava: the vocabulary and the tie belong to its language model; its names on disk are older ones."""
    text = model_of(workshop).config
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_index=31
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    peft_model = workshop.peft_model(model, lora("embed_tokens")).eval()
    peft_model.save_pretrained(tmp_path / "adapter")
    wanted = peft_model(torch.arange(30)[None]).logits
    fold_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", tied="untie")
    folded, notes = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(notes.values()), notes
    workshop.assert_close(folded.eval()(torch.arange(30)[None]).logits, wanted, 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_other_models_have_other_names(workshop, tmp_path, kind):
    """GPT-2 is tied, and the embeddings of this BERT are not; both name them otherwise."""
    config = lora("wte" if kind == "gpt2" else "word_embeddings")
    model = workshop.peft_model(kind, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    fold_adapter(tmp_path / "adapter", workshop.base(kind), tmp_path / "out", tied="untie")
    auto = {
        "gpt2": transformers.AutoModelForCausalLM,
        "bert": transformers.AutoModelForSequenceClassification,
    }[kind]
    folded = auto.from_pretrained(tmp_path / "out")
    workshop.assert_close(logits_of(folded.eval(), 16), logits_of(model, 16), 1e-5)


def logits_of(model, length):
    with torch.no_grad():
        return model(torch.arange(length)[None]).logits


def test_a_merge_remembers_what_to_do_with_tied_weights(workshop, tmp_path):
    adapter, model = pair(workshop, *ONE_END["LoRA on the embedding"], tied=True)
    base = base_of(workshop, tied=True)
    merged = merge_adapters([adapter], "linear", tied="untie")
    assert "tied: untie" in merged.recipe.to_yaml()
    merged.fold(base, tmp_path / "out")
    workshop.assert_close(logits(opened(tmp_path / "out")), logits(model), 1e-5)
    with pytest.raises(BaseModelError, match="tied"):
        merged.fold(base, tmp_path / "refused", tied="refuse")


def test_the_command_line_unties_too(workshop, tmp_path, capsys):
    adapter, model = pair(workshop, *ONE_END["LoRA on the embedding"], tied=True)
    words = [str(adapter), str(base_of(workshop, tied=True)), "-o", str(tmp_path / "out")]
    assert cli.main(["fold", *words]) == 2
    assert "tied='untie' (--tied untie)" in capsys.readouterr().err
    assert cli.main(["fold", *words, "--tied", "untie"]) == 0
    workshop.assert_close(logits(opened(tmp_path / "out")), logits(model), 1e-5)


def test_an_unknown_policy_is_refused(workshop, tmp_path):
    adapter, _ = pair(workshop, *ONE_END["LoRA on the embedding"], tied=True)
    with pytest.raises(OptionError, match="tied is 'both-ends'; it must be one of refuse, untie"):
        fold_adapter(adapter, base_of(workshop, tied=True), tmp_path / "out", tied="both-ends")
    with pytest.raises(OptionError, match="tied is 'x'"):
        merge_adapters([adapter], tied="x")


def test_an_architecture_that_transformers_does_not_know_is_not_untied(workshop, tmp_path):
    adapter, _ = pair(workshop, *ONE_END["LoRA on the embedding"], tied=True)
    base = base_of(workshop, tied=True)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "no_such_type", "architectures": ["NoSuchModel"]}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BaseModelError, match=r"embed_tokens.* the output layer and cannot be untied"
    ):
        fold_adapter(adapter, base, tmp_path / "out", tied="untie")


def test_more_than_two_ends_are_not_untied(workshop, tmp_path):
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = transformers.T5ForConditionalGeneration(config)
    workshop.peft_model(model, lora("lm_head")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BaseModelError, match=r"lm_head.*encoder.embed_tokens.*cannot be untied"):
        fold_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", tied="untie")


def test_a_second_copy_of_tied_weights_in_the_files_changes_too(workshop, tmp_path):
    adapter, model = pair(workshop, *ALIKE["rows"], tied=True)
    base = base_of(workshop, tied=True)
    tensors = load_file(base / SINGLE)
    copy = {f"{HEAD}.weight": tensors[f"{EMBED}.weight"].clone()}
    save_file(tensors | copy, base / SINGLE, metadata={"format": "pt"})
    fold_adapter(adapter, base, tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)
    wanted = model.merge_and_unload().get_input_embeddings().weight
    for end in (EMBED, HEAD):
        workshop.assert_close(found[f"{end}.weight"], wanted, 1e-7, end)


def test_rows_and_a_delta_on_one_embedding_are_folded_one_after_the_other(workshop, tmp_path):
    """PEFT has no such adapter: the rows take the place of the base's, the delta is added to them."""
    delta, rows = lora("embed_tokens"), lora("q_proj", trainable_token_indices=[1, 4])
    adapters, states = [], []
    for seed, config in enumerate((delta, rows), 1):
        model = workshop.peft_model(model_of(workshop), config, seed=seed)
        model.save_pretrained(tmp_path / f"a{seed}", save_embedding_layers=False)
        adapters.append(tmp_path / f"a{seed}")
        states.append(model.merge_and_unload().state_dict()[f"{EMBED}.weight"])
    base = base_of(workshop, tied=False)
    merge_adapters(adapters, "linear").fold(base, tmp_path / "out")
    before = load_file(base / SINGLE)[f"{EMBED}.weight"]
    found = load_file(tmp_path / "out" / SINGLE)[f"{EMBED}.weight"]
    workshop.assert_close(found, states[1] + (states[0] - before), 1e-6)


def test_an_ia3_multiplies_the_matrix_that_it_brings_along(workshop):
    """Merged with a LoRA it is W∘(l − 1), for W of the larger vocabulary."""
    config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    adapter, model = pair(workshop, config, LARGER, tied=False)
    other = workshop.adapter("llama", lora("q_proj"), "lora")
    base = base_of(workshop, tied=False)
    before = model.get_submodule(HEAD).get_base_layer().weight.detach().clone()
    wanted = model.merge_and_unload().get_output_embeddings().weight - before
    merged = merge_adapters([adapter, other], "linear", base_model=base)
    workshop.assert_close(merged.delta(HEAD), wanted, 1e-5)


def test_the_delta_of_an_adapter_with_its_own_matrix_needs_no_fitting_base(workshop):
    adapter, model = pair(workshop, lora("embed_tokens", use_dora=True), LARGER, tied=False)
    before = model_of(workshop, 40).get_input_embeddings().weight
    wanted = model.merge_and_unload().get_input_embeddings().weight - before
    base = base_of(workshop, tied=False)
    for opened_base in (None, base):
        found = load_adapter(adapter).delta(EMBED, base_model=opened_base)
        workshop.assert_close(found, wanted, 1e-5)
    assert isinstance(model, peft.PeftModel)
