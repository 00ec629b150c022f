"""Every formula on the task vectors of a whole merge equals its float64 transcription.

The expected values: the adapters' ΔW by numpy's float64 product (or by PEFT itself), all modules of a scope side by
side in one row per adapter, a module that an adapter does not touch as zeros, and `transcriptions` applied to the rows.
"""

import functools

import numpy as np
import peft
import pytest
import torch
import transcriptions
from safetensors.torch import load_file

from pcb_peft import load_adapter, merge_adapters, selection, statistics
from pcb_peft.adapter import Adapter, Modules
from pcb_peft.delta import Diagonal, LowRank
from pcb_peft.formats import Entry

FORMULAS = {  # name: method, its options, the transcription
    "pcb reference": ("pcb", {"formula": "reference"}, transcriptions.pcb_reference),
    "pcb nlp": ("pcb", {"formula": "nlp"}, transcriptions.pcb_nlp),
    "pcb vision": ("pcb", {"formula": "vision"}, transcriptions.pcb_vision),
    "pcb es": ("pcb", {"formula": "es"}, transcriptions.pcb_es),
    "pcb paper": ("pcb", {"formula": "paper"}, transcriptions.pcb_paper),
    "ties": ("ties", {}, transcriptions.ties),
    "linear": ("linear", {}, lambda x, weights, density: transcriptions.linear(x, weights)),  # noqa: ARG005
}
CODE = tuple(name for name in FORMULAS if name.startswith("pcb") and name != "pcb paper")
every_formula = pytest.mark.parametrize("name", FORMULAS)
every_pcb = pytest.mark.parametrize("name", [name for name in FORMULAS if name.startswith("pcb")])

# 77 + 299 + 77 + 95 = 548 values: D q is a fraction for every q here
SHAPES = {"a.q": (11, 7), "a.up": (23, 13), "b.q": (11, 7), "b.down": (5, 19)}
SCALES = {
    "a.q": 1.0,
    "a.up": 0.1,
    "b.q": 0.03,
    "b.down": 3.0,
}  # modules of one adapter differ by as much
TASKS = {  # id: density, weights
    "two": (0.2, (1.0, 1.0)),
    "a negative weight": (0.1, (1.0, -0.7)),
    "three of fractional weights": (0.05, (0.3, 1.25, 0.5)),
    "everything kept": (1.0, (1.0, 0.5, -2.0)),
    "one of no weight": (0.3, (1.2, 0.0, 0.8)),
    "five": (0.37, (1.5, -0.25, 0.8, 2.0, 0.1)),
    "five that keep little": (0.013, (1.0, 1.0, 1.0, 1.0, 1.0)),
}
every_case = pytest.mark.parametrize(("density", "weights"), TASKS.values(), ids=TASKS)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def factors(tasks, shapes=SHAPES, *, whole=False):
    """Per adapter: module to (lora_B, lora_A, scaling), of ranks 1 to 5; from three adapters on, each lacks a module."""
    modules = list(shapes)
    return [
        {
            module: (
                normal((t, i, 0), shapes[module][0], 1 + (t + 2 * i) % 5) * SCALES.get(module, 1),
                normal((t, i, 1), 1 + (t + 2 * i) % 5, shapes[module][1]) * (0.5 + t),
                (2.0, 0.5, -1.5)[(t + i) % 3],
            )
            for i, module in enumerate(modules)
            if whole or tasks < 3 or i != (t + 1) % len(modules)
        }
        for t in range(tasks)
    ]


def adapters(pool):
    """`Adapter` objects of what `factors` made."""
    made = []
    for t, modules in enumerate(pool):
        entries = {}
        for module, (lora_B, lora_A, scaling) in modules.items():
            delta = LowRank(torch.as_tensor(lora_A), torch.as_tensor(lora_B), scaling)
            entries[module] = Entry(LowRank, delta.shape, lambda d=delta: d, rank=delta.rank)
        made.append(Adapter(name=f"t{t}", modules=Modules(entries)))
    return made


def dense(pool, shapes=SHAPES):
    """Module to ΔW (T, out, in), float64."""
    return {
        module: np.stack(
            [
                modules[module][2]
                * modules[module][0].astype(np.float64)
                @ modules[module][1].astype(np.float64)
                if module in modules
                else np.zeros(shape)
                for modules in pool
            ]
        )
        for module, shape in shapes.items()
    }


