"""Faults of strangers' files end in one line that names the key; names are harmless; a status tells ends apart."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from helpers import content, lora
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import safe_open
from safetensors.torch import save_file

from pcb_peft import load_adapter, merge_adapters
from pcb_peft.commands.cli import main
from pcb_peft.data.batches import read_rows
from pcb_peft.deltas.replacements import ReplacedParameter, Replacements, head_files
from pcb_peft.errors import AdapterError, OptionError, PcbPeftError
from pcb_peft.files.adapter_config import AdapterConfig
from pcb_peft.files.schema import checked
from pcb_peft.runtime.paths import portable_names
from pcb_peft.runtime.shown import visible

WRONG = [
    {"modules_to_save": 3},
    {"target_parameters": 3},
    {"target_parameters": [None]},
    {"use_bdlora": 3},
    {"use_bdlora": {"nblocks": "x"}},
    {"use_bdlora": {"target_modules_bd_a": 3}},
    {"revision": {"a": 1}},
    {"task_type": ["x"]},
    {"lora_alpha": 10**400},
    {"lora_alpha": "8"},
    {"lora_alpha": float("nan")},
    {"lora_alpha": None},
    {"r": "x"},
    {"r": True},
    {"rank_pattern": 3},
    {"rank_pattern": {"up": "x"}},
    {"alpha_pattern": {"up": 10**400}},
    {"init_lora_weights": 3},
    {"target_modules": 3},
    {"trainable_token_indices": 3},
    {"bias": 3},
    {"kasa_config": 3},
    {"lora_bias": "x"},
    {"use_dora": "yes"},
    {"base_model_name_or_path": ["a"]},
    {"peft_type": {"a": 1}},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_field_of_another_type_is_named_in_the_message(workshop, change):
    path = workshop.adapter("mlp", lora())
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    field = next(iter(change))
    with pytest.raises(AdapterError, match=f"{field}.+(must be|supported)") as caught:
        load_adapter(path)
    assert len(str(caught.value)) < 1000


CONFIGS = [
    peft.LoraConfig(
        r=4, target_modules="q_proj", rank_pattern={"q_proj": 2}, alpha_pattern={"q": 1.5}
    ),
    peft.LoraConfig(target_modules=["q"], init_lora_weights="pissa", trainable_token_indices=[1]),
    peft.LoraConfig(target_modules=["q"], trainable_token_indices={"embed": [1, 2]}, use_dora=True),
    peft.IA3Config(target_modules=["k"], feedforward_modules=["k"]),
    peft.LoHaConfig(target_modules=["q"]),
    peft.LoKrConfig(target_modules=["q"], rank_pattern={"q": 2}),
    peft.AdaLoraConfig(
        target_modules=["q"], total_step=10, rank_pattern={"q.lora_E": [True, False]}
    ),
    peft.VeraConfig(target_modules=["q"]),
    peft.OFTConfig(target_modules=["q"], oft_block_size=4),
    peft.BOFTConfig(target_modules=["q"], boft_block_size=4),
    peft.TrainableTokensConfig(token_indices=[1, 2]),
    peft.HRAConfig(target_modules=["q"]),
    peft.FourierFTConfig(target_modules=["q"]),
    peft.LNTuningConfig(target_modules=["norm"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_what_peft_writes_fits_the_schema_in_a_file_and_in_memory(tmp_path, config):
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    in_memory = config.to_dict() | {"peft_type": config.peft_type.value}
    for content_ in (stored, in_memory):
        checked(content_, AdapterConfig, "here", AssertionError, "")


OTHERS = {t for t in PEFT_TYPE_TO_CONFIG_MAPPING if t.value not in ("ADALORA", "CPT", "XLORA")}


@pytest.mark.slow
@pytest.mark.parametrize("peft_type", sorted(OTHERS))
def test_what_peft_writes_by_default_fits_the_schema(peft_type):
    """Also what it leaves null."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]().to_dict() | {"peft_type": peft_type.value}
    checked(config, AdapterConfig, "here", AssertionError, "")


ROWS = {
    "text_pair": 3,
    "answer": [],
    "label": -1,
    "text": "\ud800",
    "prompt": 3,
}


@pytest.mark.parametrize("key", ROWS)
@pytest.mark.parametrize("in_file", [True, False])
def test_a_row_that_is_none_is_named_by_its_number(tmp_path, key, in_file):
    rows = [{"text": "a b"}, {"text": "a b", key: ROWS[key]}]
    if in_file:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        OptionError,
        match=rf"data: row 2.* {key} is .*; correct the row|row 2: {key} is|line 2 holds .* half",
    ):
        read_rows(tmp_path / "rows.jsonl" if in_file else rows)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "{", "\xff", '{"text": ' + "1" * 5000 + "}", "3", "null"]
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n' + line.encode("latin-1"))
    with pytest.raises(OptionError, match=r"line 2|row 2|cannot be read"):
        read_rows(tmp_path / "rows.jsonl")


PATHS = ["x" * 300, "a\0b", "\ud800/x", "~nouser/x", "", "/dev/null", "a\nb\x1b[31m"]


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_a_path_that_cannot_be_one_is_refused_wherever_it_is_given(tmp_path, workshop, path):
    good = workshop.adapter("mlp", lora())
    for words in ({"adapters": [path]}, {"adapters": [good], "base_model": path, "rank": "full"}):
        with pytest.raises(PcbPeftError):
            merge_adapters(method="linear", **words).fold(path, tmp_path / "out")


