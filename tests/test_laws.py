"""Laws that every method and every space obey. A new method or space needs no line here.

Every method is tried in the space and scope that are its defaults, a few methods in every space (see CASES). The
exceptions stand in EXCEPT, each with its reason. The laws of one method: ``pytest tests/test_laws.py -k ties``.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import itertools
import warnings

import numpy as np
import pytest
import torch
from helpers import COORDINATES, LOSSLESS, LOSSLESS_LOW_RANK, LOW_RANK, adapter, variants
from hypothesis import given, settings
from hypothesis import strategies as st

from pcb_peft import TaskStatistics, list_methods, merge_adapters
from pcb_peft.deltas.delta import LowRank
from pcb_peft.merging import engine
from pcb_peft.tasks.limits import Limits


@dataclasses.dataclass(frozen=True)
class Case:
    """A method in a space over a scope, and what options of theirs are not the defaults."""

    method: str
    space: str
    scope: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self):
        method, space = (
            self._described(self.method, list_methods()),
            self._described(self.space, LOW_RANK),
        )
        return f"{method} in {space}, {self.scope}"

    def _described(self, name, shelf):
        own = [f"{key}={value}" for key, value in self.options if key in shelf[name].options]
        return " ".join([name, *own])


# Tried in every space: a method with order statistics, one with random masks, one that merges whole matrices.
IN_EVERY_SPACE = ("pcb", "dare_ties", "tsv")


def cases():
    """Every method with its default space and scope; the elementwise ones over a whole model, too; a few everywhere."""
    for name, choice in variants(list_methods()):
        method = list_methods()[name]
        yield Case(name, method.space, method.scope, choice)
        if not (choice or method.whole_matrix or method.needs_statistic):
            yield Case(name, "dense", "global")
    for name, (space, options) in itertools.product(IN_EVERY_SPACE, variants(LOW_RANK)):
        scopes = ["module"] if list_methods()[name].whole_matrix else ["global", "module"]
        yield from (Case(name, space, scope, options) for scope in scopes)


CASES = list(dict.fromkeys(cases()))
ONCE = [  # every method in one space, every space with one method
    case
    for case in CASES
    if case.method == "pcb" or case.space == list_methods()[case.method].space
]
WITHOUT_DATA = [name for name, method in list_methods().items() if method.needs_statistic is None]
every_case = pytest.mark.parametrize("case", CASES, ids=str)

SHAPES = {"a": (14, 10), "b": (8, 11), "c": (6, 7)}
WEIGHTS = (1.0, 0.7, -0.4)
NAMES = "xyz"


def number_of_adapters(method):
    """Three, or as many as the method takes."""
    return list_methods()[method].arity or 3


@functools.cache
def pool(scale=1, ranks=(3, 2, 4)):
    """Per adapter: module to (lora_B, lora_A, scaling), float64; one does not touch "b", and only one touches "c"."""
    rng = np.random.default_rng(0)
    return [
        {
            module: (
                rng.normal(size=(scale * rows, scale * r)),
                rng.normal(size=(scale * r, scale * cols)) * (1 + t) / 4,
                (1.0, 0.5, -2.0)[t],
            )
            for module, (rows, cols) in SHAPES.items()
            if not (module == "b" and t == 1) and not (module == "c" and t > 0)
        }
        for t, r in enumerate(ranks)
    ]


def changed(adapters, change):
    """The adapters with other factors: `change` takes (lora_B, lora_A, scaling)."""
    return [{module: change(*factors) for module, factors in a.items()} for a in adapters]


def made(adapters, names=NAMES):
    """`Adapter` objects, whose tensors share their memory with the arrays."""
    return [
        adapter(
            name,
            {
                module: LowRank(torch.as_tensor(lora_A), torch.as_tensor(lora_B), scaling)
                for module, (lora_B, lora_A, scaling) in modules.items()
            },
        )
        for name, modules in zip(names, adapters, strict=False)
    ]


def measured(kind, modules, name):
    """Some statistics of an adapter, the same for every adapter of that name."""
    rng = np.random.default_rng(ord(name))
    found = {}
    for module, (lora_B, lora_A, _) in sorted(modules.items()):
        x = torch.as_tensor(rng.normal(size=(len(lora_B) + 30, lora_A.shape[1])))
        found[module] = (x.T @ x if kind == "gram" else x[: len(lora_B)]).float()
    shapes = {module: tuple(values.shape) for module, values in found.items()}
    return TaskStatistics(kind, shapes, found.__getitem__)


def merge(case, adapters, weights, names=NAMES, rank="full", **options):
    """The merged adapter."""
    options = {**dict(case.options), **options}
    if kind := list_methods()[case.method].needs_statistic:
        options["statistics"] = [
            measured(kind, x, name) for x, name in zip(adapters, names, strict=False)
        ]
    return merge_adapters(
        made(adapters, names), case.method, list(weights), case.space, case.scope, rank, **options
    )


def result(case, adapters, weights=WEIGHTS, names=NAMES, **options):
    """Module to merged ΔW, of as many of the adapters as the method takes."""
    count = min(len(adapters), number_of_adapters(case.method))
    merged = merge(case, adapters[:count], weights[:count], names, **options)
    return {module: merged.delta(module).double().numpy() for module in merged.modules}


@functools.cache
def usual(case):
    return result(case, pool())


def dense(adapters, weights):
    """Module to Σ_t w_t ΔW_t."""
    total = {}
    for modules, weight in zip(adapters, weights, strict=True):
        for module, (lora_B, lora_A, scaling) in modules.items():
            total[module] = total.get(module, 0) + weight * scaling * lora_B @ lora_A
    return total


def distance(found, wanted):
    """‖found − wanted‖ / ‖wanted‖ over all modules; 0 if both are 0."""
    assert found.keys() == wanted.keys()
    assert all(found[m].shape == wanted[m].shape for m in wanted)
    norms = [(np.linalg.norm(found[m] - wanted[m]), np.linalg.norm(wanted[m])) for m in wanted]
    difference, norm = np.linalg.norm(norms, axis=0)
    return difference / norm if norm > 0 else difference


# Each law measures by how much it is broken, relative to the merge.


def gauge(case):
    """(BG, G⁻¹A) is the adapter that (B, A) is, for every invertible G."""
    rng = np.random.default_rng(1)

    def regauged(lora_B, lora_A, scaling):
        G = rng.normal(size=(len(lora_A),) * 2) + 2 * np.eye(len(lora_A))
        return lora_B @ G * 3, np.linalg.solve(G, lora_A), scaling / 3

    return distance(result(case, changed(pool(), regauged)), usual(case))


def order(case):
    """The order of the adapters, each with its weight and its name, does not matter."""
    order = (2, 0, 1) if number_of_adapters(case.method) == 3 else (1, 0)
    others = [[row[i] for i in order] for row in (pool(), WEIGHTS, NAMES)]
    return distance(result(case, *others), usual(case))


def sign(case):
    """The opposite adapters merge to the opposite."""
    found = result(case, changed(pool(), lambda b, a, s: (-b, a, s)))
    return distance({module: -x for module, x in found.items()}, usual(case))


def scale(case):
    """Adapters that are c times as large merge to what is c times as large."""
    broken = []
    for c in (0.01, 300.0):
        found = result(case, changed(pool(), lambda b, a, s, c=c: (b, a, s * c)))
        broken.append(distance({module: x / c for module, x in found.items()}, usual(case)))
    return max(broken)


def zero(case):
    """An adapter that is zero has no say."""
    nothing = {
        module: (np.zeros((rows, 2)), np.ones((2, cols)), 1.0)
        for module, (rows, cols) in SHAPES.items()
    }
    others = pool()[: number_of_adapters(case.method) - 1]
    wanted = result(case, others) if len(others) > 1 else dense(others, [1.0])
    return distance(result(case, [*others, nothing]), wanted)


LAWS = {
    "gauge": (gauge, 1e-5),
    "order": (order, 1e-6),
    "sign": (sign, 1e-6),
    "scale": (scale, 1e-6),
    "zero": (zero, 1e-6),
}
EXCEPT = {  # (law, pattern of "method in space, scope"): reason
    ("gauge", "* gauge=as_trained, *"): "the factors are merged as they stand: so the user asked",
    ("scale", "pcb formula=reference in *"): "tanh of raw products",
    ("scale", "pcb formula=nlp in *"): "tanh of raw products",
    ("scale", "pcb formula=vision in *"): "tanh of a product with a raw factor",
    ("zero", "* gauge=as_trained, *"): "its lora_A is not zero",
    ("zero", "pcb in *"): "T counts all adapters in exp(T u²), as in the paper",
    ("zero", "pcb formula=* in *"): "T counts all adapters in exp(T u²), as in the paper",
    ("zero", "regmean in *"): "it asks for no change where its inputs are",
    (
        "zero",
        "sce in *",
    ): "entries are selected by their variance over the adapters, of which it is one",
}


def exceptions(law, case):
    return [
        reason
        for (other, pattern), reason in EXCEPT.items()
        if other == law and fnmatch.fnmatchcase(str(case), pattern)
    ]


def broken(case):
    """By how much a case breaks each law that it does not obey."""
    found = {law: measure(case) for law, (measure, _) in LAWS.items() if not exceptions(law, case)}
    return {law: distance for law, distance in found.items() if not distance <= LAWS[law][1]}


@every_case
def test_the_laws_are_obeyed(case):
    assert not broken(case)


@pytest.mark.parametrize(("law", "pattern"), EXCEPT, ids=str)
def test_an_exception_is_one(law, pattern):
    """What obeys the law after all leaves the table."""
    measure, tolerance = LAWS[law]
    cases = [case for case in CASES if fnmatch.fnmatchcase(str(case), pattern)]
    assert any(measure(case) > 10 * tolerance for case in cases)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


@every_case
def test_another_call_gives_the_same_bytes_whatever_tiles_threads_and_memory(case, monkeypatch):
    limits = Limits(tile_values=90, sample_values=150, cached_values=0)
    monkeypatch.setattr(engine, "merge", functools.partial(engine.merge, limits=limits))
    with threads(2):
        found = result(case, pool(), max_memory=0)
    assert all(found[module].tobytes() == x.tobytes() for module, x in usual(case).items())


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["pcb", "tsv"])
@pytest.mark.parametrize(("space", "options"), list(variants(LOW_RANK)))
def test_threads_change_no_byte_where_matrices_are_large_enough_to_be_shared_by_them(
    method, space, options
):
    """BLAS and LAPACK add up in another order on more threads, in a QR of 280×90 for one."""
    case = Case(method, space, "module", options)
    found = []
    for count in (1, 2, 4):
        with threads(count):
            merged = merge(case, pool(20, (1, 2, 1)), WEIGHTS, rank=None)
            found.append([merged.delta(module).numpy().tobytes() for module in merged.modules])
    assert found[0] == found[1] == found[2]


def degenerate(seed):
    """Adapters of 1 to 3 modules of 1 to 5 rows and columns, with values that tie, zeros, copies and constants."""
    rng = np.random.default_rng(seed)
    shapes = {module: rng.integers(1, 6, 2) for module in "abc"[: rng.integers(1, 4)]}
    adapters = []
    for _ in range(rng.integers(1, 4)):
        modules, r = {}, rng.integers(1, 4)
        for module, (rows, cols) in shapes.items():
            lora_B, lora_A = rng.integers(-2, 3, (rows, r)) / 2, rng.integers(-2, 3, (r, cols)) / 2
            if rng.random() < 0.2:
                lora_A[:], lora_B[:] = 1, 1
            modules[module] = lora_B * (rng.random() < 0.8), lora_A, float(rng.choice([1, -2, 0.5]))
        kept = {module: factors for module, factors in modules.items() if rng.random() < 0.8}
        adapters.append(kept or modules)
    if rng.random() < 0.3:
        adapters[-1] = adapters[0]
    return adapters, rng.choice([1.0, 0.5, -1.0, 0.0, 2.0], len(adapters))


@pytest.mark.parametrize("case", ONCE, ids=str)
@settings(max_examples=3, derandomize=True, deadline=None, database=None)
@given(seed=st.integers(0, 1 << 20))
def test_whatever_comes_in_what_comes_out_is_finite_and_the_input_is_not_touched(case, seed):
    adapters, weights = degenerate(seed)
    before = [{m: (b.copy(), a.copy()) for m, (b, a, _) in modules.items()} for modules in adapters]
    found = result(case, adapters, weights, rank="full")
    for module, values in found.items():
        assert np.isfinite(values).all()
        shapes = {(len(x[module][0]), x[module][1].shape[1]) for x in adapters if module in x}
        assert shapes == {values.shape}
    for modules, copies in zip(adapters, before, strict=True):
        for module, (lora_B, lora_A) in copies.items():
            assert np.array_equal(modules[module][0], lora_B)
            assert np.array_equal(modules[module][1], lora_A)


KEEP_ONE = [case for case in CASES if list_methods()[case.method].identity_on_one]
DENSITIES = [
    case
    for case in CASES
    if "density" in list_methods()[case.method].options and case not in KEEP_ONE
]


@pytest.mark.parametrize("case", KEEP_ONE, ids=str)
def test_an_adapter_that_is_alone_comes_back_times_its_weight(case):
    one = pool()[:1]
    for weight, rank in ((1.0, None), (-0.75, "full")):
        merged = merge(case, one, [weight], rank=rank)
        found = {module: merged.delta(module).double().numpy() for module in merged.modules}
        assert distance(found, dense(one, [weight])) <= 1e-6
        assert "is the only adapter" in str(merged.report)
    assert set(merged.modules) == set(SHAPES)


@pytest.mark.parametrize("case", DENSITIES, ids=str)
def test_at_a_density_of_one_every_method_leaves_an_adapter_as_it_is(case):
    one = pool()[:1]
    assert distance(result(case, one, [1.0], density=1.0), dense(one, [1.0])) <= 1e-6


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("space", COORDINATES)
def test_linear_is_the_weighted_sum_in_every_space_that_loses_nothing(space, scope):
    found = result(Case("linear", space, scope), pool())
    assert distance(found, dense(pool(), WEIGHTS)) <= 1e-6


@pytest.mark.parametrize("space", COORDINATES)
def test_a_linear_merge_of_linear_merges_is_the_merge_of_all(space):
    """Of the other methods none promises that; chunks of PCB are another merge."""
    adapters = made(pool(), NAMES)
    for method, same in (("linear", True), ("pcb", False)):
        part = merge_adapters(adapters[:2], method, WEIGHTS[:2], space)
        found = merge_adapters([part, adapters[2]], method, [1.0, WEIGHTS[2]], space)
        values = {m: found.delta(m).double().numpy() for m in found.modules}
        wanted = result(Case(method, space, "auto"), pool())
        assert (distance(values, wanted) <= 1e-6) == same


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(seed=st.integers(0, 1 << 20), space=st.sampled_from(COORDINATES))
def test_core_and_knots_space_lose_nothing_whatever_they_hold(seed, space):
    """Copies, zeros, and more directions than rows: at no rank in particular the sum is there, and in low rank."""
    adapters, weights = degenerate(seed)
    merged = merge(Case("linear", space, "module"), adapters, weights, rank=None)
    wanted = dense(adapters, weights)
    for module in merged.modules:
        delta = merged.modules[module]
        assert np.allclose(delta.matrix(), wanted[module], rtol=0, atol=1e-5)
        if len(adapters) > 1:
            total = sum(len(x[module][1]) for x in adapters if module in x)
            assert delta.rank <= max(1, min(total, *delta.shape))


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 1 << 20),
    case=st.sampled_from([case for case in CASES if case.method in ("pcb", "ties", "linear")]),
)
def test_any_gauge_merges_like_any_other(seed, case):
    rng = np.random.default_rng(seed)
    adapters = [
        {
            m: (rng.normal(size=(rows, r)), rng.normal(size=(r, cols)), 1.0)
            for m, (rows, cols) in SHAPES.items()
        }
        for r in rng.integers(1, 6, 2)
    ]

    def regauged(lora_B, lora_A, scaling):
        u, v = (np.linalg.qr(rng.normal(size=(len(lora_A),) * 2))[0] for _ in "uv")
        G = u * rng.uniform(0.1, 10, len(lora_A)) @ v
        return lora_B @ G, np.linalg.solve(G, lora_A), scaling

    if not exceptions("gauge", case):
        found = result(case, changed(adapters, regauged), (1.0, 0.5))
        assert distance(found, result(case, adapters, (1.0, 0.5))) <= 1e-5


# What leaves: rank, energy, report.

COMPLETE = [("linear", "core"), *(("ties", space) for space in LOSSLESS)]
every_departure = pytest.mark.parametrize(("method", "space"), COMPLETE)


def spectra(case):
    """Module to the dense merge and its SVD."""
    return {
        module: (x, *np.linalg.svd(x, full_matrices=False)) for module, x in usual(case).items()
    }


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("rank", [1, 4])
@every_departure
def test_a_rank_leaves_the_best_approximation_of_the_dense_merge_and_reports_its_energy(
    method, space, rank
):
    case = Case(method, space, "global")
    merged = merge(case, pool(), WEIGHTS, rank=rank)
    kept = whole = 0.0
    for module, (_, u, s, vh) in spectra(case).items():
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        assert distance({0: merged.delta(module).double().numpy()}, {0: best}) <= 1e-5
        assert merged.modules[module].rank <= rank
        energy = np.square(s[:rank]).sum() / max(np.square(s).sum(), 1e-300) if s.any() else 1
        assert merged.report.modules[module].energy == pytest.approx(energy, abs=1e-6)
        assert merged.report.modules[module].norm == pytest.approx(
            np.linalg.norm(s[:rank]), rel=1e-5
        )
        kept, whole = kept + np.square(s[:rank]).sum(), whole + np.square(s).sum()
    assert merged.report.energy == pytest.approx(kept / whole, abs=1e-6)


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("part", [0.3, 0.95])
@every_departure
def test_a_fraction_leaves_the_lowest_rank_that_holds_as_much_of_the_energy(method, space, part):
    case = Case(method, space, "global")
    merged = merge(case, pool(), WEIGHTS, rank=part)
    for module, (_, _, s, _) in spectra(case).items():
        energies = (
            np.square(s).cumsum() / max(np.square(s).sum(), 1e-300) if s.any() else np.ones(1)
        )
        assert merged.modules[module].rank == 1 + (energies < part).sum()
        found = merged.report.modules[module].energy
        assert found == pytest.approx(energies[merged.modules[module].rank - 1], abs=1e-6)
        assert found >= part


@pytest.mark.parametrize("rank", [None, 1, 0.5])
@every_departure
def test_less_than_nine_tenths_of_the_energy_is_warned_of(method, space, rank):
    case = Case(method, space, "global")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = merge(case, pool(), WEIGHTS, rank=rank)
    found = {module: merged.delta(module).double().numpy() for module in merged.modules}
    lost = distance(found, usual(case)) ** 2
    assert merged.report.energy == pytest.approx(1 - lost, abs=1e-5)
    assert len(caught) == (lost > 0.1)
    for warning in caught:
        assert f"{merged.report.energy:.1%}" in str(warning.message)
        worst = min(merged.report.modules.items(), key=lambda item: item[1].energy)
        assert f"least in {worst[0]}: {worst[1].energy:.1%}" in str(warning.message)
        assert warning.filename == __file__


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.scope == "module" and c.space in LOSSLESS], ids=str
)
def test_a_merge_without_a_rank_loses_nothing_and_its_report_can_be_read(case):
    """Some modules have one owner: a method may have nothing to drop there."""
    count = number_of_adapters(case.method)
    merged = merge(
        case,
        pool()[:count],
        WEIGHTS[:count],
        rank=None if case.space in LOSSLESS_LOW_RANK else "full",
    ).counted()
    found = {module: merged.delta(module).double().numpy() for module in merged.modules}
    assert distance(found, usual(case)) <= 1e-5
    assert merged.report.energy == pytest.approx(1, abs=1e-6)
    assert str(merged.report)
    assert all(0 <= fraction <= 1 for fraction in merged.report.as_dict()["kept"].values())


def kept(method, scope, density, **options):
    """Of two adapters, in dense space: by adapter, what the report says was kept, and of how many entries."""
    adapters = [{m: x for m, x in modules.items() if m == "a"} for modules in pool()[:2]]
    merged = merge(Case(method, "dense", scope), adapters, (1.0, 0.5), density=density, **options)
    return merged.counted().report.kept, 140


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.333, 1.0])
def test_the_report_says_how_much_was_kept(density, scope):
    """Of ties exactly ⌊density · D⌋. Of pcb one less than ⌈density · D⌉: the share of the lowest is 0."""
    found, D = kept("ties", scope, density)
    assert found == pytest.approx({"x": int(density * D) / D, "y": int(density * D) / D})
    for formula in ("reference", "nlp", "vision", "es"):
        found, D = kept("pcb", scope, density, formula=formula)
        assert found == pytest.approx(dict.fromkeys("xy", (D - int(D * (1 - density)) - 1) / D))
    found, D = kept("pcb", scope, density, formula="paper")
    assert found == pytest.approx(dict.fromkeys("xy", (D - int(D * (1 - density))) / D))


def test_in_factor_space_what_is_kept_is_counted_over_both_factors():
    adapters = [{"a": modules["a"]} for modules in pool()[:2]]
    merged = merge(Case("ties", "factor", "global"), adapters, (1.0, 1.0), rank=None, density=0.25)
    D = 3 * (14 + 10)  # of the larger rank
    assert merged.report.kept == pytest.approx({"x": int(0.25 * D) / D, "y": int(0.25 * D) / D})


@pytest.mark.filterwarnings("ignore:the merged adapter retains")
def test_in_global_scope_what_is_kept_is_counted_over_all_modules():
    adapters = [
        {m: x for m, x in modules.items() if m != "c"} for modules in (pool()[0], pool()[2])
    ]
    merged = merge(Case("ties", "dense", "global"), adapters, (1.0, 1.0), density=0.25).counted()
    deltas = {module: merged.delta(module) for module in merged.modules}
    D = 14 * 10 + 8 * 11
    assert merged.report.kept == pytest.approx({"x": int(0.25 * D) / D, "y": int(0.25 * D) / D})
    rows = [
        np.concatenate([(s * b @ a).ravel() for b, a, s in modules.values()])
        for modules in adapters
    ]
    for name, row in zip("xy", rows, strict=True):
        marked = np.abs(row) >= np.sort(np.abs(row))[-int(0.25 * D)]
        assert merged.report.modules["a"].kept[name] == pytest.approx(marked[:140].mean())
        assert merged.report.modules["b"].kept[name] == pytest.approx(marked[140:].mean())
    conflict = rows[0] * rows[1] < 0
    assert merged.report.modules["b"].conflicts == pytest.approx(conflict[140:].mean())
    assert merged.report.conflicts == pytest.approx(conflict.mean())
    assert deltas.keys() == {"a", "b"}


@pytest.mark.parametrize("method", WITHOUT_DATA)
def test_adapters_that_are_half_zero_merge_in_factor_space(method):
    """As PEFT makes them: lora_B is zero, lora_A is not."""
    fresh = changed(pool(), lambda b, a, s: (0 * b, a, s))
    count = number_of_adapters(method)
    for scope in ("global", "module"):
        case = Case(method, "factor", scope, (("gauge", "as_trained"),))
        merged = merge(case, [pool()[0], *fresh[1:count]], WEIGHTS[:count], rank=None)
        assert all(torch.isfinite(merged.delta(module)).all() for module in merged.modules)
        assert str(merged.report)
