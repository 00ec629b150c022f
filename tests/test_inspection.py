"""Adapters looked at one by one and side by side: numbers as numpy has them, and sentences where something is wrong."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from helpers import adapter, dense, ia3, lora, low_rank, regauged
from safetensors.torch import load_file, save_file

from pcb_peft import (
    AdapterError,
    OptionError,
    PcbPeftError,
    compare_adapters,
    export,
    inspect_adapter,
    merge_adapters,
)
from pcb_peft.commands import cli
from pcb_peft.commands.demo import examples_folder
from pcb_peft.deltas.linalg import RANK_TOLERANCE

LORA = examples_folder() / "lora"
SHAPE = (16, 12)  # all rows are sampled


def spans(matrix):
    u, s, vh = np.linalg.svd(matrix)
    rank = (s > RANK_TOLERANCE * s[0]).sum()
    return u[:, :rank], vh[:rank].T


def overlap(first, second):
    cosines = np.linalg.svd(first.T @ second, compute_uv=False)
    return np.sqrt(np.mean(cosines**2))


@pytest.fixture
def pairs():
    """Factors of two modules, for three adapters."""
    return [
        dict(
            zip(("layers.0.up", "layers.1.up"), low_rank(2, 3, shape=SHAPE, seed=seed), strict=True)
        )
        for seed in (1, 2, 3)
    ]


def named(pairs):
    return [adapter(name, modules) for name, modules in zip("xyz", pairs, strict=False)]


def test_an_inspection_has_the_norms_and_spectra_of_numpy(pairs):
    facts = inspect_adapter(adapter("x", pairs[0]))
    total = 0.0
    for module, matrix in zip(pairs[0], dense(pairs[0].values()), strict=True):
        s = np.linalg.svd(matrix, compute_uv=False)
        shares = s[s > 1e-9] / s.sum()
        line = facts.modules[module]
        assert line.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
        assert line.effective_rank == pytest.approx(
            np.exp(-(shares * np.log(shares)).sum()), rel=1e-5
        )
        assert line.shape == SHAPE
        total += np.linalg.norm(matrix) ** 2
    assert facts.norm == pytest.approx(np.sqrt(total), rel=1e-6)
    assert facts.by_layer == pytest.approx(
        {str(i): np.linalg.norm(m) for i, m in enumerate(dense(pairs[0].values()))}, rel=1e-6
    )


def test_equal_singular_values_have_their_number_as_effective_rank():
    rng = np.random.default_rng(0)
    b, a = (np.linalg.qr(rng.normal(size=(n, 5)))[0] for n in SHAPE)
    facts = inspect_adapter(adapter("x", {"m": (b, a.T)}))
    assert facts.modules["m"].effective_rank == pytest.approx(5, rel=1e-5)


def test_a_comparison_has_the_cosines_and_angles_of_numpy(pairs):
    geometry = compare_adapters(named(pairs)).geometry
    matrices = [dense(modules.values()) for modules in pairs]
    flat = [np.concatenate([m.ravel() for m in each]) for each in matrices]
    for i in range(3):
        for j in range(3):
            cosine = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
            assert geometry.cosines[i, j] == pytest.approx(cosine, abs=1e-6)
            both = [(spans(a), spans(b)) for a, b in zip(matrices[i], matrices[j], strict=True)]
            outputs = np.median([overlap(a[0], b[0]) for a, b in both])
            inputs = np.median([overlap(a[1], b[1]) for a, b in both])
            assert geometry.outputs[i, j] == pytest.approx(outputs, abs=1e-5)
            assert geometry.inputs[i, j] == pytest.approx(inputs, abs=1e-5)
    signs = np.sign(np.stack(flat))
    conflict = (signs > 0).any(0) & (signs < 0).any(0)
    assert geometry.conflicts == pytest.approx(conflict.mean(), abs=1e-9)
    assert geometry.conflicts_chance == pytest.approx(1 - 2 ** (1 - 3))


def test_a_comparison_does_not_depend_on_the_factors(pairs):
    others = [
        {m: regauged(pair, seed) for m, pair in each.items()} for seed, each in enumerate(pairs)
    ]
    one, other = compare_adapters(named(pairs)).geometry, compare_adapters(named(others)).geometry
    for field in ("cosines", "inputs", "outputs"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), atol=1e-5)


def test_random_spans_overlap_as_chance_has_it():
    pairs = [{"m": low_rank(8, shape=(300, 200), seed=seed)[0]} for seed in range(6)]
    geometry = compare_adapters([adapter(f"x{i}", each) for i, each in enumerate(pairs)]).geometry
    above = np.triu_indices(6, 1)
    for name in ("inputs", "outputs"):
        mean_square = np.mean(np.asarray(getattr(geometry, name))[above] ** 2)
        assert np.sqrt(mean_square) == pytest.approx(getattr(geometry, f"{name}_chance"), rel=0.15)


def test_adapters_that_share_their_initialisation_are_found():
    rng = np.random.default_rng(1)
    start = rng.normal(size=(4, 100))
    drifted = [
        {"m": (rng.normal(size=(90, 4)), start + 0.05 * rng.normal(size=start.shape))}
        for _ in range(2)
    ]
    apart = {"m": (rng.normal(size=(90, 4)), rng.normal(size=start.shape))}
    assert compare_adapters(named(drifted)).shared_initialisation
    advice = "\n".join(compare_adapters(named([*drifted, apart])).advice)
    assert "x and y have rows of lora_A in common, as if trained from the same one" in advice
    assert "z" not in advice.split("have rows")[0]
    assert not compare_adapters(named([drifted[0], apart])).shared_initialisation


def test_a_copy_in_other_factors_is_a_duplicate(pairs):
    copy = {module: regauged(pair) for module, pair in pairs[0].items()}
    comparison = compare_adapters(named([pairs[0], pairs[1], copy]))
    assert comparison.duplicates == (("x", "z"),)
    assert "x and z make the same change" in str(comparison)


def test_the_predicted_rank_and_size_are_those_of_the_merge(workshop):
    paths = workshop.adapters("mlp", [lora(r=2), lora(r=3)])
    comparison = compare_adapters(paths)
    assert cli.main(["merge", *map(str, paths), "-o", str(workshop.directory / "m"), "-q"]) == 0
    written = load_file(workshop.directory / "m" / "adapter_model.safetensors")
    assert comparison.merged_rank == 5
    assert comparison.merged_bytes == sum(tensor.nbytes for tensor in written.values())


def test_adapters_that_do_not_fit_are_no_error_but_a_reason(pairs):
    other = {"layers.0.up": low_rank(2, shape=(7, 12))[0]}
    comparison = compare_adapters([adapter("x", pairs[0]), adapter("wide", other)])
    assert comparison.geometry is None
    (problem,) = comparison.problems
    assert "layers.0.up" in problem
    assert "wide" in problem
    assert "cannot be merged" in str(comparison)
    assert json.dumps(comparison.as_dict())


def test_a_dominant_adapter_is_named(pairs):
    loud = {module: (10 * b, a) for module, (b, a) in pairs[0].items()}
    (advice,) = compare_adapters(named([loud, pairs[1]])).advice
    assert advice.startswith("x is ")
    assert "as strong as y: a sum of both is mostly x" in advice


def merged_or_why_not(paths, **options):
    """The message of a merge's refusal; None where there is a merge that can be saved."""
    try:
        merge_adapters(paths, **options).save_pretrained(paths[0].parent / "out", overwrite="all")
    except PcbPeftError as error:
        return str(error)
    return None


