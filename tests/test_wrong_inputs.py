"""Kinds of wrong input that the fuzzer (tests/fuzz) has found: each is refused by name, and at once."""

import json
import os
import shutil

import pytest
import torch
import yaml
from helpers import lora
from peft import VeraConfig
from safetensors.torch import load_file, save_file

from pcb_peft import (
    check,
    extract_adapter,
    load_adapter,
    merge_adapters,
    open_statistics,
    read_recipe,
)
from pcb_peft.adapters.source import Source
from pcb_peft.base.architecture import Skeleton, build_skeleton
from pcb_peft.data.batches import read_rows
from pcb_peft.data.models import load_base
from pcb_peft.data.moments import _hash_of_texts, open_moments
from pcb_peft.distillation.checkpoint import Checkpoint
from pcb_peft.errors import (
    AdapterError,
    BaseModelError,
    MismatchError,
    OptionError,
    OutputError,
    PcbPeftError,
)
from pcb_peft.evaluation.cache import OutcomeCache
from pcb_peft.evaluation.card import write_to_card
from pcb_peft.evaluation.evaluation import Evaluation
from pcb_peft.files.json_text import parse_json, read_text
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.reporting.page import write_report
from pcb_peft.runtime.hashing import sha256_of_file
from pcb_peft.searching.trials import Trial, TrialLog
from pcb_peft.writing.model_card import read_card
from pcb_peft.writing.tensors_file import save_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def header(content):
    """The bytes of a safetensors file with this header, and four more."""
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


# ------------------------------------------------------------------------------------- JSON and YAML

DOUBTFUL = {
    "[" * 101 + "]" * 101: "nested too deeply",
    '{"a": ' * 500 + "1" + "}" * 500: "nested too deeply",
    '{"r": 8, "lora_alpha": 16, "r": 64}': "the key r is there twice, with different values",
    '{"a": {"b": [{"c": 1, "c": "1"}]}}': "the key c is there twice",
    '{"a": "\\ud800"}': "half a character",
    '{"\\uDFFF": 1}': "half a character",
}


@pytest.mark.parametrize("text", DOUBTFUL, ids=range(len(DOUBTFUL)))
def test_json_that_programs_read_in_different_ways_is_refused(text):
    with pytest.raises(OptionError, match=DOUBTFUL[text]):
        parse_json(text, "here", OptionError, "correct it")


def test_json_as_programs_write_it_is_read():
    text = '{"a": 1, "b": "\\ud83d\\ude00 \\\\ud800", "a": 1, "c": ' + "[" * 98 + "]" * 98 + "}"
    assert parse_json(text, "here", OptionError, "")["b"] == "😀 \\ud800"


def test_a_text_takes_the_memory_that_it_has_not_what_it_may_have(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("é" * (1 << 20))
    asked = []

    class Watched:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size):
            asked.append(size)
            return self.file.read(size)

    path = type(tmp_path)
    plain = path.open
    monkeypatch.setattr(path, "open", lambda self, mode: Watched(plain(self, mode)))
    assert read_text(tmp_path / "x", OptionError, "", 1 << 40) == "é" * (1 << 20)
    assert max(asked) <= 1 << 20
    with pytest.raises(OptionError, match="larger than 1 MiB"):
        read_text(tmp_path / "x", OptionError, "", 1 << 20)


MERGEKIT = [
    {"models": 3},
    {"models": ["x"]},
    {"models": [{"model": ["x"]}]},
    {"models": {"model": "base+a"}},
    {"parameters": ["weight"]},
    {"parameters": {"weight": "x"}},
    {"parameters": {"weight": 10**400}},
    {"parameters": {"weight": float("nan")}},
    {"parameters": {"weight": [{"filter": 3, "value": 1}]}},
    {
        "models": [
            {"model": "base+a", "parameters": {"weight": [{"value": 1, "filter": "up"}, 0.5]}}
        ]
    },
    {"slices": 3, "models": None},
    {"slices": [3], "models": None},
    {"slices": [{"sources": [{"model": "base+a", "layer_range": {"a": 1}}]}], "models": None},
    {"merge_method": ["ties"]},
    {"base_model": True},
    {3: 4},
]


@pytest.mark.parametrize("change", MERGEKIT, ids=str)
def test_a_key_of_mergekit_that_holds_something_else_is_named(tmp_path, change):
    models = [{"model": f"base+{name}", "parameters": {"weight": 1.0}} for name in "ab"]
    content = {"merge_method": "linear", "base_model": "base", "models": models} | change
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(OptionError, match=r"merge\.yaml: mergekit"):
        read_recipe(tmp_path / "merge.yaml")


