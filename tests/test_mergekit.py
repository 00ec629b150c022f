"""What mergekit has too: of one weight, in dense space, they are mergekit's (golden/make_mergekit_golden.py).

And its YAML files are read.
"""

import warnings
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import Workshop
from helpers import adapters
from safetensors.torch import load_file

from pcb_peft import OptionError, load_adapter, merge, merge_adapters, read_recipe
from pcb_peft.commands import cli
from pcb_peft.deltas.delta import Dense

GOLDEN = load_file(Path(__file__).parent / "golden" / "mergekit.safetensors")
WEIGHTS = (0.5, 1.5, -0.7)
CASES = {  # of a golden tensor: method, weights, options
    "linear": ("linear", WEIGHTS, {}),
    "ties": ("ties", (1, 1, 1), {"density": 0.4}),
    "magnitude_prune": ("magnitude_prune", WEIGHTS, {"density": 0.4}),
    "breadcrumbs": ("breadcrumbs", WEIGHTS, {"density": 0.7, "gamma": 0.1}),
    "slerp of equal lengths": ("slerp", (1, 1), {"t": 0.3}),
    "multislerp": ("multislerp", (1, 1, 1), {}),
    "karcher": ("karcher", (1, 1, 1), {}),
    "model_stock": ("model_stock", (1, 1, 1), {}),
}
SHIFT = 0.8  # so that the vectors of model_stock have positive cosines


def vectors(case):
    stack = GOLDEN["vectors"]
    if case == "model_stock":
        return stack + SHIFT
    if case.startswith("slerp"):
        return (stack / torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True))[:2]
    return stack


def test_every_golden_tensor_is_compared():
    assert CASES.keys() == GOLDEN.keys() - {"vectors"}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_mergekit_makes(case):
    method, weights, options = CASES[case]
    merged = merge_adapters(
        adapters([Dense(values) for values in vectors(case)]),
        *(method, weights, "dense", "module", "full"),
        **options,
    )
    found, wanted = merged.delta("m"), GOLDEN[case]
    assert torch.linalg.vector_norm(found - wanted) < 1e-6 * torch.linalg.vector_norm(wanted)


LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LAYERS = ("model.layers.0.", "model.layers.1.")
BASE = {"base_model": "base"}
TWO_BASES = [{"model": f"{name}+a", "parameters": {"weight": 1}} for name in ("one", "other")]
TWICE = [{"model": "base+a", "parameters": {"weight": 2}}]


@pytest.fixture(scope="module")
def three(shared_workshop: Workshop) -> list[Path]:
    return shared_workshop.adapters("llama", [LORA, LORA, LORA])


def file_of(path: Path, adapters: list[Path], each, **content) -> Path:
    """A file of mergekit for some adapters, each with parameters of its own."""
    models = [
        {"model": f"base+{adapter}", "parameters": own}
        for adapter, own in zip(adapters, each, strict=True)
    ]
    text = yaml.safe_dump({**BASE, "models": models, **content})
    (path / "mergekit.yaml").write_text(text)
    return path / "mergekit.yaml"


def weights(*values):
    return [{"weight": value} for value in values]


def assert_sum(file: Path, adapters: list[Path], wanted) -> None:
    """The merge is Σ w(module) ΔW."""
    merged, loaded = merge(read_recipe(file)), [load_adapter(adapter) for adapter in adapters]
    for module in merged.modules:
        total = sum(w * a.delta(module) for w, a in zip(wanted(module), loaded, strict=True))
        Workshop.assert_close(merged.delta(module), total, 1e-5)


def test_mergekits_sums_are_understood(three: list[Path], tmp_path: Path):
    def fixed(*values):
        return lambda _: values

    file = file_of(tmp_path, three, weights(1, 2, 1), merge_method="linear", dtype="bfloat16")
    assert_sum(file, three, fixed(0.25, 0.5, 0.25))
    arithmetic = {"merge_method": "task_arithmetic", "parameters": {"lambda": 2.0, "weight": 0.5}}
    assert_sum(file_of(tmp_path, three, [{}, {}, {}], **arithmetic), three, fixed(1, 1, 1))
    on_top = {"merge_method": "task_arithmetic", "base_model": f"base+{three[0]}"}
    file = file_of(tmp_path, three[1:], weights(0.5, 0.2), **on_top)
    assert_sum(file, three, fixed(1 - 0.7, 0.5, 0.2))  # Δ0 + Σ w (Δ − Δ0)


