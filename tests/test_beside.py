"""What stands beside the weights: tokenizers, trained files, cards; and inputs that are no adapters."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from pcb_peft import (
    AdapterError,
    AdapterNotFoundError,
    BaseModelError,
    OptionError,
    UnsupportedError,
    load_adapter,
    merge_adapters,
    read_recipe,
)
from pcb_peft.commands import cli

WEIGHTS = "adapter_model.safetensors"
ENDS = ["embed_tokens", "lm_head"]


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | options)


def put_tokenizer(directory, words, template=None):
    """A tokenizer that knows so many words, as transformers saves it."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def words_of(directory):
    return len(transformers.AutoTokenizer.from_pretrained(directory))


# ------------------------------------------------------------------------------------------------ companions


def test_what_all_adapters_have_alike_is_copied(workshop, tmp_path):
    adapters = workshop.adapters("llama", [lora(), lora(), lora()])
    for adapter in adapters[:2]:
        put_tokenizer(adapter, 40, "{{ messages }}")
    (adapters[0] / "generation_config.json").write_text('{"top_k": 5, "transformers_version": "4"}')
    (adapters[1] / "generation_config.json").write_text('{"top_k": 5, "transformers_version": "5"}')
    (adapters[2] / "preprocessor_config.json").write_text("{}")
    merged = merge_adapters(adapters, "linear")
    assert not merged.report.notes
    merged.save_pretrained(tmp_path / "out")
    beside = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} < beside
    assert "preprocessor_config.json" in beside
    assert words_of(tmp_path / "out") == 40
    again = load_adapter(tmp_path / "out")
    again.save_pretrained(tmp_path / "again")
    assert words_of(tmp_path / "again") == 40


@pytest.mark.parametrize(("policy", "words"), [("agree", None), ("none", None), ("adapter2", 41)])
def test_a_policy_decides_where_they_differ(workshop, tmp_path, policy, words):
    adapters = workshop.adapters("llama", [lora(), lora()])
    for number, adapter in enumerate(adapters, 40):
        put_tokenizer(adapter, number)
    command = ["merge", *map(str, adapters), "-o", str(tmp_path / "out"), "--companions", policy]
    assert cli.main(command) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file() == (words is not None)
    notes = merge_adapters(adapters, "linear", companions=policy).report.notes
    assert len(notes) == (policy == "agree")
    assert all("tokenizer: adapter1, adapter2 have different ones" in note for note in notes)
    assert read_recipe(tmp_path / "out" / "merge_recipe.yaml").companions == policy
    if words:
        assert words_of(tmp_path / "out") == words


def test_an_unknown_adapter_has_no_companions(workshop):
    adapters = workshop.adapters("llama", [lora(), lora()])
    with pytest.raises(OptionError, match=r"companions is 'adapter3'; did you mean 'adapter\d'"):
        merge_adapters(adapters, "linear", companions="adapter3")


def grown(workshop, name="grown"):
    """An adapter with three more tokens than the base model, which has a tokenizer of 32."""
    base = workshop.base("llama")
    put_tokenizer(base, 32)
    (base / "added_tokens.json").write_text("{}")
    larger = workshop.model("llama")
    larger.resize_token_embeddings(35, mean_resizing=False)
    return workshop.adapter(larger, lora(modules_to_save=ENDS), name), base


