"""The command line: what it does, what it prints and where, and how it says no."""

import dataclasses
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata

import peft
import pytest
import yaml
from safetensors.torch import load_file

from pcb_peft import (
    Recipe,
    __version__,
    list_calibrations,
    list_methods,
    list_spaces,
    merge_adapters,
)
from pcb_peft.commands import cli, sources
from pcb_peft.commands.recipe_fields import recipe_fields
from pcb_peft.consumers.vllm import RANKS
from pcb_peft.deltas import replacements
from pcb_peft.recipes.peft_aliases import PEFT_ALIASES
from pcb_peft.runtime.resources import DEFAULT_MEMORY

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
    "--method pcb --density 0.5 --formula nlp": {"method": "pcb", "density": 0.5, "formula": "nlp"},
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
    "--method LINEAR --weights 1,-0.5": {"method": "linear", "weights": [1.0, -0.5]},
    "--method linear --weights -1e-1,2": {"method": "linear", "weights": [-0.1, 2.0]},
    "--method Linear --weights [0,1] 2": {"method": "linear", "weights": [[0, 1], 2.0]},
    "--method Ties --density 5e-1 --scope MODULE": {
        "method": "ties",
        "density": 0.5,
        "scope": "module",
    },
    "--set method=ties density=0.5 rank=3 --set weights=1,0.5": {
        "method": "ties",
        "density": 0.5,
        "rank": 3,
        "weights": [1.0, 0.5],
    },
    "--method tsv --after exponent:power=0.5 amplitude": {
        "method": "tsv",
        "after": [{"exponent": {"power": 0.5}}, "amplitude"],
    },
}


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("flags", MERGES)
def test_flags_are_the_arguments_of_merge_adapters(run, tmp_path, flags):
    code, out, err = run(f"merge math code -o @cli {flags}")
    assert (code, err) == (0, "")
    merge_adapters(["math", "code"], **MERGES[flags]).save_pretrained(tmp_path / "api")
    for name in (WEIGHTS, "adapter_config.json", "merge_recipe.yaml"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "api" / name).read_bytes()
    assert f"written to {tmp_path / 'cli'}: rank " in out


def test_a_report_ends_with_what_was_written_and_what_to_do_next(run, tmp_path):
    code, out, err = run("merge math code -o @out --method linear")
    assert (code, err) == (0, "")
    first, *_, written, servers, following, load, test, fold = out.splitlines()
    assert first.startswith("linear in ")
    size = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert written == f"written to {tmp_path / 'out'}: rank 6, {size / 1024:.2g} KiB"
    assert servers.startswith("vLLM: --enable-lora · read alike by vLLM, PEFT")
    assert following == "next:"
    assert load.split(maxsplit=1) == [
        "load",
        f'PeftModel.from_pretrained(base_model, "{tmp_path / "out"}")',
    ]
    assert test.endswith(f"pcb-peft evaluate {tmp_path / 'out'} --data math.jsonl code.jsonl")
    assert f"pcb-peft fold {tmp_path / 'out'} " in fold


def test_a_language_model_is_served_with_a_rank_that_vllm_takes(place, run):
    for seed, name in enumerate(("chat", "tool"), 1):
        config = lora(r=5, task_type="CAUSAL_LM")
        place.adapter("llama", config, name, seed=seed, base="org/llama")
    _, out, _ = run("merge chat tool -o @out --method linear")
    assert 10 not in RANKS
    assert "vllm serve org/llama --enable-lora --max-lora-rank 16 " in out


def test_no_line_says_how_vllm_serves_what_it_refuses(place, run):
    tokens = lora(task_type="CAUSAL_LM", trainable_token_indices=[1])
    place.adapter("llama", tokens, "words", base="org/llama")
    _, out, _ = run("merge words math -o @out --method linear")
    assert "not for vLLM" in out
    assert "vllm serve" not in out


def test_commands_to_copy_take_paths_with_spaces(place, run, tmp_path):
    shutil.copytree(place.directory / "math", tmp_path / "my math")
    _, out, _ = run("merge '@my math' code -o '@my merge' --method linear")
    commands = [line.split(maxsplit=1)[1] for line in out.splitlines()[-2:]]
    test, fold = map(shlex.split, commands)
    assert test[2:] == [str(tmp_path / "my merge"), "--data", "my math.jsonl", "code.jsonl"]
    assert fold[2] == str(tmp_path / "my merge")
    assert fold[-1] == str(tmp_path / "my merge-model")
    _, out, _ = run("check '@my merge' --for llama.cpp")
    assert f"pcb-peft export '{tmp_path / 'my merge'}' --to gguf" in out


