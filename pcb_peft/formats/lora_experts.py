"""LoRA on parameters that are no layer's weight (PEFT's `target_parameters`), most often stacks of experts.

A stack (E, dim1, dim2) is read as E modules, ``experts.down_proj.0``, ``experts.down_proj.1`` …, each a LoRA of its
own. PEFT stores lora_A as (r·E, in), expert after expert, and lora_B as (out, r·E), rank after rank. Which of dim1 and
dim2 it takes for `in` has changed twice; the files do not say:

=============  ==================  =====================================================
PEFT           stack (E, out, in)  stack (E, in, out): ``is_transposed``, as in GPT-OSS
=============  ==================  =====================================================
≤ 0.18         exchanged           as it is
0.19.0         exchanged           exchanged
≥ 0.19.1       as it is            as it is
=============  ==================  =====================================================
"""

import dataclasses
import functools
import importlib.metadata
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.layout import CONV1D, LINEAR
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.lora_parts import DEFAULT, Parts, pattern_value, scaling_of
from pcb_peft.formats.registry import PREFIX, Base, Config, LazyDelta, finite

ORDER = ("gate_up_proj", "down_proj")  # in which transformers' experts hold them
AS_IT_IS, NEVER_AS_IT_IS = (0, 19, 1), (0, 19, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """One targeted parameter.

    Attributes:
        name: Its path.
        parts: Its tensors.
        experts: How many matrices it holds.
        transposed: Whether the base stores them as (in, out), if that is known.
        shape: Of the parameter, if it is known.
    """

    name: str
    parts: Parts
    experts: int
    transposed: bool | None = None
    shape: tuple[int, ...] = ()


def read_experts(
    config: Config, tensors: Tensors, base: Base, modules: Sequence[Parts]
) -> tuple[dict[str, LazyDelta], list[Parts]]:
    """The deltas of targeted parameters, and the modules that are none.

    Raises:
        UnsupportedError: It cannot be told which tensors belong to which parameter, or which way round they are.
    """
    targets = config.get("target_parameters") or []
    wrapped: dict[str, list[Parts]] = {}
    for parts in modules:
        if any(_holds(parts.path, target) for target in targets):
            wrapped.setdefault(parts.path, []).append(parts)
    entries: dict[str, LazyDelta] = {}

    @functools.lru_cache(maxsize=2)  # experts of one stack are asked for one after the other
    def load(name: str) -> Tensor:
        return finite(tensors, name)

    for module, layers in wrapped.items():
        stacks = _stacks(config, tensors, base, module, layers)
        flipped = _flipped(config, tensors, stacks)
        for stack in stacks:
            entries |= _entries(config, tensors, stack, flipped[stack.name], load)
    return entries, [parts for parts in modules if parts.path not in wrapped]


def _holds(module: str, target: str) -> bool:
    """Whether a module is one that holds a parameter called so."""
    container = target.rpartition(".")[0]
    return bool(container) and f".{module}".endswith(f".{container}")


def _stacks(
    config: Config, tensors: Tensors, base: Base, module: str, layers: Sequence[Parts]
) -> list[Stack]:
    """The parameters of a module, innermost wrapper first, which is that of the parameter that comes first."""
    targets = [t for t in config["target_parameters"] if _holds(module, t)]
    names = {target.rpartition(".")[2] for target in targets}
    held = base().held(module) if base else {}
    known = [name for name in held if name in names]
    order = known or nested(names)
    if len(order) != len(layers):
        raise UnsupportedError(
            f"{module} has LoRA on {len(layers)} parameters, and target_parameters names {sorted(names)}: give "
            "base_model (--base-model), or the one that the adapter was trained on"
        )
    layers = sorted(layers, key=lambda parts: -parts.depth)
    return [
        _stack(config, tensors, f"{module}.{name}", parts, held.get(name))
        for name, parts in zip(order, layers, strict=True)
    ]


def nested(names: Collection[str]) -> list[str]:
    """Parameters of one module in the order in which transformers' experts hold them.

    Raises:
        UnsupportedError: They are others.
    """
    if len(names) > 1 and not set(names) <= set(ORDER):
        raise UnsupportedError(
            f"the order of the parameters {sorted(names)} in their module is not known: give base_model "
            "(--base-model); a merge of them can only be folded"
        )
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else 0)


