"""Tokenizers and other files beside the adapters: which of them the result gets, by a policy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pcb_peft.adapters.adapter import Adapter
from pcb_peft.adapters.companions import GROUPS, Companions, contents
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean

AGREE, NONE = "agree", "none"


def merge_companions(
    adapters: Sequence[Adapter], policy: str
) -> tuple[dict[str, Mapping[str, Path]], list[str]]:
    """Choose the files that stand beside the result.

    Args:
        adapters: The adapters that are merged.
        policy: "agree": those that all adapters which have them have alike; "none"; or the name of the adapter whose
            files they are.

    Returns:
        The files by group, and a note for each group that is left out.

    Raises:
        OptionError: No adapter has that name.
    """
    if policy == NONE:
        return {}, []
    if policy != AGREE:
        return dict(_of(policy, adapters)), []
    chosen: dict[str, Mapping[str, Path]] = {}
    notes: list[str] = []
    for group in GROUPS:
        owners = [adapter for adapter in adapters if group in adapter.companions]
        if not owners:
            continue
        first, *others = (adapter.companions[group] for adapter in owners)
        content = contents(first) if others else {}
        if all(contents(other) == content for other in others):
            chosen[group] = first
        else:
            names = [adapter.name for adapter in owners]
            notes.append(
                f"{group}: {', '.join(names)} have different ones, and the merged adapter has none: choose one "
                f"(companions={names[0]!r}, --companions {names[0]}), or use the base model's"
            )
    return chosen, notes


def _of(name: str, adapters: Sequence[Adapter]) -> Companions:
    """Return the files of one adapter."""
    named = {adapter.name: adapter for adapter in adapters}
    if name not in named:
        raise OptionError(
            f"companions is {name!r}{did_you_mean(name, [AGREE, NONE, *named])}; it must be {AGREE}, {NONE}, or the "
            f"name of an adapter: {', '.join(named)}"
        )
    return named[name].companions
