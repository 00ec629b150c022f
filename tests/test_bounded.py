"""Nothing that a stranger wrote takes longer than a moment: expressions, sizes, aliases, a hub that does not answer."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import peft
import pytest
import torch
import yaml
from helpers import adapter, lora, low_rank
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pcb_peft import load_adapter, merge_adapters
from pcb_peft.base.architecture import built_on_meta
from pcb_peft.base.config import read_config
from pcb_peft.errors import AdapterError, BaseModelError, OptionError, PcbPeftError
from pcb_peft.files.patterns import Expression, Patterns
from pcb_peft.files.yaml_text import load_yaml
from pcb_peft.recipes.overrides import Override
from pcb_peft.recipes.recipe import read_recipe

LONG = "a" * 40 + "b"
FOR_EVER = ["(a+)+", "(.+)+!", "(a|a)*c", "(.*)*" * 50 + "x", "|".join("a" * i for i in range(150))]


@pytest.fixture(autouse=True)
def within_seconds():
    """Fails after 25 seconds, wherever it is."""

    def late(*_):
        raise TimeoutError("25 seconds are over")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(25)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def written(directory, config, tensors):
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def lora_of(directory, module=LONG, **config):
    name = f"base_model.model.{module}.lora_"
    tensors = {name + "A.weight": torch.ones(4, 16), name + "B.weight": torch.ones(16, 4)}
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    return written(directory, plain | config, tensors)


@pytest.mark.parametrize("expression", FOR_EVER)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_an_expression_for_ever_takes_no_time_in_a_pattern(tmp_path, expression, field):
    directory = lora_of(tmp_path / "a", **{field: {expression: 4}})
    assert load_adapter(directory).modules[LONG].rank == 4


@pytest.mark.parametrize("expression", FOR_EVER)
def test_nor_in_feedforward_modules_nor_in_overrides(tmp_path, expression):
    name = f"base_model.model.{LONG}.ia3_l"
    config = {"peft_type": "IA3", "feedforward_modules": expression}
    assert load_adapter(written(tmp_path / "a", config, {name: torch.ones(1, 4, 1, 1)})).modules
    assert not Override(modules=f"re:{expression}").matches(LONG)


@pytest.mark.parametrize("expression", FOR_EVER)
def test_nor_in_target_modules_beside_target_parameters(tmp_path, expression):
    fields = {"target_modules": expression, "target_parameters": ["down_proj"]}
    assert load_adapter(lora_of(tmp_path / "a", r=2, peft_version="0.19.0", **fields)).modules


@pytest.mark.parametrize("expression", ["(?!x).*", r"(a)\1", "(", "a{1001}", "(x)" * 10_000])
def test_what_cannot_be_matched_in_linear_time_is_refused_by_name(tmp_path, expression):
    with pytest.raises(AdapterError, match=r"rank_pattern.*expression"):
        load_adapter(lora_of(tmp_path / "a", rank_pattern={expression: 4}))
    with pytest.raises(OptionError, match=r"overrides.*expression"):
        Override(modules=f"re:{expression}").matches("x")


def as_peft_finds_it(patterns, module):
    """The lookup of peft.utils.other.get_pattern_key, transcribed."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), None)


NAMES = st.lists(st.sampled_from(["a", "b", "ab", "0", "q_proj"]), min_size=1, max_size=4).map(
    ".".join
)
KEYS = NAMES | st.sampled_from(
    ["a.*", "^a", "(a|b)", "q.proj", "a_b", ".", "..", r"\d", "a|b", r"a\.b"]
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(KEYS, max_size=5), st.lists(NAMES, min_size=1, max_size=5))
def test_a_pattern_is_looked_up_as_peft_does(keys, modules):
    patterns = {key: number for number, key in enumerate(keys)}
    mine = Patterns(patterns, "here", AdapterError)
    for module in modules:
        assert mine.value(module, None) == as_peft_finds_it(patterns, module)


def test_thousands_of_patterns_are_looked_up_at_once():
    modules = [f"model.layers.{i}.mlp.experts.{i}.up_proj" for i in range(6000)]
    patterns = Patterns({name: number for number, name in enumerate(modules)}, "here", AdapterError)
    assert [patterns.value(name, None) for name in modules] == list(range(6000))


def test_an_expression_that_takes_too_long_in_all_is_refused(monkeypatch):
    monkeypatch.setattr("pcb_peft.files.patterns.SECONDS", 0)
    with pytest.raises(AdapterError, match="takes more than 0 s"):
        Expression("a", "here", AdapterError).fits("a")


# ------------------------------------------------------------------------------------- base models