def test_a_fold_whose_vocabulary_grows_has_the_adapter_s_tokenizer(workshop, tmp_path):
    adapter, base = grown(workshop)
    put_tokenizer(adapter, 35, "{{ messages }}")
    merge_adapters([adapter], "linear").fold(base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 35
    assert words_of(tmp_path / "out") == 35
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out" / "added_tokens.json").exists()  # of the other tokenizer


def test_a_grown_vocabulary_without_its_tokenizer_is_told(workshop, tmp_path):
    adapter, base = grown(workshop)
    with pytest.warns(UserWarning, match="from 32 to 35 tokens, and no tokenizer stands beside"):
        load_adapter(adapter).fold(base, tmp_path / "out")
    assert words_of(tmp_path / "out") == 32


def test_a_fold_whose_vocabulary_stays_has_the_base_model_s_files(workshop, tmp_path):
    adapter, base = workshop.adapter("llama", lora()), workshop.base("llama")
    put_tokenizer(base, 32)
    put_tokenizer(adapter, 31)
    load_adapter(adapter).fold(base, tmp_path / "out")
    assert words_of(tmp_path / "out") == 32


def test_an_adapter_beside_the_base_model_does_not_stand_beside_the_folded_one(workshop, tmp_path):
    first, second = workshop.adapters("llama", [lora(), lora(target_modules=["v_proj"])])
    base = workshop.base("llama")
    for file in ("adapter_config.json", WEIGHTS):
        shutil.copy(first / file, base)
    with pytest.warns(UserWarning, match="holds an adapter beside its weights"):
        load_adapter(second).fold(base, tmp_path / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    alone = peft.PeftModel.from_pretrained(workshop.model("llama"), second).merge_and_unload()
    for name, values in model.state_dict().items():
        workshop.assert_close(values, alone.state_dict()[name], 1e-6, name)


# --------------------------------------------------------------------------------------------- trained files


@pytest.mark.parametrize(
    "file",
    ["non_lora_trainables.bin", "value_head.safetensors", "v_head.bin", "mm_projector.bin"],
)
def test_weights_beside_an_adapter_are_refused_by_name(workshop, file):
    adapter = workshop.adapter("llama", lora())
    if file.endswith(".bin"):
        torch.save({"x": torch.ones(2)}, adapter / file)
    else:
        save_file({"x": torch.ones(2)}, adapter / file)
    with pytest.raises(UnsupportedError, match=rf"{file} holds weights that were trained with"):
        merge_adapters([adapter], "linear")


def test_the_state_of_a_training_run_and_a_whole_model_are_no_part_of_an_adapter(workshop):
    adapter = workshop.adapter("llama", lora())
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", "scheduler.pt"):
        (adapter / name).write_bytes(b"")
    for path in workshop.base("llama").iterdir():
        shutil.copy(path, adapter)
    assert load_adapter(adapter).modules


# ----------------------------------------------------------------------------------------------------- cards


def test_the_card_of_a_merge_says_all_that_is_needed_to_use_it(workshop, tmp_path):
    config = lora(task_type="CAUSAL_LM")
    adapters = workshop.adapters("llama", [config, config], base="org/base")
    merge_adapters(adapters, "ties", [1, 0.5]).save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "[org/base](https://huggingface.co/org/base)" in text
    assert "(https://arxiv.org/abs/2306.01708)" in text
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text
    assert str(tmp_path) not in text
    recipe = text.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "recipe.yaml").write_text(recipe)
    made = read_recipe(tmp_path / "recipe.yaml")
    assert (made.method, [source.path for source in made.adapters]) == (
        "ties",
        ["adapter1", "adapter2"],
    )


def test_a_folded_model_has_a_card_of_its_own(workshop, tmp_path):
    """Whether the merge is in memory or was saved: base, adapters, method, recipe and licence; not the base's card."""
    adapters, base = workshop.adapters("llama", [lora(), lora()]), workshop.base("llama")
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-licence\ntags:\n- chat\n---\n# The base\n"
    )
    merged = merge_adapters(adapters, "ties")
    merged.save_pretrained(tmp_path / "merged")
    merged.fold(base, tmp_path / "one")
    assert cli.main(["fold", str(tmp_path / "merged"), str(base), "-o", str(tmp_path / "two")]) == 0
    cards = [ModelCard.load(tmp_path / name / "README.md") for name in ("one", "two")]
    for card in cards:
        assert card.data.license == "other"
        assert card.data.to_dict()["license_name"] == "some-licence"
        assert card.data.library_name == "transformers"
        assert {"merge", "pcb_peft"} <= set(card.data.tags)
        assert "chat" not in card.data.tags
        for words in ("| adapter1 | 1.0 |", "| method | ties |", "method: ties", "some-licence"):
            assert words in card.text
    assert (tmp_path / "one" / "BASE_README.md").read_text().endswith("# The base\n")


@pytest.mark.parametrize(
    ("stated", "of_merge", "of_fold"),
    [
        pytest.param(["mit", "mit"], "mit", None, id="alike, and the base model has another"),
        pytest.param(["apache-2.0"] * 2, "apache-2.0", "apache-2.0", id="all alike"),
        pytest.param(["mit", "cc-by-nc-4.0"], None, None, id="different"),
        pytest.param(["apache-2.0", None], None, None, id="one states none"),
        pytest.param([None, None], None, "apache-2.0", id="only the base model's"),
    ],
)
def test_licences_of_adapters_are_carried_over_and_different_ones_are_told(
    workshop, tmp_path, stated, of_merge, of_fold
):
    adapters, base = workshop.adapters("llama", [lora(), lora()]), workshop.base("llama")
    for directory, licence in zip([*adapters, base], [*stated, "apache-2.0"], strict=True):
        front = f"license: {licence}" if licence else "tags: []"
        (directory / "README.md").write_text(f"---\n{front}\n---\n# One\n")
    merge_adapters(adapters, "linear").save_pretrained(tmp_path / "merged")
    load_adapter(tmp_path / "merged").fold(base, tmp_path / "folded")
    for name, licence in {"merged": of_merge, "folded": of_fold}.items():
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.to_dict().get("license") == licence
        for adapter, one in zip(adapters, stated, strict=True):
            line = f"- {adapter.name}: {one or 'none stated'}\n"
            assert (line in card.text) == any(stated)


