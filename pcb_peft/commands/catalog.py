"""The methods, spaces and calibrations as tables, and each of them explained."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pcb_peft.commands.method_options import default_methods, flag_of, peft_aliases
from pcb_peft.commands.sources import Entry, Kind, entries
from pcb_peft.errors import OptionError
from pcb_peft.plugins.options import Option, did_you_mean

if TYPE_CHECKING:
    from rich.console import RenderableType

KINDS: tuple[Kind, ...] = ("methods", "spaces", "calibrations")
MEASURED = (
    "kept: accuracy that a merge of six LoRA adapters keeps, in % of each adapter's own: mean (and worst task), every "
    "weight at 1. Differences under two points are noise; see docs/methods.md."
)


def catalog() -> dict[str, list[dict[str, Any]]]:
    """Everything there is to merge with, as plain data."""
    return {kind: [_facts(entry) for entry in entries(kind)] for kind in KINDS}


def explained(name: str) -> list[Entry]:
    """Find what is called so; a calibration twice if it goes before and after a merge.

    Raises:
        OptionError: Nothing is called so.
    """
    word = name.lower()
    found = [entry for kind in KINDS for entry in entries(kind) if entry.name == word]
    if word in peft_aliases():
        found = [
            entry for entry in entries("methods") if entry.name == peft_aliases()[word]["method"]
        ]
    if not found:
        names = [*(entry.name for kind in KINDS for entry in entries(kind)), *peft_aliases()]
        raise OptionError(
            f"no method, space or calibration {name!r}{did_you_mean(word, names)}; pcb-peft methods lists them"
        )
    return found


def explain(entry: Entry) -> str:
    """Explain one method, space or calibration in full."""
    lines = [entry.document, "", "Options:" if entry.options else "It has no options."]
    for option in entry.options.values():
        facts = f"{option.allowed}; default {option.default}"
        lines.append(f"  {flag_of(option.name)}  {facts}")
    if "space" in entry.facts:
        lines += ["", f"Defaults: {entry.facts['space']} space, {entry.facts['scope']} scope."]
    if kind := entry.facts.get("needs_statistic"):
        lines.append(f"Needs data: pcb-peft collect --kind {kind} for each adapter.")
    if paper := entry.facts.get("paper"):
        lines.append(f"Paper: {paper}")
    return "\n".join(lines)


def describe(entry: Entry) -> dict[str, Any]:
    """One method, space or calibration as plain data."""
    return {**_facts(entry), "document": entry.document}


def render(*, purposes: bool = False) -> str:
    """Tables of everything there is to merge with, as wide as the terminal.

    Args:
        purposes: Also say what each method is good at.
    """
    from rich.console import Console

    console = Console(highlight=False)
    with console.capture() as capture:
        for part in _parts(purposes=purposes):
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _parts(*, purposes: bool) -> "Iterator[RenderableType]":
    for heading, methods in _groups():
        yield _table(
            (heading, "kept", "what it does"),
            [(_marked(m), _kept(m), _purpose(m) if purposes else m.summary) for m in methods],
        )
    yield f"* the default: {_default()}. With -v: what each method is good at.\n{MEASURED}\n"
    yield _table(
        ("spaces", "what the method sees"), [(s.name, s.summary) for s in entries("spaces")]
    )
    for when in ("before", "after"):
        steps = [entry for entry in entries("calibrations") if entry.facts["when"] == when]
        yield _table((f"--{when}", "what it does"), [(step.name, step.summary) for step in steps])
    yield f"PEFT's names work, too: {', '.join(peft_aliases())}."
    yield "pcb-peft methods NAME explains one of them, with its options."


def _default() -> str:
    first, *others = default_methods()
    return f"{first}, or {', '.join(others)} for adapters, ranks and options that it does not suit"


def _groups() -> list[tuple[str, list[Entry]]]:
    """Methods under headings, those that keep most first; those that need more than adapters last."""
    methods = sorted(entries("methods"), key=lambda m: (-_score(m), m.name))
    needs_data = [m for m in methods if m.facts["needs_statistic"]]
    whole = [m for m in methods if m.facts["whole_matrix"] and m not in needs_data]
    others = [m for m in methods if m not in needs_data and m not in whole]
    groups = [("number by number", others), ("whole matrices", whole)]
    groups.sort(key=lambda group: -_score(group[1][0]))
    return [*groups, ("with sample data", needs_data)]


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> "RenderableType":
    from rich.table import Table

    table = Table(*heading, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    table.add_row()
    return table


def _marked(method: Entry) -> str:
    return method.name + ("*" if method.name == default_methods()[0] else "")


def _purpose(method: Entry) -> str:
    good_at = method.paragraph("Good at").rstrip(".")
    return f"{method.summary}\nGood at: {good_at}." if good_at else method.summary


def _kept(method: Entry) -> str:
    """Scores of a merge of LoRA adapters: mean and worst task."""
    first = method.paragraph("Measured").split(";")[0].split(",")[0].rstrip(".")
    return first.removeprefix("LoRA ") if first.startswith("LoRA ") else "-"


def _score(method: Entry) -> float:
    kept = _kept(method).split()[0]
    return 0.0 if kept == "-" else float(kept)


def _facts(entry: Entry) -> dict[str, Any]:
    facts = {name: value for name, value in entry.facts.items() if value is not None}
    return {
        "name": entry.name,
        "summary": entry.summary,
        "good_at": entry.paragraph("Good at"),
        "measured": entry.paragraph("Measured"),
        **{
            name: value
            for name, value in facts.items()
            if name not in ("accepts", "survey", "function")
        },
        "options": [_plain(option) for option in entry.options.values()],
    }


def _plain(option: Option) -> dict[str, Any]:
    return {
        "name": option.name,
        "flag": flag_of(option.name),
        "allowed": option.allowed,
        "default": option.default,
        "explanation": option.explanation,
    }
