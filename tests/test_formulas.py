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
from helpers import LOSSLESS, adapter, distance
from numpy.testing import assert_allclose
from safetensors.torch import load_file

from pcb_peft import Adapter, load_adapter, merge_adapters
from pcb_peft.deltas.delta import LowRank
from pcb_peft.merging import engine
from pcb_peft.tasks.limits import DEFAULT_LIMITS, Limits

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


def use_limits(monkeypatch, **limits):
    """Merge with these limits."""
    limited = functools.partial(engine.merge, limits=Limits(**limits))
    monkeypatch.setattr(engine, "merge", limited)


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
    """The formula, from rows (T, D) to a row, over the stacks (T, ...) side by side, or over each alone."""
    if scope == "module":
        return {module: over({module: x}, formula)[module] for module, x in stacks.items()}
    rows = np.concatenate([x.reshape(len(x), -1) for x in stacks.values()], axis=1)
    ends = np.cumsum([x[0].size for x in stacks.values()])[:-1]
    parts = np.split(formula(rows), ends)
    return {
        m: part.reshape(x.shape[1:]) for (m, x), part in zip(stacks.items(), parts, strict=True)
    }


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


@some_cases
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


@pytest.mark.parametrize(("space", "scope"), [("core", "global"), ("knots", "module")])
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
    """The factors as they are, the scaling shared out evenly, its sign with lora_A."""
    root = np.sqrt(abs(scaling))
    return np.sign(scaling) * root * lora_A.astype(np.float64), root * lora_B.astype(np.float64)


def stacked(pairs, rank):
    """(T, rank, in) and (T, out, rank): what is smaller is padded with zeros, what is larger is 0 there."""
    lora_A = [np.pad(a[:rank], ((0, max(0, rank - len(a))), (0, 0))) for a, _ in pairs]
    lora_B = [np.pad(b.T[:rank], ((0, max(0, rank - len(a))), (0, 0))).T for a, b in pairs]
    return np.stack(lora_A), np.stack(lora_B)


