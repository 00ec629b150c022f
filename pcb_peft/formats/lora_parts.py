"""The tensors of a LoRA by module, and the two factors (out, r) and (r, in) that they make for every kind of layer."""

import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.layout import CONV1D, EMBEDDING, LINEAR, Layout
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.files.patterns import Patterns
from pcb_peft.formats.checkpoint import Tensors, read_finite
from pcb_peft.formats.keys import PREFIX, module_of
from pcb_peft.formats.lazy_delta import Config
from pcb_peft.runtime.shown import quoted

OPTIONAL = {  # part that only some LoRAs have: the field of the configuration that says so
    "lora_magnitude_vector": "use_dora",
    "lora_B.bias": "lora_bias",
    "lora_diag": "kasa_config",
    "lora_monteclora_sampler": "monteclora_config",
    "lora_velora_embed": "velora_config",
}
PART = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_[AB](?=\.weight$)|lora_B\.bias$|lora_embedding_[AB]$|lora_magnitude_vector|lora_diag$)"
    r"(\.weight)?"
)
WRAPPERS = re.compile(r"(\.base_layer)+$")
TRAINING_ONLY = re.compile(r".+\.(lora_monteclora_sampler|lora_velora_embed)(\..+)?")
IN_PROJ = "in_proj_weight"
WRAPPED = ".base_layer.out_proj"
WRAPPED_TIMES = 2  # PEFT adds the change of this projection twice, in training as in merging
DEFAULT = 8  # PEFT's r and lora_alpha, where the configuration leaves them out


@dataclasses.dataclass(frozen=True, slots=True)
class LoraTensors:
    """The tensors that a LoRA holds for one module.

    Attributes:
        path: Beginning of their names, without PEFT's prefix.
        names: Part (``lora_A``, ``lora_B.bias`` …) to the tensor's name.
        attention: True for MultiheadAttention's joint projection of queries, keys and values.
        depth: Number of PEFT's wrappers around the layer that holds them.
    """

    path: str
    names: Mapping[str, str]
    attention: bool = False
    depth: int = 0

    @property
    def module(self) -> str:
        """Path of the weight that they change."""
        if self.attention:
            return f"{self.path}.{IN_PROJ}"
        if self.path.endswith(WRAPPED):
            return self.path.replace(".base_layer.", ".")
        return self.path

    @property
    def patterned(self) -> str:
        """Name that PEFT matches with its patterns of rank and alpha."""
        return self.path.removesuffix(WRAPPED)


def tensors_by_module(config: Config, names: Sequence[str]) -> tuple[list[LoraTensors], list[str]]:
    """Return the modules, and the names that belong to none; tensors that only training needs are left out.

    Raises:
        UnsupportedError: A tensor belongs to a variant that the configuration does not have.
    """
    modules: dict[str, dict[str, str]] = {}
    rest: list[str] = []
    for name in names:
        used, ignored = PART.fullmatch(name), TRAINING_ONLY.fullmatch(name)
        part = ignored[1] if ignored else ""
        if used:
            part = used["part"]
            modules.setdefault(used["path"], {})[part] = name
        elif not ignored:
            rest.append(name)
        if part in OPTIONAL and not config.get(OPTIONAL[part]):
            raise UnsupportedError(
                f"tensor {name} belongs to a LoRA with {OPTIONAL[part]}, which the configuration does not have"
            )
    return [
        _of_module(key, names, key + WRAPPED in modules) for key, names in modules.items()
    ], rest


def _of_module(key: str, names: Mapping[str, str], attention: bool) -> LoraTensors:
    if key.endswith(WRAPPED):
        return LoraTensors(module_of(key.removesuffix(WRAPPED)) + WRAPPED, names)
    path = WRAPPERS.sub("", key)
    depth = (len(key) - len(path)) // len(".base_layer")
    return LoraTensors(module_of(path), names, attention, depth)


