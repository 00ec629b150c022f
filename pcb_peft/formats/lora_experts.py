"""LoRA on parameters that are no layer's weight (PEFT's `target_parameters`), most often stacks of experts.

A stack (E, dim1, dim2) is read as E modules, ``experts.down_proj.0``, ``experts.down_proj.1`` …, each a LoRA of its
own. PEFT stores lora_A as (r·E, in), expert after expert, and lora_B as (out, r·E), rank after rank. Which of dim1 and
dim2 PEFT takes for `in` has changed twice, and the files do not say:

=============  ==================  =====================================================
PEFT           stack (E, out, in)  stack (E, in, out): ``is_transposed``, as in GPT-OSS
=============  ==================  =====================================================
≤ 0.18         exchanged           as it is
0.19.0         exchanged           exchanged
≥ 0.19.1       as it is            as it is
=============  ==================  =====================================================

A model such as Llama 4 stores (E, in, out) and does not say so. PEFT takes it for (E, out, in), and so is it read here:
the matrix of an expert is the stored one, whichever of its sides is the input.

The name of a parameter may stand alone in `target_parameters`: PEFT 0.19 and later write ``gate_up_proj`` where
somebody targets ``gate_proj`` and ``up_proj`` of a model whose experts are a stack.
"""

import dataclasses
import functools
import importlib.metadata
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.delta import LowRank
from pcb_peft.deltas.layout import CONV1D, LINEAR, ParameterForm
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.files.patterns import Expression
from pcb_peft.formats.base_weights import Base
from pcb_peft.formats.checkpoint import Tensors, read_finite
from pcb_peft.formats.keys import PREFIX
from pcb_peft.formats.lazy_delta import Config, LazyDelta
from pcb_peft.formats.lora_parts import DEFAULT, LoraTensors, pattern_value, scaling_of
from pcb_peft.runtime.shown import quoted

GATED = {"gate_up_proj", "down_proj"}
ORDER = ("w1", "v1", "gate_up_proj", "gate_proj", "up_proj", "w2", "down_proj")
"""Parameters in the order in which transformers' experts hold them."""
AS_IT_IS, NEVER_AS_IT_IS = (0, 19, 1), (0, 19, 0)
"""Versions of PEFT since which every stack, or none, is read as it is."""