@pytest.mark.parametrize("gauge", ["balanced", "as_trained"])
@pytest.mark.parametrize("weights", [(1.0, -0.7), (0.3, 1.25, 0.5)], ids=["negative", "fractional"])
@every_formula
def test_in_factor_space_both_sides_carry_the_root_of_the_weight_and_lora_a_its_sign(
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
    side_A = over(rows, functools.partial(formula, w=roots * np.sign(weights)))
    side_B = over(rows, functools.partial(formula, w=roots))
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
    return {names[key]: tensors[key].double().numpy().ravel() - 1 for key in tensors}


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
SOME = {"a": (60, 40), "b": (30, 70), "c": (20, 45)}


@pytest.mark.slow
@every_formula
def test_more_values_than_a_sample_holds(name):
    assert sum(rows * cols for rows, cols in MANY.values()) > DEFAULT_LIMITS.sample_values
    weights = (1.0, 0.6)
    pool = factors(2, MANY, rank=3)
    merged, formula = merge(pool, name, 0.15, weights)
    agree(merged, over(dense(pool, MANY), formula))


@pytest.mark.parametrize(
    ("sample", "kept", "held"),
    [(1, 600, 0), (1, 1 << 24, 1 << 24), (50, 600, 1 << 24), (1000, 1 << 24, 0)],
)
@pytest.mark.parametrize("name", ["pcb es", "pcb paper", "ties"])
def test_samples_tiles_and_brackets_of_any_size_give_the_same(
    monkeypatch, name, sample, kept, held
):
    use_limits(
        monkeypatch,
        cached_values=held,
        sample_values=sample,
        tile_values=500,
        bracket_values=kept,
    )
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


@pytest.mark.parametrize(
    ("name", "shapes"), [*((name, SOME) for name in FORMULAS), ("pcb es", MANY), ("ties", MANY)]
)
def test_in_float32(monkeypatch, name, shapes):
    """In norm but for the entries with a score so near to its threshold that float32 cannot tell them apart.

    A product of rank r has errors of about √r · 6e-8 of the largest, a score of a few times as much. Such an entry may
    be kept or not, and then τ_m has τ_i or 0 there (the weight of an entry with a single owner cancels).
    """
    use_limits(monkeypatch, double_values=0)
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
        near = np.abs(score - threshold) <= 3e-6 * np.abs(score).max(axis=1, keepdims=True)
        unsure = near.any(axis=0)
        assert unsure.mean() < 1e-3
    assert distance(found[~unsure], wanted[~unsure]) <= 1e-5
    bound = 1.0001 * np.abs(rows * np.array(weights)[:, None]).max(axis=0)
    assert (np.abs(found - wanted)[unsure] <= bound[unsure]).all()


@pytest.mark.parametrize("winsor", [0.0, 0.07])
@pytest.mark.parametrize(
    "name", [name for name in FORMULAS if name not in ("linear", "ties", "pcb paper")]
)
def test_the_tails_that_are_clamped_can_be_chosen(name, winsor):
    method, options, transcription = FORMULAS[name]
    weights = (1.0, 0.6)
    pool = factors(2, SOME)
    merged = merge_adapters(
        adapters(pool),
        method,
        weights,
        "dense",
        "global",
        "full",
        density=0.2,
        winsor=winsor,
        **options,
    )
    agree(
        merged,
        over(dense(pool, SOME), lambda x: transcription(x, np.array(weights), 0.2, winsor)),
    )


# Where the originals divide 0 by 0: reference/merge-methods.md A.5, and the docstring of pcb.


def min_max(rows):
    """A row of equal |τ| has N = sign(τ), a zero row N = 0."""
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    flat = high == low
    return np.where(flat, high > 0, (rows - low) / np.where(flat, 1, high - low))


def winsorised_magnitude(x, q):
    """Less than 100 values are not clamped, nor is a row that would become constant."""
    s, D = np.sort(np.abs(x), axis=1), x.shape[1]
    if D < 100:
        return np.abs(x)
    low, high = s[:, [int(D * q)]], s[:, [int(D * (1 - q) - 1)]]
    clamped = np.minimum(np.maximum(np.abs(x), low), high)
    return np.where(low == high, np.abs(x), clamped)


def balanced_share(score, density):
    """Where only the largest score lies above the quantile it is kept."""
    s = np.sort(score, axis=1)
    D = score.shape[1]
    threshold, largest = s[:, [min(D - 1, int(D * (1 - density)))]], s[:, [-1]]
    top = (score == largest) & (largest > 0)
    span = np.where(largest > threshold, largest - threshold, 1)
    return np.where(largest > threshold, (np.maximum(score, threshold) - threshold) / span, top)


@pytest.fixture
def guarded(monkeypatch):
    """The transcriptions with what the docstring of `pcb` promises for where they would divide 0 by 0."""
    for guard in (min_max, winsorised_magnitude, balanced_share):
        monkeypatch.setattr(transcriptions, guard.__name__, guard)


def ones(rows, cols, signs=()):
    """A module whose entries are all ±1/4; `signs` turns its first columns around."""
    lora_A = np.ones((1, cols), np.float32)
    lora_A[0, : len(signs)] = signs
    return np.full((rows, 1), 0.25, np.float32), lora_A, 1.0


def plain(seed, rows, cols, r=2):
    return normal((seed, 0), rows, r) * np.float32(SCALE), normal((seed, 1), r, cols), 1.0


def nothing(rows, cols):
    """An adapter as it is before its training: lora_B is 0."""
    return np.zeros((rows, 2), np.float32), normal(99, 2, cols), 1.0


EDGES = {  # adapters: module to factors
    "one row of equal magnitudes": [{"a": ones(9, 14)}, {"a": plain(1, 9, 14)}],
    "all rows of equal magnitudes": [{"a": ones(9, 14)}, {"a": ones(9, 14, [-1, -1])}],
    "the same constant": [{"a": ones(9, 14)}, {"a": ones(9, 14)}],
    "constant but for a tail": [
        {"a": ones(20, 30), "b": plain(1, 1, 3)},
        {"a": ones(20, 30, [-1]), "b": plain(2, 1, 3)},
    ],
    "a zero adapter": [{"a": plain(1, 9, 14)}, {"a": nothing(9, 14)}, {"a": plain(2, 9, 14)}],
    "all but one are zero": [{"a": nothing(9, 14)}, {"a": plain(1, 9, 14)}, {"a": nothing(9, 14)}],
    "one value": [{"a": plain(1, 1, 1)}, {"a": plain(4, 1, 1)}],
    "two values": [{"a": plain(1, 2, 1)}, {"a": plain(5, 2, 1)}],
    "three values": [{"a": plain(1, 1, 3)}, {"a": plain(2, 1, 3)}],
    "four values": [{"a": plain(1, 2, 2)}, {"a": plain(2, 2, 2)}],
    "identical adapters": [{"a": plain(1, 15, 14), "b": plain(2, 8, 9)}] * 3,
    "one value, identical": [{"a": plain(1, 1, 1)}] * 2,
    "less than a hundredth of all": [
        {"a": plain(1, 40, 30), "b": plain(2, 2, 3)},
        {"b": plain(3, 2, 3)},
    ],
    "nothing in common": [{"a": plain(1, 15, 14)}, {"b": plain(2, 12, 13)}],
}


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(("scope", "density"), [("global", 0.2), ("module", 1.0)])
@pytest.mark.parametrize("edge", EDGES)
def test_where_the_originals_break(edge, scope, density):
    """What comes out is finite, is not zero, is no larger than the adapters, and is what the docstring says."""
    for name in (name for name in FORMULAS if name.startswith("pcb")):
        pool = EDGES[edge]
        shapes = {
            module: (lora_B.shape[0], lora_A.shape[1])
            for modules in pool
            for module, (lora_B, lora_A, _) in modules.items()
        }
        weights = np.array([1.0, 0.75, -1.25][: len(pool)])
        if edge.endswith(("identical adapters", "identical")):
            weights = np.ones(len(pool))
        stacks = dense(pool, dict(sorted(shapes.items())))
        merged, formula = merge(pool, name, density, weights, scope=scope)
        found = {module: merged.delta(module).double().numpy() for module in shapes}
        assert all(np.isfinite(values).all() for values in found.values())
        assert any(values.any() for values in found.values())
        for module, x in stacks.items():
            largest = np.abs(weights[:, None, None] * x).max()
            assert np.abs(found[module]).max() <= 1.000001 * largest

        def promised(rows, formula=formula, weights=weights):
            present = rows.any(axis=1)
            return formula(rows) if present.sum() > 1 else weights @ rows

        if name != "pcb paper":
            agree(merged, over(stacks, promised, scope))


@pytest.mark.parametrize(("space", "tasks"), [("core", 3), ("knots", 2)])
@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "linear"])
def test_adapters_of_rank_one_do_not_vanish_in_core_space_and_module_scope(name, space, tasks):
    """Nearly orthogonal, each is a single entry of its T×T core: to clamp that to the next would be to lose it."""
    pool = [{"a": plain(t, 64, 48, r=1)} for t in range(tasks)]
    merged, _ = merge(pool, name, 0.2, np.ones(tasks), space=space, scope="module")
    total = dense(pool, {"a": (64, 48)})["a"].sum(axis=0)
    assert np.linalg.norm(merged.delta("a")) >= 0.7 * np.linalg.norm(total)