@dataclasses.dataclass(frozen=True, slots=True)
class LazyFactors:
    """lora_A (r, in) and lora_B (out, r) of one module, before they are read.

    Attributes:
        shape: (out, in).
        rank: r.
        layout: How the layer stores W.
        tensors: The adapter's tensors.
        names: Tensors that hold lora_A and lora_B.
        blocks: Number of diagonal blocks of which lora_A and lora_B consist (BD-LoRA); 1 in a plain LoRA.
    """

    shape: tuple[int, int]
    rank: int
    layout: Layout
    tensors: Tensors
    names: tuple[str, str]
    blocks: tuple[int, int]

    def read(self) -> tuple[Tensor, Tensor]:
        """Return lora_A and lora_B, float32."""
        lora_A, lora_B = (
            _block_diagonal(read_finite(self.tensors, name).flatten(1), count)
            for name, count in zip(self.names, self.blocks, strict=True)
        )
        return lora_A, lora_B


def _stacks(config: Config) -> str:
    """Return, for a message, why an adapter's stacks of experts are not found."""
    if not config.get("target_parameters"):
        return ""
    return (
        f"; its target_parameters {config['target_parameters']} are not in this module of the base model, as "
        f"transformers {importlib.metadata.version('transformers')} builds it: give the base model that it was trained "
        "on, or install transformers 5, which has experts as stacks"
    )


def factors_of(config: Config, tensors: Tensors, lora: LoraTensors) -> LazyFactors:
    """Return the factors of a Linear, Conv1D, Embedding, ConvNd or of MultiheadAttention's projections.

    Raises:
        UnsupportedError: A grouped convolution, or a layer inside another adapter's.
        AdapterError: One factor is missing, or their ranks differ.
    """
    if lora.depth:
        raise UnsupportedError(
            f"{lora.path}: a LoRA inside a wrapped layer is not supported{_stacks(config)}"
        )
    kind = "lora_embedding_" if "lora_embedding_A" in lora.names else "lora_"
    names = [lora.names.get(kind + side) for side in "AB"]
    if names[0] is None or names[1] is None:
        sides = [
            f"no {kind}{side}" if name is None else name
            for side, name in zip("AB", names, strict=True)
        ]
        raise AdapterError(f"{lora.path} has {' and '.join(sides)}")
    if config.get("use_dora") and "lora_magnitude_vector" not in lora.names:
        raise AdapterError(f"{lora.path} has no lora_magnitude_vector, though it is a DoRA")
    key_A, key_B = names[0], names[1]
    shape_A, shape_B = tensors.shape(key_A), tensors.shape(key_B)
    if min(len(shape_A), len(shape_B)) < 2:
        raise AdapterError(f"{lora.path}: lora_A {shape_A} and lora_B {shape_B} must be matrices")
    if 0 in (*shape_A, *shape_B):
        raise AdapterError(
            f"{lora.path}: lora_A {shape_A} and lora_B {shape_B} hold no values: the rank is 0"
        )
    block_A, block_B = _blocks(config, lora, (shape_A, shape_B))
    if shape_A[0] != shape_B[1] * block_B:
        if len(shape_B) > 2:
            raise UnsupportedError(
                f"{lora.path} is a grouped convolution (lora_A {shape_A}, lora_B {shape_B}): PEFT trains a change "
                "that W of a grouped convolution cannot hold; leave the module out"
            )
        raise AdapterError(
            f"{lora.path}: lora_A {shape_A} and lora_B {shape_B} have different ranks"
        )
    shape = (shape_B[0], math.prod(shape_A[1:]) * block_A)
    _check_vectors(tensors, lora, shape[0], shape_A[0])
    layout = _layout(config, lora, shape_A, shape_B)
    blocks = (block_A, block_B)
    return LazyFactors(shape, shape_A[0], layout, tensors, (key_A, key_B), blocks)