def test_an_ia3_has_no_rank_to_report(run, tmp_path):
    _, out, _ = run("merge math-ia3 code-ia3 -o @out --method linear")
    assert re.search(rf"written to {tmp_path / 'out'}: [\d.]+ KiB\n", out)


def test_a_merge_without_a_head_of_its_own_is_pointed_out_loudly(run, tmp_path):
    _, _, err = run("merge math-cls code-cls -o @out --method linear")
    assert err.startswith(
        "warning: the merged adapter has NO classifier of its own: math-cls, code-cls"
    )
    assert str(tmp_path / "out" / "heads") in err
    assert run("merge math-cls code-cls -o @first --method linear --heads first")[2] == ""


def test_quiet_prints_errors_only(run):
    assert run("merge math-cls code-cls -o @out --method linear -q") == (0, "", "")
    code, out, err = run("-q merge math nowhere -o @other")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "pcb" in run("methods -q")[1]


def test_verbose_adds_a_line_per_module_and_the_time(run):
    code, out, err = run("merge math code -o @out --method linear --verbose")
    assert code == 0
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    for module in modules:
        assert f"{module}: 16 x 16, rank 6, energy 1.0000, sign conflicts " in out
    assert re.fullmatch(r"pcb-peft merge took [\d.]+ (ms|s)\n", err)
    assert modules[0] not in run("merge math code -o @other --method linear")[1]


def test_the_shell_completes_names():
    actions = cli.build_parser()[1]["merge"]._actions
    (method,) = (action for action in actions if action.dest == "method")
    assert method.completer("TI", parsed_args=None) == ["ties", "ties_svd"]


@pytest.mark.filterwarnings("default:the merged adapter retains")
def test_json_is_one_object_on_stdout(run, tmp_path):
    code, out, _ = run("merge math-cls code-cls -o @out --method linear --rank 1 --json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["command"], answer["rank"]) == ("merge", 1)
    assert answer["output"] == str(tmp_path / "out")
    assert answer["bytes"] > 0
    assert answer["heads_kept_apart"] == ["math-cls", "code-cls"]
    assert answer["report"]["method"] == "linear"
    energy, head = answer["warnings"]
    assert energy.startswith("the merged adapter retains")
    assert "NO classifier" in head
    assert run("merge math-cls code-cls -o @quiet --method linear --json -q")[2] == ""


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("merge math code --dry-run --json", "estimate"),
        ("fold math bases/llama -o @out --json", "bytes"),
        ("extract bases/llama --base-model bases/llama -o @out --rank 1 --json", "error"),
        ("methods --json", "methods"),
        ("methods pcb --json", "found"),
        ("methods nothing --json", "error"),
        ("merge --json", "error"),
        ("--version --json", "pcb_peft"),
    ],
)
def test_every_answer_and_every_error_comes_as_json_too(run, line, key):
    assert key in json.loads(run(line)[1])


def test_what_nobody_expected_is_one_line_and_a_traceback_if_asked_for(run, monkeypatch):
    def broken(_):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("pcb_peft.commands.methods.COMMAND", broken_command(broken))
    code, out, err = run("methods")
    assert (code, out) == (1, "")
    assert err == (
        "error: unexpected ZeroDivisionError: no luck\nhint: run it again with -v to see where\n"
    )
    code, _, err = run("methods -v")
    assert code == 1
    assert "in broken" in err


def broken_command(run):
    from pcb_peft.commands.command import Command

    return Command("methods", "Break", "pcb-peft methods", lambda _: None, run)


def test_a_recipe_is_merged(run, tmp_path):
    recipe = {"adapters": ["math", {"path": "code", "weight": -2}], "method": "linear", "rank": 5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("merge @recipe.yaml -o @out")[0] == 0
    merge_adapters(["math", "code"], "linear", [1, -2], rank=5).save_pretrained(tmp_path / "api")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "api" / WEIGHTS).read_bytes()
    assert run("merge @out/merge_recipe.yaml -o @again")[0] == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "api" / WEIGHTS).read_bytes()