def test_mergekits_gradients_and_filters_are_understood(three: list[Path], tmp_path: Path):
    """The model has two layers: a gradient's ends."""
    gradient = file_of(tmp_path, three[:2], weights([0, 1], 0.5), merge_method="task_arithmetic")
    assert_sum(gradient, three[:2], lambda module: (float(module.startswith(LAYERS[1])), 0.5))
    conditions = [{"filter": "q_proj", "value": 0.25}, {"value": 2}]
    file = file_of(tmp_path, three[:1], weights(conditions), merge_method="task_arithmetic")
    assert_sum(file, three[:1], lambda module: (0.25 if "q_proj" in module else 2,))


def test_each_parameter_takes_the_first_filter_that_a_module_meets(
    three: list[Path], tmp_path: Path
):
    """Filters of different models meet in one module, and one that meets none is of no effect."""
    query, attention = {"filter": "q_proj", "value": 3}, {"filter": "self_attn", "value": 0.5}
    first = [{"filter": "lm_head", "value": 9}, attention, {"value": 2}]
    second = [query, {"filter": "layers.1.", "value": 5}, {"filter": "weight", "value": 7}]
    third = [{**query, "value": 1}, {**attention, "value": 4}, {"value": 1}]
    each = weights(first, second, third)
    file = file_of(tmp_path, three, each, merge_method="task_arithmetic")

    def wanted(module):
        asked = "q_proj" in module
        return 0.5, 3 if asked else 5 if "layers.1." in module else 7, 1 if asked else 4

    assert_sum(file, three, wanted)