class _RecentTensors:
    """Tensors of which the last two that were read are kept: experts of one stack are read one after the other."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._recent: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type["_RecentTensors"], tuple[Tensors]]:
        return _RecentTensors, (self._tensors,)

    def read(self, name: str) -> Tensor:
        """Return a tensor in float32; errors are those of `read_finite`."""
        recent = self._recent  # replaced as a whole and never changed, for threads
        values = recent[name] if name in recent else read_finite(self._tensors, name)
        other = [item for item in recent.items() if item[0] != name][-1:]
        self._recent = dict([*other, (name, values)])
        return values


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """One targeted parameter.

    Attributes:
        name: Path of the parameter.
        lora: Its tensors.
        experts: Number of matrices that it holds.
        transposed: Whether the base model stores them as (in, out); None if that is not known.
        shape: Shape of the parameter; empty if it is not known.
    """

    name: str
    lora: LoraTensors
    experts: int
    transposed: bool | None = None
    shape: tuple[int, ...] = ()

    @property
    def leaf(self) -> str:
        """Name of the parameter in its module."""
        return self.name.rpartition(".")[2]

    @property
    def is_matrix(self) -> bool:
        """True for a single matrix, such as ``linear.weight``."""
        return self.experts == 1 and len(self.shape) != 3


def read_experts(
    config: Config, tensors: Tensors, base: Base, modules: Sequence[LoraTensors]
) -> tuple[dict[str, LazyDelta], list[LoraTensors]]:
    """Return the deltas of targeted parameters, and the modules that have none.

    Raises:
        UnsupportedError: The files do not say which tensors belong to which parameter, or which way round they are.
    """
    by_path: dict[str, list[LoraTensors]] = {}
    for lora in modules:
        by_path.setdefault(lora.path, []).append(lora)
    names = {path: _parameters(config, base, path, wrappers) for path, wrappers in by_path.items()}
    wrapped = {path: wrappers for path, wrappers in by_path.items() if names[path]}
    entries: dict[str, LazyDelta] = {}
    recent = _RecentTensors(tensors)
    for module, wrappers in wrapped.items():
        stacks = _stacks(config, tensors, base, module, wrappers, names[module])
        flipped = _flipped(config, tensors, stacks)
        for stack in stacks:
            entries |= _entries(config, tensors, stack, flipped[stack.name], recent)
    return entries, [lora for lora in modules if lora.path not in wrapped]


def _parameters(
    config: Config, base: Base, module: str, wrappers: Sequence[LoraTensors]
) -> set[str]:
    """Return the names of the targeted parameters that a module holds; none where its layer is targeted as such.

    A target without a path (``down_proj``) is one of every module that has such a parameter. Without the base model, a
    module may have it if it is wrapped more than once, or if `target_modules` does not name it.
    """
    targets = [str(target).rpartition(".") for target in config.get("target_parameters") or []]
    names = {name for path, _, name in targets if path and f".{module}".endswith(f".{path}")}
    alone = {name for path, _, name in targets if not path}
    if not alone or (len(names) == len(wrappers) and not base):
        return names
    if base is not None:
        return names | (alone & base().own_parameters(module).keys())
    wrapped_again = any(lora.depth for lora in wrappers)
    return names | alone if wrapped_again or not _is_targeted(config, module) else names


def _is_targeted(config: Config, module: str) -> bool:
    """Return whether `target_modules` names a module."""
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return Expression(targets, "target_modules", AdapterError).fits(module)
    return any(f".{module}".endswith(f".{target}") for target in targets)


def _stacks(
    config: Config,
    tensors: Tensors,
    base: Base,
    module: str,
    wrappers: Sequence[LoraTensors],
    names: set[str],
) -> list[Stack]:
    """Return the targeted parameters of a module in its order: the innermost wrapper is that of the first."""
    forms = base().own_parameters(module) if base else {}
    order = [name for name in forms if name in names] or nested(names)
    if len(order) != len(wrappers):
        raise UnsupportedError(
            f"{module} has LoRA on {len(wrappers)} parameters, and target_parameters names {sorted(names)}: give "
            "base_model (--base-model), or the one that the adapter was trained on"
        )
    wrappers = sorted(wrappers, key=lambda lora: -lora.depth)
    return [
        _stack(config, tensors, f"{module}.{name}", lora, forms.get(name))
        for name, lora in zip(order, wrappers, strict=True)
    ]


def nested(names: Collection[str]) -> list[str]:
    """Return parameters of one module in the order in which transformers' experts hold them.

    Raises:
        UnsupportedError: Their order is not known.
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
    lora: LoraTensors,
    form: ParameterForm | None,
) -> Stack:
    lora = dataclasses.replace(lora, path=name)
    rank = pattern_value(config, "rank_pattern", name, config.get("r", DEFAULT))
    if not {"lora_A", "lora_B"} <= lora.names.keys():
        raise AdapterError(f"{name} has {', '.join(lora.names)} and not both of its factors")
    shape_A, shape_B = (tensors.shape(lora.names[part]) for part in ("lora_A", "lora_B"))
    if len(shape_A) != 2 or len(shape_B) != 2:
        raise AdapterError(f"{name}: lora_A {shape_A} and lora_B {shape_B} must be matrices")
    rows, cols = shape_A[0], shape_B[1]
    if not isinstance(rank, int) or rank < 1 or rows != cols or rows % rank or not rows:
        raise AdapterError(
            f"{name}: lora_A has {rows} rows and lora_B {cols} columns; both must be a multiple of the rank "
            f"{quoted(rank)}"
        )
    if form is None:
        return Stack(name, lora, rows // rank)
    return Stack(name, lora, rows // rank, form.transposed, form.shape)


def _flipped(config: Config, tensors: Tensors, stacks: Sequence[Stack]) -> dict[str, bool]:
    """Return, by parameter, whether its factors are those of the transposed matrix.

    The shapes of the base model say so, else the version of PEFT, else the shapes of the adapter.

    Raises:
        UnsupportedError: None of them says.
    """
    sizes = {  # inputs and outputs according to the adapter
        stack.leaf: (
            tensors.shape(stack.lora.names["lora_A"])[1],
            tensors.shape(stack.lora.names["lora_B"])[0],
        )
        for stack in stacks
    }
    guess = _by_gate(sizes)
    return {stack.name: _is_flipped(config, stack, sizes[stack.leaf], guess) for stack in stacks}


def _by_gate(sizes: Mapping[str, tuple[int, int]]) -> bool | None:
    """Return whether factors are those of the transposed matrices: gate_up_proj has two outputs per input of down_proj.

    None if the shapes do not say.
    """
    if set(sizes) != GATED:
        return None
    (gate_up_in, gate_up_out), (down_in, down_out) = sizes["gate_up_proj"], sizes["down_proj"]
    straight, turned = gate_up_out == 2 * down_in, gate_up_in == 2 * down_out
    return turned if straight != turned else None


def _is_flipped(config: Config, stack: Stack, sizes: tuple[int, int], guess: bool | None) -> bool:
    """Return whether factors with these inputs and outputs are those of the transposed matrix."""
    if stack.is_matrix:
        return False
    if len(stack.shape) == 3 and stack.shape[1] != stack.shape[2]:
        _, first, second = stack.shape
        return sizes != ((first, second) if stack.transposed else (second, first))
    version = _version(str(config.get("peft_version")))
    if stack.transposed is None and version >= AS_IT_IS > installed_peft():
        raise UnsupportedError(
            f"{stack.name}: the installed PEFT would have to read experts of PEFT {config['peft_version']} in its own "
            "way, which depends on the base model: give base_model (--base-model), or upgrade PEFT"
        )
    if version >= NEVER_AS_IT_IS:
        return _is_exchanged(version, transposed=False)
    if guess is not None and stack.transposed is None:
        return guess
    if stack.transposed is None:
        raise UnsupportedError(
            f"{stack.name}: an adapter of PEFT {config.get('peft_version') or 'before 0.18'} does not say which way "
            "round its experts are: give base_model (--base-model)"
        )
    return _is_exchanged(version, transposed=stack.transposed)


def _is_exchanged(version: tuple[int, ...], *, transposed: bool) -> bool:
    """Return whether a version of PEFT takes the matrices of a stack for their transposes."""
    if version >= AS_IT_IS:
        return False
    return version >= NEVER_AS_IT_IS or not transposed


def installed_peft() -> tuple[int, ...]:
    """Return the version of PEFT."""
    return _version(importlib.metadata.version("peft"))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _entries(
    config: Config, tensors: Tensors, stack: Stack, flipped: bool, recent: _RecentTensors
) -> dict[str, LazyDelta]:
    """Return one entry per expert."""
    if stack.transposed is None:
        # PEFT before 0.19 exchanges all but those that are stored as (in, out)
        older = _version(str(config.get("peft_version"))) < NEVER_AS_IT_IS
        stack = dataclasses.replace(stack, transposed=older and not flipped)
    inputs = tensors.shape(stack.lora.names["lora_A"])[1]
    outputs = tensors.shape(stack.lora.names["lora_B"])[0]
    shape = (inputs, outputs) if flipped else (outputs, inputs)
    rank = tensors.shape(stack.lora.names["lora_A"])[0] // stack.experts
    scaling = scaling_of(config, stack.lora, rank)
    if stack.is_matrix and stack.leaf != "weight":
        raise UnsupportedError(
            f"{stack.name}: a LoRA on a parameter that is neither a weight nor a stack of them is not supported"
        )
    paths = [f"{stack.name}.{index}" for index in range(stack.experts)]
    if stack.is_matrix:
        paths = [stack.name.removesuffix(".weight")]
    return {
        path: LazyDelta(
            LowRank,
            shape,
            functools.partial(_load_expert, stack, index, rank, scaling, flipped, recent),
            rank,
            stacked=not stack.is_matrix,
            parameter=stack.is_matrix,
        )
        for index, path in enumerate(paths)
    }


def _load_expert(
    stack: Stack, index: int, rank: int, scaling: float, flipped: bool, recent: _RecentTensors
) -> LowRank:
    lora_A = recent.read(stack.lora.names["lora_A"])[index * rank : (index + 1) * rank]
    lora_B = recent.read(stack.lora.names["lora_B"])[:, index :: stack.experts]
    if flipped:
        lora_A, lora_B = lora_B.T, lora_A.T
    layout = CONV1D if stack.transposed else LINEAR
    layout = layout if stack.is_matrix else dataclasses.replace(layout, expert=index)
    return LowRank(lora_A, lora_B, scaling, layout=layout)


def write_experts(
    modules: Mapping[str, LowRank], rank: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return fields of the configuration, and tensors (float32), for those modules that are experts, at one rank."""
    stacks: dict[str, dict[int, LowRank]] = {}
    for module, delta in modules.items():
        if delta.layout.expert is not None:
            stacks.setdefault(module.rpartition(".")[0], {})[delta.layout.expert] = delta
    if not stacks:
        return {}, {}
    tensors: dict[str, Tensor] = {}
    for container in {name.rpartition(".")[0] for name in stacks}:
        names = [name for name in stacks if name.rpartition(".")[0] == container]
        order = nested([name.rpartition(".")[2] for name in names])
        for depth, leaf in enumerate(reversed(order)):
            key = PREFIX + container + ".base_layer" * depth
            lora_A, lora_B = _stacked_factors(stacks[f"{container}.{leaf}"], rank)
            tensors |= {f"{key}.lora_A.weight": lora_A, f"{key}.lora_B.weight": lora_B}
    return {
        "target_parameters": sorted(stacks),
        "peft_version": importlib.metadata.version("peft"),
    }, tensors


def _stacked_factors(experts: Mapping[int, LowRank], rank: int) -> tuple[Tensor, Tensor]:
    """Return lora_A (r·E, in) and lora_B (out, r·E) of a stack; an expert that no adapter touches is zero."""
    first = next(iter(experts.values()))
    exchanged = _is_exchanged(installed_peft(), transposed=first.layout.transposed)
    count, (outputs, inputs) = 1 + max(experts), first.shape[::-1] if exchanged else first.shape
    lora_A, lora_B = torch.zeros(count, rank, inputs), torch.zeros(outputs, rank, count)
    for index, delta in experts.items():
        factors = delta.lora_A, delta.lora_B.double() * delta.scaling
        factor_A, factor_B = (factors[1].T, factors[0].T) if exchanged else factors
        lora_A[index, : delta.rank] = factor_A
        lora_B[:, : delta.rank, index] = factor_B
    return lora_A.flatten(0, 1), lora_B.flatten(1)
