"""A recipe is everything that is needed to make a merge again, and the file says nothing else."""

import dataclasses
import doctest
import hashlib
import inspect
from pathlib import Path

import numpy as np
import peft
import pytest
import yaml
from helpers import lora
from hypothesis import given, settings
from hypothesis import strategies as st

from pcb_peft import (
    AdapterError,
    OptionError,
    Recipe,
    Source,
    __version__,
    list_methods,
    list_spaces,
    load_adapter,
    merge,
    merge_adapters,
    read_recipe,
)
from pcb_peft.deltas import rank_choice
from pcb_peft.files import yaml_text
from pcb_peft.merging.plan import KEYWORDS
from pcb_peft.recipes import fields, steps, weights
from pcb_peft.recipes import recipe as recipe_module

# PEFT 0.21 asks transformers 5.23 for it

WRITTEN = ("adapter_model.safetensors", "adapter_config.json", "merge_recipe.yaml", "README.md")


@pytest.fixture(scope="module")
def adapters(shared_workshop):
    return shared_workshop.adapters("mlp", [lora(), lora(r=2, use_rslora=True)])


@pytest.fixture(scope="module")
def ia3s(shared_workshop):
    config = peft.IA3Config(target_modules=["up", "mix"], feedforward_modules=["mix"])
    return [shared_workshop.adapter("mlp", config, f"ia3{seed}", seed=seed) for seed in (1, 2)]


@pytest.fixture
def write(tmp_path):
    """Writes a recipe file."""

    def write(content):
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "recipe.yaml"

    return write


# --------------------------------------------------------------------------------------- round trips


RECIPES = [
    Recipe.parse(adapters=(Source("a"),)),
    Recipe.parse(adapters=(Source("a"), Source("org/b")), weights=(1, -0.5), method="ties", rank=4),
    Recipe.parse(adapters=(Source("a", "v1", "sub", "ab" * 32),), rank=0.9, scope="module", seed=7),
    Recipe.parse(adapters=(Source("a"),), rank="full", heads="refuse", base_model="org/base"),
    Recipe.parse(
        adapters=(Source("a"),), options={"density": 1e-05, "formula": "es", "winsor": None}
    ),
    Recipe.parse(
        adapters=(Source("a"),), space="core", version="0.1", before="pico", after=["svc"]
    ),
    Recipe.parse(adapters=(Source("a"),), after={"exponent": {"power": 0.5}}),
    Recipe.parse(
        adapters=tuple(map(Source, ("12", "1e3", "null", "no", "~", "- a", "a: b", "#", "ä/ö")))
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_a_recipe_survives_its_file(write, recipe):
    assert read_recipe(write(recipe.to_yaml())) == recipe


names = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(names, st.floats(-9, 9)), min_size=1, max_size=3))
def test_any_path_and_any_weight_survive_the_file(tmp_path_factory, items):
    paths, weights = zip(*items, strict=True)
    recipe = Recipe.parse(adapters=tuple(map(Source, paths)), weights=weights, seed=3)
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert read_recipe(file) == recipe


def test_short_forms_are_understood(write):
    short = read_recipe(write("adapters: [a, {path: b, weight: 2, revision: v1}]\nmethod: linear"))
    assert short.adapters == (Source("a"), Source("b", "v1"))
    assert short.weights == (1.0, 2)
    long = read_recipe(
        write({"adapters": ["a", {"path": "b", "revision": "v1"}], "weights": [1, 2]})
    )
    assert long.weights == short.weights
    assert (short.method, long.method) == ("linear", "auto")


def test_the_file_of_a_result_is_plain_yaml_with_everything_in_it(adapters, tmp_path):
    merged = merge_adapters(
        list(adapters), "linear", [1, -0.5], base_model=tmp_path, space="core", rank=4, seed=5
    )
    text = merged.recipe.to_yaml()
    assert "!" not in text
    assert "&" not in text
    content = yaml.safe_load(text)

    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert content["adapters"] == [
        {
            "path": str(path),
            "sha256": digest(path / WRITTEN[0]),
            "config_sha256": digest(path / "adapter_config.json"),
            "weight": weight,
        }
        for path, weight in zip(adapters, [1.0, -0.5], strict=True)
    ]
    wanted = {
        "method": "linear",
        "space": "core",
        "rank": 4,
        "seed": 5,
        "base_model": str(tmp_path),
    }
    assert content.items() >= wanted.items()
    assert {"scope", "heads", "version"} <= content.keys()
    assert "auto" not in text


def test_numbers_of_numpy_are_plain_numbers_in_the_file(write, adapters):
    merged = merge_adapters(adapters, "linear", np.array([1, -0.5]))
    assert read_recipe(write(merged.recipe.to_yaml())).weights == (1, -0.5)