UNEQUAL = {  # two adapters, and whether the base model is given
    "two bases": (lora("q_proj"), lora("q_proj"), {"bases": ("org/a", "org/b")}),
    "a DoRA": (lora("q_proj"), lora("q_proj", use_dora=True), {}),
    "a DoRA on its base": (lora("q_proj"), lora("q_proj", use_dora=True), {"given": True}),
    "an (IA)³": (lora("k_proj"), ia3("k_proj", feedforward_modules=[]), {}),
    "an (IA)³ on its base": (
        lora("k_proj"),
        ia3("k_proj", feedforward_modules=[]),
        {"given": True},
    ),
    "a chosen rank": (lora("q_proj"), lora("q_proj", "v_proj", r=5), {}),
    "heads": (
        lora("q_proj", modules_to_save=["lm_head"]),
        lora("q_proj", modules_to_save=["lm_head"]),
        {},
    ),
    "nothing in common": (lora("q_proj"), lora("down_proj"), {}),
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_a_comparison_says_of_a_merge_what_the_merge_says(workshop, case):
    *configs, how = UNEQUAL[case]
    bases = how.get("bases", (None, None))
    paths = [
        workshop.adapter("llama", config, f"a{seed}", seed=seed, base=base)
        for seed, (config, base) in enumerate(zip(configs, bases, strict=True))
    ]
    options = {"base_model": workshop.base("llama")} if how.get("given") else {}
    refusal = merged_or_why_not(paths, **options)
    comparison = compare_adapters(paths, **options)
    assert comparison.problems == (() if refusal is None else (refusal,))
    if refusal is None:
        merged = merge_adapters(paths, **options)
        assert merged.report.rank <= comparison.merged_rank
        assert set(comparison.notes) <= set(merged.report.notes)


def test_a_lora_of_an_image_model_does_not_fit_one_of_a_language_model(workshop, tmp_path):
    parts = {"lora_down.weight": torch.ones(2, 320), "lora_up.weight": torch.ones(320, 2)}
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{name}.{part}": value for part, value in parts.items()}, tmp_path / "i.safetensors"
    )
    paths = [
        tmp_path / "i.safetensors",
        workshop.adapter("llama", lora("q_proj"), base="org/llama"),
    ]
    (problem,) = compare_adapters(paths).problems
    assert problem == merged_or_why_not(paths)
    assert "adapter of org/llama with modules of no image model" in problem