def test_gradients_of_mergekit_that_meet_nowhere_are_refused(tmp_path):
    """Lists of 1009 and 2003 weights would need two million."""
    models = [
        {"model": f"base+{name}", "parameters": {"weight": [1.0] * length}}
        for name, length in {"a": 1010, "b": 2004}.items()
    ]
    content = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(OptionError, match="one length"):
        read_recipe(tmp_path / "merge.yaml")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, 10**400, "x", True])
@pytest.mark.parametrize("field", ["scale", "weights"])
def test_a_number_that_leaves_no_numbers_is_refused(field, value):
    given = [value, 1] if field == "weights" else value
    with pytest.raises(OptionError, match=field):
        Recipe.parse(adapters=["a", "b"], **{field: given})


def test_a_seed_of_any_length_is_refused():
    with pytest.raises(OptionError, match="seed"):
        Recipe.parse(adapters=["a"], seed=10**5000)


# ------------------------------------------------------------------------------------- adapters


def edited(workshop, kind, config, edit):
    path = workshop.adapter(kind, config)
    return workshop.edit_tensors(path, edit)


@pytest.mark.parametrize("value", [3e38, 1e20])
def test_a_change_that_is_no_float_any_more_is_refused(workshop, value):
    def huge(tensors):
        return {name: torch.full_like(values, value) for name, values in tensors.items()}

    adapter = load_adapter(edited(workshop, "mlp", lora(), huge))
    with pytest.raises(AdapterError, match=r"up: its change has values .* larger than"):
        adapter.delta("blocks.0.up")
    with pytest.raises(AdapterError, match="its change has values"):
        merge_adapters([workshop.directory / "adapter"], "linear", progress=False)


def test_a_trained_bias_that_is_no_vector_is_refused(workshop):
    def as_row(tensors):
        return {n: v[None] if n.endswith(".bias") else v for n, v in tensors.items()}

    path = edited(workshop, "mlp", lora(bias="all"), as_row)
    with pytest.raises(AdapterError, match=r"bias has shape \(1, \d+\); it must have 1 dimension"):
        load_adapter(path, base_model=workshop.base("mlp"))


def test_a_base_model_of_another_shape_is_refused_when_a_delta_is_read(workshop):
    """Its weights are convolutions: another number of values has no place there."""
    path = workshop.adapter("odd", lora("image"))
    base = workshop.base("odd")
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["image.weight"] = tensors["image.weight"][:, :1].contiguous()
    save_file(tensors, file)
    adapter = load_adapter(path, base_model=base)
    with pytest.raises(MismatchError, match=r"image: .*give the base"):
        adapter.delta("image", base_model=base)


def test_what_peft_itself_cannot_read_is_refused_in_its_words(workshop):
    from test_every_adapter import CASES

    case = CASES["SHiRA"]
    path = workshop.adapter(case.kind, case.config)
    workshop.edit_config(path, random_seed="x")
    adapter = load_adapter(path, base_model=workshop.base("mlp"))
    with pytest.raises(AdapterError, match="PEFT itself refuses it"):
        adapter.delta(next(iter(adapter.modules)))


@pytest.mark.parametrize("field", ["auto_mapping", "arrow_config"])
def test_a_field_of_any_length_makes_a_short_message(workshop, field):
    path = workshop.edit_config(workshop.adapter("mlp", lora()), **{field: ["x"] * 3000})
    with pytest.raises(AdapterError, match=field) as caught:
        load_adapter(path)
    assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------- files that are none


@pytest.fixture(params=["pipe", "device", "directory", "loop"])
def no_file(request):
    """A function that puts something else in the place of a file."""

    def replace(path):
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        elif request.param == "directory":
            path.mkdir()
        else:
            path.symlink_to(path)
        return path

    return replace


@pytest.mark.filterwarnings("ignore:.*holds links that lead out of it")
@pytest.mark.parametrize("name", [CONFIG, TENSORS, "heads/other.safetensors"])
def test_what_is_no_file_is_not_waited_for(workshop, no_file, name):
    path = workshop.adapter("mlp", lora())
    (path / "heads").mkdir()
    no_file(path / name)
    with pytest.raises(PcbPeftError):
        load_adapter(path)


@pytest.mark.parametrize("read", [open_statistics, open_moments, read_recipe, _hash_of_texts])
def test_nor_where_other_files_belong(tmp_path, no_file, read):
    with pytest.raises(PcbPeftError):
        read(no_file(tmp_path / "x.safetensors"))


def test_nothing_else_is_hashed(tmp_path, no_file):
    with pytest.raises(OSError, match="x"):
        sha256_of_file(no_file(tmp_path / "x"))