def test_the_card_of_a_merge_with_one_head_keeps_what_it_said(workshop, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    adapters = workshop.adapters("bert", [config, config])
    merge_adapters(adapters, "linear").save_pretrained(tmp_path / "merged")
    before = (tmp_path / "merged" / "README.md").read_text()
    assert "**This merge has no classifier of its own.**" in before
    (tmp_path / "merged" / "README.md").write_text(f"{before}\n## Evaluation\n\nvery good\n")
    assert (
        cli.main(["head", str(tmp_path / "merged"), "adapter2", "-o", str(tmp_path / "out")]) == 0
    )
    after = (tmp_path / "out" / "README.md").read_text()
    assert "of its own" not in after
    assert "classifier: loads with the adapter" in after
    assert "head: adapter2" in after
    assert "very good" in after


# ------------------------------------------------------------------------------- inputs that are no adapters


def mlx(directory):
    (directory / "adapter_config.json").write_text('{"lora_parameters": {"rank": 8}}')
    save_file(
        {"model.layers.0.q_proj.lora_a": torch.ones(2, 2)}, directory / "adapters.safetensors"
    )


def fsdp(directory):
    (directory / "pytorch_model_fsdp_0").mkdir()
    (directory / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"")


def deepspeed(directory):
    (directory / "global_step10").mkdir()
    (directory / "global_step10" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")


def axolotl(directory):
    for step in (9, 10):
        (directory / f"checkpoint-{step}").mkdir()
        (directory / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    (directory / "config.json").write_text("{}")


def whole(directory):
    save_file({"x": torch.ones(2)}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (mlx, "no peft_type.*it is an adapter of MLX"),
        (fsdp, "shards of an FSDP run.*accelerate merge-weights"),
        (deepspeed, r"shards of a DeepSpeed run.*zero_to_fp32\.py"),
        (axolotl, r"subfolders checkpoint-10, checkpoint-9: the latest is .*checkpoint-10"),
        (whole, "holds a whole model.*pcb-peft extract"),
    ],
)
def test_directories_that_hold_no_adapter(tmp_path, make, message):
    directory = tmp_path / "run"
    directory.mkdir()
    make(directory)
    with pytest.raises(AdapterError, match=message):
        load_adapter(directory)


def test_shards_beside_a_configuration(workshop):
    """A run that wrote the adapter's configuration, and its tensors in parts."""
    adapter = workshop.adapter("llama", lora())
    (adapter / WEIGHTS).unlink()
    fsdp(adapter)
    with pytest.raises(AdapterNotFoundError, match=r"has neither.*shards of an FSDP run"):
        load_adapter(adapter)


@pytest.mark.parametrize("file", [WEIGHTS, "adapter_config.json"])
def test_a_file_of_an_adapter_is_not_its_directory(workshop, file):
    adapter = workshop.adapter("llama", lora())
    with pytest.raises(AdapterError, match=f"give the directory that it is in: {adapter}"):
        load_adapter(adapter / file)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_peft_model_in_another_is_refused(workshop, tmp_path):
    inner = workshop.peft_model("llama", lora())
    outer = peft.PeftModel(inner, lora(target_modules=["k_proj"]), adapter_name="outer")
    with pytest.raises(UnsupportedError, match=r"PeftModel around another PeftModel.*add_adapter"):
        load_adapter((outer, "outer"))
    outer.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved" / "outer"
    assert next(iter(load_file(saved / WEIGHTS))).startswith("base_model.model.base_model.model.")
    with pytest.raises(UnsupportedError, match="PeftModel in another"):
        load_adapter(saved)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "big"}, {"hidden_act": "nope"}, {"layer_types": ["x", "y"]}]
)
def test_a_configuration_that_transformers_cannot_read(workshop, tmp_path, fields):
    """StrictDataclass and KeyError inside transformers; a merge of LoRAs does without."""
    base, adapter = workshop.base("llama"), workshop.adapter("llama", lora())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | fields))
    assert merge_adapters([adapter], "linear", base_model=base).modules
    with pytest.raises(BaseModelError, match=r"cannot be loaded with transformers .*config\.json"):
        load_adapter(adapter).fold(base, tmp_path / "out")
