"""Quantised weights of a checkpoint: which tensors belong to a weight, and how its values are computed from them."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypeAlias

import msgspec
from torch import Tensor

from pcb_peft.base import dequantise
from pcb_peft.base.config import WAY_OUT
from pcb_peft.base.files import TensorInfo
from pcb_peft.deltas.linalg import all_finite
from pcb_peft.errors import BaseModelError
from pcb_peft.files.schema import Count, checked
from pcb_peft.runtime.shown import quoted, shown

Read: TypeAlias = Callable[[str], Tensor]
"""Read a tensor of the checkpoint by its name."""

_QUANT_STATE = re.compile(r"(.+\.weight)\.quant_state\.bitsandbytes__(nf4|fp4)$")
_PLAIN = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
_LEFTOVERS = re.compile(
    r"\.(qweight|qzeros|SCB|weight_packed|weight_scale(_inv)?|weight\.(absmax|quant_map))$|_(blocks|scales)$"
)
_OF_ACTIVATIONS = re.compile(
    r"\.(weight_format|input_scale|activation_scale|input_global_scale|input_zero_point|[kqv]_scale)$"
)
"""Matches tensors that say how inputs were quantised, or which kernel read the weight; nobody needs them afterwards."""


@dataclasses.dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight that is stored as codes and scales.

    Attributes:
        scheme: Its name, for messages.
        parts: Names of the tensors that it is made of; the first holds the codes.
        shape: Of the weight, as the layer without quantisation has it.
        values: Computes it, float32.
    """

    scheme: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    values: Callable[[], Tensor]


def quantised_weights(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read, source: str
) -> dict[str, QuantisedWeight]:
    """Find the quantised weights of a checkpoint.

    Args:
        config: ``config.json``.
        tensors: The checkpoint's tensors, by name.
        read: Reads one of them; called here for small ones only.
        source: The checkpoint's name, for messages.

    Returns:
        Parameter (``model.layers.0.mlp.up_proj.weight``) to its quantised weight; empty for an ordinary checkpoint.

    Raises:
        BaseModelError: A weight is stored in a way that is not known here.
    """
    described = _described(config)
    checked(described, _Quantisation, f"{source}: quantization_config", BaseModelError, WAY_OUT)
    with _as_described(f"{source}: its quantised weights have"):
        found = _all_weights(described, tensors, read, source)
    return {
        name: dataclasses.replace(weight, values=functools.partial(_values, weight, name, source))
        for name, weight in found.items()
    }


@contextlib.contextmanager
def _as_described(what: str) -> Generator[None]:
    """Raise BaseModelError where the parts of a weight do not fit each other, or what is said of them."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BaseModelError(
            f"{what} other shapes, or other parts, than config.json and the weights themselves say "
            f"({type(error).__name__}: {shown(error)}); {WAY_OUT}"
        ) from error


def _values(weight: "QuantisedWeight", name: str, source: str) -> Tensor:
    """Compute a weight.

    Raises:
        BaseModelError: Its parts do not fit each other, or give no numbers.
    """
    with _as_described(f"{source}: {name} ({weight.scheme}) has"):
        values = weight.values()
        if values.shape != weight.shape or not all_finite(values):
            raise ValueError(
                f"they give {tuple(values.shape)}, or infinite values, for {weight.shape}"
            )
        return values


def _all_weights(
    described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read, source: str
) -> dict[str, "QuantisedWeight"]:
    found: dict[str, QuantisedWeight] = {}
    for scheme in (_bitsandbytes_4bit, _bitsandbytes_8bit, _packed_columns, _compressed, _mxfp4):
        for parameter, weight in scheme(described, tensors, read, source):
            found.setdefault(parameter, weight)
    for parameter, weight in _scaled(described, tensors, read):
        found.setdefault(parameter, weight)
    known = {part for weight in found.values() for part in weight.parts}
    unknown = [name for name in tensors if _LEFTOVERS.search(name) and name not in known]
    method = described.get("quant_method")
    if method and not (found or unknown) and all(info.dtype in _PLAIN for info in tensors.values()):
        raise BaseModelError(
            f"{source}: config.json describes a quantisation ({method}), and the files hold plain weights: take "
            "quantization_config out of config.json"
        )
    if unknown or (method and not found):
        what = f"{unknown[0]}, for one," if unknown else "what its config.json describes"
        raise BaseModelError(
            f"{source} is quantised ({method or 'its config.json does not say how'}), and {what} cannot be dequantised "
            "here; known are bitsandbytes (NF4, FP4, INT8), GPTQ, AWQ (GEMM), FP8, MXFP4 and compressed-tensors; give "
            "the model that it was made from, in bfloat16, float16 or float32"
        )
    return found


def of_no_use_without(
    found: Mapping[str, QuantisedWeight], tensors: Mapping[str, TensorInfo]
) -> set[str]:
    """Return the tensors that a checkpoint no longer needs once its weights are plain numbers."""
    parts = {part for weight in found.values() for part in weight.parts}
    return (parts - found.keys()) | set(filter(_OF_ACTIVATIONS.search, tensors))


def is_quantised(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """Say why a checkpoint counts as quantised; empty where it does not."""
    if tensor := next(filter(_LEFTOVERS.search, tensors), None):
        return f"it holds {tensor}"
    return "its config.json has a quantization_config" if _described(config) else ""


def without_quantisation(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """``config.json`` of the same model once its weights are plain numbers of a dtype ("bfloat16")."""
    plain = {
        key: without_quantisation(value, dtype) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }
    return plain | {key: dtype for key in ("dtype", "torch_dtype") if key in plain}


def _described(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration's word on quantisation, be it that of the text model."""
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    keys = ("quantization_config", "compression_config")
    return next((part[key] for part in parts for key in keys if part.get(key)), {})