def over(stacks, formula):
    """The formula (rows (T, D) to a row) over all stacks (T, ...) side by side; cut into stacks again."""
    tasks = len(next(iter(stacks.values())))
    merged = formula(np.concatenate([x.reshape(tasks, -1) for x in stacks.values()], axis=1))
    ends = np.cumsum([x[0].size for x in stacks.values()])[:-1]
    return {
        module: part.reshape(x.shape[1:])
        for (module, x), part in zip(stacks.items(), np.split(merged, ends), strict=True)
    }


def near(found, wanted, tolerance):
    """‖found − wanted‖ ≤ tolerance ‖wanted‖: where nothing is kept, nothing is found."""
    difference = np.asarray(found, np.float64) - wanted
    return np.linalg.norm(difference) <= tolerance * np.linalg.norm(wanted)


def agree(merged, wanted, tolerance=1e-5):
    assert set(merged.modules) == set(wanted)
    assert any(values.any() for values in wanted.values())
    for module, values in wanted.items():
        assert near(merged.delta(module), values, tolerance), module


def merge(pool, name, density, weights, **options):
    """The merge, dense and global unless told otherwise, and its transcription as a function of rows."""
    method, own, transcription = FORMULAS[name]
    settings = {"space": "dense", "scope": "global", "rank": "full"} | own | options
    if method != "linear":
        settings["density"] = density
    made = pool if isinstance(pool[0], Adapter) else adapters(pool)
    merged = merge_adapters(made, method, list(weights), **settings)
    return merged, lambda rows, w=weights: transcription(rows, np.array(w, np.float64), density)


@every_case
@every_formula
def test_in_dense_space_and_global_scope(name, density, weights):
    pool = factors(len(weights))
    merged, formula = merge(pool, name, density, weights)
    agree(merged, over(dense(pool), formula))


@every_case
@every_formula
def test_in_module_scope_every_module_is_a_merge_of_its_own(name, density, weights):
    """Of four modules, since a module of 77 values is too small for a density of 0.013, or to be clamped."""
    shapes = {"a": (11, 17), "b": (23, 13), "c": (17, 11), "d": (15, 19)}
    pool = factors(len(weights), shapes, whole=True)
    merged, formula = merge(pool, name, density, weights, scope="module")
    agree(merged, {module: over({0: x}, formula)[0] for module, x in dense(pool, shapes).items()})


def spans(x):
    """U and V: the singular vectors of [ΔW_1 … ΔW_T] and [ΔW_1; …; ΔW_T] that carry more than rounding."""
    u, s, _ = np.linalg.svd(np.concatenate(list(x), axis=1), full_matrices=False)
    _, r, vh = np.linalg.svd(np.concatenate(list(x), axis=0), full_matrices=False)
    return u[:, s > 1e-9 * s[0]], vh[r > 1e-9 * r[0]].T


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize(
    "case", ["two", "a negative weight", "three of fractional weights", "five"]
)
@every_formula
def test_in_core_and_knots_space_on_coordinates_from_dense_svds(name, case, space, scope):
    density, weights = TASKS[case]
    shapes = {"a": (40, 32), "b": (31, 50), "c": (37, 41)}
    pool = factors(len(weights), shapes, whole=scope == "module")
    stacks = dense(pool, shapes)
    bases = {module: spans(x) for module, x in stacks.items()}
    if space == "knots":
        bases = {module: (u, np.eye(v.shape[0])) for module, (u, v) in bases.items()}
    cores = {module: bases[module][0].T @ x @ bases[module][1] for module, x in stacks.items()}
    merged, formula = merge(pool, name, density, weights, space=space, scope=scope)
    if scope == "global":
        wanted = over(cores, formula)
    else:
        wanted = {module: over({0: x}, formula)[0] for module, x in cores.items()}
    agree(merged, {module: u @ wanted[module] @ v.T for module, (u, v) in bases.items()})


def balanced(x, rank):
    """√ΣVᵀ and U√Σ of ΔW, padded to a rank; every column of U has its largest entry positive."""
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))])
    root = np.sqrt(s) * signs
    lora_A, lora_B = np.zeros((rank, x.shape[1])), np.zeros((x.shape[0], rank))
    kept = min(rank, len(s))
    lora_A[:kept], lora_B[:, :kept] = (root[:, None] * vh)[:kept], (u * root)[:, :kept]
    return lora_A, lora_B


