"""The command line: what it does, what it prints and where, and how it says no."""

import re
import shlex
import subprocess
import sys

import peft
import pytest
import yaml
from safetensors.torch import load_file

from pcb_peft import __version__, list_methods, list_spaces, merge_adapters
from pcb_peft.commands import cli

# PEFT 0.21 asks transformers 5.23 for it

WEIGHTS = "adapter_model.safetensors"


def lora(**options):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"]} | options)


@pytest.fixture(scope="module")
def place(shared_workshop):
    """Two adapters, (IA)³s and classifiers, and their bases."""
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    head = lora(target_modules=["query"], task_type="SEQ_CLS")
    for seed, name in enumerate(("math", "code"), 1):
        shared_workshop.adapter("llama", lora(), name, seed=seed)
        shared_workshop.adapter("llama", config, f"{name}-ia3", seed=seed)
        shared_workshop.adapter("bert", head, f"{name}-cls", seed=seed)
    shared_workshop.base("llama")
    return shared_workshop


@pytest.fixture
def run(place, monkeypatch, capsys, tmp_path):
    """Runs a command where math, code and base are; a word that begins with @ is in a directory of the test's own."""
    monkeypatch.chdir(place.directory)

    def run(line):
        words = [re.sub("^@", f"{tmp_path}/", word) for word in shlex.split(line)]
        code = cli.main(words)
        return code, *capsys.readouterr()

    return run


# -------------------------------------------------------------------------------------------- merge


MERGES = {  # flags to the arguments that they stand for
    "": {},
    "--method linear": {"method": "linear"},
    "--method linear --weights 1 -0.5": {"method": "linear", "weights": [1.0, -0.5]},
    "--weights 2 1e-1 --method ties": {"method": "ties", "weights": [2.0, 0.1]},
    "--method pcb --density 0.5 --formula nlp": {"density": 0.5, "formula": "nlp"},
    "--space core --scope global": {"space": "core", "scope": "global"},
    "--space factor --gauge as_trained --method linear": {
        "method": "linear",
        "space": "factor",
        "gauge": "as_trained",
    },
    "--rank 3 --method linear": {"method": "linear", "rank": 3},
    "--rank 0.99 --method linear": {"method": "linear", "rank": 0.99},
    "--rank none": {},
    "--seed 3 --method dare_linear --density 0.9": {
        "method": "dare_linear",
        "density": 0.9,
        "seed": 3,
    },
    "--base-model base --heads refuse": {"base_model": "base", "heads": "refuse"},
    "--heads average --tied untie": {"heads": "average", "tied": "untie"},
    "--max-memory 0 --device cpu": {"max_memory": 0, "device": "cpu"},
    "--max-memory 1.5K": {"max_memory": 1536},
}


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("flags", MERGES)
def test_flags_are_the_arguments_of_merge_adapters(run, tmp_path, flags):
    code, out, err = run(f"merge math code -o @cli {flags}")
    assert (code, err) == (0, "")
    merge_adapters(["math", "code"], **MERGES[flags]).save_pretrained(tmp_path / "api")
    for name in (WEIGHTS, "adapter_config.json", "merge_recipe.yaml"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "api" / name).read_bytes()
    assert out.splitlines()[-1].startswith(f"written to {tmp_path / 'cli'} of rank ")


def test_the_report_is_all_that_is_printed(run, tmp_path):
    code, out, err = run("merge math code -o @out --method linear")
    assert (code, err) == (0, "")
    first, second, last = out.splitlines()
    assert re.fullmatch(r"linear in \w+ space, \w+ scope: 2 modules in \d+\.\d s", first)
    assert re.fullmatch(r"retained energy 1\.0000, sign conflicts .*%", second)
    assert last == f"written to {tmp_path / 'out'} of rank 6"


def test_an_ia3_has_no_rank_to_report(run, tmp_path):
    _, out, _ = run("merge math-ia3 code-ia3 -o @out --method linear")
    assert out.splitlines()[-1] == f"written to {tmp_path / 'out'}"


def test_heads_that_are_kept_apart_are_pointed_out(run, tmp_path):
    _, out, _ = run("merge math-cls code-cls -o @out --method linear")
    assert out.splitlines()[-1].endswith(
        f"the heads of math-cls, code-cls are in {tmp_path / 'out/heads'}"
    )