# ------------------------------------------------------------------------------------ made once more


def assert_made_again(merged, directory):
    """From the file of the result, to the same bytes."""
    merged.save_pretrained(directory / "once")
    again = merge(read_recipe(directory / "once" / "merge_recipe.yaml"))
    assert again.recipe == merged.recipe
    again.save_pretrained(directory / "twice")
    for name in WRITTEN:
        assert (directory / "once" / name).read_bytes() == (directory / "twice" / name).read_bytes()


def test_a_recipe_of_another_version_is_noted(adapters):
    recipe = merge_adapters(adapters, "linear").recipe
    assert not merge(recipe).report.notes
    other = merge(dataclasses.replace(recipe, version="0.0.1"))
    assert any("0.0.1" in note and __version__ in note for note in other.report.notes)
    assert other.recipe == recipe


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize(
    "method", [m.name for m in list_methods().values() if not m.needs_statistic]
)
def test_every_method_gives_the_same_bytes_again(adapters, tmp_path, method):
    assert_made_again(merge_adapters(adapters, method, [1, 0.7], seed=3), tmp_path)


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("scope", ["module", "global"])
@pytest.mark.parametrize("space", sorted({*list_spaces()} - {"vector"}))
def test_every_space_and_scope_gives_the_same_bytes_again(adapters, tmp_path, space, scope):
    merged = merge_adapters(adapters, "pcb", space=space, scope=scope, rank=3, density=0.4)
    assert_made_again(merged, tmp_path)


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 0.5}, {"weights": [0, -1]}], ids=str)
@pytest.mark.filterwarnings("ignore:the merged adapter retains")
def test_ranks_and_weights_give_the_same_bytes_again(adapters, tmp_path, options):
    assert_made_again(merge_adapters(adapters, "linear", **options), tmp_path)


@pytest.mark.parametrize("method", ["linear", "pcb"])
def test_ia3s_give_the_same_bytes_again(ia3s, tmp_path, method):
    assert_made_again(merge_adapters(ia3s, method), tmp_path)


def test_the_method_s_options_matter(adapters):
    sparse, dense = (merge_adapters(adapters, "pcb", density=density) for density in (0.1, 0.9))
    assert not sparse.delta("up").equal(dense.delta("up"))


def test_an_adapter_that_has_changed_since_is_noticed(workshop):
    directory = workshop.adapter("mlp", lora())
    merge_adapters([directory]).save_pretrained(workshop.directory / "out")
    recipe = read_recipe(workshop.directory / "out" / "merge_recipe.yaml")
    merge(recipe)
    workshop.adapter("mlp", lora(), seed=2)
    with pytest.raises(AdapterError, match=r"adapter has changed.*take sha256 out of the recipe"):
        merge(recipe)


def test_a_configuration_that_has_changed_since_is_noticed(workshop):
    directory = workshop.adapter("mlp", lora())
    merge_adapters([directory]).save_pretrained(workshop.directory / "out")
    recipe = read_recipe(workshop.directory / "out" / "merge_recipe.yaml")
    workshop.edit_config(directory, lora_alpha=99)
    with pytest.raises(AdapterError, match=r"adapter has changed.*take config_sha256 out"):
        merge(recipe)


def test_an_adapter_in_memory_is_not_taken_for_a_directory(workshop, monkeypatch):
    model = workshop.peft_model("mlp", lora())
    merge_adapters([(model, "default")]).save_pretrained(workshop.directory / "out")
    recipe = read_recipe(workshop.directory / "out" / "merge_recipe.yaml")
    workshop.adapter("mlp", lora(), "default")
    monkeypatch.chdir(workshop.directory)
    with pytest.raises(AdapterError, match=r"in memory: default has no files.*save that adapter"):
        merge(recipe)


def test_a_recipe_without_a_hash_takes_what_is_there(workshop, write):
    directory = workshop.adapter("mlp", lora())
    merged = merge(read_recipe(write({"adapters": [str(directory)], "method": "linear"})))
    workshop.assert_deltas(merged, workshop.deltas("mlp", directory), 1e-6)
    assert merged.recipe.adapters == (load_adapter(directory).source,)


# ------------------------------------------------------------------------------- what is not a recipe