RECIPE = {"adapters": ["math", "code"], "method": "ties", "options": {"density": 0.4}, "rank": 4}
CHANGES = {  # flags beside that recipe to the arguments of the merge, and the note
    "--density 0.3": ({"method": "ties", "density": 0.3, "rank": 4}, "density"),
    "--set density=3e-1 rank=none": ({"method": "ties", "density": 0.3}, "rank, density"),
    "--rank 5 --seed 3": ({"method": "ties", "density": 0.4, "rank": 5, "seed": 3}, "rank, seed"),
    "--method linear": ({"method": "linear", "rank": 4}, "method"),
    "--method dare_ties": ({"method": "dare_ties", "density": 0.4, "rank": 4}, "method"),
    "--weights 1,-2 --method pcb --formula nlp": (
        {"method": "pcb", "density": 0.4, "formula": "nlp", "weights": [1.0, -2.0], "rank": 4},
        "weights, method, formula",
    ),
}


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("flags", CHANGES)
def test_flags_override_a_recipe_and_the_report_says_which(run, tmp_path, flags):
    arguments, changed = CHANGES[flags]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    code, out, _ = run(f"merge @recipe.yaml -o @cli {flags}")
    assert code == 0
    assert f"changed on the command line, against {tmp_path / 'recipe.yaml'}: {changed}\n" in out
    assert ("left out, because linear has no such option: density\n" in out) == ("linear" in flags)
    merge_adapters(["math", "code"], **arguments).save_pretrained(tmp_path / "api")
    for name in (WEIGHTS, "merge_recipe.yaml"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "api" / name).read_bytes()


def test_every_field_of_a_recipe_has_a_flag():
    elsewhere = {"adapters", "options", "overrides", "version"}
    flags = {field.name for field in recipe_fields()}
    assert flags == {field.name for field in dataclasses.fields(Recipe)} - elsewhere


def test_the_form_of_the_files_is_asked_for_beside_the_recipe(run, tmp_path, place):
    run("merge math code -o @out --method linear")
    run("merge math code -o @again --method linear")
    flags = "--dtype bfloat16 --rank-pattern --overwrite"
    assert run(f"merge @out/merge_recipe.yaml -o @again {flags}")[0] == 0
    tensors = load_file(tmp_path / "again" / WEIGHTS)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    peft.PeftModel.from_pretrained(place.model("llama"), tmp_path / "again")


def test_a_merge_is_folded_in_one_go(run, place, tmp_path):
    code, out, err = run("merge math code -o @out --method linear --fold --base-model bases/llama")
    assert (code, err) == (0, "")
    assert f"written to {tmp_path / 'out'}: " in out
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
    assert (code, err) == (0, "")
    assert out.startswith(f"folded into {tmp_path / 'out'} (")
    before = load_file(place.base("llama") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    changes = place.changes("llama", place.directory / name)
    for parameter, values in before.items():
        wanted = values + changes.get(parameter, 0)
        place.assert_close(after[parameter], wanted, 1e-6, parameter)


def test_methods_lists_what_there_is_in_eighty_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\033" not in out
    words = [line.split()[0] for line in lines if line.strip()]
    names = {
        *list_methods(),
        *list_spaces(),
        *list_calibrations("before"),
        *list_calibrations("after"),
    }
    assert {*words, "flat"} >= names
    assert "flat*" in words
    assert one_line("* the default: flat, or pcb") in one_line(out)
    for method in list_methods().values():
        assert one_line(out).count(one_line(method.summary)) >= 1
    assert "Good at" not in out
    assert "Good at: all tasks at once" in run("methods -v")[1]


def one_line(text):
    """Its words, without the columns that stand between them."""
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("name", [*list_methods(), *list_spaces(), "EXPONENT", "ties_svd"])
def test_methods_explains_one_of_them_with_its_options(run, name):
    code, out, err = run(f"methods {name}")
    assert (code, err) == (0, "")
    meant = {
        "EXPONENT": list_calibrations("before")["exponent"],
        "ties_svd": list_methods()["ties"],
    }
    known = meant.get(name) or list_methods().get(name) or list_spaces()[name]
    assert out.startswith(known.summary)
    for option in known.options.values():
        assert f"--{option.name.replace('_', '-')}  {option.allowed}" in out


# --------------------------------------------------------------------------------------------- help


def help_of(capsys, command):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_version_is_told(run):
    assert run("--version") == run("-V") == (0, f"pcb_peft {__version__}\n", "")
    _, out, _ = run("--version -v")
    assert f"peft {peft.__version__}\n" in out
    assert f"torch {metadata.version('torch')}\n" in out


def test_a_bare_command_prints_help(run, capsys):
    code, out, err = run("")
    assert (code, err) == (0, "")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert out == capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_shows_an_example_that_can_be_parsed(capsys, command):
    _, _, examples = help_of(capsys, command).partition("example:\n")
    lines = [shlex.split(line) for line in examples.splitlines() if line.strip()]
    assert lines
    for program, *words in lines:
        assert (program, words[0]) == ("pcb-peft", command)
        assert cli.parse(words).command.name == command


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_argument_is_explained_and_no_flag_is_there_twice(command):
    parser = cli.build_parser()[1][command]
    flags = [flag for action in parser._actions for flag in action.option_strings]
    assert len(flags) == len({*flags})
    assert {"-q", "-v", "--json", "--help"} <= {*flags}
    assert all(action.help for action in parser._actions)


def test_the_help_of_the_whole_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^ +{command} +\w", out, re.MULTILINE), command


def test_the_help_of_merge_has_the_options_of_the_method_that_is_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "--method", "TIES", "--help"])
    out = capsys.readouterr().out
    assert "--density" in out
    assert "--formula" not in out
    assert "--formula" in help_of(capsys, "merge")