def test_a_recipe_is_merged(run, tmp_path):
    recipe = {"adapters": ["math", {"path": "code", "weight": -2}], "method": "linear", "rank": 5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("merge @recipe.yaml -o @out")[0] == 0
    merge_adapters(["math", "code"], "linear", [1, -2], rank=5).save_pretrained(tmp_path / "api")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "api" / WEIGHTS).read_bytes()
    assert run("merge @out/merge_recipe.yaml -o @again")[0] == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "api" / WEIGHTS).read_bytes()


def test_the_form_of_the_files_is_asked_for_beside_the_recipe(run, tmp_path, place):
    run("merge math code -o @out --method linear")
    flags = "--dtype bfloat16 --rank-pattern --overwrite"
    assert run(f"merge @out/merge_recipe.yaml -o @out {flags}")[0] == 0
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    peft.PeftModel.from_pretrained(place.model("llama"), tmp_path / "out")


def test_a_merge_is_folded_in_one_go(run, place, tmp_path):
    code, out, err = run("merge math code -o @out --method linear --fold --base-model bases/llama")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith(f"written to {tmp_path / 'out'}")
    before = load_file(place.base("llama") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    deltas = [place.deltas("llama", place.directory / name) for name in ("math", "code")]
    for name, values in before.items():
        module = name.removesuffix(".weight")
        wanted = values + sum(delta.get(module, 0) for delta in deltas)
        place.assert_close(after[name], wanted, 1e-6, name)


# ------------------------------------------------------------------------------------- fold, methods


@pytest.mark.parametrize("name", ["math", "math-ia3"])
def test_an_adapter_is_folded_as_peft_folds_it(run, place, tmp_path, name):
    code, out, err = run(f"fold {name} bases/llama -o @out")
    assert (code, out, err) == (0, f"folded into {tmp_path / 'out'}\n", "")
    before = load_file(place.base("llama") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changes = place.changes("llama", place.directory / name)
    for parameter, values in before.items():
        wanted = values + changes.get(parameter, 0)
        place.assert_close(after[parameter], wanted, 1e-6, parameter)


def test_methods_lists_what_there_is(run):
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    words = {line.split()[0] for line in out.splitlines() if line}
    assert words >= {*list_methods(), *list_spaces()}
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for name, method in list_methods().items():
        facts = (name, method.space, method.scope, method.needs_statistic or "none", method.paper)
        assert " ".join([*facts, method.summary]) in lines
        assert f"{name} {method.measured or 'not measured here'} {method.good_at}" in lines


@pytest.mark.parametrize("name", [*list_methods(), *list_spaces()])
def test_methods_explains_one_of_them_with_its_options(run, name):
    code, out, err = run(f"methods {name}")
    assert (code, err) == (0, "")
    known = list_methods().get(name) or list_spaces()[name]
    assert out.startswith(known.summary)
    for option in known.options.values():
        assert f"--{option.name.replace('_', '-')}  {option.allowed}" in out


# --------------------------------------------------------------------------------------------- help


def help_of(capsys, command):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("command", cli.EXAMPLES)
def test_the_help_of_a_command_shows_an_example_that_can_be_parsed(capsys, command):
    _, _, examples = help_of(capsys, command).partition("example:\n")
    lines = [shlex.split(line) for line in examples.splitlines() if line.strip()]
    assert lines
    for program, *words in lines:
        assert (program, words[0]) == ("pcb-peft", command)
        cli._parser(words).parse_args(words)


def test_the_help_of_the_whole_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for command in cli.EXAMPLES:
        assert re.search(rf"^ +{command} +\w", out, re.MULTILINE), command


def test_the_help_of_merge_has_the_options_of_the_method_that_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "--method", "ties", "--help"])
    out = capsys.readouterr().out
    assert "--density" in out
    assert "--formula" not in out
    assert "--formula" in help_of(capsys, "merge")