def test_adapters_without_a_module_in_common_are_pointed_out(pairs):
    apart = [{"layers.0.up": pairs[0]["layers.0.up"]}, {"layers.1.up": pairs[1]["layers.1.up"]}]
    said = str(compare_adapters(named(apart)))
    assert "No two of them change the same module" in said
    assert "signs differ" not in said


def test_one_adapter_is_not_compared(pairs):
    with pytest.raises(OptionError, match="inspect"):
        compare_adapters(named(pairs[:1]))


def test_what_looks_wrong_is_said():
    rng = np.random.default_rng(0)
    deltas = {
        f"layers.{i}.up": (rng.normal(size=(8, 2)), rng.normal(size=(2, 8))) for i in range(6)
    }
    b, a = deltas["layers.1.up"]
    deltas |= {"layers.1.up": (0 * b, a), "layers.2.up": (1e4 * b, a), "layers.3.up": (1e-7 * b, a)}
    warnings = "\n".join(inspect_adapter(adapter("x", deltas)).warnings)
    assert "1 of 6 modules change nothing" in warnings
    assert "layers.2.up: a norm of more than 20 times" in warnings
    assert "layers.3.up change almost nothing" in warnings
    untrained = {module: (0 * b, a) for module, (b, a) in deltas.items()}
    assert "never trained" in str(inspect_adapter(adapter("x", untrained)))


def test_a_reason_is_that_of_the_kind(workshop):
    """lora_B, (IA)³ factors, lora_alpha: the word of what was trained; and entries far above any weight's."""
    path = workshop.adapter("llama", lora("q_proj"), base="org/llama")
    assert "(lora_alpha is 0)" in str(inspect_adapter(workshop.edit_config(path, lora_alpha=0)))
    path = workshop.adapter("llama", ia3("k_proj", feedforward_modules=[]), "ia3", base="org/llama")
    assert inspect_adapter(path).warnings == ()
    workshop.edit_tensors(path, lambda old: {name: torch.ones_like(x) for name, x in old.items()})
    (warning,) = inspect_adapter(path).warnings
    assert "all its factors are 1" in warning
    path = workshop.adapter("llama", lora("q_proj"), "loud", base="org/llama")
    assert inspect_adapter(path).warnings == ()
    workshop.edit_tensors(path, lambda old: {name: 100 * x for name, x in old.items()})
    (warning,) = inspect_adapter(path).warnings
    assert "has the training diverged" in warning


def test_a_dora_without_its_base_model_is_no_fault(workshop):
    path = workshop.adapter("llama", lora("q_proj", use_dora=True), base="org/llama")
    facts = inspect_adapter(path)
    (said,) = facts.warnings
    assert "2 modules are not known without the base model (DoRA rescales W" in said
    assert re.search(r"^q_proj +2 +16 x 16 +- +-$", str(facts), re.M)
    assert "norm, layer" not in str(facts)
    assert inspect_adapter(path, workshop.base("llama")).warnings == ()


def test_a_file_of_nan_is_few_lines(workshop):
    path = workshop.adapter("llama", lora("q_proj", "k_proj", "v_proj"), base="org/llama")
    workshop.edit_tensors(path, lambda old: {name: x * float("nan") for name, x in old.items()})
    *some, last = inspect_adapter(path).warnings
    assert len(some) == 3
    assert last == "6 modules cannot be read in all"


