"""Adapters in memory, and how far apart two results are: what many test files need.

Adapters that PEFT saves are made by `Workshop` in conftest.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from pcb_peft import Adapter, MergedAdapter, list_spaces, merge_adapters
from pcb_peft.adapters.adapter import DeltaMapping
from pcb_peft.deltas.delta import Delta, LowRank
from pcb_peft.formats import LazyDelta

Matrix = np.ndarray
Pair = tuple[Matrix, Matrix]
"""lora_B (out, r) and lora_A (r, in), float64."""

TARGETS = ("up", "mix")  # modules of `Workshop`'s model "mlp"

# Spaces by what they promise; a new space is in the first list, and in the others by its registration.
LOW_RANK = {name: space for name, space in list_spaces().items() if LowRank in space.accepts}
TRUNCATING = {"ctm"}  # the only space that may drop energy before the merge
LOSSLESS = [name for name in LOW_RANK if name not in TRUNCATING]
LOW_RANK_OUTPUT = [name for name in LOW_RANK if LOW_RANK[name].low_rank_output]
LOSSLESS_LOW_RANK = [name for name in LOSSLESS if name in LOW_RANK_OUTPUT]
COORDINATES = [name for name in LOSSLESS if name != "factor"]  # linear in ΔW: a sum stays a sum


def variants(registry: Mapping[str, Any]) -> Iterable[tuple[str, tuple[tuple[str, str], ...]]]:
    """Every registered name with its defaults, and once more with each other choice of its options."""
    for name, item in registry.items():
        choices = [(o.name, c) for o in item.options.values() for c in o.choices if c != o.default]
        yield from [(name, ()), *((name, (choice,)) for choice in choices)]


def low_rank(*ranks: int, shape: tuple[int, int] = (16, 12), seed: int = 0) -> list[Pair]:
    """Random factors of these ranks."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(shape[0], r)), rng.normal(size=(r, shape[1]))) for r in ranks]


def dense(pairs: Iterable[Pair]) -> list[Matrix]:
    """ΔW of each pair of factors."""
    return [b @ a for b, a in pairs]


def regauged(pair: Pair, seed: int = 5) -> Pair:
    """(BG, G⁻¹A): other factors of the same ΔW."""
    rank = len(pair[1])
    gauge = np.random.default_rng(seed).normal(size=(rank, rank)) + 2 * np.eye(rank)
    return pair[0] @ gauge, np.linalg.solve(gauge, pair[1])


def delta(pair: Pair, dtype: torch.dtype = torch.float32, scaling: float = 1.0) -> LowRank:
    """The product of the factors as a delta; `scaling` changes how it is stored, not what it is."""
    lora_B, lora_A = (torch.as_tensor(factor).to(dtype) for factor in pair)
    return LowRank(lora_A / scaling, lora_B, scaling)


def adapter(name: str, deltas: Mapping[str, Delta | Pair]) -> Adapter:
    """An adapter in memory: module to its delta, or to factors."""
    found = {m: d if isinstance(d, Delta) else delta(d) for m, d in deltas.items()}
    return Adapter(
        name=name,
        modules=DeltaMapping(
            {
                module: LazyDelta(type(d), d.shape, lambda d=d: d, rank=getattr(d, "rank", None))
                for module, d in found.items()
            }
        ),
    )


def adapters(deltas: Sequence[Delta | Pair]) -> list[Adapter]:
    """One adapter per delta, each of the one module "m"."""
    return [adapter(f"task{i}", {"m": each}) for i, each in enumerate(deltas)]


def merged(deltas: Sequence[Delta | Pair], **arguments: Any) -> MergedAdapter:
    """Their merge, by `linear` unless told otherwise."""
    return merge_adapters(adapters(deltas), **{"method": "linear", **arguments})


def distance(found: Any, wanted: Any) -> float:
    """‖found − wanted‖ / ‖wanted‖; ‖found‖ where `wanted` is 0."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0))


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    """A LoRA of rank 3 and alpha 5 on `targets`, unless `options` say otherwise."""
    default = {"r": 3, "lora_alpha": 5, "target_modules": list(targets or TARGETS)}
    return peft.LoraConfig(**default | options)


def ia3(*targets: str, **options: Any) -> peft.IA3Config:
    """An (IA)³ on `targets`, without feed-forward modules unless `options` say otherwise."""
    default = {"target_modules": list(targets or TARGETS), "feedforward_modules": []}
    return peft.IA3Config(**default | options)


def content(directory: Path) -> dict[str, bytes]:
    """The files below a directory, by their path in it."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