# ------------------------------------------------------------------------------------- base models


def test_an_expert_without_one_of_its_matrices_is_missed(workshop):
    base = workshop.base("mixtral")
    skeleton = build_skeleton(base)
    names = list(load_file(base / "model.safetensors"))
    missing = next(name for name in names if "experts.0" in name and "w1" in name)
    names.remove(missing)
    assert isinstance(skeleton, Skeleton)
    with pytest.raises(BaseModelError, match="matrices that stand beside"):
        skeleton.stack_sources(names)


# ------------------------------------------------------------------------------------- what this package kept

OUTCOMES = ["{", "[]", "[" * 10_000, "{}", '{"outcomes": 3}', '{"outcomes": ["x"]}', "\xff"]


@pytest.mark.parametrize("content", [*OUTCOMES, '{"outcomes": [NaN]}'])
def test_a_damaged_cache_is_computed_anew(tmp_path, content):
    cache = OutcomeCache(tmp_path)
    assert cache.get({"a": 1}, lambda: [1.0, 0.0]) == [1.0, 0.0]
    (file,) = tmp_path.rglob("*.json")
    file.write_bytes(content.encode("latin-1"))
    assert cache.get({"a": 1}, lambda: [0.5]) == [0.5]
    assert cache.get({"a": 1}, lambda: [9.0]) == [0.5]


@pytest.mark.parametrize("content", [*OUTCOMES, '{"outcomes": "0"}'])
def test_so_is_a_damaged_hash(tmp_path, content):
    cache, file = OutcomeCache(tmp_path / "cache"), tmp_path / "x"
    file.write_bytes(b"x")
    digest = cache.file_digest(file)
    (kept,) = tmp_path.rglob("*.json")
    kept.write_bytes(content.encode("latin-1"))
    assert cache.file_digest(file) == digest == sha256_of_file(file)


LINES = [
    '{"number": 0}',
    "3",
    "[]",
    '{"number": "x", "candidate": {}, "members": []}',
    json.dumps(
        {
            "number": 1,
            "candidate": {},
            "members": ["a"],
            "step": "search",
            "kept": {"x": {"a": 1.0}},
            "response": 0.0,
            "seconds": 0.0,
            "error": "",
        }
    ),
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_log_that_is_no_trial_is_named(tmp_path, line):
    log = TrialLog(tmp_path / "log", "this search", 7)
    assert log.read() == ([], 7)
    trial = Trial(number=0, candidate={"weights": 1.0}, members=("a",), kept={1.0: {"a": 0.5}})
    log.append(trial)
    with (tmp_path / "log").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(OptionError, match=r"log, trial 2.*take the line out"):
        log.read()


@pytest.mark.parametrize("content", ["a\nb\n", "{}\n", "[]\n{}\n", '{"search": 3}\n', "3\n3\n"])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, content):
    (tmp_path / "log").write_text(content)
    with pytest.raises(OptionError, match="log"):
        TrialLog(tmp_path / "log", "this search", 7).read()
    assert (tmp_path / "log").read_text() == content


CHECKPOINTS = [
    (b"", "not a readable safetensors file"),
    ({}, "no checkpoint of a distillation"),
    ({"format": "pcb_peft distillation 1"}, "belongs to another distillation"),
    ({"state": '{"step": -1, "history": []}'}, "step is -1; it must be an integer >= 0"),
    ({"state": '{"step": 1, "history": [[0, {"a": NaN}]]}'}, "nan.; it must be a number"),
    ({"state": '{"step": 1, "history": []}'}, "its history is not that of the tasks"),
    ({"state": '{"step": 1, "history": [[0, {"a": 1}]]}'}, "best.0. is missing, or does not"),
]


@pytest.mark.parametrize(("content", "said"), CHECKPOINTS)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content, said):
    path = tmp_path / "checkpoint"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        whole = {"format": "pcb_peft distillation 1", "fingerprint": "f"}
        metadata = whole | content if "state" in content else content
        save_tensors({"other": torch.ones(2)}, path, metadata)
    with pytest.raises(OptionError, match=said):
        Checkpoint(path, "f").read().check({"a"}, {"best.0": (2,), "other": (2,)})


CARDS = ["---\na: [\n---\n# x\n", "---\n- a\n---\n", "---\nx: !!python/name:os.x\n---\n", "\xff"]