class _Codes(msgspec.Struct):
    """The codes of a group of weights, as compressed-tensors describes them."""

    num_bits: Count | None = None


class _Group(msgspec.Struct):
    """A group of compressed-tensors."""

    weights: _Codes | None = None


class _Quantisation(msgspec.Struct):
    """The fields of a quantisation that are read."""

    quant_method: str | None = None
    bits: Count = 4
    group_size: int = -1
    version: str | None = "gemm"
    checkpoint_format: str | None = None
    config_groups: dict[str, _Group] | None = None
    weight_block_size: list[Count] | None = None


_Found: TypeAlias = Iterator[tuple[str, QuantisedWeight]]


def _bitsandbytes_4bit(
    _: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read, source: str
) -> _Found:
    del source
    for name in tensors:
        match = _QUANT_STATE.fullmatch(name)
        if match and match[1] in tensors:
            weight, kind = match.groups()
            beside = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
            parts = {part: f"{weight}.{part}" for part in beside if f"{weight}.{part}" in tensors}
            state = functools.partial(_quant_state, name, parts, read)
            values = functools.partial(_four_bit_values, weight, state, read)
            every = (weight, name, *parts.values())
            yield (
                weight,
                QuantisedWeight(f"bitsandbytes {kind.upper()}", every, state().shape, values),
            )


def _quant_state(name: str, parts: Mapping[str, str], read: Read) -> dequantise.QuantState:
    return dequantise.QuantState(read(name), {part: read(tensor) for part, tensor in parts.items()})


def _four_bit_values(weight: str, state: Callable[[], dequantise.QuantState], read: Read) -> Tensor:
    return dequantise.bitsandbytes_4bit(read(weight), read(f"{weight}.absmax"), state())


def _bitsandbytes_8bit(
    _: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read, source: str
) -> _Found:
    del source
    for name in (name for name in tensors if name.endswith(".SCB")):
        weight = f"{name.removesuffix('.SCB')}.weight"
        if weight in tensors:
            values = functools.partial(_call, dequantise.bitsandbytes_8bit, read, (weight, name))
            shape = tensors[weight].shape
            yield weight, QuantisedWeight("bitsandbytes INT8", (weight, name), shape, values)


def _packed_columns(
    described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read, source: str
) -> _Found:
    """GPTQ and AWQ: both call their codes ``qweight``."""
    method, bits = described.get("quant_method"), described.get("bits", 4)
    for name in (name for name in tensors if name.endswith(".qweight")):
        module = name.removesuffix(".qweight")
        parts = [name, f"{module}.qzeros", f"{module}.scales"]
        if any(part not in tensors for part in parts):
            continue
        if method == "awq":
            _check_awq(described, source)
            rows, words = tensors[name].shape
            shape = (8 * words, rows)
            values = functools.partial(_call, dequantise.awq, read, parts)
        elif method == "gptq" and bits in (2, 3, 4, 8):
            columns = tensors[name].shape[1]
            group_size = described.get("group_size", -1)
            inputs = tensors[name].shape[0] * 32 // bits
            shape = (columns, inputs)
            if f"{module}.g_idx" in tensors:
                parts.append(f"{module}.g_idx")
            offset = 0 if described.get("checkpoint_format") == "gptq_v2" else 1
            values = functools.partial(_gptq_values, parts, read, bits, offset, inputs, group_size)
        else:
            continue
        yield f"{module}.weight", QuantisedWeight(str(method).upper(), tuple(parts), shape, values)


def _check_awq(described: Mapping[str, Any], source: str) -> None:
    if described.get("bits", 4) != 4 or described.get("version", "gemm").lower() != "gemm":
        raise BaseModelError(
            f"{source}: AWQ of {described.get('bits')} bits in the layout {quoted(described.get('version'))} cannot be "
            "dequantised here; 4 bits in the GEMM layout can; give the model that it was made from"
        )


def _gptq_values(
    parts: list[str], read: Read, bits: int, offset: int, inputs: int, group_size: int
) -> Tensor:
    import torch

    qweight, qzeros, scales, *groups = (read(part) for part in parts)
    size = inputs if group_size == -1 else group_size
    place = groups[0] if groups else torch.arange(inputs) // size
    return dequantise.gptq(qweight, qzeros, scales, place, bits, zero_offset=offset)


