"""DoRAs merge as gains of W's rows and low-rank parts side by side, and leave as a DoRA that PEFT loads.

What is expected comes from PEFT's own merge_and_unload of each adapter.
"""

import copy
import dataclasses
import json
import pickle

import helpers
import peft
import pytest
import torch
from helpers import LOW_RANK_OUTPUT, lora
from safetensors.torch import load_file, save_file

from pcb_peft import (
    UnsupportedError,
    add_weighted_adapter,
    list_methods,
    list_spaces,
    load_adapter,
    merge_adapters,
)
from pcb_peft.deltas.delta import Dense, LowRank, Rescaled
from pcb_peft.recipes.recipe import read_recipe
from pcb_peft.spaces import in_parts
from pcb_peft.tasks.blocks import stacked
from pcb_peft.tasks.task_vectors import TaskVectors

WEIGHTS = (1.5, -0.7)
MAGNITUDE = "lora_magnitude_vector"


def dora(*targets, **options):
    return lora(*targets, **{"use_dora": True} | options)


PAIRS = {  # the model, two adapters, and the most that their ranks can add up to
    "DoRA, DoRA": ("mlp", dora("up", "mix"), dora("up", "mix"), 6),
    "DoRA, LoRA": ("mlp", dora("up", "mix"), lora("up", "mix", r=2), 5),
    "LoRA, DoRA": ("mlp", lora("up", "mix", r=2, use_rslora=True), dora("up", "mix"), 5),
    "other modules": ("mlp", dora("up", "down"), lora("down", "mix"), 6),
    "mixed ranks": ("mlp", dora("up", rank_pattern={"blocks.0.up": 1}), dora("up", "mix", r=2), 5),
    "Conv1D": (
        "gpt2",
        dora("c_attn", "c_proj", fan_in_fan_out=True),
        dora("c_proj", r=2, fan_in_fan_out=True),
        5,
    ),
    "Conv1D, LoRA": (
        "gpt2",
        lora("c_attn", "c_proj", fan_in_fan_out=True),
        dora("c_proj", r=2, fan_in_fan_out=True),
        5,
    ),
    "an embedding": ("odd", dora("table", "linear"), dora("table", r=2), 5),
    "convolutions": ("odd", dora("line", "image", "volume"), lora("line", "image", "point"), 6),
    "trained biases": ("mlp", dora("up", "mix", bias="lora_only"), dora("up", "mix"), 6),
    "lora_bias": ("mlp", lora("up", "mix", lora_bias=True), dora("up", "mix"), 6),
}
every_pair = pytest.mark.parametrize("name", PAIRS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lora_bias=True", "ignore:.*invalid shape"),
    pytest.mark.slow,
]


@pytest.fixture
def pair(shared_workshop, name):
    kind, first, second, _ = PAIRS[name]
    folder = "".join(c for c in name if c.isalnum())
    paths = [shared_workshop.directory / f"{folder}{seed}" for seed in (1, 2)]
    for seed, (path, config) in enumerate(zip(paths, (first, second), strict=True), 1):
        if not path.is_dir():
            shared_workshop.adapter(kind, config, path.name, seed=seed)
    return paths


def combined(workshop, kind, adapters, weights=WEIGHTS):
    """Σ w ΔW according to PEFT, by parameter."""
    total = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, change in workshop.changes(kind, adapter).items():
            total[name] = total.get(name, 0) + weight * change
    return total


