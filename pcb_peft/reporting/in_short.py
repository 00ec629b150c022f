"""Sentences at the top of a page: who is strong, what the adapters have in common, where to look first."""

import torch

from pcb_peft.inspection.comparison import Comparison
from pcb_peft.merging.report import Report, least_share

ALIKE = 1.5
"""Norms that differ by less than this factor are called about equal."""
NOTHING = 0.1
"""Changes whose cosine is smaller have almost nothing in common."""


def in_short(
    report: Report, comparison: Comparison | None, *, evaluated: bool = False
) -> list[str]:
    """Return a sentence on each of the three questions, as far as it can be answered; none for one adapter.

    Args:
        report: The report of the merge.
        comparison: Its adapters side by side, if they are known.
        evaluated: True if lost tasks are known, which say better where to look.
    """
    if len(report.adapters) < 2:
        return []
    look = [] if evaluated else _where_to_look(report)
    return [*_strongest(report), *_in_common(comparison), *look]


def _strongest(report: Report) -> list[str]:
    norms = {name: line.norm for name, line in report.adapters.items()}
    strong, weak = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    if not norms[weak]:
        return [f"{weak} changes nothing."]
    times = norms[strong] / norms[weak]
    if times < ALIKE:
        return [
            f"All adapters are about equally strong (norms {norms[weak]:.3g} to {norms[strong]:.3g})."
        ]
    return [
        f"{strong} is the strongest: its norm is {norms[strong]:.3g}, {times:.1f} times that of {weak}."
    ]


def _in_common(comparison: Comparison | None) -> list[str]:
    if comparison is None or comparison.geometry is None:
        return []
    cosines, names = comparison.geometry.cosines.nan_to_num(0.0), comparison.names
    pairs = cosines.abs().tril(-1) - torch.ones_like(cosines).triu()  # each pair once
    first, second = divmod(int(torch.argmax(pairs)), len(names))
    cosine = float(cosines[first, second])
    words = f"{names[second]} and {names[first]}, with a cosine of {cosine:.2f}"
    if abs(cosine) < NOTHING:
        return [f"The changes have almost nothing in common; nearest are {words}."]
    return [f"Most in common have {words}."]


def _where_to_look(report: Report) -> list[str]:
    shares = {name: line.share for name, line in report.adapters.items() if line.share is not None}
    if not shares:
        return []
    name = min(shares, key=shares.__getitem__)
    places = least_share(report.adapters[name])
    least = "" if places == "-" else f", least in {places}"
    return [f"Look at {name} first: the merge makes {shares[name]:.2f} of its own change{least}."]