# ------------------------------------------------------------------------------------- names

NAMES = [
    "math",
    "Math",
    "team/math",
    "CON",
    "con.x",
    "a:b",
    "..",
    ".",
    "",
    "x" * 300,
    "é",
    "a\nb",
    "nul",
    "a b",
    "\ud800",
]


def is_portable(name):
    """As Windows' documentation, and POSIX's portable file name character set, have it."""
    stem = name.split(".")[0].upper()
    letters = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    reserved = {"CON", "PRN", "AUX", "NUL"} | {f"{d}{n}" for d in ("COM", "LPT") for n in range(10)}
    return (
        0 < len(name) < 200
        and set(name) <= letters
        and name[0] not in ".-"
        and stem not in reserved
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(NAMES) | st.text(max_size=5), unique=True, max_size=8))
def test_names_become_different_files_on_every_system(names):
    files = portable_names(names)
    assert list(files) == names
    assert all(is_portable(file) for file in files.values())
    assert len({file.casefold() for file in files.values()}) == len(names)


def test_a_plain_name_stays():
    assert portable_names(["math-lora_2.0"]) == {"math-lora_2.0": "math-lora_2.0"}


def test_a_head_of_any_name_is_found_again(workshop):
    head = Replacements(
        (), {"score.weight": ReplacedParameter((2,), lambda: torch.tensor([1.0, 2.0]))}
    )
    adapter = workshop.adapter("mlp", lora())
    for path, content_ in head_files(dict.fromkeys(["team/math", "Math", "math"], head)).items():
        (adapter / path).parent.mkdir(exist_ok=True)
        (adapter / path).write_bytes(content_)
    assert set(load_adapter(adapter).heads) == {"team/math", "Math", "math"}
    with safe_open(adapter / "heads" / "Math.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_nothing_that_a_stranger_named_reaches_the_terminal_as_it_is(workshop, tmp_path, capsys):
    path = workshop.adapter("mlp", lora()).rename(tmp_path / "a\n# b\x1b[31m")
    for words in (["inspect", path], ["merge", path, "--method", "linear", "-o", tmp_path / "out"]):
        assert main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert "\x1b[31m" not in out + err
    assert "\n# b" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["a\nerror: b", "a\x1b[2J", "x" * 2000])
def test_a_tensor_whose_name_is_no_name_is_refused(workshop, name):
    path = workshop.adapter("mlp", lora())
    save_file({name: torch.ones(1)}, path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="cannot be the name of a tensor") as caught:
        load_adapter(path)
    assert visible(str(caught.value)) == str(caught.value)


# ------------------------------------------------------------------------------------- exit status


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pcb_peft", *map(str, words)],
        capture_output=True,
        env=os.environ | environment,
        timeout=60,
    )


def test_an_exit_status_tells_bad_input_from_bad_usage(workshop, capsys):
    bad = workshop.adapter("mlp", lora())
    (bad / "adapter_config.json").write_text("{")
    assert main(["inspect", str(bad)]) == 2
    assert main(["inspekt", str(bad)]) == 64
    assert "Traceback" not in capsys.readouterr().err


def test_the_help_explains_the_exit_status(capsys):
    assert main([]) == 0
    assert "exit status:" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
@pytest.mark.slow
def test_a_full_device_is_said_to_be_full():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ran = subprocess.run(
            [sys.executable, "-m", "pcb_peft", "methods"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert ran.returncode == 4
    assert b"No space left" in ran.stderr
    assert b"Traceback" not in ran.stderr


@pytest.mark.slow
def test_a_terminal_of_ascii_shows_what_it_can():
    ran = run("methods", "pcb", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_stream_that_the_caller_has_closed_is_no_error(workshop, streams):
    one, other = (workshop.adapter("mlp", lora(), name) for name in ("one", "other"))
    command = f"{sys.executable} -m pcb_peft merge {one} {other} -o {one.parent}/out {streams}"
    subprocess.run(["sh", "-c", command], check=True)
    assert load_adapter(one.parent / "out").modules


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "rank"), [("x", "0"), ("-1", "0"), ("9" * 50, "0"), ("2", "5"), ("0", "0")]
)
def test_a_launcher_that_sets_no_numbers_is_named(value, rank):
    ran = run("methods", WORLD_SIZE=value, RANK=rank)
    assert ran.returncode == 2
    assert b"WORLD_SIZE is" in ran.stderr
    assert b"Traceback" not in ran.stderr


def test_the_bytes_of_a_merge_do_not_depend_on_the_names_of_its_inputs(workshop, tmp_path):
    one, other = (workshop.adapter("mlp", lora(), name) for name in ("one", "other"))
    merge_adapters([one, other], "linear").save_pretrained(tmp_path / "a")
    merge_adapters([one.rename(tmp_path / "x\ny"), other], "linear").save_pretrained(tmp_path / "b")
    name = "adapter_model.safetensors"
    assert content(tmp_path / "a")[name] == content(tmp_path / "b")[name]
