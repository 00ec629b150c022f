"""The refusal of an export: what the program cannot hold, and the ways out with their price."""

from collections.abc import Callable, Sequence

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.base.files import bytes_of
from pcb_peft.base.model import BaseModel
from pcb_peft.errors import UnsupportedError
from pcb_peft.exporting.contents import BECOMES_LORA, Content
from pcb_peft.exporting.low_rank import as_additions, energies
from pcb_peft.exporting.profile import Profile
from pcb_peft.exporting.profiles import profile_named
from pcb_peft.runtime.shown import typed
from pcb_peft.runtime.units import format_size


def refused(
    adapter: Adapter,
    profile: Profile,
    contents: Sequence[Content],
    base: Callable[[], BaseModel] | None,
) -> UnsupportedError:
    """Return the error that names what a profile cannot hold, and the ways out.

    Args:
        adapter: The adapter.
        profile: The profile.
        contents: What it cannot hold.
        base: The base model, if it is known; without it the price of a LoRA is not known where W is needed.
    """
    found = ", ".join(content.words for content in contents)
    ways = [_fold(adapter, base)]
    if all(content.kind in BECOMES_LORA for content in contents):
        ways.insert(0, _as_lora(adapter, contents, base))
    if profile.wider and all(
        content.kind in profile_named(profile.wider).holds for content in contents
    ):
        ways.append(
            f"to={profile.wider!r} (--to {profile.wider}), if your program reads it: pcb-peft check says who does"
        )
    return UnsupportedError(
        f"{adapter.name} holds {found}, which the profile {profile.name} cannot; ways out: {'; or '.join(ways)}"
    )


def _as_lora(
    adapter: Adapter, contents: Sequence[Content], base: Callable[[], BaseModel] | None
) -> str:
    if base is None and any(content.kind in ("dora", "ia3") for content in contents):
        return (
            "max_rank=64 with base_model (--max-rank 64 --base-model MODEL), a LoRA of that rank; its energy is said "
            "then"
        )
    additions = as_additions(adapter, base).modules.entries
    concerned = {m: additions[m] for content in contents for m in content.modules if m in additions}
    shares, measured = energies(concerned)
    price = ", ".join(f"{share:.1%} at rank {rank}" for rank, share in shares.items())
    return (
        f"max_rank=N (--max-rank N), a LoRA that keeps of the energy {price} (measured on {measured} of "
        f"{len(concerned)} modules)"
    )


def _fold(adapter: Adapter, base: Callable[[], BaseModel] | None) -> str:
    name, size = typed(adapter.base_model or "MODEL"), ""
    if base is not None:
        size = format_size(bytes_of(base().tensors))
        size = f", {size}"
    command = f"--base-model {name}{size}"
    if adapter.source is None:  # a merge that is not written
        command = f"merge with --for transformers {command}"
    else:
        command = f"pcb-peft export {typed(adapter.source.path)} --to transformers {command}"
    return f"a fold, which is exact: to='transformers' ({command})"
