"""Where adapters come from: directories, the Hub's cache, live models."""

import hashlib
import os
import re
from pathlib import Path

import peft
import pytest
import torch
from helpers import lora
from safetensors.torch import load_file

from pcb_peft import (
    AdapterError,
    OptionError,
    Source,
    UnsupportedError,
    load_adapter,
    merge_adapters,
)

OLD, NEW = "1" * 40, "2" * 40  # commits


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache, repository, commit, adapter, subfolder="", refs=("main",)):
    """Lays an adapter into the cache as huggingface_hub does: blobs, and links to them."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit / subfolder
    for directory in (snapshot, root / "blobs", root / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    for ref in refs:
        (root / "refs" / ref).write_text(commit)
    for file in adapter.iterdir():
        content = file.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


def sha256(directory, file="adapter_model.safetensors"):
    return hashlib.sha256((directory / file).read_bytes()).hexdigest()


def source(path, directory):
    configured = sha256(directory, "adapter_config.json")
    return Source(str(path), sha256=sha256(directory), config_sha256=configured)


# -------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize("spell", [str, Path, Source, lambda d: Source(f"{d}/")])
def test_a_directory_is_an_adapter(workshop, spell):
    directory = workshop.adapter("mlp", lora(), "math")
    adapter = load_adapter(spell(str(directory)))
    workshop.assert_deltas(adapter, workshop.deltas("mlp", directory))
    assert adapter.name == "math"
    assert adapter.source.path.rstrip("/") == str(directory)
    assert adapter.source.sha256 == sha256(directory)


@pytest.mark.parametrize("subfolder", [None, "v1"])
def test_peft_is_told_where_an_adapter_is_in_a_folder_of_the_hubs_cache(workshop, cache, subfolder):
    directory = workshop.adapter("mlp", lora())
    put(cache, "someone/math", OLD, directory, subfolder or "")
    found = Source(str(cache / "models--someone--math"), subfolder=subfolder)
    model = peft.PeftModel.from_pretrained(workshop.model("mlp"), **found.for_peft())
    saved = load_file(directory / "adapter_model.safetensors")
    state = peft.get_peft_model_state_dict(model)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in saved)


def test_a_loaded_adapter_is_handed_on(workshop):
    adapter = load_adapter(workshop.adapter("mlp", lora()))
    assert load_adapter(adapter) is adapter


def test_a_subfolder_of_a_directory_is_an_adapter(workshop):
    directory = workshop.adapter("mlp", lora(), "both/code")
    workshop.adapter("mlp", lora(), "both/math", seed=2)
    adapter = load_adapter(workshop.directory / "both", subfolder="code")
    workshop.assert_deltas(adapter, workshop.deltas("mlp", directory))
    assert adapter.name == "code"
    assert adapter.source.subfolder == "code"


def test_a_second_adapter_is_found_where_peft_saves_it(workshop):
    """PEFT writes an adapter of another name than `default` into a folder of that name."""
    model = workshop.peft_model("mlp", lora())
    model = workshop.peft_model(model, lora(r=2), seed=2, name="second")
    model.save_pretrained(workshop.directory / "model")
    second = load_adapter(workshop.directory / "model", subfolder="second")
    workshop.assert_deltas(second, workshop.deltas("mlp", workshop.directory / "model" / "second"))


def test_the_current_directory_and_the_home_directory_are_understood(workshop, monkeypatch):
    directory = workshop.adapter("mlp", lora(), "math")
    monkeypatch.chdir(directory)
    assert load_adapter(".").name == "math"
    monkeypatch.chdir(workshop.directory)
    monkeypatch.setenv("HOME", str(workshop.directory))
    assert load_adapter("~/math").source.sha256 == load_adapter("math").source.sha256


def test_a_directory_that_is_not_there_is_named(workshop):
    workshop.adapter("mlp", lora(), "both/code")
    with pytest.raises(AdapterError, match=r"both.*there are adapters in its subfolders code"):
        load_adapter(workshop.directory / "both", subfolder="")
    with pytest.raises(AdapterError, match=r"both/math.*no such directory"):
        load_adapter(workshop.directory / "both", subfolder="math")
    reached = "nor a hub repository that can be reached$"
    with pytest.raises(AdapterError, match=f"nowhere is neither a directory {reached}"):
        load_adapter(workshop.directory / "nowhere")
    with pytest.raises(
        AdapterError, match=rf"cod is neither a directory \(did you mean .*both/code\?\) {reached}"
    ):
        load_adapter(workshop.directory / "both" / "cod")


@pytest.mark.parametrize("threads", [1, 2])
def test_of_several_directories_the_first_that_is_not_there_is_named(workshop, threads):
    there = workshop.adapter("mlp", lora())
    given = [there, workshop.directory / "first", there, workshop.directory / "second"]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(AdapterError, match="first is neither"):
            merge_adapters(given)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------ the Hub


def test_a_hub_id_is_read_from_the_cache(workshop, cache):
    directory = workshop.adapter("mlp", lora())
    put(cache, "org/math-lora", NEW, directory)
    adapter = load_adapter("org/math-lora")
    workshop.assert_deltas(adapter, workshop.deltas("mlp", directory))
    assert adapter.name == "math-lora"
    assert adapter.source == source("org/math-lora", directory)


@pytest.mark.parametrize("revision", [OLD, "v1"])
def test_a_revision_is_a_commit_or_a_tag(workshop, cache, revision):
    old, new = workshop.adapters("mlp", [lora(), lora()])
    put(cache, "org/math", OLD, old, refs=["v1"])
    put(cache, "org/math", NEW, new)
    workshop.assert_deltas(load_adapter("org/math"), workshop.deltas("mlp", new))
    adapter = load_adapter("org/math", revision=revision)
    workshop.assert_deltas(adapter, workshop.deltas("mlp", old))
    assert adapter.source.revision == revision


def test_a_subfolder_of_a_repository_is_an_adapter(workshop, cache):
    first, second = workshop.adapters("mlp", [lora(), lora()])
    put(cache, "org/many", NEW, first, "math")
    put(cache, "org/many", NEW, second, "code/v2")
    workshop.assert_deltas(
        load_adapter("org/many", subfolder="math"), workshop.deltas("mlp", first)
    )
    adapter = load_adapter(Source("org/many", subfolder="code/v2"))
    workshop.assert_deltas(adapter, workshop.deltas("mlp", second))
    assert adapter.name == "v2"
    with pytest.raises(AdapterError, match="subfolders math"):
        load_adapter("org/many")


def test_a_directory_goes_before_a_hub_id_as_in_peft(workshop, cache, monkeypatch):
    local, remote = workshop.adapters("mlp", [lora(), lora()])
    put(cache, "org/math", NEW, remote)
    local.rename(workshop.directory / "org-math")
    (workshop.directory / "org").mkdir()
    (workshop.directory / "org-math").rename(workshop.directory / "org" / "math")
    monkeypatch.chdir(workshop.directory)
    wanted = workshop.deltas("mlp", workshop.directory / "org" / "math")
    workshop.assert_deltas(load_adapter("org/math"), wanted)


MISSING = {
    "not in the cache": ("org/nothing", {}),
    "a revision that is not": ("org/math", {"revision": "v9"}),
    "no hub id": ("a/b/c", {}),
    "no name at all": ("", {}),
    "spaces": ("my adapter", {}),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_the_hub_does_not_have_is_named_in_one_line(workshop, cache, monkeypatch, case):
    put(cache, "org/math", NEW, workshop.adapter("mlp", lora()))
    monkeypatch.chdir(cache)
    name, options = MISSING[case]
    with pytest.raises(AdapterError) as raised:
        load_adapter(name, **options)
    message = str(raised.value)
    assert name in message
    assert "\n" not in message


@pytest.mark.usefixtures("cache")
def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterError, match=r"org/math is neither .* can be reached: .*$") as raised:
        load_adapter("org/math")
    assert "\n" not in str(raised.value)


def test_a_snapshot_without_weights_is_refused(workshop, cache):
    directory = workshop.adapter("mlp", lora())
    (directory / "adapter_model.safetensors").unlink()
    put(cache, "org/math", NEW, directory)
    with pytest.raises(AdapterError, match=r"neither adapter_model\.safetensors nor"):
        load_adapter("org/math")


def test_adapters_of_the_hub_merge_and_their_card_names_them(workshop, cache):
    first, second = workshop.adapters("mlp", [lora(), lora()])
    put(cache, "org/math", NEW, first)
    put(cache, "org/many", NEW, second, "code")
    merged = merge_adapters(["org/math", Source("org/many", subfolder="code")], "linear")
    deltas = [workshop.deltas("mlp", directory) for directory in (first, second)]
    workshop.assert_deltas(merged, {m: deltas[0][m] + deltas[1][m] for m in deltas[0]}, 1e-5)
    merged.save_pretrained(workshop.directory / "out")
    card = (workshop.directory / "out" / "README.md").read_text()
    assert re.search(r"\| \[org/math\]\(\S+\) \| 1(\.0)? \|", card)
    assert "| [org/many]" in card


# -------------------------------------------------------------------------------------- live models


CONFIGS = {
    "LoRA": ("mlp", lora()),
    "patterns": ("mlp", lora(use_rslora=True, alpha_pattern={"mix": 3}, rank_pattern={"up": 2})),
    "Conv1D": ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True)),
    "a head": ("bert", lora(target_modules=["query"], task_type="SEQ_CLS")),
    "(IA)³": ("mlp", peft.IA3Config(target_modules=["up", "mix"], feedforward_modules=["mix"])),
}


@pytest.mark.filterwarnings("ignore:Could not find a config file in org/tiny")  # PEFT's, offline
@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_of_a_live_model_is_the_saved_one_bit_for_bit(workshop, case):
    kind, config = CONFIGS[case]
    model = workshop.peft_model(kind, config, base="org/tiny")
    live = load_adapter((model, "default"))
    model.save_pretrained(workshop.directory / "a", save_embedding_layers=False)
    saved = load_adapter(workshop.directory / "a")
    assert list(live.modules) == list(saved.modules)
    base = workshop.base(kind) if case == "(IA)³" else None
    for module in live.modules:
        assert torch.equal(live.delta(module, base), saved.delta(module, base))
    assert live.head.modules == saved.head.modules
    assert live.head.parameters.keys() == saved.head.parameters.keys()
    for name, values in live.head.read().items():
        assert torch.equal(values, saved.head.read()[name])
    for field in ("base_model", "revision", "task_type"):
        assert getattr(live, field) == getattr(saved, field)
    live.save_pretrained(workshop.directory / "live")
    saved.save_pretrained(workshop.directory / "saved")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        written = [workshop.directory / way / name for way in ("live", "saved")]
        assert written[0].read_bytes() == written[1].read_bytes()


def test_each_adapter_of_a_live_model_is_read_by_its_name(workshop):
    model = workshop.peft_model("mlp", lora())
    model = workshop.peft_model(model, lora(r=2, use_rslora=True), seed=2, name="second")
    model.save_pretrained(workshop.directory / "m")
    merged = merge_adapters([(model, "default"), (model, "second")], "linear", weights=[1, -2])
    wanted = [
        workshop.deltas("mlp", directory)
        for directory in (workshop.directory / "m", workshop.directory / "m" / "second")
    ]
    workshop.assert_deltas(merged, {m: wanted[0][m] - 2 * wanted[1][m] for m in wanted[0]}, 1e-5)
    assert [source.path for source in merged.recipe.adapters] == [
        "in memory: default",
        "in memory: second",
    ]


def test_merging_a_live_model_leaves_it_as_it_is(workshop):
    model = workshop.peft_model("mlp", lora())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge_adapters([(model, "default")] * 2)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_adapter_that_a_model_does_not_have_is_named_with_those_it_has(workshop):
    model = workshop.peft_model("mlp", lora(), name="math")
    with pytest.raises(OptionError, match="no adapter 'code'; its adapters are math"):
        load_adapter((model, "code"))
    with pytest.raises(OptionError, match="is it a PeftModel"):
        load_adapter((workshop.model("mlp"), "code"))


def test_what_is_not_supported_is_refused_from_a_live_model_too(workshop):
    config = lora(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    model = workshop.peft_model("llama", config, name="math")
    with pytest.raises(UnsupportedError, match=r"'math'.*layer_replication"):
        load_adapter((model, "math"))


# ------------------------------------------------------------------------------------------- hashes


def test_an_adapter_other_than_the_hash_says_is_refused(workshop):
    directory = workshop.adapter("mlp", lora())
    right = source(directory, directory)
    assert load_adapter(right).source == right
    workshop.adapter("mlp", lora(), seed=2)
    with pytest.raises(
        AdapterError, match=f"adapter has changed.*{sha256(directory)}.*{right.sha256}"
    ):
        load_adapter(right)


def test_reading_gives_the_saved_bits(workshop):
    directory = workshop.adapter("mlp", lora())
    tensors = load_file(directory / "adapter_model.safetensors")
    for module, delta in load_adapter(directory).modules.items():
        key = f"base_model.model.{module}"
        assert torch.equal(delta.lora_A, tensors[f"{key}.lora_A.weight"])
        assert torch.equal(delta.lora_B, tensors[f"{key}.lora_B.weight"])