def _check_vectors(tensors: Tensors, lora: LoraTensors, out: int, rank: int) -> None:
    """Raise AdapterError where a vector beside the factors has more or fewer values than it must."""
    sizes = {"lora_magnitude_vector": out, "lora_B.bias": out, "lora_diag": rank}
    for part, size in sizes.items():
        if part in lora.names and math.prod(tensors.shape(lora.names[part])) != size:
            shape = tensors.shape(lora.names[part])
            raise AdapterError(f"{lora.path}: {part} has shape {shape}; it must have {size} values")


def _layout(
    config: Config, lora: LoraTensors, shape_A: tuple[int, ...], shape_B: tuple[int, ...]
) -> Layout:
    if "lora_embedding_A" in lora.names:
        return EMBEDDING
    if len(shape_A) > 2:
        return Layout(shape=(shape_B[0], *shape_A[1:]))
    return CONV1D if config.get("fan_in_fan_out") else LINEAR


def _blocks(
    config: Config, lora: LoraTensors, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[int, int]:
    """Return the number of diagonal blocks of lora_A and of lora_B (BD-LoRA); 1 each in a plain LoRA."""
    stated: Any = config.get("use_bdlora")
    if not isinstance(stated, Mapping) or len(shapes[0]) > 2:
        return 1, 1
    first, second = (
        any(word in lora.path for word in stated.get(f"target_modules_bd_{side}") or [])
        for side in "ab"
    )
    count = int(stated.get("nblocks", 1))
    return (count if first else 1), (count if second and not first else 1)


def _block_diagonal(stacked: Tensor, count: int) -> Tensor:
    """Return blocks that are stored on top of each other along the diagonal."""
    return stacked if count == 1 else torch.block_diag(*stacked.chunk(count))


def scaling_of(config: Config, lora: LoraTensors, rank: int) -> float:
    """Return alpha/r or alpha/√r, with the patterns that match the module.

    Raises:
        AdapterError: The configuration has another rank than the tensors.
    """
    module = lora.patterned
    stated = pattern_value(config, "rank_pattern", module, config.get("r", DEFAULT))
    if stated != rank:
        raise AdapterError(
            f"{module}: lora_A has rank {rank}, but the configuration says {quoted(stated)}"
        )
    alpha = pattern_value(config, "alpha_pattern", module, config.get("lora_alpha", DEFAULT))
    if alpha is None:
        raise AdapterError(f"{module}: lora_alpha is null; it must be a number")
    times = WRAPPED_TIMES if lora.path.endswith(WRAPPED) else 1
    return times * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def pattern_value(config: Config, field: str, module: str, default: Any) -> Any:
    """Return the value of the first key, in the order of the file, that matches the module as PEFT matches it.

    Raises:
        AdapterError: A key is not a regular expression that can be matched in a bounded time.
    """
    patterns: Patterns | None = config.get(field)
    return patterns.value(module, default) if patterns else default


def stored(
    module: str, modules: Container[str], factors: tuple[Tensor, Tensor], layout: Layout
) -> dict[str, Tensor]:
    """Return the tensors that PEFT stores for lora_A (r, in) and lora_B (out, r) of one of the modules."""
    lora_A, lora_B = factors
    if layout.lookup:
        key = f"{PREFIX}{module}.lora_embedding_"
        return {key + "A": lora_A, key + "B": lora_B}
    kernel = () if layout.shape is None else layout.shape[2:]
    lora_A = lora_A.reshape(lora_A.shape[0], -1, *kernel)
    lora_B = lora_B[(..., *[None] * len(kernel))]
    attention, _, last = module.rpartition(".")
    if last == "out_proj" and f"{attention}.{IN_PROJ}" in modules:
        module, lora_B = attention + WRAPPED, lora_B / WRAPPED_TIMES
    key = f"{PREFIX}{module.removesuffix(f'.{IN_PROJ}')}.lora_"
    return {key + "A.weight": lora_A, key + "B.weight": lora_B}


def target_of(module: str, modules: Container[str]) -> str:
    """Return the path that PEFT must target for one of the modules."""
    attention, _, last = module.rpartition(".")
    joint = last == IN_PROJ or (last == "out_proj" and f"{attention}.{IN_PROJ}" in modules)
    return attention if joint else module