def _compressed(
    described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read, source: str
) -> _Found:
    """compressed-tensors' packed forms."""
    for name in (name for name in tensors if name.endswith(".weight_packed")):
        module = name.removesuffix(".weight_packed")
        extra = ("weight_scale", "weight_shape", "weight_global_scale", "weight_zero_point")
        parts = {part: f"{module}.{part}" for part in (*extra, "weight_g_idx")}
        parts = {part: tensor for part, tensor in parts.items() if tensor in tensors}
        every = (name, *parts.values())
        if "weight_global_scale" in parts:
            rows, pairs = tensors[name].shape
            order = (name, parts["weight_scale"], parts["weight_global_scale"])
            values = functools.partial(_call, dequantise.nvfp4, read, order)
            yield f"{module}.weight", QuantisedWeight("NVFP4", every, (rows, 2 * pairs), values)
        elif "weight_shape" in parts:
            rows, columns = (int(size) for size in read(parts["weight_shape"]).tolist())
            bits = _bits(described, source)
            values = functools.partial(_packed_values, name, parts, read, (rows, columns), bits)
            scheme = f"compressed-tensors, {bits} bits"
            yield f"{module}.weight", QuantisedWeight(scheme, every, (rows, columns), values)


def _bits(described: Mapping[str, Any], source: str) -> int:
    """Bits of a code; the groups of a configuration must agree on them."""
    groups = described.get("config_groups") or {}
    found = {(group.get("weights") or {}).get("num_bits") for group in groups.values()}
    if len(found) != 1 or not found <= {2, 3, 4, 5, 6, 7, 8}:
        raise BaseModelError(
            f"{source}: config_groups of its config.json name weights of {sorted(map(str, found))} bits; one number "
            "for all of them can be dequantised; give the model that it was made from"
        )
    return int(found.pop() or 0)


def _packed_values(
    name: str, parts: Mapping[str, str], read: Read, shape: tuple[int, int], bits: int
) -> Tensor:
    optional = (parts.get("weight_zero_point"), parts.get("weight_g_idx"))
    zeros, groups = (None if part is None else read(part) for part in optional)
    return dequantise.packed_integers(
        read(name), read(parts["weight_scale"]), shape, bits, zeros, groups
    )


def _mxfp4(
    _: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read, source: str
) -> _Found:
    """gpt-oss: experts (E, out, in / 32, 16), which the layer holds as (E, in, out)."""
    del source
    for name in (name for name in tensors if name.endswith("_blocks")):
        parameter = name.removesuffix("_blocks")
        if f"{parameter}_scales" in tensors and tensors[name].dtype == "U8":
            *experts, rows, groups, _half = tensors[name].shape
            parts = (name, f"{parameter}_scales")
            shape = (*experts, 32 * groups, rows)
            values = functools.partial(_transposed_mxfp4, parts, read)
            yield parameter, QuantisedWeight("MXFP4", parts, shape, values)


def _transposed_mxfp4(parts: tuple[str, str], read: Read) -> Tensor:
    """One expert at a time: codes as indices take eight bytes per value."""
    import torch

    blocks, scales = read(parts[0]), read(parts[1])
    if blocks.ndim < 4:
        return dequantise.mxfp4(blocks, scales).T.contiguous()
    experts, rows, groups, _half = blocks.shape
    values = torch.empty(experts, 32 * groups, rows)
    for expert in range(experts):
        values[expert] = dequantise.mxfp4(blocks[expert], scales[expert]).T
    return values


def _scaled(described: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> _Found:
    """Codes times scales: FP8 with blocks (DeepSeek, Qwen), with rows (fbgemm, compressed-tensors), int8 likewise."""
    block = described.get("weight_block_size")
    for name, info in tensors.items():
        scale = next(
            (f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in tensors), None
        )
        if scale is None or info.dtype not in (*_FP8, "I8"):
            continue
        zeros = f"{name}_zero_point"
        parts = (name, scale, *((zeros,) if zeros in tensors else ()))
        size = (int(block[0]), int(block[1])) if block and scale.endswith("_inv") else None
        values = functools.partial(_scaled_values, parts, read, size)
        scheme = "INT8" if info.dtype == "I8" else "FP8"
        yield name, QuantisedWeight(scheme, parts, info.shape, values)


def _scaled_values(parts: tuple[str, ...], read: Read, block: tuple[int, int] | None) -> Tensor:
    codes, scales, *zeros = (read(part) for part in parts)
    values = codes.float()
    if zeros:
        values = values - zeros[0].float().reshape(-1, *[1] * (values.ndim - 1))
    return dequantise.scaled_blocks(values, scales, block)


def _call(
    function: Callable[..., Tensor], read: Read, parts: tuple[str, ...] | list[str]
) -> Tensor:
    return function(*(read(part) for part in parts))