SIZES = [
    {"num_hidden_layers": 200_000},
    {"num_hidden_layers": 10**12},
    {"num_hidden_layers": "x"},
    {"hidden_size": "x"},
    {"num_attention_heads": 0},
    {"vocab_size": -1},
    {"vocab_size": 10**30},
    {"architectures": [3]},
    {"architectures": "x"},
    {"model_type": ["llama"]},
    {"rope_scaling": {"factor": 10**400}},
]


@pytest.mark.parametrize("change", SIZES, ids=str)
def test_a_configuration_that_is_none_is_refused(workshop, tmp_path, change):
    directory = workshop.base("llama") if hasattr(workshop, "base") else None
    if directory is None:
        workshop.model("llama").save_pretrained(tmp_path / "base")
        directory = tmp_path / "base"
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": None} | change))
    with pytest.raises(BaseModelError, match=r"config\.json"):
        built_on_meta(directory)


def test_a_model_of_too_many_parts_is_not_built(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr("pcb_peft.base.config._MOST_MODULES", 10)
    workshop.model("llama").save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="more than 10 modules"):
        built_on_meta(tmp_path)


def test_the_code_of_a_base_model_is_not_run(tmp_path):
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass C: pass\n")
    assert built_on_meta(tmp_path) is None
    assert read_config(tmp_path)["model_type"] == "evil"
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- recipes

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)
BOMBS = [LAUGHS, MERGES, "a: &a [*a]", "a: &a {b: *a}", "[" * 50_000, "? [a]\n: b", "a: 2001-99-99"]
BOMBS += ["a: " + "1" * 5000, "a: !!python/object/apply:os.getcwd []", "a: b: c", "\0"]


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_yaml_that_is_a_bomb_is_refused_in_few_words(tmp_path, text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(OptionError, match=r"recipe\.yaml cannot be read as YAML") as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert len(str(caught.value)) < 500


def test_aliases_in_reason_are_read(tmp_path):
    text = "adapters: [a, b]\noptions: &o {density: 0.2}\noverrides: [{modules: x, options: *o}]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert read_recipe(tmp_path / "recipe.yaml").overrides[0].options == {"density": 0.2}


@pytest.mark.parametrize("field", ["method", "weights", "rank", "adapters", "overrides", "scope"])
def test_a_message_stays_short_whatever_it_names(field):
    value = ["x" * 1000] * 1000
    for _ in range(5):
        value = [value] * 10
    with pytest.raises(PcbPeftError) as caught:
        merge_adapters(**({"adapters": ["a"]} | {field: value}))
    assert len(str(caught.value)) < 1500


# ------------------------------------------------------------------------------------- others who do not answer


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        place = f"http://127.0.0.1:{mute.getsockname()[1]}"
        code = (
            "import pcb_peft.base.hub as hub; hub.SECONDS = 1\n"
            "from pcb_peft.errors import AdapterError\n"
            "try: hub.download('someone/something', None, wanted=['*'], error_type=AdapterError)\n"
            "except AdapterError as error: print(error)\n"
        )
        environment = os.environ | {
            "HF_ENDPOINT": place,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        }
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            timeout=20,
        )
    assert "did not answer within 1 s" in run.stdout, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_others_hears_signals(number):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the parent may ignore it
        "from pcb_peft.runtime.processes import all_processes\n"
        "import torch, accelerate\n"
        "print('waits', flush=True)\n"
        "with all_processes(): pass\n"
    )
    launcher = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | launcher,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as waiting:
        waiting.stdout.readline()
        time.sleep(0.5)
        waiting.send_signal(number)
        assert waiting.wait(timeout=3) == -number


def test_a_rank_by_net_utility_takes_time_in_proportion(monkeypatch):
    """The layers of the model are counted once, not once for each module."""
    from pcb_peft.recipes import weights

    count = 0
    plain = weights.layer_of

    def counted(module):
        nonlocal count
        count += 1
        return plain(module)

    monkeypatch.setattr(weights, "layer_of", counted)
    modules = 40
    sources = [
        adapter(name, {f"layers.{i}.q": low_rank(2, seed=seed + i)[0] for i in range(modules)})
        for name, seed in (("a", 0), ("b", 100))
    ]
    merge_adapters(sources, "linear", rank=f"utility:{modules}")
    assert count < 10 * modules


def test_peft_writes_what_the_schema_has(workshop):
    """Every configuration that PEFT writes for a LoRA is read."""
    config = lora(rank_pattern={"up": 2}, alpha_pattern={"up": 3})
    assert isinstance(config, peft.LoraConfig)
    assert load_adapter(workshop.adapter("mlp", config)).modules