A = {"adapters": ["a"]}
FAULTS = {  # content, words of the message
    "an unknown key": (A | {"methd": "ties"}, r"unknown key 'methd'; did you mean 'method'\?"),
    "a key of another tool": (A | {"slices": []}, "unknown key 'slices'; allowed: adapters"),
    "a key that is no word": ({1: 2}, "unknown key '1'"),
    "no adapters": ({"method": "linear"}, "nothing to merge"),
    "an empty list": ({"adapters": []}, "nothing to merge"),
    "adapters in no list": ({"adapters": "a"}, "adapters must be a list"),
    "an adapter that is a number": ({"adapters": [3]}, "adapter 3 must be a path"),
    "an adapter that is nothing": ({"adapters": [None]}, "adapter None must be a path"),
    "an adapter that is a list": ({"adapters": [["a", "b"]]}, "must be a path"),
    "an adapter with an unknown key": (
        {"adapters": [{"path": "a", "wieght": 1}]},
        "wieght.*weight",
    ),
    "an adapter without a path": ({"adapters": [{"weight": 1}]}, "must be a path"),
    "a path that is a number": ({"adapters": [{"path": 3}]}, "path.*3"),
    "a revision that is a number": ({"adapters": [{"path": "a", "revision": 3}]}, "revision.*3"),
    "weights twice": (
        {"adapters": [{"path": "a", "weight": 1}], "weights": [1]},
        "give weights, or a weight with each adapter, not both",
    ),
    "too many weights": (A | {"weights": [1, 2]}, "1 adapters and 2 weights"),
    "a weight that is a word": (A | {"weights": ["1"]}, "'1' is not a finite number"),
    "a weight that is true": (A | {"weights": [True]}, "True is not a finite number"),
    "a weight beyond bounds": (A | {"weights": [float("inf")]}, "inf is not a finite number"),
    "a weight that is no number": (A | {"weights": [float("nan")]}, "nan is not a finite number"),
    "weights in no list": (A | {"weights": 1}, "weights"),
    "weights as a word": (A | {"weights": "1"}, "weights"),
    "a scope that is not": (A | {"scope": "layer"}, "scope is 'layer'; it must be one of auto"),
    "heads that are not": (A | {"heads": "drop"}, "heads is 'drop'; it must be one of keep-each"),
    "a rank of zero": (A | {"rank": 0}, "rank is 0; it must be"),
    "a rank that is a word": (A | {"rank": "8"}, "rank is '8'; it must be"),
    "a rank above one": (A | {"rank": 1.5}, "rank is 1.5; it must be"),
    "a rank that is true": (A | {"rank": True}, "rank is True; it must be"),
    "a method that is a list": (A | {"method": ["ties"]}, "method"),
    "a space that is a number": (A | {"space": 3}, "space"),
    "options in no mapping": (A | {"options": ["density"]}, "options"),
    "a seed that is a word": (A | {"seed": "x"}, "seed"),
    "a base model that is a number": (A | {"base_model": 3}, "base_model"),
    "a key twice": ("adapters: [a, b]\nadapters: [a]", "the key 'adapters' is there twice"),
    "an option twice": (
        "adapters: [a]\noptions: {density: 0.1, density: 0.2}",
        "the key 'density' is there twice",
    ),
    "a list": ("- a", "is not a recipe"),
    "nothing": ("", "is not a recipe"),
    "a word": ("merge", "is not a recipe"),
    "not YAML": ("adapters: [", "cannot be read as YAML"),
    "code": ("adapters: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_faulty_file_is_refused_by_what_is_wrong_with_it(write, case):
    content, words = FAULTS[case]
    with pytest.raises(OptionError, match=f"(?s){words}"):
        read_recipe(write(content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"recipe\.yaml cannot be read"):
        read_recipe(tmp_path / "recipe.yaml")


REQUESTS = {  # arguments of merge_adapters, words of the message
    "a method that is not": ({"method": "tise"}, "no merge method 'tise'; did you mean 'ties'"),
    "a space that is not": ({"space": "cores"}, "no space 'cores'; did you mean 'core'"),
    "a scope that is not": ({"scope": "layer"}, "scope is 'layer'"),
    "an option that is not": (
        {"method": "ties", "densty": 0.2},
        "has no option 'densty'; did you mean 'density'",
    ),
    "an option of a method without any": (
        {"method": "linear", "space": "core", "density": 0.2},
        "linear in space core has no option 'density'",
    ),
    "a density out of bounds": (
        {"density": 1.5},
        r"density is 1\.5; it must be a number in \(0, 1\]",
    ),
    "a density of zero": ({"density": 0}, r"density is 0\.0; it must be a number in \(0, 1\]"),
    "a density that is a word": ({"density": "0.1"}, "density is '0.1'; it must be a number"),
    "a formula that is not": ({"formula": "old"}, "formula is 'old'; it must be one of paper"),
    "a rank that is not": ({"rank": -1}, "rank is -1"),
    "too few weights": ({"weights": [1]}, "2 adapters and 1 weights: give one weight per adapter"),
    "a weight that is not": ({"weights": [1, float("nan")]}, "nan is not a finite number"),
    "heads that are not": ({"heads": "drop"}, "heads is 'drop'"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_cannot_be_met_is_refused_before_a_tensor_is_read(workshop, case):
    options, words = REQUESTS[case]
    directories = workshop.adapters("mlp", [lora(), lora()])
    for directory in directories:
        workshop.edit_tensors(directory, lambda t: {k: v * float("nan") for k, v in t.items()})
    with pytest.raises(OptionError, match=words):
        merge_adapters(directories, **options)


@pytest.mark.parametrize("word", ["wieghts", "weight"])
def test_a_misspelt_argument_is_told_from_an_option(adapters, word):
    with pytest.raises(OptionError, match=f"has no option '{word}'; did you mean 'weights'"):
        merge_adapters(adapters, **{word: [1, 2]})


def test_every_argument_can_be_suggested():
    arguments = inspect.signature(merge_adapters).parameters
    assert set(arguments) - {"options"} <= KEYWORDS


def test_an_option_of_another_method_is_told_whose_it_is(adapters):
    with pytest.raises(
        OptionError, match=r"has no option 'density': it is an option of .*pcb.*ties"
    ):
        merge_adapters(adapters, "linear", density=0.3)


NO_LIST = ["x", Path("x"), 1, None, {"a": 1}]


@pytest.mark.parametrize("given", NO_LIST, ids=repr)
def test_adapters_that_are_no_list_are_refused(given):
    with pytest.raises(OptionError, match=r"adapters is .*; it must be a list"):
        merge_adapters(given)


@pytest.mark.parametrize("given", [1, None, {"path": "a"}], ids=repr)
def test_an_adapter_that_is_none_is_refused_with_what_may_be_given(given):
    with pytest.raises(OptionError, match=r"adapters: .* is no adapter; it must be a directory"):
        merge_adapters([given])


@pytest.mark.parametrize("kind", [str, Path])
def test_a_recipe_may_be_named_by_its_file(write, adapters, kind):
    path = write({"adapters": [str(path) for path in adapters], "method": "linear"})
    assert merge(kind(path)).recipe == merge(read_recipe(kind(path))).recipe


@pytest.mark.parametrize("given", [3, None, b"recipe.yaml"])
def test_what_is_no_recipe_is_refused(given):
    for function in (merge, read_recipe):
        with pytest.raises(OptionError, match="it must be a Recipe, or the path of a YAML file"):
            function(given)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", "0.1e-2", ".01e-1", "10e-4"])
def test_a_number_with_an_exponent_is_a_number(write, text):
    recipe = read_recipe(write(f"adapters: [a]\noptions: {{ridge: {text}, word: 1e3x, name: e3}}"))
    assert recipe.options == {"ridge": float(text), "word": "1e3x", "name": "e3"}


def test_a_recipe_of_paths_is_one_of_words(tmp_path):
    assert Recipe.parse(adapters=[tmp_path]) == Recipe.parse(adapters=[str(tmp_path)])
    assert Recipe.parse(adapters=["a"], base_model=tmp_path).base_model == str(tmp_path)


def test_a_recipe_can_be_changed_in_some_fields():
    recipe = Recipe.parse(adapters=["a", "b"], weights=[1, 2], rank=4, after="svc")
    changed = recipe.changed(rank="full", weights=[3, [0, 1]])
    assert changed == Recipe.parse(
        adapters=["a", "b"], weights=[3, [0, 1]], rank="full", after=["svc"]
    )
    with pytest.raises(OptionError, match="2 adapters and 1 weights"):
        recipe.changed(weights=[1])


def test_errors_are_those_that_peft_raises_too(tmp_path):
    with pytest.raises(ValueError, match="rank is -1"):
        Recipe.parse(adapters=["a"], rank=-1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json") as caught:
        load_adapter(tmp_path / "empty")
    assert isinstance(caught.value, AdapterError)


@pytest.mark.parametrize("module", [fields, rank_choice, recipe_module, steps, weights, yaml_text])
def test_examples_are_true(module):
    assert doctest.testmod(module).failed == 0


def test_a_rank_for_ia3s_is_refused(ia3s):
    with pytest.raises(OptionError, match=r"rank is 3, but an \(IA\)³ adapter .* has no rank"):
        merge_adapters(ia3s, "linear", rank=3)


def test_a_space_that_cannot_take_ia3s_is_refused_with_those_that_can(ia3s):
    with pytest.raises(
        OptionError, match=r"'core' cannot take adapters of kind \(IA\)³.*auto, vector"
    ):
        merge_adapters(ia3s, "linear", space="core")


def test_nothing_to_merge_is_refused():
    with pytest.raises(OptionError, match="nothing to merge"):
        merge_adapters([])