def entries_of(kind):
    if kind != "calibrations":
        registered = list_methods() if kind == "methods" else list_spaces()
        return [(None, plugin) for plugin in registered.values()]
    return [(w, one) for w in ("before", "after") for one in list_calibrations(w).values()]


@pytest.mark.parametrize("kind", ["methods", "spaces", "calibrations"])
def test_what_is_read_from_the_sources_is_what_is_registered(kind):
    read = sources.entries(kind)
    registered = sorted(entries_of(kind), key=lambda pair: pair[1].name)
    assert [entry.name for entry in read] == [plugin.name for _, plugin in registered]
    for entry, (when, plugin) in zip(read, registered, strict=True):
        assert entry.options == plugin.options
        assert entry.document == inspect.getdoc(plugin.function)
        assert when in (None, entry.facts["when"])
        for fact in {field.name for field in dataclasses.fields(plugin)} - NOT_READ:
            assert entry.facts[fact] == getattr(plugin, fact), (entry.name, fact)


NOT_READ = {
    "name",
    "function",
    "accepts",
    "survey",
}  # the last two are kinds of delta, and a function


def test_constants_are_read_from_the_sources_as_they_are():
    assert sources.constant("deltas/replacements.py", "POLICIES") == replacements.POLICIES
    assert sources.constant("recipes/peft_aliases.py", "PEFT_ALIASES") == PEFT_ALIASES
    assert sources.constant("runtime/resources.py", "DEFAULT_MEMORY") == DEFAULT_MEMORY