def as_trained(x, rank):
    """The factors themselves, padded; the scaling in even parts, its sign on lora_B."""
    lora_B, lora_A, scaling = x
    padding = ((0, rank - lora_A.shape[0]), (0, 0))
    root = np.sqrt(abs(scaling))
    return np.pad(lora_A * root, padding), np.pad(lora_B.T * root, padding).T * np.sign(scaling)


@pytest.mark.parametrize("gauge", ["balanced", "as_trained"])
@pytest.mark.parametrize(
    "case", ["two", "a negative weight", "three of fractional weights", "five"]
)
@every_formula
def test_in_factor_space_a_and_b_carry_the_root_of_the_weight_and_b_its_sign(name, case, gauge):
    density, weights = TASKS[case]
    shapes = {"a": (20, 12), "b": (11, 25)}
    pool = factors(len(weights), shapes, whole=True)
    stacks = dense(pool, shapes)
    rows = {}
    for module in shapes:
        rank = max(modules[module][1].shape[0] for modules in pool)
        if gauge == "balanced":
            pairs = [balanced(x, rank) for x in stacks[module]]
        else:
            pairs = [as_trained(modules[module], rank) for modules in pool]
        for side, parts in zip("AB", zip(*pairs, strict=True), strict=True):
            rows[module, side] = np.stack(parts)
    merged, formula = merge(pool, name, density, weights, space="factor", gauge=gauge)
    roots = np.sqrt(np.abs(weights))
    lora_A = over(rows, functools.partial(formula, w=roots))
    lora_B = over(rows, functools.partial(formula, w=roots * np.sign(weights)))
    agree(merged, {module: lora_B[module, "B"] @ lora_A[module, "A"] for module in shapes})


# Adapters that PEFT made, and what PEFT says they do.

LORAS = [
    {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down", "mix", "head"]},
    {"r": 2, "lora_alpha": 7, "use_rslora": True, "target_modules": ["up", "mix"]},
    {
        "r": 4,
        "rank_pattern": {"mix": 1},
        "alpha_pattern": {"down": 3},
        "target_modules": ["down", "mix"],
    },
]


@every_formula
def test_adapters_in_files_of_peft_with_the_deltas_of_its_merge_and_unload(workshop, name):
    paths = workshop.adapters("mlp", [peft.LoraConfig(**config) for config in LORAS])
    deltas = [workshop.deltas("mlp", path) for path in paths]
    modules = {module: x for delta in deltas for module, x in delta.items()}
    stacks = {
        module: np.stack([delta.get(module, torch.zeros_like(x)).numpy() for delta in deltas])
        for module, x in sorted(modules.items())
    }
    merged, formula = merge([load_adapter(path) for path in paths], name, 0.2, (1.0, -0.5, 1.3))
    agree(merged, over(stacks, formula))


@pytest.mark.parametrize("scope", ["global", "module"])
@every_formula
def test_ia3_competes_by_its_distance_from_one(workshop, name, scope):
    targets = [["up", "down", "mix", "head"], ["up", "mix"], ["down", "mix"]]
    if scope == "module":
        targets = [targets[0]] * 3
    configs = [
        peft.IA3Config(target_modules=t, feedforward_modules=["down"] if "down" in t else [])
        for t in targets
    ]
    paths = workshop.adapters("mlp", configs)
    files = [
        {
            key.removeprefix("base_model.model.").removesuffix(".ia3_l"): values.double().numpy()
            - 1
            for key, values in load_file(path / "adapter_model.safetensors").items()
        }
        for path in paths
    ]
    modules = {module: x for file in files for module, x in file.items()}
    stacks = {
        module: np.stack([file.get(module, np.zeros_like(x)) for file in files])
        for module, x in sorted(modules.items())
    }
    weights, density = (1.0, 0.5, -0.8), 0.4
    merged, formula = merge(
        [load_adapter(path) for path in paths],
        name,
        density,
        weights,
        space="auto",
        scope=scope,
        rank=None,
    )
    if scope == "global":
        wanted = over(stacks, formula)
    else:
        wanted = {module: over({0: x}, formula)[0] for module, x in stacks.items()}
    assert set(merged.modules) == set(wanted)
    for module, values in wanted.items():
        delta = merged.modules[module]
        assert delta.feedforward == module.endswith("down")
        assert near(delta.l.double() - 1, values.ravel(), 1e-5)
