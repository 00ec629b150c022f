"""Every formula, applied to the task vectors of a whole merge, equals its float64 transcription.

The expected values: the adapters' ΔW by numpy's float64 product (or by PEFT), all modules of a scope side by side in
one row per adapter, a module that an adapter does not touch as zeros, and `transcriptions` applied to these rows.
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
from pcb_peft.delta import LowRank
from pcb_peft.formats import Entry

FORMULAS = {  # name: method, its options, the transcription
    "pcb reference": ("pcb", {"formula": "reference"}, transcriptions.pcb_reference),
    "pcb nlp": ("pcb", {"formula": "nlp"}, transcriptions.pcb_nlp),
    "pcb vision": ("pcb", {"formula": "vision"}, transcriptions.pcb_vision),
    "pcb es": ("pcb", {"formula": "es"}, transcriptions.pcb_es),
    "pcb paper": ("pcb", {"formula": "paper"}, transcriptions.pcb_paper),
    "ties": ("ties", {}, transcriptions.ties),
    "linear": ("linear", {}, lambda x, weights, _: transcriptions.linear(x, weights)),
}
TASKS = {  # density, weights
    "two": (0.2, (1.0, 1.0)),
    "a negative weight": (0.1, (1.0, -0.7)),
    "fractional weights": (0.05, (0.3, 1.25, 0.5)),
    "everything kept": (1.0, (1.0, 0.5, -2.0)),
    "one of no weight": (0.3, (1.2, 0.0, 0.8)),
    "five": (0.37, (1.5, -0.25, 0.8, 2.0, 0.1)),
    "five that keep little": (0.013, (1.0, 1.0, 1.0, 1.0, 1.0)),
}
SCOPES = ["global", "module"]
every_formula = pytest.mark.parametrize("name", FORMULAS)
every_pcb = pytest.mark.parametrize("name", [name for name in FORMULAS if name.startswith("pcb")])
every_scope = pytest.mark.parametrize("scope", SCOPES)
every_case = pytest.mark.parametrize(("density", "weights"), TASKS.values(), ids=TASKS)
some_cases = pytest.mark.parametrize(
    ("density", "weights"),
    [TASKS["a negative weight"], TASKS["fractional weights"]],
    ids=["a negative weight", "fractional weights"],
)

# 77 + 299 + 77 + 95 = 548 values: D q is a fraction for every q here. The modules of an adapter are of unequal size.
SHAPES = {"a.q": (11, 7), "a.up": (23, 13), "b.q": (11, 7), "b.down": (5, 19)}
SCALES = {"a.q": 0.3, "a.up": 0.03, "b.q": 0.01, "b.down": 1.0}
SCALE = 0.1  # of all other modules: tanh bends such values and does not saturate


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def factors(tasks, shapes=SHAPES, *, rank=1, whole=False):
    """Per adapter: module to (lora_B, lora_A, scaling), of five ranks from `rank` on, three scalings and T norms.

    From three adapters on each lacks a module, unless they are to be whole.
    """
    pool = []
    for t in range(tasks):
        modules = {}
        for i, (module, (rows, cols)) in enumerate(shapes.items()):
            r = rank + (t + 2 * i) % 5
            lora_B = normal((t, i, 0), rows, r) * np.float32(SCALES.get(module, SCALE))
            lora_A = normal((t, i, 1), r, cols) * np.float32(0.5 + t / 2)
            if whole or tasks < 3 or i != (t + 1) % len(shapes):
                modules[module] = lora_B, lora_A, (2.0, 0.5, -1.5)[(t + i) % 3]
        pool.append(modules)
    return pool


def adapter(name, deltas):
    entries = {
        module: Entry(
            type(delta), delta.shape, lambda d=delta: d, rank=getattr(delta, "rank", None)
        )
        for module, delta in deltas.items()
    }
    return Adapter(name=name, modules=Modules(entries))


def adapters(pool):
    """`Adapter` objects of what `factors` makes."""
    return [
        adapter(
            f"t{t}",
            {
                module: LowRank(torch.as_tensor(lora_A), torch.as_tensor(lora_B), scaling)
                for module, (lora_B, lora_A, scaling) in modules.items()
            },
        )
        for t, modules in enumerate(pool)
    ]


def dense(pool, shapes=SHAPES):
    """Module to ΔW (T, out, in), float64."""
    stacks = {module: np.zeros((len(pool), *shape)) for module, shape in shapes.items()}
    for t, modules in enumerate(pool):
        for module, (lora_B, lora_A, scaling) in modules.items():
            stacks[module][t] = scaling * lora_B.astype(np.float64) @ lora_A.astype(np.float64)
    return stacks


def over(stacks, formula, scope="global"):
    """The formula (rows (T, D) to a row) over the stacks (T, ...) side by side, or each alone; cut into stacks again."""
    if scope == "module":
        return {module: over({module: x}, formula)[module] for module, x in stacks.items()}
    rows = np.concatenate([x.reshape(len(x), -1) for x in stacks.values()], axis=1)
    ends = np.cumsum([x[0].size for x in stacks.values()])[:-1]
    parts = np.split(formula(rows), ends)
    return {
        m: part.reshape(x.shape[1:]) for (m, x), part in zip(stacks.items(), parts, strict=True)
    }


def distance(found, wanted):
    """‖found − wanted‖ / ‖wanted‖; 0 where both are 0."""
    difference = np.linalg.norm(np.asarray(found, np.float64) - wanted)
    return difference and difference / np.linalg.norm(wanted)


def agree(merged, wanted, tolerance=1e-5):
    assert set(merged.modules) == set(wanted)
    assert any(values.any() for values in wanted.values())
    for module, values in wanted.items():
        assert distance(merged.delta(module), values) <= tolerance, module


def merge(pool, name, density, weights, **options):
    """The merge, dense and global unless told otherwise; and its transcription, from rows to a row."""
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
    shapes = {"a": (11, 17), "b": (23, 13), "c": (17, 11), "d": (15, 19)}
    pool = factors(len(weights), shapes, whole=True)
    merged, formula = merge(pool, name, density, weights, scope="module")
    agree(merged, over(dense(pool, shapes), formula, "module"))


@functools.cache
def coordinates(tasks, space, scope):
    """Factors; and per module orthonormal U, V that hold all ΔW_t, and Uᵀ ΔW_t V, from SVDs of the dense matrices."""
    shapes = {"a": (40, 32), "b": (31, 50), "c": (37, 41)}
    pool = factors(tasks, shapes, rank=6, whole=scope == "module")
    bases, cores = {}, {}
    for module, x in dense(pool, shapes).items():
        u, s, _ = np.linalg.svd(np.concatenate(list(x), axis=1), full_matrices=False)
        _, r, vh = np.linalg.svd(np.concatenate(list(x), axis=0), full_matrices=False)
        u, v = u[:, s > 1e-9 * s[0]], vh[r > 1e-9 * r[0]].T
        u, v = (u, v) if space == "core" else (u, np.eye(len(v)))
        bases[module], cores[module] = (u, v), u.T @ x @ v
    return pool, bases, cores


@every_scope
@pytest.mark.parametrize("space", ["core", "knots"])
@some_cases
@every_formula
def test_in_core_and_knots_space_on_coordinates_from_dense_svds(
    name, density, weights, space, scope
):
    pool, bases, cores = coordinates(len(weights), space, scope)
    merged, formula = merge(pool, name, density, weights, space=space, scope=scope)
    wanted = over(cores, formula, scope)
    agree(merged, {module: u @ wanted[module] @ v.T for module, (u, v) in bases.items()})


def balanced(x):
    """√ΣVᵀ and U√Σ of ΔW, every column of U with its largest entry positive."""
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    root = np.sqrt(s) * np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))])
    return root[:, None] * vh, u * root


def as_trained(lora_B, lora_A, scaling):
    """The factors as they are, the scaling shared out evenly, its sign with lora_B."""
    root = np.sqrt(abs(scaling))
    return root * lora_A.astype(np.float64), np.sign(scaling) * root * lora_B.astype(np.float64)


def stacked(pairs, rank):
    """(T, rank, in) and (T, out, rank): what is smaller is padded with zeros, what is larger is 0 there."""
    lora_A = [np.pad(a[:rank], ((0, max(0, rank - len(a))), (0, 0))) for a, _ in pairs]
    lora_B = [np.pad(b.T[:rank], ((0, max(0, rank - len(a))), (0, 0))).T for a, b in pairs]
    return np.stack(lora_A), np.stack(lora_B)


@pytest.mark.parametrize("gauge", ["balanced", "as_trained"])
@pytest.mark.parametrize("weights", [(1.0, -0.7), (0.3, 1.25, 0.5)], ids=["negative", "fractional"])
@every_formula
def test_in_factor_space_both_sides_carry_the_root_of_the_weight_and_lora_b_its_sign(
    name, weights, gauge
):
    shapes = {"a": (20, 12), "b": (11, 25)}
    pool = factors(len(weights), shapes, rank=2, whole=True)
    rows = {}
    for module, deltas in dense(pool, shapes).items():
        trained = [modules[module] for modules in pool]
        pairs = (
            [balanced(x) for x in deltas]
            if gauge == "balanced"
            else [as_trained(*x) for x in trained]
        )
        rank = max(lora_A.shape[0] for _, lora_A, _ in trained)
        rows[module, "A"], rows[module, "B"] = stacked(pairs, rank)
    merged, formula = merge(pool, name, 0.45, weights, space="factor", gauge=gauge)
    roots = np.sqrt(np.abs(weights))
    side_A = over(rows, functools.partial(formula, w=roots))
    side_B = over(rows, functools.partial(formula, w=roots * np.sign(weights)))
    agree(merged, {module: side_B[module, "B"] @ side_A[module, "A"] for module in shapes})


LORAS = [
    {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down", "mix", "head"]},
    {"r": 2, "lora_alpha": 7, "use_rslora": True, "target_modules": ["up", "mix"]},
    {
        "r": 4,
        "rank_pattern": {"mix": 1},
        "alpha_pattern": {"down": 3},
        "target_modules": ["mix", "down"],
    },
]


@every_formula
def test_files_of_peft_by_the_deltas_of_its_merge_and_unload(workshop, name):
    paths = workshop.adapters("mlp", [peft.LoraConfig(**config) for config in LORAS])
    deltas = [workshop.deltas("mlp", path) for path in paths]
    stacks = {
        module: np.stack([delta.get(module, torch.zeros_like(first)).numpy() for delta in deltas])
        for module, first in sorted(deltas[0].items())
    }
    merged, formula = merge([load_adapter(path) for path in paths], name, 0.2, (1.0, -0.5, 1.3))
    agree(merged, over(stacks, formula))


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(101, 150)
        self.down = torch.nn.Linear(150, 103)
        self.out = torch.nn.Linear(103, 120)


def ia3_row(path):
    """Module to l − 1, from what PEFT stored."""
    tensors = load_file(path / "adapter_model.safetensors")
    names = {key: key.removeprefix("base_model.model.").removesuffix(".ia3_l") for key in tensors}
    return {names[key]: l.double().numpy().ravel() - 1 for key, l in tensors.items()}


@every_scope
@every_formula
def test_ia3_competes_by_its_distance_from_one(workshop, name, scope):
    targets = [["up", "down", "out"], ["up", "down"], ["down", "out"]]
    if scope == "module":
        targets = [targets[0]] * 3
    paths = [
        workshop.adapter(
            Layers(),
            peft.IA3Config(target_modules=t, feedforward_modules=["down"]),
            f"t{i}",
            seed=i,
        )
        for i, t in enumerate(targets)
    ]
    rows = [ia3_row(path) for path in paths]
    stacks = {
        module: np.stack([row.get(module, 0 * x) for row in rows]) for module, x in rows[0].items()
    }
    pool = [load_adapter(path) for path in paths]
    merged, formula = merge(pool, name, 0.4, (1.0, 0.5, -0.8), space="auto", scope=scope, rank=None)
    wanted = over(stacks, formula, scope)
    assert set(merged.modules) == set(wanted)
    for module, values in wanted.items():
        assert merged.modules[module].feedforward == (module == "down")
        assert distance(merged.modules[module].l.double() - 1, values) <= 1e-5


# More values than are held, sampled or computed at once.

MANY = {"a": (600, 200), "b": (300, 400), "c": (150, 500)}  # 315 000 values per adapter
SOME = {"a": (60, 40), "b": (30, 70)}


@every_formula
def test_more_values_than_a_sample_holds(name):
    assert sum(rows * cols for rows, cols in MANY.values()) > statistics.SAMPLE_VALUES
    weights = (1.0, 0.6)
    pool = factors(2, MANY, rank=3)
    merged, formula = merge(pool, name, 0.15, weights)
    agree(merged, over(dense(pool, MANY), formula))


@pytest.mark.parametrize("kept", [600, 1 << 24])
@pytest.mark.parametrize("sample", [1, 50, 1000])
@every_formula
def test_samples_tiles_and_brackets_of_any_size_give_the_same(monkeypatch, name, sample, kept):
    monkeypatch.setattr(statistics, "SAMPLE_VALUES", sample)
    monkeypatch.setattr(statistics, "TILE_VALUES", 500)
    monkeypatch.setattr(selection, "KEPT_VALUES", kept)
    density, weights = TASKS["fractional weights"]
    pool = factors(3, SOME, rank=2)
    merged, formula = merge(pool, name, density, weights)
    agree(merged, over(dense(pool, SOME), formula))


def scores(name, rows):
    """What the formula compares with its threshold."""
    count = {"pcb reference": 1e-4}.get(name, 0.01)
    if name == "ties":
        return np.abs(rows)
    if name == "pcb paper":
        return transcriptions.paper_score(rows)
    N = transcriptions.normalized(rows, count)
    inter = {
        "pcb reference": np.tanh(rows * rows.sum(axis=0)),
        "pcb nlp": np.tanh(rows * rows.sum(axis=0)),
        "pcb vision": np.tanh(rows * N.sum(axis=0)),
        "pcb es": sum(np.tanh(N * N_j) for N_j in N),
    }
    return transcriptions.intra(rows, count) * inter[name]


@pytest.mark.parametrize("shapes", [SOME, MANY], ids=["sorted", "sampled"])
@every_formula
def test_in_float32(monkeypatch, name, shapes):
    """In norm but for the entries with a score so near to its threshold that float32 cannot tell them apart.

    A product of rank r has errors of about √r · 6e-8 of the largest, a score of a few times as much. Such an entry may
    be kept or not, and then τ_m has τ_i or 0 there (the weight of an entry with a single owner cancels).
    """
    monkeypatch.setattr(statistics, "DOUBLE_VALUES", 0)
    density, weights = 0.15, (1.0, 0.6)
    pool = factors(2, shapes, rank=3)
    stacks = dense(pool, shapes)
    merged, formula = merge(pool, name, density, weights)
    found = np.concatenate([merged.delta(module).numpy().ravel() for module in shapes])
    rows = np.concatenate([x.reshape(2, -1) for x in stacks.values()], axis=1)
    wanted = formula(rows)
    unsure = np.zeros(len(wanted), bool)
    if name != "linear":
        score = scores(name, rows)
        threshold = np.sort(score)[:, [int(len(wanted) * (1 - density))]]
        near = np.abs(score - threshold) <= 1e-5 * np.abs(score).max(axis=1, keepdims=True)
        unsure = near.any(axis=0)
        assert unsure.mean() < 1e-3
    assert distance(found[~unsure], wanted[~unsure]) <= 1e-5
    bound = 1.0001 * np.abs(rows * np.array(weights)[:, None]).max(axis=0)
    assert (np.abs(found - wanted)[unsure] <= bound[unsure]).all()
