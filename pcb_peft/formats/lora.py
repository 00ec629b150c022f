"""LoRA: ΔW = scaling · lora_B @ lora_A, and its variants."""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Delta, LowRank, Rescaled
from pcb_peft.deltas.layout import CONV1D
from pcb_peft.deltas.replacements import ReplacedParameter
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.base_weights import Base, BaseWeight, bias_entries
from pcb_peft.formats.checkpoint import Tensors, read_finite
from pcb_peft.formats.dora import direction, rescaled, with_magnitudes
from pcb_peft.formats.heads import read_rows, saved_parameters
from pcb_peft.formats.keys import PREFIX
from pcb_peft.formats.lazy_delta import (
    AdapterContents,
    AdapterFiles,
    Config,
    LazyDelta,
    as_dense,
    is_vector,
    vector_delta,
)
from pcb_peft.formats.lora_expert_tensors import read_expert_tensors
from pcb_peft.formats.lora_experts import read_experts, write_experts
from pcb_peft.formats.lora_parts import (
    LazyFactors,
    LoraTensors,
    factors_of,
    scaling_of,
    stored,
    target_of,
    tensors_by_module,
)
from pcb_peft.formats.lora_variants import InitResidual, init_residual, without_residual
from pcb_peft.formats.registry import Format, RowStore, register
from pcb_peft.runtime.shown import quoted

TOKENS = "token_adapter."
OUTPUTS = ("lm_head", "embed_out", "decoder", "output", "output_layer")

SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""Matches experts one by one: PEFT stacks them, for which they must have one rank."""

UNSUPPORTED = {  # field of the configuration to the reason why such a LoRA is not read
    "layer_replication": "the adapter's layers are not those of the base model",
    "use_qalora": "QALoRA has no ΔW of W's shape",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only: it has no ΔW",
    "arrow_config": "an Arrow router has no single ΔW",
}


def read(config: Config, tensors: Tensors, base: Base) -> AdapterContents:
    """Return the deltas of a LoRA checkpoint.

    Raises:
        UnsupportedError: The adapter uses a feature that changes ΔW in a way that is not read.
        AdapterError: Tensors are missing, or do not have the shapes that the configuration says.
    """
    for field, reason in UNSUPPORTED.items():
        if config.get(field):
            raise UnsupportedError(f"{field} = {quoted(config[field])} is not supported: {reason}")
    residual = None if _already_taken_out(config, base) else init_residual(config)
    modules, rest = tensors_by_module(config, tensors.names())
    biases, rest = bias_entries(config, tensors, rest, base)
    replaced = read_rows(tensors, rest, TOKENS, functools.partial(_row_numbers, config))
    saved = saved_parameters(tensors, replaced.rest)
    entries, modules = read_experts(config, tensors, base, modules)
    experts, modules = read_expert_tensors(config, tensors, modules)
    entries |= experts
    for lora in modules:
        factors = factors_of(config, tensors, lora)
        scaling = scaling_of(config, lora, factors.rank)
        weight = saved.get(f"{lora.module}.weight", base)
        entries[lora.module] = _entry(lora, factors, scaling, residual, weight)
        if "lora_B.bias" in lora.names:
            name = lora.names["lora_B.bias"]
            load = functools.partial(_bias, tensors, name, scaling)
            entries[f"{lora.module}.bias"] = LazyDelta(
                LowRank, (tensors.shape(name)[0], 1), load, 1
            )
    return AdapterContents(entries | biases, saved, replaced.rows, replaced.copies)


def _row_numbers(config: Config, module: str) -> Sequence[int] | None:
    """Return the rows of a module that the configuration says to be replaced; a list is for the input embeddings."""
    stated = config.get("trainable_token_indices")
    if isinstance(stated, Mapping):
        return next((rows for end, rows in stated.items() if module.endswith(end)), None)
    return None if module.rpartition(".")[2] in OUTPUTS else stated


def _already_taken_out(config: Config, base: Base) -> bool:
    """Return whether the initialisation's part is out of the base model's W already: in a PeftModel in memory."""
    plain = isinstance(config.get("init_lora_weights", True), bool)
    return base is not None and not (plain and not config.get("kasa_config")) and base().residual


@dataclasses.dataclass(frozen=True, slots=True)
class _LoadLora:
    """Reads the change of one module.

    Attributes:
        lora: Tensors of the module.
        factors: lora_A and lora_B.
        scaling: alpha/r or alpha/√r.
        residual: The part of W that the initialisation took out, if any.
        weight: Reads W, which only a DoRA or an initialisation that took out a part of W needs.
    """

    lora: LoraTensors
    factors: LazyFactors
    scaling: float
    residual: InitResidual | None
    weight: BaseWeight

    def __call__(self) -> Delta:
        magnitude = self.lora.names.get("lora_magnitude_vector")
        if self.residual is None and magnitude is None:
            return self._low_rank()
        values, layout = self.weight.read()
        delta = dataclasses.replace(self._low_rank(), layout=layout)
        if self.residual:
            taken = self.residual.function(values, self.factors.rank, self.scaling)
            delta = without_residual(delta, taken)
        if magnitude is None:
            return delta
        return rescaled(values, delta, read_finite(self.factors.tensors, magnitude), self.weight)

    def _low_rank(self) -> LowRank:
        lora_A, lora_B = self.factors.read()
        if diagonal := self.lora.names.get("lora_diag"):
            lora_A = read_finite(self.factors.tensors, diagonal)[:, None] * lora_A
        return LowRank(lora_A, lora_B, self.scaling, layout=self.factors.layout)


def _entry(
    lora: LoraTensors,
    factors: LazyFactors,
    scaling: float,
    residual: InitResidual | None,
    base: Base | ReplacedParameter,
) -> LazyDelta:
    """Return the change of a module's weight: the base model's, or the one that the adapter brings along."""
    brought_along = isinstance(base, ReplacedParameter)
    if factors.layout.shape or factors.layout.lookup or brought_along:
        residual = None  # PEFT takes nothing out of these
    is_dora = "lora_magnitude_vector" in lora.names
    reasons = [residual.reason] if residual else []
    reasons += ["DoRA rescales W + BA by its norm"] if is_dora else []
    why = ", and ".join(reasons)
    weight = BaseWeight(base, lora.module, factors.shape, why, factors.layout)
    entry = LazyDelta(
        kind=Rescaled if is_dora else LowRank,
        shape=factors.shape,
        load=_LoadLora(lora, factors, scaling, residual, weight),
        rank=2 * factors.rank if residual else factors.rank,
        missing=f"{lora.module}: {why}" if why and base is None else "",
    )
    return as_dense(entry) if brought_along else entry


def _bias(tensors: Tensors, name: str, scaling: float) -> LowRank:
    """Return the change of a bias (PEFT's `lora_bias`)."""
    return vector_delta(read_finite(tensors, name) * scaling)


def write(
    modules: Mapping[str, LowRank | Rescaled], dtype: torch.dtype, *, rank_pattern: bool = False
) -> AdapterFiles:
    """Return the deltas as a LoRA checkpoint whose scaling is 1 everywhere; as a DoRA, if they rescale W.

    Args:
        modules: Deltas by module path.
        dtype: Dtype of the tensors, to which they are rounded once.
        rank_pattern: Give every module its own rank; else smaller ranks are padded with zeros.

    Raises:
        UnsupportedError: A bias changes whose weight does not.
    """
    doras = {name: d.without_zero_rows() for name, d in modules.items() if isinstance(d, Rescaled)}
    loras = {name: d for name, d in modules.items() if isinstance(d, LowRank)}
    loras |= {name: direction(delta) for name, delta in doras.items()}
    return with_magnitudes(_write_loras(loras, dtype, rank_pattern=rank_pattern), doras)


def _write_loras(
    modules: Mapping[str, LowRank], dtype: torch.dtype, *, rank_pattern: bool
) -> AdapterFiles:
    """Return the deltas as a LoRA checkpoint; arguments and errors are those of `write`."""
    biases = {name: delta for name, delta in modules.items() if is_vector(delta)}
    weights = {name: delta for name, delta in modules.items() if name not in biases}
    singles = {name for name in weights if SINGLE_EXPERT.search(name)} if rank_pattern else set()
    rank = max((weights[name].rank for name in singles or weights), default=1)
    expert_config, expert_tensors = write_experts(weights, rank)
    weights = {name: delta for name, delta in weights.items() if delta.layout.expert is None}
    tensors = {name: values.to(dtype) for name, values in expert_tensors.items()}
    own_ranks = {
        name: delta.rank if rank_pattern and name not in singles else rank
        for name, delta in weights.items()
    }
    for module, delta in weights.items():
        lora_A, lora_B = delta.padded(own_ranks[module])
        factors = lora_A.to(dtype), lora_B.to(dtype)
        tensors |= stored(module, weights, factors, delta.layout)
    targets = sorted({target_of(module, weights) for module in weights})
    tensors |= _biases(biases, weights, dtype)
    ranks = {
        _pattern(target_of(module, weights), targets): own_rank
        for module, own_rank in own_ranks.items()
        if own_rank != rank
    }
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": any(delta.layout == CONV1D for delta in weights.values()),
        "init_lora_weights": True,
        "target_modules": targets,
        **expert_config,
    }
    if biases:
        config["lora_bias"] = True
    if rank_pattern and ranks:
        config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    return AdapterFiles(config, tensors)


def _biases(
    biases: Mapping[str, LowRank], weights: Mapping[str, LowRank], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return ``lora_B.bias`` for every module if one has it: PEFT knows `lora_bias` for all modules or none."""
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
    """Return the key of a pattern that matches this module only."""
    ambiguous = any(other.endswith(f".{module}") for other in modules)
    return f"^{module}" if ambiguous else module


def row_config(indices: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return the field of the configuration that says which rows of each module are replaced."""
    return {"trainable_token_indices": dict(indices)}


register(
    Format(
        "LORA",
        read,
        kinds=(LowRank, Rescaled),
        write=write,
        rows=RowStore(TOKENS, row_config),
    )
)