def config_of(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def loaded(workshop, kind, directory):
    """PEFT has a place for each tensor, and a tensor for each place."""
    model = peft.PeftModel.from_pretrained(workshop.model(kind).double(), directory)
    stored = load_file(directory / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(model, stored)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model


def assert_changes(workshop, found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        workshop.assert_close(found[name], change, tolerance, name)


@pytest.fixture
def doras(workshop):
    """Two on the same Linears, and their base."""
    configs = [dora("up", "mix"), dora("up", "mix", r=2)]
    return workshop.adapters("mlp", configs), workshop.base("mlp")


# ------------------------------------------------------------------------------------------ what leaves


@every_pair
def test_a_weighted_sum_leaves_as_a_dora(shared_workshop, name, pair, tmp_path):
    kind, _, _, most = PAIRS[name]
    base = shared_workshop.base(kind)
    merged = merge_adapters(pair, "linear", WEIGHTS, base_model=base)
    assert merged.report.energy == pytest.approx(1)
    merged.save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["use_dora"]
    assert config["r"] <= most
    wanted = combined(shared_workshop, kind, pair)
    model = loaded(shared_workshop, kind, tmp_path / "out")
    assert_changes(shared_workshop, shared_workshop.changes(kind, model), wanted)
    again = load_adapter(tmp_path / "out", base_model=base)
    for module in again.modules:
        shared_workshop.assert_close(again.delta(module), merged.delta(module), 1e-5, module)


@every_pair
def test_pcb_leaves_as_a_dora_of_no_more_than_all_ranks(shared_workshop, name, pair, tmp_path):
    kind, _, _, most = PAIRS[name]
    merged = merge_adapters(pair, base_model=shared_workshop.base(kind))
    merged.save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["use_dora"]
    assert config["r"] <= most
    found = shared_workshop.changes(kind, loaded(shared_workshop, kind, tmp_path / "out"))
    for module in merged.modules:
        if f"{module}.weight" in found:
            change = found[f"{module}.weight"]
            shared_workshop.assert_close(merged.delta(module), change, 1e-5, module)


@every_pair
def test_a_fold_is_peft_s_own_of_what_was_saved(shared_workshop, name, pair, tmp_path):
    kind = PAIRS[name][0]
    base = shared_workshop.base(kind)
    merged = merge_adapters(pair, "pcb", WEIGHTS, base_model=base)
    merged.save_pretrained(tmp_path / "out")
    merged.fold(base, tmp_path / "folded")
    model = loaded(shared_workshop, kind, tmp_path / "out").merge_and_unload()
    wanted, found = model.state_dict(), shared_workshop.state(tmp_path / "folded")
    assert found.keys() <= wanted.keys()
    for parameter, values in found.items():
        shared_workshop.assert_close(values, wanted[parameter], 1e-6, parameter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "space"),
    [
        *((name, "core") for name in PAIRS),
        *(("mixed ranks", space) for space in LOW_RANK_OUTPUT if space != "core"),
    ],
)
def test_one_adapter_comes_back_as_it_was(shared_workshop, name, pair, space, tmp_path):
    kind = PAIRS[name][0]
    path = pair[0] if PAIRS[name][1].use_dora else pair[1]
    base = shared_workshop.base(kind)
    merged = merge_adapters([path], "linear", space=space, base_model=base)
    merged.save_pretrained(tmp_path / "out")
    before, after = (load_file(d / "adapter_model.safetensors") for d in (path, tmp_path / "out"))
    for key in filter(lambda key: key.endswith(MAGNITUDE), before):
        shared_workshop.assert_close(after[key], before[key], 1e-6, key)
    wanted = shared_workshop.changes(kind, path)
    assert_changes(shared_workshop, shared_workshop.changes(kind, tmp_path / "out"), wanted)


@pytest.mark.parametrize("space", [name for name in LOW_RANK_OUTPUT if name != "factor"])
def test_a_sum_is_the_same_in_every_lossless_space(workshop, doras, space):
    paths, base = doras
    options = {"basis_rank": 5} if space == "ctm" else {}
    merged = merge_adapters(paths, "linear", WEIGHTS, space=space, base_model=base, **options)
    assert {entry.kind for entry in merged.modules.entries.values()} == {Rescaled}
    for name, change in combined(workshop, "mlp", paths).items():
        workshop.assert_close(merged.delta(name.removesuffix(".weight")), change, 1e-5, name)


def test_the_configuration_is_minimal(doras, tmp_path):
    paths, base = doras
    merged = merge_adapters(paths, base_model=base)
    merged.save_pretrained(tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config.pop("use_dora")
    assert config.keys() == {
        *("peft_type", "inference_mode", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora"),
        *("fan_in_fan_out", "init_lora_weights", "target_modules", "auto_mapping"),
    }
    assert config["lora_alpha"] == config["r"]
    recipe = read_recipe(tmp_path / "out" / "merge_recipe.yaml")
    assert recipe.base_model == str(base)


def test_rounded_factors_have_the_magnitudes_that_go_with_them(workshop, doras, tmp_path):
    paths, base = doras
    merged = merge_adapters(paths, "linear", base_model=base)
    merged.save_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kinds = {key.rpartition(".")[2]: values.dtype for key, values in tensors.items()}
    assert kinds == {"weight": torch.bfloat16, MAGNITUDE: torch.float32}
    again = load_adapter(tmp_path / "out", base_model=base)
    for module, delta in merged.modules.items():
        workshop.assert_close(again.modules[module].gain, delta.gain, 1e-6, module)
        workshop.assert_close(again.delta(module), merged.delta(module), 1e-2, module)


def test_a_dora_that_was_only_read_is_saved_as_it_was(workshop, doras, tmp_path):
    paths, base = doras
    load_adapter(paths[0], base_model=base).save_pretrained(tmp_path / "out")
    assert_changes(
        workshop, workshop.changes("mlp", tmp_path / "out"), workshop.changes("mlp", paths[0])
    )


def test_a_live_model_gets_a_dora(workshop):
    model = workshop.peft_model("llama", dora("q_proj"), seed=1, name="math")
    model = workshop.peft_model(model, lora("q_proj", "up_proj"), seed=2, name="code")
    singles = []
    for name in ("math", "code"):
        single = copy.deepcopy(model)
        single.set_adapter(name)
        singles.append(single)
    wanted = combined(workshop, "llama", singles)
    add_weighted_adapter(model, ["math", "code"], list(WEIGHTS), "merged", "cat")
    assert model.peft_config["merged"].use_dora
    model.set_adapter("merged")
    assert_changes(workshop, workshop.changes("llama", model), wanted)


# ------------------------------------------------------------------------------------------ rank and energy


def retained(merged, wanted):
    """1 − ‖lost‖² / ‖ΔW‖² by module."""
    changes = {name.removesuffix(".weight"): change for name, change in wanted.items()}
    return {
        module: 1 - float((merged.delta(module) - c).norm() ** 2 / c.norm() ** 2)
        for module, c in changes.items()
    }


@pytest.mark.parametrize("rank", [1, 2, 4, 0.6, 0.9, 0.999])
@pytest.mark.filterwarnings("ignore:the merged adapter retains")
def test_a_truncation_reports_the_energy_of_the_whole_change(workshop, doras, rank, tmp_path):
    paths, base = doras
    merged = merge_adapters(paths, "linear", rank=rank, base_model=base)
    found = retained(merged, combined(workshop, "mlp", paths, (1, 1)))
    for module, line in merged.report.modules.items():
        assert line.energy == pytest.approx(max(0, found[module]), abs=1e-5)
        assert line.rank <= rank if isinstance(rank, int) else line.energy >= rank - 1e-6
    merged.save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["use_dora"]
    assert_changes(
        workshop,
        workshop.changes("mlp", tmp_path / "out"),
        {f"{module}.weight": merged.delta(module) for module in merged.modules},
    )


def test_a_fraction_takes_no_more_ranks_than_it_needs(workshop, doras):
    paths, base = doras
    wanted = combined(workshop, "mlp", paths, (1, 1))
    merged = merge_adapters(paths, "linear", rank=0.9, base_model=base)
    ranks = {module: line.rank for module, line in merged.report.modules.items()}
    less = {
        m: merge_adapters(paths, "linear", rank=r - 1, base_model=base)
        for m, r in ranks.items()
        if r > 1
    }
    assert less
    for module, lower in less.items():
        assert retained(lower, wanted)[module] < 0.9


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
def test_a_budget_is_shared_out_over_the_low_rank_parts(workshop, doras, tmp_path):
    paths, base = doras
    merged = merge_adapters(paths, "linear", rank="budget:12", base_model=base)
    assert sum(line.rank for line in merged.report.modules.values()) == 12
    found = retained(merged, combined(workshop, "mlp", paths, (1, 1)))
    for module, line in merged.report.modules.items():
        assert line.energy == pytest.approx(max(0, found[module]), abs=1e-5)
    merged.save_pretrained(tmp_path / "out", rank_pattern=True)
    again = load_adapter(tmp_path / "out", base_model=base)
    for module in merged.modules:
        workshop.assert_close(again.delta(module), merged.delta(module), 1e-5, module)


def test_in_full_it_is_the_same_merge_and_dense(workshop, doras):
    paths, base = doras
    merged, full = (merge_adapters(paths, base_model=base, rank=rank) for rank in (None, "full"))
    for module, entry in full.modules.entries.items():
        assert entry.kind is Dense
        workshop.assert_close(full.delta(module), merged.delta(module), 1e-6, module)


# ------------------------------------------------------------------------------------------ what it competes as


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gains_and_low_rank_parts_are_of_one_measure():
    weight, low = random(7, 5), LowRank(random(2, 5), random(7, 2))
    parts = Rescaled(random(7, seed=1), low, lambda: weight)
    projection = in_parts(list_spaces()["core"])([parts, low], [1.0, 1.0])
    gains, cores = (
        block.open(torch.float64, torch.device("cpu"))(slice(None), slice(None))
        for block in projection.blocks
    )
    assert gains.shape == (2, 1, 7)
    assert float(gains[0].norm()) == pytest.approx(float((parts.gain[:, None] * weight).norm()))
    assert not gains[1].any()
    assert float(cores[0].norm()) == pytest.approx(low.norm())


def test_without_a_gain_a_space_is_what_it_was():
    low = [LowRank(random(2, 5, seed=s), random(7, 2, seed=s)) for s in (1, 2)]
    projection = in_parts(list_spaces()["core"])(low, [1.0, 1.0])
    assert len(projection.blocks) == 1


def test_what_a_smaller_basis_loses_is_a_part_of_the_whole():
    weight = random(7, 5)
    deltas = [
        Rescaled(
            random(7, seed=s), LowRank(random(2, 5, seed=s), random(7, 2, seed=s)), lambda: weight
        )
        for s in (1, 2)
    ]
    alone = list_spaces()["ctm"]([delta.added for delta in deltas], [1.0, 1.0], basis_rank=1)
    projection = in_parts(list_spaces()["ctm"])(deltas, [1.0, 1.0], basis_rank=1)
    lost = (1 - alone.energy) * sum(delta.added.norm() ** 2 for delta in deltas)
    assert projection.energy == pytest.approx(1 - lost / sum(d.norm() ** 2 for d in deltas))


def as_dense(adapter):
    """The same adapter as matrices."""
    return helpers.adapter(adapter.name, {m: Dense(d.matrix()) for m, d in adapter.modules.items()})


MATRICES = sorted(name for name, method in list_methods().items() if method.whole_matrix)


@pytest.mark.parametrize("method", MATRICES)
def test_a_method_of_matrices_sees_the_matrix(workshop, doras, method):
    paths, base = doras
    adapters = [load_adapter(path, base_model=base) for path in paths]
    merged = merge_adapters(adapters, method)
    wanted = merge_adapters([as_dense(adapter) for adapter in adapters], method)
    assert any("as a LoRA" in note for note in merged.report.notes)
    for module in wanted.modules:
        workshop.assert_close(merged.delta(module), wanted.delta(module), 1e-5, module)


def test_every_method_says_whether_it_merges_matrices():
    block = dataclasses.replace(stacked(random(2, 3, 3), (1.0, 1.0)), keys=(1, 2))

    class Noticing(TaskVectors):
        def combine(self, rule, *, whole=False, weigh=None):
            noticed.append(whole)
            return super().combine(rule, whole=whole, weigh=weigh)

        def transformed(self, transform):
            return Noticing(super().transformed(transform).blocks)

    for name, method in list_methods().items():
        if method.needs_statistic is None:
            noticed = []
            method(Noticing([block]))
            assert noticed == [method.whole_matrix], name


def test_dense_space_leaves_a_lora_as_ever(workshop, doras, tmp_path):
    paths, base = doras
    merged = merge_adapters(paths, "linear", WEIGHTS, space="dense", base_model=base)
    merged.save_pretrained(tmp_path / "out")
    assert not config_of(tmp_path / "out").get("use_dora")
    wanted = combined(workshop, "mlp", paths)
    assert_changes(workshop, workshop.changes("mlp", tmp_path / "out"), wanted)


def test_a_module_that_is_merged_otherwise_is_part_of_the_dora(workshop, doras, tmp_path):
    paths, base = doras
    overrides = [{"modules": "*.mix", "method": "linear", "space": "dense", "options": {}}]
    merged = merge_adapters(paths, "linear", WEIGHTS, base_model=base, overrides=overrides)
    merged.save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["use_dora"]
    wanted = combined(workshop, "mlp", paths)
    assert_changes(workshop, workshop.changes("mlp", tmp_path / "out"), wanted)


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ({"after": "norm"}, True),
        ({"before": "equalize"}, True),
        ({"after": "svc"}, False),
        ({"before": "pico"}, False),
    ],
)
def test_calibrations_see_the_whole_change(workshop, doras, steps, kept, tmp_path):
    paths, base = doras
    adapters = [load_adapter(path, base_model=base) for path in paths]
    merged = merge_adapters(adapters, "linear", **steps)
    wanted = merge_adapters([as_dense(adapter) for adapter in adapters], "linear", **steps)
    for module in wanted.modules:
        workshop.assert_close(merged.delta(module), wanted.delta(module), 1e-5, module)
    merged.save_pretrained(tmp_path / "out")
    assert bool(config_of(tmp_path / "out").get("use_dora")) == kept
    assert any("as a LoRA" in note for note in merged.report.notes) != kept


# ------------------------------------------------------------------------------------------ what a DoRA cannot hold


def test_a_row_that_is_multiplied_by_zero_is_taken_out_of_w(workshop, doras, tmp_path):
    paths, base = doras

    def vanish(tensors):
        for key, values in tensors.items():
            if key.endswith(MAGNITUDE):
                values[3] = 0
        return tensors

    workshop.edit_tensors(paths[0], vanish)
    merged = merge_adapters(paths, "linear", [1, 0], base_model=base)
    merged.save_pretrained(tmp_path / "out")
    wanted = combined(workshop, "mlp", paths, [1, 0])
    assert_changes(workshop, workshop.changes("mlp", tmp_path / "out"), wanted)
    assert config_of(tmp_path / "out")["use_dora"]
    load_adapter(paths[0], base_model=base).save_pretrained(tmp_path / "alone")
    wanted = workshop.changes("mlp", paths[0])
    assert_changes(workshop, workshop.changes("mlp", tmp_path / "alone"), wanted)


def test_a_row_of_which_only_the_low_rank_part_is_left_costs_one_rank(workshop, doras, tmp_path):
    paths, base = doras
    first, second = (load_adapter(path, base_model=base).modules["up"].gain for path in paths)
    weight = float(-(1 + first[4]) / second[4])  # so that 1 + Σ w g is 0 in this row
    merged = merge_adapters(paths, "linear", [1, weight], base_model=base)
    assert merged.report.modules["up"].rank == 6
    assert merged.report.modules["blocks.0.up"].rank == 5
    merged.save_pretrained(tmp_path / "out")
    assert config_of(tmp_path / "out")["use_dora"]
    wanted = combined(workshop, "mlp", paths, [1, weight])
    assert_changes(workshop, workshop.changes("mlp", tmp_path / "out"), wanted)


def test_beside_experts_it_leaves_as_a_lora_and_says_so(workshop, tmp_path):
    experts = lora(target_parameters=["mlp.experts.down_proj"], target_modules=["q_proj"])
    paths = workshop.adapters("mixtral", [dora("q_proj", "k_proj"), experts])
    merged = merge_adapters(paths, "linear", WEIGHTS, base_model=workshop.base("mixtral"))
    assert any("no DoRA holds" in note for note in merged.report.notes)
    merged.save_pretrained(tmp_path / "out")
    assert not config_of(tmp_path / "out").get("use_dora")
    wanted = combined(workshop, "mixtral", paths)
    assert_changes(workshop, workshop.changes("mixtral", tmp_path / "out"), wanted)


@pytest.mark.parametrize(
    "other", [lora("attention"), peft.LoHaConfig(r=2, target_modules=["wide"])]
)
def test_beside_attention_or_full_rank_likewise(workshop, other, tmp_path):
    paths = workshop.adapters("odd", [dora("linear"), other])
    merged = merge_adapters(paths, "linear", WEIGHTS, base_model=workshop.base("odd"))
    assert any("no DoRA holds" in note for note in merged.report.notes)
    merged.save_pretrained(tmp_path / "out")
    wanted = combined(workshop, "odd", paths)
    assert_changes(workshop, workshop.changes("odd", tmp_path / "out"), wanted)


def test_beside_a_weight_that_an_adapter_brings_along_likewise(workshop, tmp_path):
    configs = [dora("q_proj"), lora("embed_tokens")]
    models = [workshop.peft_model("llama", config, seed=s) for s, config in enumerate(configs)]
    paths = [tmp_path / "a", tmp_path / "b"]
    for model, path in zip(models, paths, strict=True):
        model.save_pretrained(path, save_embedding_layers=path == paths[1])
    merged = merge_adapters(paths, "linear", WEIGHTS, base_model=workshop.base("llama"))
    assert any("brings along" in note for note in merged.report.notes)
    merged.save_pretrained(tmp_path / "out")
    wanted = combined(workshop, "llama", paths)
    assert_changes(workshop, workshop.changes("llama", tmp_path / "out"), wanted)


def test_without_the_base_model_in_hand_a_merge_is_what_the_adapters_were_read_beside(
    workshop, doras, tmp_path
):
    paths, base = doras
    other = workshop.adapter("mlp", lora("down"), "other", seed=3)
    first, second = (load_adapter(path, base_model=base) for path in paths)
    merged = merge_adapters([first, second, other], "linear")
    assert any("not known" in note for note in merged.report.notes)
    merged.save_pretrained(tmp_path / "out")
    wanted = combined(workshop, "mlp", [*paths, other], (1, 1, 1))
    assert_changes(workshop, workshop.changes("mlp", tmp_path / "out"), wanted)
    third = load_adapter(other, base_model=base)
    merge_adapters([first, second, third], "linear").save_pretrained(tmp_path / "dora")
    assert config_of(tmp_path / "dora")["use_dora"]
    assert_changes(workshop, workshop.changes("mlp", tmp_path / "dora"), wanted)


def test_beside_what_the_files_of_the_base_do_not_hold_likewise(workshop, tmp_path):
    paths = workshop.adapters("mlp", [dora("up"), lora("mix")])
    base = workshop.base("mlp")
    weights = load_file(base / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "mix" not in n}, base / "model.safetensors")
    merged = merge_adapters(paths, "linear", WEIGHTS, base_model=base)
    assert any("not known" in note for note in merged.report.notes)
    merged.save_pretrained(tmp_path / "out")
    wanted = combined(workshop, "mlp", paths)
    assert_changes(workshop, workshop.changes("mlp", tmp_path / "out"), wanted)


def test_directions_of_net_utility_are_those_of_the_whole_change(doras, tmp_path):
    paths, base = doras
    merged = merge_adapters(paths, "linear", rank="utility:9", base_model=base)
    merged.save_pretrained(tmp_path / "out")
    assert not config_of(tmp_path / "out").get("use_dora")
    assert any("as a LoRA" in note for note in merged.report.notes)


def test_a_row_of_zeros_is_refused_with_the_way_out(workshop, tmp_path):
    paths = workshop.adapters("mlp", [dora("up"), lora("mix")])
    base = workshop.base("mlp")
    weights = load_file(base / "model.safetensors")
    weights["blocks.0.mix.weight"][2] = 0
    save_file(weights, base / "model.safetensors")
    workshop.edit_tensors(
        paths[1],
        lambda t: {
            k: v * (torch.arange(len(v)) != 2)[:, None] if "B" in k else v for k, v in t.items()
        },
    )
    merged = merge_adapters(paths, "linear", base_model=base)
    with pytest.raises(UnsupportedError, match=r"blocks.0.mix: row 2 of W .* space='dense'"):
        merged.save_pretrained(tmp_path / "out")


class Weight:
    """Reads a W; stands for the base model, and can be pickled."""

    def __call__(self):
        return random(7, 5)


def test_a_dora_reads_w_in_another_process_too():
    delta = Rescaled(random(7), LowRank(random(2, 5), random(7, 2)), Weight())
    found = pickle.loads(pickle.dumps(delta))
    assert torch.equal(found.matrix(), delta.matrix())
