"""LoRA: ΔW = scaling · lora_B @ lora_A, and its variants."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, LowRank, Rescaled
from pcb_peft.deltas.layout import CONV1D, Layout
from pcb_peft.deltas.replacements import Parameter
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.checkpoint import Tensors
from pcb_peft.formats.dora import direction, rescaled, with_magnitudes
from pcb_peft.formats.heads import read_rows
from pcb_peft.formats.lora_experts import read_experts, write_experts
from pcb_peft.formats.lora_parts import (
    Factors,
    Parts,
    factors_of,
    parts_of,
    scaling_of,
    stored,
    target_of,
)
from pcb_peft.formats.lora_variants import InitResidual, taken_from, without
from pcb_peft.formats.registry import (
    PREFIX,
    AdapterContents,
    AdapterFiles,
    Base,
    Config,
    Format,
    LazyDelta,
    RowStore,
    as_dense,
    base_weight,
    bias_entries,
    finite,
    is_vector,
    register,
    saved_parameters,
    vector_delta,
    without_base,
)

TOKENS = "token_adapter."
OUTPUTS = ("lm_head", "embed_out", "decoder", "output", "output_layer")

UNSUPPORTED = {  # what would change ΔW, and is not read: configuration field to reason
    "layer_replication": "the adapter's layers are not those of the base model",
    "use_qalora": "QALoRA has no ΔW of W's shape",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only: it has no ΔW",
    "arrow_config": "an Arrow router has no single ΔW",
}


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """The deltas of a LoRA checkpoint.

    Raises:
        UnsupportedError: The adapter uses a feature that changes ΔW in a way that is not read.
        AdapterError: Tensors are missing, or do not have the shapes that the configuration says.
    """
    for field, reason in UNSUPPORTED.items():
        if config.get(field):
            raise UnsupportedError(f"{field} = {config[field]!r} is not supported: {reason}")
    taken = None if _residual(config, base) else taken_from(config)
    modules, rest = parts_of(config, tensors.names())
    biases, rest = bias_entries(config, tensors, rest, base)
    read_ = read_rows(tensors, rest, TOKENS, functools.partial(_rows_stated, config))
    saved = saved_parameters(tensors, read_.rest)
    entries, modules = read_experts(config, tensors, base, modules)
    for parts in modules:
        factors = factors_of(config, tensors, parts)
        scaling = scaling_of(config, parts, factors.rank)
        ground = saved.get(f"{parts.module}.weight", base)
        whole = factors.layout.shape or factors.layout.lookup or isinstance(ground, Parameter)
        entries[parts.module] = _weight(
            tensors, ground, parts, factors, scaling, None if whole else taken
        )
        if "lora_B.bias" in parts.names:
            entries[f"{parts.module}.bias"] = _bias(tensors, parts.names["lora_B.bias"], scaling)
    return AdapterContents(entries | biases, saved, read_.rows, read_.copies)


def _rows_stated(config: Config, module: str) -> Sequence[int] | None:
    """The rows of a module that the configuration says to be replaced; a list is for the input embeddings."""
    stated = config.get("trainable_token_indices")
    if isinstance(stated, Mapping):
        return next((rows for end, rows in stated.items() if module.endswith(end)), None)
    return None if module.rpartition(".")[2] in OUTPUTS else stated


def _residual(config: Config, base: Base) -> bool:
    """Whether what the initialisation takes out of W is out of it already."""
    plain = isinstance(config.get("init_lora_weights", True), bool)
    return base is not None and not (plain and not config.get("kasa_config")) and base().residual


def _weight(
    tensors: Tensors,
    base: Base | Parameter,
    parts: Parts,
    factors: Factors,
    scaling: float,
    taken: InitResidual | None,
) -> LazyDelta:
    """What the adapter does to a module's weight: the base's, or the one that it brings along."""

    def plain() -> LowRank:
        lora_A, lora_B = factors.read()
        if diagonal := parts.names.get("lora_diag"):
            lora_A = finite(tensors, diagonal)[:, None] * lora_A
        return LowRank(lora_A, lora_B, scaling, layout=factors.layout)

    magnitude = parts.names.get("lora_magnitude_vector")
    if taken is None and magnitude is None:
        return LazyDelta(LowRank, factors.shape, plain, factors.rank)
    reasons = [taken.reason] if taken else []
    reasons += ["DoRA rescales W + BA by its norm"] if magnitude else []
    why = ", and ".join(reasons)

    def weight() -> tuple[Tensor, Layout]:
        return base_weight(base, parts.module, factors.shape, why, factors.layout)

    def load() -> Delta:
        values, layout = weight()
        delta = dataclasses.replace(plain(), layout=layout)
        if taken:
            delta = without(delta, taken.function(values, factors.rank, scaling))
        if magnitude is None:
            return delta
        return rescaled(values, delta, finite(tensors, magnitude), lambda: weight()[0])

    kind = LowRank if magnitude is None else Rescaled
    missing = without_base(parts.module, why) if base is None else ""
    entry = LazyDelta(kind, factors.shape, load, (2 if taken else 1) * factors.rank, missing)
    return as_dense(entry) if isinstance(base, Parameter) else entry


def _bias(tensors: Tensors, name: str, scaling: float) -> LazyDelta:
    """What `lora_bias` adds to a bias."""

    def load() -> LowRank:
        return vector_delta(finite(tensors, name) * scaling)

    return LazyDelta(LowRank, (tensors.shape(name)[0], 1), load, 1)


def write(
    modules: Mapping[str, LowRank | Rescaled], dtype: torch.dtype, *, rank_pattern: bool = False
) -> AdapterFiles:
    """The deltas as a LoRA checkpoint whose scaling is 1 everywhere; as a DoRA, if they rescale W.

    Args:
        modules: By module path.
        dtype: Of the tensors; the only rounding.
        rank_pattern: Give every module its own rank, where else the smaller ones are padded with zeros.

    Raises:
        UnsupportedError: A bias changes whose weight does not.
    """
    held = {name: d.without_zero_rows() for name, d in modules.items() if isinstance(d, Rescaled)}
    plain = {name: d for name, d in modules.items() if isinstance(d, LowRank)}
    plain |= {name: direction(delta) for name, delta in held.items()}
    return with_magnitudes(_factors(plain, dtype, rank_pattern=rank_pattern), held)


def _factors(
    modules: Mapping[str, LowRank], dtype: torch.dtype, *, rank_pattern: bool
) -> AdapterFiles:
    """The deltas as a LoRA checkpoint; arguments and errors are `write`'s."""
    biases = {name: delta for name, delta in modules.items() if is_vector(delta)}
    weights = {name: delta for name, delta in modules.items() if name not in biases}
    rank = max((delta.rank for delta in weights.values()), default=1)
    parameters, tensors = write_experts(weights, rank)
    weights = {name: delta for name, delta in weights.items() if delta.layout.expert is None}
    tensors = {name: values.to(dtype) for name, values in tensors.items()}
    for module, delta in weights.items():
        lora_A, lora_B = _padded(delta, delta.rank if rank_pattern else rank)
        factors = lora_A.to(dtype), lora_B.to(dtype)
        tensors |= stored(module, weights, factors, delta.layout)
    targets = sorted({target_of(module, weights) for module in weights})
    tensors |= _biases(biases, weights, dtype)
    ranks = {
        _pattern(target_of(module, weights), targets): delta.rank
        for module, delta in weights.items()
        if delta.rank != rank
    }
    layouts = [delta.layout for delta in weights.values()]
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": CONV1D in layouts,
        "init_lora_weights": True,
        "target_modules": targets,
        **parameters,
    }
    if biases:
        config["lora_bias"] = True
    if rank_pattern and ranks:
        config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    return AdapterFiles(config, tensors)