def test_a_weight_of_zero_takes_no_part_in_mergekits_means(three: list[Path], tmp_path: Path):
    """Nor does it make the others longer."""
    turn = {"merge_method": "slerp", "base_model": f"base+{three[0]}", "parameters": {"t": [0, 1]}}
    for each, content, first in (
        ([{}, {}], turn, True),
        (weights([1, 0], [0, 1]), {"merge_method": "multislerp"}, True),
        (weights(0, 3), {"merge_method": "nuslerp"}, False),
        (weights(0, 3), {"merge_method": "ties"}, False),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = file_of(tmp_path, three[:2], each, **content)
            assert_sum(
                file,
                three[:2],
                lambda module, first=first: (1, 0) if first and LAYERS[0] in module else (0, 1),
            )


def test_a_base_model_with_one_of_the_adapters_is_no_difference(three: list[Path], tmp_path: Path):
    """Δ0 + 0.5 (Δ0 − Δ0) + 0.2 (Δ − Δ0)."""
    on_top = {"merge_method": "task_arithmetic", "base_model": f"base+{three[0]}"}
    file = file_of(tmp_path, three[:2], weights(0.5, 0.2), **on_top)
    assert_sum(file, three[:2], lambda _: (0.8, 0.2))


def test_one_slice_of_all_layers_has_parameters(three: list[Path], tmp_path: Path):
    sources = [{"model": f"base+{adapter}", "layer_range": [0, 2]} for adapter in three[:2]]
    sources[1]["parameters"] = {"weight": 3}
    slices = [{"sources": sources, "parameters": {"weight": 0.25}}]
    content = {**BASE, "merge_method": "task_arithmetic", "parameters": {"weight": 9}}
    file = tmp_path / "mergekit.yaml"
    file.write_text(yaml.safe_dump({**content, "slices": slices}))
    with pytest.warns(UserWarning, match=r"layer_range \[0, 2\] is taken for all layers"):
        assert_sum(file, three[:2], lambda _: (0.25, 3))


def test_mergekits_other_methods_are_understood(three: list[Path], tmp_path: Path):
    given = [{"weight": 0.3, "density": 0.5}] * 3
    recipe = read_recipe(file_of(tmp_path, three, given, merge_method="ties"))
    assert (recipe.method, recipe.space, recipe.scope) == ("ties", "dense", "module")
    assert (recipe.weights, recipe.options) == ((1, 1, 1), {"density": 0.5})
    assert [source.path for source in recipe.adapters] == list(map(str, three))
    with pytest.warns(UserWarning, match="divides by the weights"):
        recipe = read_recipe(file_of(tmp_path, three, weights(1, 2, 3), merge_method="ties"))
    assert (recipe.weights, recipe.options) == ((0.5, 1, 1.5), {"density": 1.0})
    file = file_of(tmp_path, three, weights(1, 1, 1), merge_method="dare_ties")
    with pytest.warns(UserWarning, match=r"other random numbers.*averaged"):
        recipe = read_recipe(file)
    assert recipe.options == {"density": 1.0, "rescale": True}
    turn = {"merge_method": "slerp", "base_model": f"base+{three[1]}", "parameters": {"t": 0.25}}
    file = file_of(tmp_path, three[:2], [{}, {}], **turn)
    with pytest.warns(UserWarning, match="one whole weight"):
        recipe = read_recipe(file)
    assert [source.path for source in recipe.adapters] == [str(three[1]), str(three[0])]
    assert recipe.weights == (1.5, 0.5)


@pytest.mark.parametrize(
    ("each", "content", "message"),
    [
        (weights([0, 1], 1), {"merge_method": "linear"}, "sum of the weights in each layer"),
        (weights([0, 1], [1, 0]), {"merge_method": "linear"}, None),
        (weights(1, 1), {"merge_method": "multislerp", "base_model": None}, "one whole weight"),
        (weights(1, 1), {"merge_method": "multislerp"}, None),
        ([{}, {}], {"merge_method": "model_stock"}, "point away from each other"),
    ],
)
def test_what_differs_from_mergekits_numbers_is_said(each, content, message, tmp_path: Path):
    file = file_of(tmp_path, [Path("a"), Path("b")], each, **content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read_recipe(file)
    assert [message in str(warning.message) for warning in said] == ([True] if message else [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"merge_method": "nearswap"}, "nearswap .* is not among the methods here"),
        ({"merge_method": "tiess"}, "did you mean 'ties'"),
        ({"merge_method": "ties", "merges": 1}, "'merges' has no counterpart"),
        ({"merge_method": "ties", "parameters": {"densty": 1}}, "did you mean 'density'"),
        ({"merge_method": "ties", "parameters": {"density": [1, 0.5]}}, "give one number"),
        ({"merge_method": "ties", "models": [{"model": "tuned"}]}, "pcb-peft extract tuned base"),
        ({"merge_method": "ties", "models": [{"model": "other+a"}]}, "not on the base model base"),
        ({"merge_method": "ties", "base_model": "base+b"}, "takes the differences"),
        ({"merge_method": "ties", "models": [{"model": "base+a"}]}, "needs a weight"),
        ({"merge_method": "linear", "models": TWICE, "parameters": {"normalize": False}}, "scales"),
        ({"merge_method": "passthrough", "models": []}, "stacks layers"),
        ({"merge_method": "ties", "models": None, "slices": [{}, {}]}, "one after the other"),
        (
            {"merge_method": "breadcrumbs", "parameters": {"rescale": True}},
            "rescale is True, .*out",
        ),
        ({"merge_method": "linear", "parameters": {"normalize": [1, 0]}}, "true or false here"),
        ({"merge_method": "ties", "models": [{"model": "base+a", "weight": 1}]}, "has 'weight'"),
        ({"merge_method": "linear", "models": TWO_BASES, "base_model": None}, "different base mod"),
    ],
)
def test_what_of_mergekit_is_not_covered_is_recognised(content, message: str, tmp_path: Path):
    models = [{"model": "base+a", "parameters": {"weight": 1}}]
    path = tmp_path / "mergekit.yaml"
    path.write_text(yaml.safe_dump({**BASE, "models": models, **content}))
    with pytest.raises(OptionError, match=message):
        read_recipe(path)


def test_a_mergekit_file_on_the_command_line(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = file_of(tmp_path, three, weights(1, 2, 1), merge_method="task_arithmetic")
    assert cli.main(["merge", str(file), "-o", str(tmp_path / "merged"), "--set", "rank=4"]) == 0
    assert read_recipe(tmp_path / "merged" / "merge_recipe.yaml").weights == (1, 2, 1)
    capsys.readouterr()
