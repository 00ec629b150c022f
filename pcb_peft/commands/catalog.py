"""What there is to merge with: the methods, spaces and calibrations, as the command line shows them."""

import inspect
from collections.abc import Sequence

from pcb_peft.calibrations import Calibration, When, list_calibrations
from pcb_peft.commands.arguments import flag_of
from pcb_peft.methods import MergeMethod, get_method, list_methods
from pcb_peft.spaces import Space, get_space, list_spaces

WHEN: tuple[When, When] = ("before", "after")
MEASURED = """\
measured: what a merge keeps of the shipped MiniLM adapters' accuracy, in % of each adapter's own: mean (and worst) of
four tasks, first with every weight at 1, then at the best common weight, if another. Differences under two points are
noise. From a checkout: python benchmarks/quality.py --bfloat16 METHOD (docs/methods.md).
"""


def print_catalog(name: str | None) -> None:
    """Prints the merge methods, the spaces and the calibrations, or explains one of them."""
    if name is not None:
        for known in _named(name):
            print(inspect.getdoc(known.function))
            print("\nOptions:")
            for option in known.options.values():
                print(f"  {flag_of(option)}  {option.allowed}; default {option.default}")
        return
    methods = list_methods().values()
    _print_table(
        ("method", "space", "scope", "data", "paper", "what it does"),
        [
            (m.name, m.space, m.scope, m.needs_statistic or "none", m.paper, m.summary)
            for m in methods
        ],
    )
    _print_table(
        ("method", "measured", "good at"),
        [(m.name, m.measured or "not measured here", m.good_at) for m in methods],
    )
    print(MEASURED)
    _print_table(("space", "blocks"), [(s.name, s.summary) for s in list_spaces().values()])
    for when in WHEN:
        calibrations = list_calibrations(when).values()
        _print_table(
            (when, "paper", "what it does"), [(c.name, c.paper, c.summary) for c in calibrations]
        )


def _print_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as what stands in them, and an empty line."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    for row in (heading, *rows):
        print(
            "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        )
    print()


def _named(name: str) -> Sequence[MergeMethod | Space | Calibration]:
    """What is called so: a calibration is there twice if it goes before and after."""
    shelves = (list_calibrations(when) for when in WHEN)
    calibrations = [shelf[name] for shelf in shelves if name in shelf]
    return calibrations or [get_space(name) if name in list_spaces() else get_method(name)]