@pytest.mark.parametrize("space", LOSSLESS)
@every_pcb
def test_an_adapter_without_competitors_is_returned(name, space):
    pool = factors(1)
    for others in ([], [{module: nothing(*shape) for module, shape in SHAPES.items()}] * 2):
        weights = (-0.75, 1.0, 2.0)[: 1 + len(others)]
        merged, _ = merge(pool + others, name, 0.2, weights, space=space)
        agree(merged, {module: -0.75 * x[0] for module, x in dense(pool).items()}, 1e-6)


@pytest.mark.parametrize(
    "name", [name for name in FORMULAS if name not in ("linear", "ties", "pcb paper")]
)
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_identical_adapters_agree_on_what_one_of_them_would_keep(name, density):
    """All but the least of the kept entries, the share of which is 0: those of the largest magnitude, as they are."""
    pool = [factors(1, SOME)[0]] * 4
    values = np.concatenate([x[0].ravel() for x in dense(pool, SOME).values()])
    merged, _ = merge(pool, name, density, np.ones(4), winsor=0.0)
    found = np.concatenate([merged.delta(module).numpy().ravel() for module in SOME])
    kept = found != 0
    assert kept.sum() == len(values) - int(len(values) * (1 - density)) - 1
    assert_allclose(found[kept], values[kept], rtol=1e-6)
    assert np.abs(values[kept]).min() >= np.abs(values[~kept]).max()


@pytest.mark.parametrize("double", [1 << 27, 0], ids=["float64", "float32"])
@every_formula
def test_a_hundred_adapters(monkeypatch, name, double):
    """E¹⁰⁰ is beyond float32, and e⁻¹⁰⁰ far below the 1e-12 that stands for no share at all."""
    use_limits(monkeypatch, double_values=double)
    shapes = {"a": (12, 11)}
    pool = factors(100, shapes, whole=True)
    merged, formula = merge(pool, name, 0.3, np.full(100, 0.5))
    agree(merged, over(dense(pool, shapes), formula))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pcb reference", "pcb vision"])
def test_a_thousand_adapters_do_not_overflow_in_float64(name):
    """As e⁷¹⁰ does."""
    pool = factors(1000, {"a": (3, 4)}, whole=True)
    merged, _ = merge(pool, name, 0.3, np.ones(1000))
    assert torch.isfinite(merged.delta("a")).all()
    assert merged.delta("a").any()
