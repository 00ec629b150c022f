"""Settings that differ from module to module, and PEFT's names for methods."""

import peft
import pytest

from pcb_peft import OptionError, load_adapter, merge, merge_adapters, read_recipe
from pcb_peft.base.paths import layer_of
from pcb_peft.deltas.rank_choice import FixedRank, parse_rank
from pcb_peft.recipes.weights import at_depth

LORA = peft.LoraConfig(r=3, target_modules="all-linear")
QUERY, UP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"


@pytest.fixture
def adapters(workshop):
    return workshop.adapters("llama", [LORA, LORA])


def test_a_gradient_goes_from_the_first_layer_to_the_last(workshop, adapters):
    first, second = (workshop.deltas("llama", adapter) for adapter in adapters)
    merged = merge_adapters(adapters, "linear", weights=[[0.2, 0.8], -1])
    for layer, weight in enumerate([0.2, 0.8]):
        module = UP.format(layer)
        wanted = weight * first[module] - second[module]
        workshop.assert_close(merged.delta(module), wanted, 1e-5, module)


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("layers.0.q", 1.0),
        ("layers.1.q", 3.0),
        ("layers.2.q", 5.0),
        ("layers.4.q", 1.0),
        ("head", 1.0),
    ],
)
def test_a_gradient_is_linear_between_its_values(module, wanted):
    assert at_depth([(1.0, 5.0, 1.0), 7.0], module, layers=5) == (wanted, 7.0)


def test_a_layer_is_the_first_number_of_a_path():
    assert [layer_of(path) for path in ("a.12.b.3", "fc1.x", "h")] == [12, None, None]


def test_the_first_override_that_matches_has_the_module(workshop, adapters):
    overrides = [
        {"modules": "*.1.mlp.*", "weights": [0.0, 2.0]},
        {"modules": r"re:.*\.mlp\..*", "weights": [3.0, 0.0]},
    ]
    merged = merge_adapters(adapters, "linear", overrides=overrides)
    first, second = (workshop.deltas("llama", adapter) for adapter in adapters)
    workshop.assert_close(merged.delta(UP.format(0)), 3 * first[UP.format(0)], 1e-5)
    workshop.assert_close(merged.delta(UP.format(1)), 2 * second[UP.format(1)], 1e-5)
    both = first[QUERY.format(1)] + second[QUERY.format(1)]
    workshop.assert_close(merged.delta(QUERY.format(1)), both, 1e-5)


def test_an_override_has_its_own_method_space_scope_and_options(workshop, adapters):
    settings = {"space": "knots", "scope": "module", "density": 0.4}
    options = {"options": {"density": settings["density"]}}
    override = {"modules": "*.mlp.*", "method": "ties", **settings, **options}
    del override["density"]
    merged = merge_adapters(adapters, "pcb", density=0.3, overrides=[override])
    for method, module, wanted in (
        ("ties", UP.format(0), merge_adapters(adapters, "ties", **settings)),
        ("pcb", QUERY.format(0), merge_adapters(adapters, "pcb", density=0.3)),
    ):
        workshop.assert_close(merged.delta(module), wanted.delta(module).double(), 1e-6, method)


def test_an_override_keeps_the_options_of_the_same_method_only(adapters):
    merged = merge_adapters(
        adapters,
        "pcb",
        density=0.3,
        overrides=[{"modules": "*q_proj"}, {"modules": "*", "method": "ties"}],
    )
    densities = [override.options["density"] for override in merged.recipe.overrides]
    assert densities == [0.3, 0.2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"modules": "*.nothing"}, "matches no module"),
        ({"modules": "re:("}, "not a regular expression"),
        ({"module": "*"}, "must be a mapping with the key modules"),
        ({"modules": "*", "methd": "ties"}, "unknown key 'methd'; did you mean 'method'"),
        ({"modules": "*", "scope": "globl"}, "scope is 'globl'; did you mean 'global'"),
        ({"modules": "*", "options": [1]}, r"options is \[1\]; it must be a mapping"),
        ({"modules": "*", "method": "tise"}, "did you mean 'ties'"),
        ({"modules": "*", "weights": [1.0]}, "2 adapters and 1 weights"),
        ({"modules": "*", "options": {"density": 2.0}}, "density is 2.0"),
    ],
)
def test_a_wrong_override_is_refused(adapters, override, message):
    with pytest.raises(OptionError, match=message):
        merge_adapters(adapters, overrides=[override])


@pytest.mark.parametrize(
    "weights", [[[], 1.0], [[1.0, "x"], 1.0], ["1", 1.0], [float("nan"), 1.0], []]
)
def test_wrong_weights_are_refused(adapters, weights):
    with pytest.raises(OptionError, match="weights"):
        merge_adapters(adapters, "linear", weights=weights)


def test_a_recipe_with_gradients_and_overrides_makes_the_same_bytes_again(adapters, tmp_path):
    overrides = [{"modules": "*.mlp.*", "method": "ties", "weights": [[0.0, 1.0], 1.0]}]
    merged = merge_adapters(adapters, weights=[[0.5, 1.0], 2.0], overrides=overrides)
    merged.save_pretrained(tmp_path / "one")
    merge(read_recipe(tmp_path / "one" / "merge_recipe.yaml")).save_pretrained(tmp_path / "two")
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("name", "method", "space", "scope", "rank"),
    [
        ("cat", "linear", "core", "module", None),
        ("svd", "linear", "core", "module", 3),
        ("ties_svd", "ties", "dense", "module", 3),
        ("magnitude_prune_svd", "magnitude_prune", "dense", "module", 3),
    ],
)
@pytest.mark.filterwarnings("ignore:the merged adapter retains")
def test_pefts_names_stand_for_methods_in_the_space_of_deltas(
    adapters, name, method, space, scope, rank
):
    recipe = merge_adapters([load_adapter(adapter) for adapter in adapters], name).recipe
    assert (recipe.method, recipe.space, recipe.scope, recipe.rank) == (
        method,
        space,
        scope,
        parse_rank(rank),
    )


def test_what_is_said_stands_against_pefts_name(adapters):
    recipe = merge_adapters(adapters, "ties_svd", space="core", rank=5).recipe
    assert (recipe.space, recipe.rank) == ("core", FixedRank(5))
