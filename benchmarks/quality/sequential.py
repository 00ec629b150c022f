"""A merge by least squares, module by module from the first to the last, on unlabelled texts; tried, and not built.

Each module of the merge shall answer its own inputs, which the modules before it have already changed, as the adapter's
module answers the adapter's. RegMean, in contrast, takes the inputs of the base model with one adapter for all modules.
"""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from texts import Row
from torch import Tensor

from pcb_peft import Adapter
from pcb_peft.adapters.delta_mapping import DeltaMapping
from pcb_peft.data.live_adapters import with_adapter
from pcb_peft.data.models import load_base, load_tokenizer
from pcb_peft.deltas.delta import Dense
from pcb_peft.formats import LazyDelta, in_memory

RIDGE = 0.1
"""How strongly a module stays near the merge it begins from, as a fraction of the mean square of its inputs."""
LENGTH = 128


class _HasAllError(Exception):
    """Ends a run of the model."""


@torch.no_grad()
def sequential(
    start: Adapter,
    adapters: Sequence[Adapter],
    base: Path,
    texts: Mapping[str, list[Row]],
    rank: int | None = None,
) -> Adapter:
    """Solve for one module after the other, in the order in which the model runs them.

    Args:
        start: The merge that is improved.
        adapters: What was merged.
        base: The base model, an encoder.
        texts: Each adapter's texts, by its name.
        rank: The highest rank of a module, found by reduced-rank regression; None: any.
    """
    model = load_base(base, start.task_type, torch.float32)
    batches = {name: _batch(rows, base) for name, rows in texts.items()}
    own: dict[str, dict[str, Tensor]] = {}
    for adapter in adapters:
        with with_adapter(model, adapter):
            own[adapter.name] = _inputs(model, batches[adapter.name], list(start.modules))
    entries: dict[str, LazyDelta] = {}
    for module in own[adapters[0].name]:
        weight = model.get_submodule(module).weight
        first = start.delta(module)
        moments, answers = torch.zeros(weight.shape[1], weight.shape[1]), torch.zeros_like(weight)
        for adapter in adapters:
            seen = _inputs(model, batches[adapter.name], [module])[module]
            wanted = own[adapter.name][module] @ (weight + adapter.delta(module)).T
            missing = wanted - seen @ (weight + first).T
            moments += seen.T @ seen / len(seen)
            answers += missing.T @ seen / len(seen)
        moments += RIDGE * moments.diagonal().mean() * torch.eye(len(moments))
        solved = first + torch.linalg.solve(moments, answers, left=False)
        delta = solved if rank is None else _cut(solved, moments, rank)
        weight += delta
        entries[module] = in_memory(Dense(delta))
    return Adapter(
        name="sequential",
        modules=DeltaMapping(entries),
        base=start.base,
        base_model=start.base_model,
    )


def _cut(solved: Tensor, moments: Tensor, rank: int) -> Tensor:
    """Return the matrix of a rank that answers the inputs most nearly as a matrix does."""
    root = torch.linalg.cholesky(moments)
    u, s, vh = torch.linalg.svd(solved @ root, full_matrices=False)
    part = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return torch.linalg.solve_triangular(root, part, upper=False, left=False)


def _inputs(model: Any, batch: Any, modules: Sequence[str]) -> dict[str, Tensor]:
    """Return the inputs of some modules, (tokens, in), in the order in which the model runs them.

    The model stops when it has them.
    """
    found: dict[str, Tensor] = {}
    tokens = batch["attention_mask"].bool()

    def keep(name: str, _module: Any, inputs: tuple[Tensor]) -> None:
        found[name] = inputs[0][tokens]
        if len(found) == len(modules):
            raise _HasAllError

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(functools.partial(keep, name))
        for name in modules
    ]
    with contextlib.suppress(_HasAllError):
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def _batch(rows: list[Row], base: Path) -> Any:
    texts = [row["text"] for row in rows]
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    options = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return load_tokenizer(base)(texts, pairs, **options)
