"""The head of one task among those beside a merged adapter."""

from collections.abc import Mapping

from pcb_peft.deltas.replacements import Replacements
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import did_you_mean


def chosen_head(
    adapter: str, own: Replacements, heads: Mapping[str, Replacements], name: str
) -> Replacements:
    """Return the head of one task.

    Args:
        adapter: The merged adapter's name.
        own: The head that loads with it.
        heads: The heads beside it.
        name: Which of them is wanted.

    Raises:
        OptionError: There is no head of that name.
    """
    if name in heads:
        return heads[name]
    loads = f"; its own {', '.join(own.modules)} loads with it" if own else ""
    known = f"its heads are {', '.join(heads)}" if heads else f"it keeps none{loads}"
    raise OptionError(f"{adapter} has no head {name!r}{did_you_mean(name, heads)}; {known}")
