"""Values of quantised weights, in float32: one function per way of storing them.

Every function takes the tensors of a checkpoint as they are stored and returns the weight as the layer without
quantisation would hold it. A value is its code times a scale; schemes differ in how codes are packed, and over which
part of the weight a scale reaches (a block, a group of inputs, a row).
"""

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from pcb_peft.base.config import WAY_OUT
from pcb_peft.errors import BaseModelError
from pcb_peft.files.json_text import parse_json
from pcb_peft.files.schema import Count, Number, checked

_STATE = "the quant_state of a 4-bit weight"

FP4_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the sixteen 4-bit floating-point codes (OCP Microscaling Formats v1.0, table 5)."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of a 32-bit word, from the lowest, that holds output 0, 1, … 7 of eight (AWQ's GEMM layout)."""


def bitsandbytes_4bit(packed: Tensor, absmax: Tensor, state: "QuantState") -> Tensor:
    """Dequantise NF4 or FP4 codes: two in a byte, the first in the high half; one scale per block of values.

    Args:
        packed: uint8, half as many as there are values.
        absmax: One scale per block; codes of scales where these are quantised, too ("double quantisation").
        state: What bitsandbytes writes beside the weight.
    """
    count = math.prod(state.shape)
    _refuse_other("codes", packed.numel(), -(-count // 2))
    _refuse_other("absmax", absmax.numel(), -(-count // state.block_size))
    _refuse_other("quant_map", state.quant_map.shape, (16,))
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 0xF], dim=1).flatten().long()
    scales = state.scales(absmax.flatten()).repeat_interleave(min(state.block_size, count))
    return (state.quant_map.float()[codes[:count]] * scales[:count]).reshape(state.shape)


class _Stated(msgspec.Struct):
    """The fields that are read of what bitsandbytes writes beside a weight."""

    shape: tuple[Count, ...]
    blocksize: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    nested_blocksize: Count | None = None
    nested_offset: Number | None = None


class QuantState:
    """The facts that bitsandbytes writes beside a 4-bit weight: its shape, its code table, the scales of its scales."""

    def __init__(self, described: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Read the state.

        Args:
            described: The JSON text, as uint8.
            tensors: ``quant_map``, and with double quantisation ``nested_absmax`` and ``nested_quant_map``.
        """
        text = bytes(described.flatten().tolist()).decode("utf-8", errors="replace")
        content = parse_json(text, _STATE, BaseModelError, WAY_OUT)
        stated = checked(content, _Stated, _STATE, BaseModelError, WAY_OUT)
        self.shape = stated.shape
        self.block_size = stated.blocksize
        self.quant_map = tensors["quant_map"]
        self._nested_block_size = stated.nested_blocksize or 0
        self._nested_offset = stated.nested_offset or 0.0
        self._tensors = tensors

    def scales(self, absmax: Tensor) -> Tensor:
        """Scales of the blocks, float32."""
        if "nested_absmax" not in self._tensors:
            _refuse_other("absmax", absmax.is_floating_point(), True)  # codes need what is missing
            return absmax.float()
        values = self._tensors["nested_quant_map"].float()[absmax.long()]
        outer = self._tensors["nested_absmax"].float().flatten()
        size = min(self._nested_block_size, len(values))
        _refuse_other("nested_absmax", len(outer), -(-len(values) // size))
        return values * outer.repeat_interleave(size)[: len(values)] + self._nested_offset


def bitsandbytes_8bit(codes: Tensor, row_maxima: Tensor) -> Tensor:
    """Dequantise LLM.int8() weights: int8 codes (out, in), and the largest absolute value of each row (out,)."""
    _refuse_other("SCB", row_maxima.shape, codes.shape[:1])
    return codes.float() * (row_maxima.float() / 127)[:, None]


def gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor, bits: int, *, zero_offset: int
) -> Tensor:
    """Dequantise GPTQ weights: (code − zero) · scale, with a zero and a scale per group of inputs.

    Args:
        qweight: int32 (in · bits / 32, out): the codes of an output's inputs, packed downwards.
        qzeros: int32 (groups, out · bits / 32), packed along the outputs.
        scales: (groups, out).
        groups: The group of each input (in,).
        bits: Per code: 2, 3, 4 or 8.
        zero_offset: 1 where the file holds zero − 1 (the first version of the format), 0 where it holds the zero.

    Returns:
        (out, in).
    """
    _refuse_other("scales", scales.shape[1:], qweight.shape[1:])
    _refuse_other("qzeros", qzeros.shape[0], scales.shape[0])
    _refuse_other("groups from 0 on", int(groups.min()) >= 0, True)
    codes = unpack(qweight.T.contiguous(), bits, len(groups)).T
    zeros = (unpack(qzeros, bits, scales.shape[1]) + zero_offset) & ((1 << bits) - 1)
    place = groups.long()
    return ((codes - zeros[place]).float() * scales.float()[place]).T.contiguous()


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """Dequantise AWQ weights (4 bits, GEMM layout): (code − zero) · scale, per group of inputs.

    Args:
        qweight: int32 (in, out / 8).
        qzeros: int32 (groups, out / 8).
        scales: (groups, out).

    Returns:
        (out, in).
    """
    codes, zeros = (_in_awq_order(packed) for packed in (qweight, qzeros))
    _refuse_other("scales", scales.shape, zeros.shape)
    _refuse_other("groups of inputs", len(codes) % len(zeros), 0)
    size = len(codes) // len(zeros)
    zeros, scales = zeros.repeat_interleave(size, 0), scales.float().repeat_interleave(size, 0)
    return ((codes - zeros).float() * scales).T.contiguous()


def _in_awq_order(packed: Tensor) -> Tensor:
    rows, words = packed.shape
    nibbles = unpack(packed, 4, 8 * words).view(rows, words, 8)
    return nibbles[:, :, list(AWQ_ORDER)].reshape(rows, 8 * words)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes that are packed into 32-bit words along the last axis, lowest bits first, across words if need be.

    Args:
        words: int32 (rows, words).
        bits: Per code.
        count: Codes per row; what a last word holds beyond them is padding.

    Returns:
        int64 (rows, count).
    """
    # a code may end in the word after the last
    unsigned = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    first = torch.arange(count) * bits
    word, shift = first // 32, first % 32
    pairs = unsigned[:, word] | (unsigned[:, word + 1] << 32)
    return (pairs >> shift) & ((1 << bits) - 1)


def scaled_blocks(codes: Tensor, scales: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """Multiply a matrix by one scale per block: FP8 as DeepSeek, Qwen and fbgemm store it, int8 of compressed-tensors.

    Args:
        codes: (…, out, in), of any number type.
        scales: One for all, one per row (out, 1), or a grid of them (…, ⌈out/height⌉, ⌈in/width⌉); as uint8, exponents
            of two with a bias of 127.
        block: Height and width of a block; None: the matrix divided by the grid.
    """
    scales = exponents(scales) if scales.dtype == torch.uint8 else scales.float()
    if scales.ndim < 2:
        return codes.float() * scales.reshape(-1, 1)
    rows, cols = codes.shape[-2:]
    height, width = block or (-(-rows // scales.shape[-2]), -(-cols // scales.shape[-1]))
    height, width = min(height, rows), min(width, cols)
    _refuse_other("scales", scales.shape[-2:], (-(-rows // height), -(-cols // width)))
    spread = scales.repeat_interleave(height, -2)[..., :rows, :]
    return codes.float() * spread.repeat_interleave(width, -1)[..., :cols]


def exponents(codes: Tensor) -> Tensor:
    """Powers of two that uint8 exponents with a bias of 127 stand for (E8M0)."""
    return torch.exp2(codes.float() - 127)


def fp4_pairs(packed: Tensor) -> Tensor:
    """Values of 4-bit floating-point codes, two in a byte along the last axis, the first in the low half."""
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return torch.tensor(FP4_E2M1)[codes.long()]


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Dequantise MXFP4: blocks of 32 codes along the inputs, each with an exponent of two.

    Args:
        blocks: uint8 (…, out, in / 32, 16).
        scales: uint8 (…, out, in / 32).

    Returns:
        (…, out, in).
    """
    _refuse_other("blocks", blocks.shape, (*scales.shape, 16))
    return (fp4_pairs(blocks) * exponents(scales)[..., None]).flatten(-2)


def nvfp4(packed: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """Dequantise NVFP4 (compressed-tensors): blocks of 16 codes, FP8 scales, which one number divides.

    Args:
        packed: uint8 (out, in / 2).
        scales: FP8 (out, in / 16).
        global_scale: One number.
    """
    return scaled_blocks(fp4_pairs(packed), scales.float() / global_scale.float())


def packed_integers(
    packed: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    bits: int,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Dequantise compressed-tensors' packed integers: (code − zero) · scale, per row and group of inputs.

    Args:
        packed: int32 (out, ⌈in · bits / 32⌉), ⌊32 / bits⌋ codes in a word, each 2^(bits − 1) too high.
        scales: (out, groups).
        shape: (out, in).
        bits: Per code.
        zeros: (out, groups), as they are; or int32 (⌈out · bits / 32⌉, groups), packed downwards like the codes.
        groups: The group of each input (in,); None: all groups are as long as each other, in order.
    """
    _refuse_other("weight_packed", packed.shape, (shape[0], -(-shape[1] // (32 // bits))))
    _refuse_other("weight_scale", scales.shape[:-1], shape[:1])
    codes = _unpack_whole(packed, bits, shape[1])
    if groups is None:
        groups = torch.arange(shape[1]) // -(-shape[1] // scales.shape[1])
    if zeros is not None:
        if zeros.dtype == torch.int32:
            zeros = _unpack_whole(zeros.T.contiguous(), bits, shape[0]).T
        _refuse_other("weight_zero_point", zeros.shape, scales.shape)
        codes = codes - zeros.long()[:, groups.long()]
    return codes.float() * scales.float()[:, groups.long()]


def _refuse_other(what: str, found: object, wanted: object) -> None:
    """Raise ValueError where something is not as it must be: torch would repeat one value for all."""
    if found != wanted:
        raise ValueError(f"{what}: found {found}, wanted {wanted}")


def _unpack_whole(words: Tensor, bits: int, count: int) -> Tensor:
    """Signed codes of which each lies in one word."""
    shifts = torch.arange(32 // bits) * bits
    codes = (words.long()[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count] - (1 << (bits - 1))
