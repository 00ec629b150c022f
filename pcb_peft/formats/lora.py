"""LoRA, on layers whose ΔW is scaling · lora_B @ lora_A."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pcb_peft.delta import LowRank
from pcb_peft.errors import AdapterError, UnsupportedError
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.registry import (
    PREFIX,
    Config,
    Contents,
    Entry,
    Format,
    Written,
    finite,
    module_of,
    register,
    saved_parameters,
)

A, B = ".lora_A.weight", ".lora_B.weight"

UNSUPPORTED = {  # what would change ΔW, and is not read: configuration field to reason
    "use_dora": "DoRA's ΔW depends on the base weight",
    "lora_bias": "the bias of lora_B is not merged",
    "trainable_token_indices": "trained token rows are not merged",
    "target_parameters": "LoRA on parameters (experts) is not read",
    "layer_replication": "the adapter's layers are not those of the base model",
    "use_qalora": "QALoRA has no ΔW of W's shape",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only: it has no ΔW",
    "arrow_config": "an Arrow router has no single ΔW",
    "use_bdlora": "block-diagonal LoRA is not read",
    "kasa_config": "KaSA changes the base weights",
}
DEFAULT = 8  # PEFT's r and lora_alpha, where the configuration leaves them out
MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
CONVERSION = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"


def read(config: Config, tensors: Tensors) -> Contents:
    """The low-rank deltas of a LoRA checkpoint.

    Raises:
        UnsupportedError: The adapter uses a feature that changes ΔW in a way that is not read.
        AdapterError: Tensors are missing, or do not have the shapes that the configuration says.
    """
    refuse_unsupported(config)
    names = tensors.names()
    modules = {name.removesuffix(A): name for name in names if name.endswith(A)}
    entries = {module_of(key): _entry(config, tensors, key) for key in modules}
    rest = [
        name for name in names if not name.endswith((A, B)) or name.rsplit(".", 2)[0] not in modules
    ]
    return Contents(entries, saved_parameters(tensors, rest))


def refuse_unsupported(config: Config) -> None:
    """Raises UnsupportedError, with the reason, for what would make the factors mean something else."""
    for field, reason in UNSUPPORTED.items():
        if config.get(field):
            raise UnsupportedError(f"{field} = {config[field]!r} is not supported: {reason}")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"bias = {config['bias']!r} is not supported: trained biases are not merged"
        )
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(MUTATING_INITS):
        raise UnsupportedError(
            f"init_lora_weights = {init!r} is not supported: it changes the base weights, so lora_B @ lora_A is not "
            f"the change of the original model; convert the adapter first with PEFT's {CONVERSION}"
        )


def scaling_of(config: Config, module: str, rank: int) -> float:
    """alpha/r or alpha/√r, with the patterns that match the module.

    Raises:
        AdapterError: The configuration says another rank than the tensors have.
    """
    stated = pattern_value(config, "rank_pattern", module, config.get("r", DEFAULT))
    if stated != rank:
        raise AdapterError(
            f"{module}: lora_A has rank {rank}, but the configuration says {stated!r}"
        )
    alpha = pattern_value(config, "alpha_pattern", module, config.get("lora_alpha", DEFAULT))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{module}: lora_alpha is {alpha!r}; it must be a finite number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def pattern_value(config: Config, field: str, module: str, default: Any) -> Any:
    """The value of the first key, in the order of the file, that matches the module as PEFT matches it.

    Raises:
        AdapterError: The field is not a mapping of regular expressions.
    """
    pattern = config.get(field) or {}
    try:
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
    except (AttributeError, re.error) as error:
        raise AdapterError(
            f"{field} is {pattern!r}; it must map regular expressions to numbers: {error}"
        ) from error
    return default


def _entry(config: Config, tensors: Tensors, key: str) -> Entry:
    module = key.removeprefix(PREFIX)
    if key + B not in tensors.names():
        raise AdapterError(f"{module} has lora_A but no lora_B")
    shape_A, shape_B = tensors.shape(key + A), tensors.shape(key + B)
    if len(shape_A) != 2 or len(shape_B) != 2:
        raise UnsupportedError(
            f"{module}: LoRA on a convolution ({shape_A}, {shape_B}) is not supported"
        )
    if shape_A[0] != shape_B[1]:
        raise AdapterError(f"{module}: lora_A {shape_A} and lora_B {shape_B} have different ranks")
    scaling = scaling_of(config, module, shape_A[0])
    flip = bool(config.get("fan_in_fan_out"))

    def load() -> LowRank:
        return LowRank(
            finite(tensors, key + A), finite(tensors, key + B), scaling, fan_in_fan_out=flip
        )

    return Entry(LowRank, (shape_B[0], shape_A[1]), load, rank=shape_A[0])


def write(
    modules: Mapping[str, LowRank], dtype: torch.dtype, *, rank_pattern: bool = False
) -> Written:
    """The deltas as a LoRA checkpoint whose scaling is 1 everywhere.

    Args:
        modules: By module path.
        dtype: Of the tensors; the only rounding.
        rank_pattern: Give every module its own rank, where else the smaller ones are padded with zeros.
    """
    rank = max(delta.rank for delta in modules.values())
    tensors: dict[str, Tensor] = {}
    for module, delta in modules.items():
        width = delta.rank if rank_pattern else rank
        lora_A, lora_B = _unscaled(delta)
        padding = width - delta.rank
        tensors[PREFIX + module + A] = torch.nn.functional.pad(lora_A, (0, 0, 0, padding)).to(dtype)
        tensors[PREFIX + module + B] = torch.nn.functional.pad(lora_B, (0, padding)).to(dtype)
    ranks = {
        _pattern(module, modules): delta.rank
        for module, delta in modules.items()
        if delta.rank != rank
    }
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": any(delta.fan_in_fan_out for delta in modules.values()),
        "init_lora_weights": True,
        "target_modules": sorted(modules),
    }
    if rank_pattern and ranks:
        config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    return Written(config, tensors)


def _pattern(module: str, modules: Collection[str]) -> str:
    """The key of a pattern that matches this one of the modules only."""
    ambiguous = any(other.endswith(f".{module}") for other in modules)
    return f"^{module}" if ambiguous else module


def _unscaled(delta: LowRank) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B (float32) of the same ΔW at scaling 1."""
    return delta.lora_A.float(), (delta.lora_B.double() * delta.scaling).float()


register(Format("LORA", read, LowRank, write))
