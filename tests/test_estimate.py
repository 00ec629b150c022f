"""What a merge is said to cost, beside what it makes."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from pcb_peft import (
    OptionError,
    PcbPeftError,
    Recipe,
    Source,
    estimate_merge,
    list_calibrations,
    list_methods,
    merge,
)
from pcb_peft.adapters import source
from pcb_peft.calibrations import Calibration
from pcb_peft.commands.cli import main
from pcb_peft.dry_run import probes
from pcb_peft.formats.checkpoint import SafetensorsFile
from pcb_peft.runtime.hashing import sha256_of_file

pytestmark = pytest.mark.slow  # whole models: the parts are tested by themselves


TARGETS = ["q_proj", "v_proj", "down_proj"]  # of two layers: (16, 16), (8, 16), (16, 24)
SIZES = {
    "dense": 2 * (16 * 16 + 8 * 16 + 16 * 24),
    "core": 2 * (5 * 5 + 5 * 5 + 5 * 5),  # ranks 2 and 3
    "knots": 2 * (5 * 16 + 5 * 16 + 5 * 24),
    "factor": 2 * 3 * (32 + 24 + 40),
}


@pytest.fixture(scope="module")
def adapters(shared_workshop):
    configs = [peft.LoraConfig(r=rank, target_modules=TARGETS) for rank in (2, 3)]
    return shared_workshop.adapters("llama", configs)


def recipe(adapters, **choices):
    return Recipe.parse(adapters=tuple(Source(str(path)) for path in adapters), **choices)


@pytest.fixture
def unread(monkeypatch):
    """A tensor that is read is an error, and so is a hash of tensors."""

    def refuse(*_):
        raise AssertionError("a tensor was read")

    def hash_configurations(file):
        return sha256_of_file(file) if file.suffix == ".json" else refuse()

    monkeypatch.setattr(SafetensorsFile, "read", refuse)
    monkeypatch.setattr(source, "sha256_of_file", hash_configurations)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("space", SIZES)
def test_sizes_are_exact_and_come_from_the_headers(adapters, space, scope):
    found = estimate_merge(recipe(adapters, space=space, scope=scope, method="ties"))
    assert found.modules == 6
    assert found.values == SIZES[space]
    assert found.passes == 2
    assert found.seconds > 0
    assert found.memory > found.read + found.written > 0


@pytest.mark.parametrize(("rank", "dtype"), [(None, "float32"), (4, "float32"), (4, "bfloat16")])
def test_what_is_written_has_the_size_that_was_said(adapters, tmp_path, rank, dtype):
    words = recipe(adapters, space="core", method="linear", rank=rank)
    dtype = getattr(torch, dtype)
    merge(words).save_pretrained(tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    wanted = sum(tensor.nbytes for tensor in tensors)
    assert estimate_merge(words, dtype=dtype).written == wanted


def stored(directory):
    """Bytes of the tensors in all files below a directory."""
    files = directory.rglob("*.safetensors")
    return sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def lora(rank, **options):
    return peft.LoraConfig(r=rank, target_modules=TARGETS, **options)


HEAD = {"modules_to_save": ["lm_head"]}
MIXED = {
    "ranks": [lora(4), lora(5, rank_pattern={"down_proj": 7})],
    "other modules": [lora(4), peft.LoraConfig(r=6, target_modules=["q_proj", "up_proj"])],
    "DoRA and LoRA": [lora(3, use_dora=True), lora(4)],
    "biases": [lora(2, bias="all"), lora(3)],
    "one head": [lora(2, **HEAD), lora(3)],
    "heads": [lora(2, **HEAD), lora(3, **HEAD)],
    "rows": [lora(2, trainable_token_indices=[1, 2]), lora(3, trainable_token_indices=[5])],
}


@pytest.mark.parametrize("rank_pattern", [False, True])
@pytest.mark.parametrize("mixed", MIXED)
def test_what_an_adapter_takes_is_what_was_said(workshop, mixed, rank_pattern):
    paths, out = workshop.adapters("llama", MIXED[mixed]), workshop.directory / "out"
    words = recipe(paths, method="linear", space="core", base_model=str(workshop.base("llama")))
    merge(words).save_pretrained(out, dtype=torch.bfloat16, rank_pattern=rank_pattern)
    found = estimate_merge(words, dtype=torch.bfloat16, rank_pattern=rank_pattern)
    assert found.written == stored(out)


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("rank", ["budget:7", "utility:30", 0.9])
@pytest.mark.parametrize("space", ["core", "dense"])
def test_what_the_data_tells_is_no_more_than_what_was_said(workshop, space, rank):
    paths, out = workshop.adapters("llama", MIXED["ranks"]), workshop.directory / "out"
    words = recipe(paths, method="ties", space=space, scope="module", rank=rank)
    merge(words).save_pretrained(out)
    assert 0.2 * estimate_merge(words).written < stored(out) <= estimate_merge(words).written


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, "full"])
@pytest.mark.parametrize("mixed", MIXED)
def test_a_fold_takes_what_was_said(workshop, mixed, rank):
    paths, out = workshop.adapters("llama", MIXED[mixed]), workshop.directory / "out"
    base = workshop.base("llama")
    words = recipe(paths, method="linear", rank=rank, base_model=str(base))
    merge(words).fold(base, out)
    assert estimate_merge(words, fold=True).written == stored(out)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_untied_end_is_counted(workshop):
    config = transformers.LlamaConfig.from_dict(
        workshop.model("llama").config.to_dict() | {"tie_word_embeddings": True}
    )
    model, base = transformers.LlamaForCausalLM(config), workshop.directory / "base"
    model.save_pretrained(base)
    path = workshop.adapter(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    words = recipe([path], method="linear", base_model=str(base), tied="untie")
    merge(words).fold(base, workshop.directory / "out")
    assert estimate_merge(words, fold=True).written == stored(workshop.directory / "out")


REFUSED = {
    "different base models": ([lora(2), lora(3)], {}, False),
    "heads='refuse'": ([lora(2, **HEAD)], {"heads": "refuse"}, False),
    "give a rank, or fold it": ([lora(2)], {"rank": "full"}, False),
    "give base_model too": ([lora(2)], {}, True),
}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("message", REFUSED)
def test_what_the_merge_refuses_is_refused_from_the_headers(workshop, message):
    configs, words, fold = REFUSED[message]
    paths = [
        workshop.adapter("llama", config, f"a{seed}", seed=seed, base=f"made/by-{seed}")
        for seed, config in enumerate(configs)
    ]
    with pytest.raises(PcbPeftError, match=message):
        estimate_merge(recipe(paths, **words), fold=fold)


@pytest.mark.parametrize(
    "method", [m.name for m in list_methods().values() if m.needs_statistic is None]
)
def test_every_method_has_a_cost(adapters, method):
    assert estimate_merge(recipe(adapters, method=method)).passes >= 1


def test_a_vector_has_a_cost(shared_workshop):
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    path = shared_workshop.adapter("llama", config, "ia3")
    found = estimate_merge(recipe([path, path], method="ties"))
    assert found.values == 2 * (8 + 24)


def test_modules_of_other_settings_are_counted_too(adapters):
    other = {"modules": "*.q_proj", "method": "linear", "space": "dense"}
    found = estimate_merge(recipe(adapters, space="core", method="ties", overrides=(other,)))
    assert found.values == SIZES["core"] * 2 // 3 + 2 * 16 * 16
    assert found.modules == 6


def test_memory_between_passes_is_no_more_than_what_is_allowed(adapters):
    words = recipe(adapters, space="dense", scope="global", method="pcb")
    much, none = estimate_merge(words), estimate_merge(words, max_memory=0)
    assert none.memory < much.memory
    assert none.read > much.read


@pytest.mark.usefixtures("unread")
def test_an_error_is_found_without_the_merge(adapters):
    with pytest.raises(OptionError, match="density is 7"):
        estimate_merge(recipe(adapters, options={"density": 7}))


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_calibration_has_a_cost(adapters, when, monkeypatch):
    """By a clock that only calibrations move on."""
    calibrated, now = Calibration.__call__, 0.0

    def moved(calibration, *arguments):
        nonlocal now
        now += 1
        return calibrated(calibration, *arguments)

    monkeypatch.setattr(Calibration, "__call__", moved)
    monkeypatch.setattr(probes.time, "perf_counter", lambda: now)
    plain = estimate_merge(recipe(adapters, space="core", scope="module", method="linear"))
    for name in list_calibrations(when):
        words = recipe(
            adapters, space="core", scope="module", method="linear", **{when: (name,) * 3}
        )
        assert estimate_merge(words).seconds > plain.seconds, name


def test_a_calibration_that_does_not_exist_is_found_without_the_merge(adapters):
    with pytest.raises(OptionError, match="after: no calibration 'svd'"):
        estimate_merge(recipe(adapters, after=("svd",)))


def test_a_dry_run_says_it_and_writes_nothing(adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["merge", *map(str, adapters), "--dry-run", "--method", "pcb", "--space", "dense"])
        == 0
    )
    assert (
        "6 modules, 1,536 values per adapter, 3 passes over them\nreads " in capsys.readouterr().out
    )
    assert list(tmp_path.iterdir()) == []


def test_pefts_names_have_a_cost_at_their_rank(adapters, tmp_path):
    words = recipe(adapters, method="svd")
    merge(words).save_pretrained(tmp_path / "out")
    assert estimate_merge(words).written == stored(tmp_path / "out")


def test_the_dtype_may_be_a_name(adapters):
    words = recipe(adapters, method="linear")
    by_name = estimate_merge(words, dtype="bfloat16").written
    assert by_name == estimate_merge(words, dtype=torch.bfloat16).written
    with pytest.raises(OptionError, match="dtype is 'int8'; it must be one of float32"):
        estimate_merge(words, dtype="int8")