def test_an_image_lora_is_known_by_its_modules(tmp_path):
    parts = {"lora_down.weight": torch.ones(2, 320), "lora_up.weight": torch.ones(320, 2)}
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    file = tmp_path / "i.safetensors"
    save_file({f"{name}.{part}": value for part, value in parts.items()}, file)
    facts = inspect_adapter(file)
    assert "SDXL" in facts.base_model
    assert facts.warnings == ()


def test_an_odd_scaling_and_values_that_are_no_numbers_are_said(workshop):
    path = workshop.adapter("mlp", lora(lora_alpha=96, r=2), base="base")
    assert any("scaling is 48" in warning for warning in inspect_adapter(path).warnings)

    def damage(tensors):
        name = next(name for name in tensors if "up.lora_A" in name)
        return tensors | {name: tensors[name] * float("nan")}

    facts = inspect_adapter(workshop.edit_tensors(path, damage))
    assert any("up" in w and "NaN" in w for w in facts.warnings)
    assert [m for m, one in facts.modules.items() if one.problem] == ["blocks.0.up"]


def test_labels_of_a_head_are_named():
    text = str(inspect_adapter(LORA / "clinc_domain"))
    assert "labels      auto and commute, banking" in text


@pytest.mark.slow
def test_an_adapter_fits_on_one_screen(workshop):
    config = lora("q_proj", "v_proj", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    path = workshop.adapter("llama", config, base="meta/llama")
    (path / "tokenizer_config.json").write_text("{}")
    text = str(inspect_adapter(path))
    assert len(text.splitlines()) <= 24
    for words in ("LoRA on", "meta/llama", "rank        3", "alpha 5", "q_proj", "lm_head.weight"):
        assert words in text
    assert "beside it: tokenizer_config.json" in text


def test_ia3_vectors_are_compared_by_what_they_multiply(workshop):
    paths = workshop.adapters("mlp", [ia3(), ia3()])
    comparison = compare_adapters(paths)
    assert comparison.merged_rank is None
    assert comparison.geometry.inputs.triu(1).isnan().any()
    assert "shared inputs" not in str(comparison)


@pytest.mark.parametrize("line", ["inspect x y", "compare x y"])
def test_the_commands_print_text_and_json(workshop, monkeypatch, capsys, line):
    for seed, name in enumerate("xy", 1):
        workshop.adapter("mlp", lora(), name, seed=seed)
    monkeypatch.chdir(workshop.directory)
    assert cli.main(shlex.split(line)) == 0
    assert "x" in capsys.readouterr().out
    assert cli.main([*shlex.split(line), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == line.split()[0]


@pytest.mark.parametrize("profile", ["gguf", "mlx"])
def test_a_lora_for_another_program_has_the_same_norms_and_the_report_of_its_merge(
    workshop, tmp_path, profile
):
    pytest.importorskip("gguf")
    base = workshop.base("llama")
    configs = [lora("q_proj", "down_proj"), lora("q_proj", use_rslora=True)]
    merged = merge_adapters(workshop.adapters("llama", configs), "linear", progress=False)
    wanted = inspect_adapter(merged)
    export(merged, profile, tmp_path / "out", base_model=base, progress=False)
    assert (tmp_path / "out" / "merge_report.json").is_file()
    found = inspect_adapter(tmp_path / "out")
    for fact in ("norm", "effective_rank"):
        here, there = (
            sorted(getattr(m, fact) for m in one.modules.values()) for one in (found, wanted)
        )
        assert here == pytest.approx(there)
    assert found.by_layer == pytest.approx(wanted.by_layer)
    assert "made by this merge:\nlinear" in str(found)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf")
    file = tmp_path / "x.gguf"
    for content, words in ((b"text", "its first four bytes"), (b"GGUF" + bytes(40), "is damaged")):
        file.write_bytes(content)
        with pytest.raises(AdapterError, match=words):
            inspect_adapter(file)


def test_one_line_of_bars_per_list_of_layers_and_not_too_many_bars():
    (pair,) = low_rank(1)
    modules = [f"model.vision.blocks.{i}.q" for i in range(3)]
    modules += [f"model.text.layers.{i}.q" for i in range(200)]
    lines = str(inspect_adapter(adapter("x", dict.fromkeys(modules, pair)))).splitlines()
    bars = [line.split("  ") for line in lines if line.startswith("norm, ")]
    assert bars == [["norm, text 0 to 199", "█" * 50], ["norm, vision 0 to 2", "███"]]