def _biases(
    biases: Mapping[str, LowRank], weights: Mapping[str, LowRank], dtype: torch.dtype
) -> dict[str, Tensor]:
    """``lora_B.bias`` of every module if one has it: PEFT knows `lora_bias` for all or none."""
    if not biases:
        return {}
    owners = {name.removesuffix(".bias") for name in biases}
    if alone := sorted(owners - weights.keys()):
        raise UnsupportedError(
            f"a vector of {alone[0]} changes, but no matrix beside it does, and LoRA holds no such change: fold the "
            "adapter into the base model"
        )
    tensors: dict[str, Tensor] = {}
    for module, delta in weights.items():
        bias = biases.get(f"{module}.bias")
        values = torch.zeros(delta.shape[0]) if bias is None else bias.matrix()[:, 0]
        tensors[f"{PREFIX}{module}.lora_B.bias"] = values.to(dtype)
    return tensors


def _pattern(module: str, modules: Collection[str]) -> str:
    """The key of a pattern that matches this one of the modules only."""
    ambiguous = any(other.endswith(f".{module}") for other in modules)
    return f"^{module}" if ambiguous else module


def _padded(delta: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B (float32) of the same ΔW at scaling 1, padded with zeros to a rank."""
    lora_A, lora_B, padding = delta.lora_A.float(), delta.lora_B, rank - delta.rank
    lora_B = (lora_B if delta.scaling == 1 else lora_B.double() * delta.scaling).float()
    if not padding:
        return lora_A, lora_B
    pad = torch.nn.functional.pad
    return pad(lora_A, (0, 0, 0, padding)), pad(lora_B, (0, padding))


def row_config(indices: Mapping[str, list[int]]) -> dict[str, Any]:
    """The field of the configuration that tells the rows of each module."""
    return {"trainable_token_indices": dict(indices)}


register(Format("LORA", read, (LowRank, Rescaled), write, RowStore(TOKENS, row_config)))
