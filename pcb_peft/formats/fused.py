"""Matrices that one program keeps whole and another in parts: queries, keys and values of an attention.

The rows of the whole are those of its parts, one below the other. A LoRA of the whole is therefore one LoRA per part,
with the same lora_A; and LoRAs of the parts are one LoRA of the whole, whose rank is the sum of theirs unless they
share lora_A. Of some matrices, one program has the second half of the rows before the first.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pcb_peft.deltas.delta import Dense, LowRank
from pcb_peft.deltas.layout import LINEAR
from pcb_peft.errors import UnsupportedError
from pcb_peft.formats.lazy_delta import LazyDelta, lora_rows, only_rows
from pcb_peft.images.rows import parts_of, rows_of_parts, shares_of


def split_entry(name: str, entry: LazyDelta) -> dict[str, LazyDelta]:
    """Return the deltas of a fused module's parts.

    Raises:
        UnsupportedError: The delta is not a LoRA, nor a matrix.
    """
    if entry.kind not in (LowRank, Dense):
        raise UnsupportedError(
            f"{name}: a {entry.kind.kind_name} of a fused matrix cannot be split into LoRAs of its parts"
        )
    return {
        part: only_rows(entry, rows, rows.stop - rows.start)
        for part, rows in rows_of_parts(name, entry.shape).items()
    }


def split_loras(name: str, delta: LowRank) -> dict[str, LowRank]:
    """Return the LoRAs of a fused module's parts."""
    slices = rows_of_parts(name, delta.shape)
    return {part: lora_rows(delta, rows) for part, rows in slices.items()}


def exchanged_entry(entry: LazyDelta) -> LazyDelta:
    """Return the delta with the second half of its rows before the first."""
    return only_rows(entry, _exchanged_rows(entry.shape[0]), entry.shape[0])


def exchanged_lora(delta: LowRank) -> LowRank:
    """Return the LoRA with the second half of its rows before the first."""
    return lora_rows(delta, _exchanged_rows(delta.shape[0]))


def _exchanged_rows(count: int) -> Tensor:
    return torch.arange(count).roll(count // 2)


def joined(parts: Sequence[LowRank | int]) -> LowRank:
    """Return one LoRA of the matrix whose rows are those of the parts.

    Args:
        parts: The LoRAs from the first rows to the last; a number of rows where there is none.
    """
    loras = [part for part in parts if isinstance(part, LowRank)]
    shared = all(torch.equal(loras[0].lora_A, one.lora_A) for one in loras[1:])
    down, rank, blocks = [loras[0].lora_A] if shared else [one.lora_A for one in loras], 0, []
    width = sum(len(one) for one in down)
    for part in parts:
        if isinstance(part, int):
            blocks.append(torch.zeros(part, width))
            continue
        block = torch.zeros(part.shape[0], width)
        place = 0 if shared else rank
        block[:, place : place + part.rank] = part.padded(part.rank)[1]
        rank += part.rank
        blocks.append(block)
    return LowRank(torch.cat([one.float() for one in down]), torch.cat(blocks))


def regrouped(modules: Mapping[str, LowRank], wanted: Sequence[str]) -> dict[str, LowRank]:
    """Return the same change with other modules: wholes for parts, parts for wholes.

    Args:
        modules: The deltas.
        wanted: The names to return; together they hold all of `modules`.
    """
    pieces = {part: (name, delta) for name, delta in modules.items() for part in parts_of(name)}
    result: dict[str, LowRank] = {}
    for name in wanted:
        if name in modules:
            result[name] = modules[name]
        elif len(parts := parts_of(name)) > 1:
            result[name] = joined(_with_sizes(name, [modules.get(part) for part in parts]))
        else:
            result[name] = split_loras(*pieces[name])[name]
    return result


def _with_sizes(name: str, parts: Sequence[LowRank | None]) -> list[LowRank | int]:
    """Return the LoRAs, and numbers of rows where there is none."""
    shapes = [part.shape for part in parts if part is not None]
    if any(part is not None and part.layout != LINEAR for part in parts):
        raise UnsupportedError(f"{name}: only matrices are kept in one with others")
    if len(parts) == 4:
        sizes = [shapes[0][1]] * 3 + [4 * shapes[0][1]]
    else:
        shares = shares_of(name)
        known = (
            part.shape[0] // share
            for part, share in zip(parts, shares, strict=True)
            if part is not None
        )
        unit = next(known)
        sizes = [unit * share for share in shares]
    return [size if part is None else part for part, size in zip(parts, sizes, strict=True)]