def test_the_examples_of_merge_and_fold_do_what_they_say(place, monkeypatch, tmp_path, capsys):
    """They name directories and hub ids: here there are directories of all these names."""
    monkeypatch.chdir(tmp_path)
    for name in ("math", "code"):
        (tmp_path / f"{name}-lora").symlink_to(place.directory / name)
    (tmp_path / "recipe.yaml").write_text("adapters: [math-lora, code-lora]\nmethod: linear\n")
    (tmp_path / "meta-llama").mkdir()
    (tmp_path / "meta-llama" / "Llama-3.2-1B").symlink_to(place.base("llama"))
    for command in ("merge", "fold", "methods"):
        _, _, examples = help_of(capsys, command).partition("example:\n")
        for line in examples.strip().splitlines():
            assert cli.main([*shlex.split(line)[1:], *["--overwrite"] * (command == "merge")]) == 0
    assert (tmp_path / "merged-model" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------- errors


ERRORS = {  # command to words of the one line
    "merge nowhere code -o @out": "nowhere is neither a directory nor a hub repository",
    "merge bases code -o @out": r"bases holds no adapter_config\.json",
    "merge math code -o @out --weights 1": "2 adapters and 1 weights",
    "merge math code -o @out --method tise": "no merge method 'tise'; did you mean 'ties'",
    "merge math code -o @out --space dens": "no space 'dens'; did you mean 'dense'",
    "merge math code -o @out --scope layer": "scope is 'layer'",
    "merge math code -o @out --heads drop": "heads is 'drop'",
    "merge math code -o @out --rank 0": "rank is 0",
    "merge math code -o @out --rank 1.5": r"rank is 1\.5",
    "merge math code -o @out --rank some": "rank is 'some'",
    "merge math code -o @out --density 2": r"density is 2\.0; it must be float in \(0, 1\]",
    "merge math code -o @out --formula old": "formula is 'old'",
    "merge math code -o .": "current directory",
    "merge math code -o code": "code exists and is not empty",
    "merge math code -o @out --fold": "give base_model too",
    "merge math code -o @out --rank full": "give a rank, or fold it",
    "merge math math-ia3 -o @out": "Diagonal and LowRank",
    "merge math math-cls -o @out --heads refuse": "math-cls replace parameters",
    "merge math-ia3 code-ia3 -o @out --rank 3": "has no rank",
    "merge math-ia3 code-ia3 -o @out --rank-pattern": "rank_pattern",
    "merge nowhere.yaml -o @out": r"nowhere\.yaml cannot be read",
    "merge nowhere.yaml code --method ties -o @out": "leave out method, code",
    "fold math nowhere -o @out": "nowhere is neither a directory",
    "fold math bases -o @out": r"config\.json",
    "fold math-cls bases/llama -o @out": "is not in the base model bases/llama",
    "methods tise": "'tise'; did you mean 'ties'",
}


@pytest.mark.parametrize("line", ERRORS)
def test_an_error_is_one_line_and_the_status_is_2(run, tmp_path, line):
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{ERRORS[line]}.*\n", err)
    assert not (tmp_path / "out").exists()


USAGE = {
    "": "COMMAND",
    "merg math": "invalid choice: 'merg'",
    "merge math code": "the following arguments are required: -o/--output",
    "merge -o @out": "required: adapters",
    "merge math code -o @out --densty 0.1": "unrecognized arguments: --densty",
    "merge math code -o @out --method linear --density 0.1": "unrecognized arguments: --density",
    "merge math code -o @out --density much": "argument --density: invalid float value: 'much'",
    "merge math code -o @out --weights one": "argument --weights: invalid float value: 'one'",
    "merge math code -o @out --max-memory much": "argument --max-memory: .*'much'",
    "merge math code -o @out --max-memory inf": "argument --max-memory: .*'inf'",
    "merge math code -o @out --dtype int8": "argument --dtype: invalid choice: 'int8'",
    "merge math code -o @out --method dare_linear --rescale maybe": "argument --rescale: .*'maybe'",
    "merge math code -o @out --before pico:a=[": r"argument --before: .*'pico:a=\['",
    "merge math code -o @out --device nowhere": "argument --device: .*'nowhere'",
    "merge math code -o @out --device meta": "argument --device: .*'meta'",
    "methods a b": "unrecognized arguments: b",
}


@pytest.mark.parametrize("line", USAGE)
def test_a_command_that_cannot_be_parsed_ends_with_the_usage_and_status_2(run, capsys, line):
    with pytest.raises(SystemExit) as left:
        run(line)
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: pcb-peft")
    assert re.search(f"error: .*{USAGE[line]}.*\n$", err)


# ---------------------------------------------------------------------------------- other processes


def process(place, *words):
    return subprocess.run(
        [sys.executable, "-m", "pcb_peft", *words],
        cwd=place.directory,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_process_merges_warns_on_stderr_and_reports_on_stdout(place, tmp_path):
    ran = process(place, *f"merge math code -o {tmp_path}/out --method linear --rank 1".split())
    assert ran.returncode == 0
    assert re.fullmatch(r"warning: the merged adapter retains .*\n", ran.stderr)
    assert ran.stdout.splitlines()[-1] == f"written to {tmp_path}/out of rank 1"
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_a_process_fails_without_a_traceback(place, tmp_path):
    ran = process(place, "merge", "math", "nowhere", "-o", f"{tmp_path}/out")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.fullmatch(r"error: nowhere is neither .*\n", ran.stderr)