def _stack(
    config: Config,
    tensors: Tensors,
    name: str,
    parts: Parts,
    held: tuple[tuple[int, ...], bool] | None,
) -> Stack:
    parts = dataclasses.replace(parts, path=name)
    rank = pattern_value(config, "rank_pattern", name, config.get("r", DEFAULT))
    if not {"lora_A", "lora_B"} <= parts.names.keys():
        raise AdapterError(f"{name} has {', '.join(parts.names)} and not both of its factors")
    rows, cols = tensors.shape(parts.names["lora_A"])[0], tensors.shape(parts.names["lora_B"])[1]
    if not isinstance(rank, int) or rows != cols or rows % rank:
        raise AdapterError(
            f"{name}: lora_A has {rows} rows and lora_B {cols} columns; both must be a multiple of the rank {rank!r}"
        )
    shape, transposed = held or ((), None)
    return Stack(name, parts, rows // rank, transposed, shape)


def _flipped(config: Config, tensors: Tensors, stacks: Sequence[Stack]) -> dict[str, bool]:
    """Parameter to whether its factors are those of the transposed matrix: by shapes, else by PEFT's version.

    Raises:
        UnsupportedError: Neither tells.
    """
    sizes = {
        stack.name.rpartition(".")[2]: (
            tensors.shape(stack.parts.names["lora_A"])[1],
            tensors.shape(stack.parts.names["lora_B"])[0],
        )
        for stack in stacks
    }
    if set(sizes) == set(ORDER):  # gate_up_proj has two outputs for each input of down_proj
        (first_in, first_out), (second_in, second_out) = (sizes[name] for name in ORDER)
        straight, turned = first_out == 2 * second_in, first_in == 2 * second_out
        if straight != turned:
            return {stack.name: turned for stack in stacks}
    return {
        stack.name: _flipped_alone(config, stack, sizes[stack.name.rpartition(".")[2]])
        for stack in stacks
    }


def _flipped_alone(config: Config, stack: Stack, sizes: tuple[int, int]) -> bool:
    if stack.experts == 1 and len(stack.shape) != 3:
        return False
    if len(stack.shape) == 3 and stack.shape[1] != stack.shape[2]:
        wanted = stack.shape[:0:-1] if not stack.transposed else stack.shape[1:]
        return sizes != wanted
    version = tuple(int(n) for n in re.findall(r"\d+", str(config.get("peft_version")))[:3])
    if version >= AS_IT_IS:
        return False
    if version >= NEVER_AS_IT_IS:
        return True
    if stack.transposed is None:
        raise UnsupportedError(
            f"{stack.name}: an adapter of PEFT {config.get('peft_version') or 'before 0.18'} does not tell which way "
            "round its experts are: give base_model (--base-model)"
        )
    return not stack.transposed


def _entries(
    config: Config, tensors: Tensors, stack: Stack, flipped: bool, load: Callable[[str], Tensor]
) -> dict[str, LazyDelta]:
    """One entry per expert."""
    key_A, key_B = stack.parts.names["lora_A"], stack.parts.names["lora_B"]
    inputs, outputs = tensors.shape(key_A)[1], tensors.shape(key_B)[0]
    shape = (inputs, outputs) if flipped else (outputs, inputs)
    rank = tensors.shape(key_A)[0] // stack.experts
    scaling = scaling_of(config, stack.parts, rank)
    plain = stack.experts == 1 and len(stack.shape) != 3

    def expert(index: int) -> LowRank:
        lora_A = load(key_A)[index * rank : (index + 1) * rank]
        lora_B = load(key_B)[:, index :: stack.experts]
        if flipped:
            lora_A, lora_B = lora_B.T, lora_A.T
        layout = CONV1D if stack.transposed else LINEAR
        layout = layout if plain else dataclasses.replace(layout, expert=index)
        return LowRank(lora_A, lora_B, scaling, layout=layout)

    def entry(index: int) -> LazyDelta:
        return LazyDelta(LowRank, shape, lambda: expert(index), rank, stacked=not plain)

    if plain and not stack.name.endswith(".weight"):
        raise UnsupportedError(
            f"{stack.name}: a LoRA on a parameter that is neither a weight nor a stack of them is not supported"
        )
    if plain:
        return {stack.name.removesuffix(".weight"): entry(0)}
    return {f"{stack.name}.{index}": entry(index) for index in range(stack.experts)}


def write_experts(
    modules: Mapping[str, LowRank], rank: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of the configuration, and tensors (float32), for those modules that are experts, at one rank.

    Raises:
        UnsupportedError: The installed PEFT would read them the other way round.
    """
    stacks: dict[str, dict[int, LowRank]] = {}
    for module, delta in modules.items():
        if delta.layout.expert is not None:
            stacks.setdefault(module.rpartition(".")[0], {})[delta.layout.expert] = delta
    if not stacks:
        return {}, {}
    installed = importlib.metadata.version("peft")
    if tuple(int(n) for n in re.findall(r"\d+", installed)[:3]) < AS_IT_IS:
        raise UnsupportedError(
            f"experts are written as PEFT 0.19.1 and later read them, and PEFT {installed} is installed: upgrade it"
        )
    tensors: dict[str, Tensor] = {}
    for container in {name.rpartition(".")[0] for name in stacks}:
        names = [name for name in stacks if name.rpartition(".")[0] == container]
        order = nested([name.rpartition(".")[2] for name in names])
        for depth, leaf in enumerate(reversed(order)):
            key = PREFIX + container + ".base_layer" * depth
            factors = _joined(stacks[f"{container}.{leaf}"], rank)
            tensors |= dict(
                zip((f"{key}.lora_A.weight", f"{key}.lora_B.weight"), factors, strict=True)
            )
    return {"target_parameters": sorted(stacks), "peft_version": installed}, tensors


def _joined(experts: Mapping[int, LowRank], rank: int) -> tuple[Tensor, Tensor]:
    """lora_A (r·E, in) and lora_B (out, r·E) of a stack; an expert that no adapter touches is zero."""
    first = next(iter(experts.values()))
    count, (outputs, inputs) = 1 + max(experts), first.shape
    lora_A, lora_B = torch.zeros(count, rank, inputs), torch.zeros(outputs, rank, count)
    for index, delta in experts.items():
        lora_A[index, : delta.rank] = delta.lora_A
        lora_B[:, : delta.rank, index] = delta.lora_B.double() * delta.scaling
    return lora_A.flatten(0, 1), lora_B.flatten(1)