def test_the_examples_of_merge_and_fold_do_what_they_say(place, monkeypatch, tmp_path, capsys):
    """They name directories and hub ids: here there are directories of all these names."""
    monkeypatch.chdir(tmp_path)
    for name in ("math", "code"):
        (tmp_path / f"{name}-lora").symlink_to(place.directory / name)
    (tmp_path / "recipe.yaml").write_text("adapters: [math-lora, code-lora]\nmethod: ties\n")
    (tmp_path / "meta-llama").mkdir()
    (tmp_path / "meta-llama" / "Llama-3.2-1B").symlink_to(place.base("llama"))
    for command in ("merge", "fold", "methods"):
        _, _, examples = help_of(capsys, command).partition("example:\n")
        for line in examples.strip().splitlines():
            assert cli.main([*shlex.split(line)[1:], *["--overwrite"] * (command == "merge")]) == 0
    assert (tmp_path / "merged-model" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------- errors


ERRORS = {  # command to words of the one line
    "merge nowhere code -o @out": r"nowhere is neither a directory \(paths begin in",
    "merge bases code -o @out": r"bases holds no adapter_config\.json",
    "merge math code -o @out --weights 1": "2 adapters and 1 weights",
    "merge math code -o @out --method tise": "no merge method 'tise'; did you mean 'ties'",
    "merge math code -o @out --space dens": "no space 'dens'; did you mean 'dense'",
    "merge ./codr math -o @out": r"\./codr is neither .*; did you mean \./code\?",
    "fold math code -o @out": "code is an adapter, and no base model",
    "evaluate codr --data math/adapter_config.json": r"no directory codr; did you mean \./code",
    "evaluate math --data math/adapter_config.json --log @no/log": "lies in .*, which does not exist",
    "search math code --data math/adapter_config.json -o @no/best.yaml": "which does not exist",
    "search math code --data math/adapter_config.json -o math/best.yaml": "from which the output",
    "search math code --data math/adapter_config.json -o bases/llama/config.json": "pcb_peft did not write",
    "evaluate math --data math/adapter_config.json --log math/adapter_config.json": "from which the output",
    "distill math code --texts math --base-model code -o code --overwrite": "from which the output",
    "evaluate math --adapters math --base-model no": "there is nothing to measure on: give data",
    "search math code --data math/adapter_config.json --base-model bases/llama --budget soon": "budget is 'soon'",
    "evaluate math --data math=no.jsonl": "--data: there is no file no.jsonl; give a file with",
    "search math code --data math code": "--data: math is a directory; give a file with",
    "merge math code -o @out --scope layer": "scope is 'layer'",
    "merge math code -o @out --density much": r"density is 'much'; it must be a number in \(0, 1\]",
    "merge math code -o @out --method dare_linear --rescale maybe": "rescale is 'maybe'",
    "merge math code -o @out --max-memory much": "max_memory is 'much'",
    "merge math code -o @out --max-memory inf": "max_memory is 'inf'",
    "merge math code -o @out --before pico:a=[": "before pico has no option 'a'",
    "merge math code -o @out --device nowhere": "device is 'nowhere', which does not work here",
    "merge math code -o @out --device meta": "device is 'meta'",
    "merge math codr -o @out": r"codr is neither .*; did you mean \./code\?",
    "fold math base/llama -o @out": "base/llama is neither",
    "fold math bases/lama -o @out": r"; did you mean \./bases/llama\?",
    "merge math code -o @out --heads drop": "heads is 'drop'",
    "merge math code -o @out --rank 0": "rank is 0",
    "merge math code -o @out --rank 1.5": r"rank is 1\.5",
    "merge math code -o @out --rank some": "rank is 'some'",
    "merge math code -o @out --density 2": r"density is 2\.0; it must be a number in \(0, 1\]",
    "merge math code -o @out --formula old": "formula is 'old'",
    "merge math code -o .": "current directory",
    "merge math code -o code": "code contains .*code, from which the output is made",
    "merge math code -o @out --fold": "give base_model too",
    "merge math code -o @out --rank full": "give a rank, or fold it",
    "merge math math-ia3 -o @out": r"\(IA\)³ and LoRA",
    "merge math math-cls -o @out --heads refuse": "math-cls replace parameters",
    "merge math-ia3 code-ia3 -o @out --rank 3": "has no rank",
    "merge math-ia3 code-ia3 -o @out --rank-pattern": "rank_pattern",
    "merge nowhere.yaml -o @out": r"nowhere\.yaml cannot be read",
    "fold math nowhere -o @out": "nowhere is neither a directory",
    "collect math --base-model nowhere --data math/adapter_config.json -o @out": "nowhere",
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


USAGE = {  # command to the error, and words of the hint
    "merg math": ("no command 'merg'; did you mean 'merge'?; there are merge, ", "--help"),
    "MERGE math": ("no command 'MERGE'; did you mean 'merge'?", "--help"),
    "merge math code": ("give -o/--output, the directory to write, or --dry-run", "-o merged"),
    "merge -o @out": ("missing: adapters", "merge --help"),
    "merge --weights 1 0.5 math code -o @out": (
        "missing: adapters",
        "arguments come before options",
    ),
    "merge math -o @out --weights 1 0.5 code": (
        "--weights: 'code' is not a number",
        "merge math-lora",
    ),
    "merge math code -o @out --weights one": (
        "--weights: 'one' is not a number",
        "--weights 1 0.5",
    ),
    "merge math code -o @out --weights": ("--weights needs at least one value", "merge --help"),
    "merge math code -o": ("-o/--output needs a value", "merge --help"),
    "merge math code -o @out --fold=yes": ("--fold takes no value", "merge --help"),
    "merge math code -o @out --metod ties": (
        "unknown option --metod; did you mean '--method'?",
        "--help",
    ),
    "merge math code -o @out --densty 0.1": (
        "unknown option --densty; did you mean '--density'?",
        "merge --help",
    ),
    "merge math code -o @out --method linear --density 0.1": (
        "density belongs to breadcrumbs, .*pcb, .*ties.*; linear and core have no such option",
        "pcb-peft methods linear",
    ),
    "merge math code -o @out --gauge balanced": (
        "gauge belongs to factor; flat, core, pcb and knots have no such option",
        "pcb-peft methods flat",
    ),
    "merge math code -o @out --set densty=0.1": (
        "--set: no field or option 'densty'; did you mean 'density'?",
        "",
    ),
    "merge math code -o @out --set density": ("--set: 'density' is not KEY=VALUE", "density=0.3"),
    "merge math code -o @out --before pico:gauge": (
        "'pico:gauge' is not NAME:OPTION=VALUE",
        "power=0.5",
    ),
    "merge nowhere.yaml code --method ties -o @out": (
        "a recipe names its adapters itself: leave out code, or write it into nowhere.yaml",
        "",
    ),
    "merge math code -o @out --dtype int8": (
        "no --dtype 'int8'; there are float32, bfloat16, float16",
        "merge --help",
    ),
    "collect math --base-model b --data d -o @out --kind grm": (
        "no --kind 'grm'; did you mean 'gram'?; there are gram, gradient",
        "collect --help",
    ),
    "collect math": ("missing: --base-model, --data, -o/--output", "collect --help"),
    "demo --pool loar": ("no --pool 'loar'; did you mean 'lora'?; there are lora, ia3", "--help"),
    "methods a b": ("unexpected argument 'b'", "methods"),
    "--verson": ("unknown option --verson; did you mean '--version'?", "--help"),
}


@pytest.mark.parametrize("line", USAGE)
def test_a_command_line_that_is_not_understood_is_one_line_and_a_hint(run, line):
    code, out, err = run(line)
    assert (code, out) == (64, "")
    error, hint = USAGE[line]
    first, *others = err.splitlines()
    assert re.fullmatch(f"error: {re.escape(error).replace(re.escape('.*'), '.*')}.*", first)
    assert len(others) == bool(hint)
    assert all(other.startswith("hint: ") and hint in other for other in others)


# ---------------------------------------------------------------------------------- other processes


def process(place, *words):
    return subprocess.run(
        [sys.executable, "-m", "pcb_peft", *words],
        cwd=place.directory,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_process_merges_warns_on_stderr_and_reports_on_stdout(place, tmp_path):
    ran = process(place, *f"merge math code -o {tmp_path}/out --method linear --rank 1".split())
    assert ran.returncode == 0
    assert re.fullmatch(r"warning: the merged adapter retains .*\n", ran.stderr)
    assert f"written to {tmp_path}/out: rank 1, " in ran.stdout
    assert (tmp_path / "out" / WEIGHTS).is_file()


@pytest.mark.slow
def test_a_process_fails_without_a_traceback(place, tmp_path):
    ran = process(place, "merge", "math", "nowhere", "-o", f"{tmp_path}/out")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.fullmatch(r"error: nowhere is neither .*\n", ran.stderr)


IMPORTED = """\
import sys
from pcb_peft.commands import cli
for line in {lines}:
    try:
        cli.main(line.split())
    except SystemExit:
        pass
    print("IMPORTED", line, *sorted({{"torch", "transformers", "peft", "rich", "yaml"}} & {{*sys.modules}}))
"""


def imported(place, *lines):
    """What is imported after each of some commands, run one after another in a fresh process."""
    code = IMPORTED.format(lines=list(lines))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place.directory,
        capture_output=True,
        text=True,
        check=True,
    )
    said = re.findall(r"^IMPORTED (.*)$", ran.stdout, re.MULTILINE)
    return [line.removeprefix(command).split() for line, command in zip(said, lines, strict=True)]


@pytest.mark.slow
def test_help_version_and_errors_import_nothing_heavy_and_methods_no_torch(place):
    light = [
        "",
        "--help",
        "--version -v",
        "merge --help",
        "merge --method ties --help",
        "merg",
        "merge a b",
        "merge a b -o c --method tise",
        "merge a ./nowhere -o c",
        "evaluate a --data b=nowhere.jsonl",
    ]
    light += [f"{command} --help" for command in cli.COMMANDS]
    *found, methods = imported(place, *light, "methods")
    assert found == [[]] * len(light)
    assert methods == ["rich"]


@pytest.mark.slow
def test_a_directory_that_must_not_be_replaced_is_refused_before_anything_slow(place, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    words = f"-o {tmp_path}"
    lines = [
        f"merge math code {words}",
        f"merge math code --fold --base-model base {words} --overwrite",
        f"fold math base {words}",
        f"head math code {words}",
        f"export math --to portable {words}",
        f"distill math math code --base-model base --data a.jsonl b.jsonl {words}",
        f"extract tuned base {words}",
    ]
    assert imported(place, *lines) == [[]] * len(lines)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_merge_imports_neither_transformers_nor_peft(place, tmp_path):
    assert imported(place, f"merge math code -o {tmp_path}/out") == [["torch", "yaml"]]