@pytest.mark.parametrize("card", CARDS, ids=range(len(CARDS)))
def test_a_card_that_cannot_be_read_is_not_lost(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    with pytest.raises(OutputError, match=r"README\.md"):
        write_to_card(Evaluation(name="x", tasks=()), tmp_path)
    assert (tmp_path / "README.md").read_bytes() == card.encode("latin-1")
    assert read_card(tmp_path / "README.md").front == {}


def test_a_head_of_one_name_alone_is_read(workshop):
    path = workshop.adapter("mlp", lora())
    (path / "heads").mkdir()
    save_file({"weight": torch.ones(2)}, path / "heads" / "other.safetensors")
    assert set(load_adapter(path).heads) == {"other"}
    texts = {"labels": '{"a": 1}'}
    save_file({"score.weight": torch.ones(2)}, path / "heads" / "other.safetensors", texts)
    with pytest.raises(AdapterError, match="labels"):
        load_adapter(path)


def test_moments_whose_tensors_are_missing_or_of_other_shapes_are_refused(tmp_path):
    texts = {"format": "pcb_peft moments 1", "layers": '{"a": "0"}'}
    good = {"0.values": torch.ones(2), "0.vectors": torch.ones(4, 2), "0.rest": torch.ones(())}
    changes = [{"0.values": torch.ones(3)}, {"0.rest": torch.ones(2)}, {"0.vectors": None}]
    changes += [{"0.vectors": torch.ones(())}, {"0.values": -torch.ones(2)}]
    changes += [{"0.rest": torch.ones(0)}, {"0.values": torch.ones(0)}]
    changes += [{"0.vectors": torch.full((4, 2), 4).to(torch.float8_e4m3fn)}]
    for change in changes:
        tensors = {name: values for name, values in (good | change).items() if values is not None}
        save_file(tensors, tmp_path / "m.safetensors", texts)
        with pytest.raises(AdapterError, match=r"m\.safetensors.*measure the moments again"):
            open_moments(tmp_path / "m.safetensors").of("a")
    save_file(good, tmp_path / "m.safetensors", texts)
    assert open_moments(tmp_path / "m.safetensors").of("a") is not None


def test_a_directory_that_holds_no_adapter_is_not_searched_to_its_end(tmp_path):
    deep = tmp_path / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    (deep / "x.distcp").touch()
    with pytest.raises(AdapterError) as caught:
        load_adapter(tmp_path)
    assert "distcp" not in str(caught.value)
    (tmp_path / "a" / "x.distcp").touch()
    with pytest.raises(AdapterError, match="distcp"):
        load_adapter(tmp_path)


def test_a_base_model_that_holds_nan_makes_no_adapter(workshop):
    base = workshop.base("mlp")
    broken = shutil.copytree(base, workshop.directory / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["head.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"head\.weight holds NaN"):
        extract_adapter(broken, base, rank=1)


def test_a_link_in_a_circle_beside_the_inputs_is_passed_over(workshop):
    base, path = workshop.base("mlp"), workshop.adapter("mlp", lora())
    (base / "loop").symlink_to(base / "loop")
    load_adapter(path).fold(base, workshop.directory / "out")
    assert (workshop.directory / "out" / "model.safetensors").is_file()


def test_choices_that_are_no_list_are_named():
    rows = [{"prompt": "a", "answer": "b", "choices": 3}]
    with pytest.raises(OptionError, match="row 1: choices is 3"):
        read_rows(rows, ("text", "prompt"))


def test_a_file_of_no_tensors_or_of_single_numbers_is_refused(tmp_path):
    file = tmp_path / "lora.safetensors"
    for names in ((), ("x.lora_B.weight",)):
        save_file(dict.fromkeys(names, torch.ones(())), file)
        with pytest.raises(AdapterError):
            load_adapter(file)
    str(check(file))  # says something, and ends
    save_file({}, file)
    with pytest.raises(AdapterError, match="no LoRA"):
        check(file)


@pytest.mark.parametrize("edit", ["a name less", "a name more", "an adapter less"])
def test_a_report_that_does_not_belong_to_its_merge_is_refused(workshop, edit):
    pair = workshop.adapters("mlp", [lora(), lora()])
    out = workshop.directory / "out"
    merge_adapters(pair, "linear").save_pretrained(out)
    content = json.loads((out / "merge_report.json").read_text())
    for line in content["modules"].values():
        for key in ("products", "adapter_norms"):
            if edit == "a name more":
                line[key]["other"] = 1.0
            elif edit == "an adapter less" or key == "products":
                line[key].pop(max(line[key]))
    if edit == "an adapter less":
        content["names"].pop()
    (out / "merge_report.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=r"merge_report\.json.*(names other|is of \d)"):
        write_report(out, workshop.directory / "report.html")


def test_a_home_that_there_is_not_is_no_path():
    with pytest.raises(AdapterError):
        check("~nouser/x")


@pytest.mark.parametrize("weight", [torch.ones(()), torch.ones(0), torch.full((10, 6), torch.nan)])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "VeRA", "PiSSA"])
def test_a_weight_without_dimensions_or_values_is_none(workshop, kind, weight):
    configs = {"DoRA": lora(use_dora=True), "VeRA": VeraConfig(r=2, target_modules=["up"])}
    configs |= {"LoRA": lora(), "PiSSA": lora(init_lora_weights="pissa")}
    base, path = workshop.base("mlp"), workshop.adapter("mlp", configs[kind])
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"up.weight": weight}, base / "model.safetensors")
    with pytest.raises(PcbPeftError, match="up"):
        load_adapter(path, base_model=base).fold(base, workshop.directory / "out")


