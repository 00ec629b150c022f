"""Laws that every method obeys in every space and over every scope. A new method or space needs no line here.

A method that breaks a law by design stands in EXCEPT, with the reason; that it does break it is a test, too.
"""

import dataclasses
import fnmatch
import functools
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pcb_peft import OptionError, list_methods, list_spaces, merge_adapters, statistics
from pcb_peft.adapter import Adapter, Modules
from pcb_peft.delta import LowRank
from pcb_peft.formats import Entry

EXCEPT = {  # law: {method in space, scope: reason}; the first pattern that matches counts
    "gauge": {
        "* in factor[[]gauge=as_trained], *": "it merges the factors as they are: the user asked for it",
    },
    "scale": {
        "pcb[[]formula=reference] *": "tanh of raw products",
        "pcb[[]formula=nlp] *": "tanh of raw products",
        "pcb[[]formula=vision] *": "tanh of a raw factor",
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    method: str
    space: str
    scope: str
    options: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self._with_options(self.method, list_methods())} in {self._with_options(self.space, list_spaces())}, {self.scope}"

    def _with_options(self, name, shelf):
        own = [f"[{key}={value}]" for key, value in self.options if key in shelf[name].options]
        return name + "".join(own)


def variants(shelf):
    """Everything on a shelf with its defaults, and with each other choice of its options."""
    for name, item in shelf.items():
        yield name, ()
        for option in item.options.values():
            yield from (
                (name, ((option.name, choice),))
                for choice in option.choices
                if choice != option.default
            )


LOW_RANK = {name: space for name, space in list_spaces().items() if LowRank in space.accepts}
CASES = [
    Case(method, space, scope, (*own, *others))
    for (method, own), (space, others), scope in itertools.product(
        variants(list_methods()), variants(LOW_RANK), ("global", "module")
    )
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def excepted(request):
    """Expects the law to be broken where it is said to be."""

    def check(law, case):
        for pattern, reason in EXCEPT.get(law, {}).items():
            if fnmatch.fnmatchcase(str(case), pattern):
                request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    return check


SHAPES = {"a": (14, 10), "b": (9, 12), "c": (8, 8), "d": (6, 7)}
RANKS = (3, 2, 4)
WEIGHTS = (1.0, 0.7, -0.4)


@functools.cache
def pool(seed=0):
    """Per adapter: module to (lora_B, lora_A, scaling), float64; "c" is touched by two adapters, "d" by one."""
    rng = np.random.default_rng(seed)
    return [
        {
            module: (
                rng.normal(size=(rows, r)),
                rng.normal(size=(r, cols)) * (1 + t) / 4,
                (1.0, 0.5, -2.0)[t],
            )
            for module, (rows, cols) in SHAPES.items()
            if not (module == "c" and t == 1) and not (module == "d" and t > 0)
        }
        for t, r in enumerate(RANKS)
    ]


def changed(adapters, change):
    """The adapters with other factors: `change` of adapter, lora_B, lora_A and scaling."""
    return [
        {module: change(t, *factors) for module, factors in modules.items()}
        for t, modules in enumerate(adapters)
    ]


def made(adapters, names="xyzuvw"):
    result = []
    for name, modules in zip(names, adapters, strict=False):
        deltas = {
            module: LowRank(torch.as_tensor(lora_A), torch.as_tensor(lora_B), scaling)
            for module, (lora_B, lora_A, scaling) in modules.items()
        }
        entries = {
            module: Entry(LowRank, delta.shape, lambda d=delta: d, rank=delta.rank)
            for module, delta in deltas.items()
        }
        result.append(Adapter(name=name, modules=Modules(entries)))
    return result


def merge(case, adapters, weights, names="xyzuvw", rank="full", **settings):
    return merge_adapters(
        made(adapters, names),
        case.method,
        list(weights),
        case.space,
        case.scope,
        rank,
        **dict(case.options),
        **settings,
    )


def result(case, adapters, weights=WEIGHTS, names="xyzuvw", **settings):
    """Module to merged ΔW. A method that takes two adapters only gets the first two."""
    try:
        merged = merge(case, adapters, weights, names, **settings)
    except OptionError:
        merged = merge(case, adapters[:2], weights[:2], names, **settings)
    return {module: merged.delta(module).double().numpy() for module in merged.modules}


@functools.cache
def usual(case):
    return result(case, pool())


def distance(found, wanted):
    """‖found − wanted‖ / ‖wanted‖ over all modules."""
    assert found.keys() == wanted.keys()
    norms = [(np.linalg.norm(found[m] - wanted[m]), np.linalg.norm(wanted[m])) for m in wanted]
    difference, norm = np.linalg.norm(norms, axis=0)
    return difference / norm


def dense(adapters, weights):
    """Module to Σ_t w_t ΔW_t."""
    total = {}
    for modules, weight in zip(adapters, weights, strict=True):
        for module, (lora_B, lora_A, scaling) in modules.items():
            total[module] = total.get(module, 0) + weight * scaling * lora_B @ lora_A
    return total


@every_case
def test_the_merge_does_not_depend_on_the_gauge(excepted, case):
    """(BG, G⁻¹A) is the adapter that (B, A) is, for every invertible G."""
    excepted("gauge", case)
    rng = np.random.default_rng(1)

    def regauged(_, lora_B, lora_A, scaling):
        gauge = rng.normal(size=(len(lora_A),) * 2) + 2 * np.eye(len(lora_A))
        return lora_B @ gauge * 3, np.linalg.solve(gauge, lora_A), scaling / 3

    assert distance(result(case, changed(pool(), regauged)), usual(case)) <= 1e-5


@every_case
def test_the_order_of_the_adapters_does_not_matter(excepted, case):
    excepted("order", case)
    if len(usual(case)) < 4 or case.method == "slerp":
        order = (1, 0)
    else:
        order = (2, 0, 1)
    found = result(
        case, [pool()[i] for i in order], [WEIGHTS[i] for i in order], ["xyz"[i] for i in order]
    )
    assert distance(found, usual(case)) <= 1e-6


@every_case
def test_the_opposite_adapters_merge_to_the_opposite(excepted, case):
    excepted("opposite", case)
    found = result(case, changed(pool(), lambda _, b, a, s: (-b, a, s)))
    assert distance({m: -x for m, x in found.items()}, usual(case)) <= 1e-6


@every_case
@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_adapters_that_are_as_many_times_as_large_merge_to_what_is_as_many_times_as_large(
    excepted, case, scale
):
    excepted("scale", case)
    found = result(case, changed(pool(), lambda _, b, a, s: (b, a, s * scale)))
    assert distance({m: x / scale for m, x in found.items()}, usual(case)) <= 1e-6


@every_case
def test_an_adapter_of_zeros_has_no_say(excepted, case):
    excepted("zero", case)
    nothing = {
        m: (np.zeros((rows, 2)), np.ones((2, cols)), 1.0) for m, (rows, cols) in SHAPES.items()
    }
    found = result(case, [*pool()[:2], nothing], (1.0, 0.7, 1.0))
    assert distance(found, result(case, pool()[:2], (1.0, 0.7))) <= 1e-6