def test_nor_does_such_a_bias_tell_how_a_layer_is_stored(workshop):
    base, path = (
        workshop.base("mlp"),
        workshop.adapter("mlp", VeraConfig(r=2, target_modules=["mix"])),
    )
    tensors = load_file(base / "model.safetensors")
    before = load_adapter(path, base_model=base).delta("blocks.0.mix")
    save_file(tensors | {"up.bias": torch.ones(())}, base / "model.safetensors")
    assert torch.equal(load_adapter(path, base_model=base).delta("blocks.0.mix"), before)


def test_a_message_of_any_length_is_short_and_keeps_its_end():
    message = str(OutputError(f"the labels {'x' * 9000} are unknown; rename them"))
    assert message.startswith("the labels xx")
    assert message.endswith("xx are unknown; rename them")
    assert len(message) < 3000


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (CONFIG, b'{"r": [4], "target_parameters": 3}'),
        (TENSORS, header({"a": {"shape": [1], "data_offsets": [0, 4]}})),
        (TENSORS, header({"a": "x"})),
        (TENSORS, header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}})),
        (TENSORS, header({"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}})),
        (TENSORS, header({"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}})),
        (TENSORS, header({"__metadata__": [1]})),
        (TENSORS, header(None).replace(b"null", b'{"a":{},"a":3}')),
        (TENSORS, header([])),
        (TENSORS, header({"a\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})),
        (TENSORS, (1 << 30).to_bytes(8, "little")),
    ],
)
def test_a_damaged_adapter_is_not_checked(workshop, file, content):
    path = workshop.adapter("mlp", lora())
    (path / file).write_bytes(content)
    with pytest.raises(AdapterError, match=rf"{file}.*(save|write) the (adapter|file) again"):
        check(path)


def test_an_adapter_without_tensors_is_not_checked(workshop):
    path = workshop.adapter("mlp", lora())
    (path / TENSORS).unlink()
    with pytest.raises(AdapterError, match=f"has no {TENSORS}"):
        check(path)


def test_a_kept_head_that_holds_no_tensors_is_refused(workshop):
    config = lora("query", task_type="SEQ_CLS", modules_to_save=["classifier"])
    pair = [workshop.adapter("bert", config, name, seed=seed) for seed, name in enumerate("ab")]
    merged = workshop.directory / "merged"
    merge_adapters(pair, "linear", progress=False).save_pretrained(merged)
    save_file({}, merged / "heads" / "a.safetensors")
    with pytest.raises(AdapterError, match=r"heads.a\.safetensors"):
        load_adapter(merged).with_head("a")


@pytest.mark.parametrize("width", [(13, 17), (12, 16, 1), ()])
def test_experts_whose_parts_make_no_matrix_are_refused(workshop, width):
    base = workshop.base("mixtral")
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("experts.1.w1.weight"))
    save_file(tensors | {name: torch.ones(width)}, base / "model.safetensors")
    with pytest.raises(BaseModelError, match="are parts of one matrix, and have the shapes"):
        extract_adapter(base, base, rank=1, progress=False)


def test_a_model_of_any_size_is_not_built_to_run_texts(workshop):
    base = workshop.base("llama")
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 200_000}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="'num_hidden_layers' is 200000; it may be 2000"):
        load_base(base, "CAUSAL_LM")


def test_a_file_without_end_is_not_read_to_find_that_it_is_too_large(tmp_path):
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OptionError, match="larger than 1024 MiB"):
        read_rows(tmp_path / "holes")


def test_a_subfolder_that_no_file_can_have_is_refused(workshop):
    source = Source(str(workshop.adapter("mlp", lora())), subfolder="x" * 5000)
    with pytest.raises(PcbPeftError, match="cannot be a path"):
        load_adapter(source)
