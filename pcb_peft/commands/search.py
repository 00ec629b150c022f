"""``pcb-peft search``: a better recipe, found on validation texts and measured on test texts."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcb_peft.commands.arguments import parse_step, parse_value, progress_of
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.evaluate import (
    add_measuring_arguments,
    add_running_arguments,
    data_of,
    measuring_of,
    running_of,
)
from pcb_peft.commands.inputs import paths_of
from pcb_peft.commands.parser import UsageError
from pcb_peft.runtime.shown import typed

OPTIMISERS = ("auto", "random", "ngopt", "cma", "tpe")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("start", nargs="+", help="adapters, or one recipe (.yaml) to start from")
    parser.add_argument("--base-model", help="directory or hub id (default: what the recipe says)")
    for flag, what in (
        (
            "--data",
            "validation texts: one file of JSON lines per adapter, in order or by name, as for evaluate",
        ),
        (
            "--test-data",
            "texts for the winner alone (default: one half of the texts of --data, which is then not searched on)",
        ),
    ):
        parser.add_argument(flag, nargs="+", default=(), metavar="[NAME=]FILE", help=what)
    parser.add_argument(
        "--vary",
        nargs="+",
        default=(),
        metavar="NAME=VALUES",
        help="what may change, such as method=pcb,ties density=0.05..0.5 rank=16,32 after=none,svc,exponent+norm "
        "after.exponent.power=0..1 (default: weights=0.4..2.5); --vary scale: the common weight alone; --vary all: "
        "everything that these adapters allow",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=1,
        help="weights per adapter, from the first layers to the last (default: 1)",
    )
    _add_choosing(parser)
    _add_files(parser.add_argument_group("files"))
    add_measuring_arguments(parser.add_argument_group("how tasks are measured"))
    running = parser.add_argument_group("how they are run")
    add_running_arguments(running, budget=False)
    running.add_argument(
        "--workers",
        type=int,
        default=1,
        help="trials at a time, each in a process with a model of its own (default: 1)",
    )


def _add_choosing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--objective",
        default="mean",
        help="mean or worst of what is kept, or the share of the worst in a mixture, such as 0.5 (default: mean)",
    )
    parser.add_argument(
        "--optimiser",
        type=str.lower,
        default=OPTIMISERS[0],
        choices=OPTIMISERS,
        help="ngopt and cma (nevergrad) and tpe (Optuna) need pip install 'pcb-peft[search]' (default: ngopt if it is "
        "installed, else random)",
    )
    parser.add_argument("--trials", type=int, default=20, help="merges to try (default: 20)")
    parser.add_argument("--budget", help="time after which no trial is begun, such as 30m")
    parser.add_argument("--seed", type=int, default=0, help="seed of the optimiser (default: 0)")
    parser.add_argument(
        "--leave-one-out", action="store_true", help="also leave out each adapter in turn"
    )
    parser.add_argument(
        "--clusters",
        action="store_true",
        help="also find which adapters go together: the fewest merges that lose no task",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.8,
        help="a task is lost below this share of its adapter's score (default: 0.8)",
    )


def _add_files(group: Any) -> None:
    group.add_argument(
        "--log",
        type=Path,
        default=Path("search.jsonl"),
        help="every trial is written there, and a search that was stopped goes on from it (default: search.jsonl)",
    )
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("best.yaml"),
        help="file for the winning recipe; several merges are best-1.yaml, best-2.yaml … (default: best.yaml)",
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw all trials: .png, .svg or .pdf"
    )
    group.add_argument(
        "--overwrite-all",
        action="store_const",
        const="all",
        default=True,
        dest="overwrite",
        help="replace the recipe and the picture whatever is there (default: what a search wrote)",
    )


def _run(parsed: argparse.Namespace) -> Answer:
    from pcb_peft.runtime.processes import current
    from pcb_peft.searching.files import is_from_a_search
    from pcb_peft.searching.picture import check_picture
    from pcb_peft.searching.search import search
    from pcb_peft.writing.targets import check_file_target

    check_picture(parsed.plot)
    for file in filter(None, (parsed.output, parsed.plot)):  # before hours of trials
        check_file_target(
            file,
            overwrite=parsed.overwrite,
            inputs=paths_of(parsed),
            is_ours=is_from_a_search,
        )
    recipe = len(parsed.start) == 1 and parsed.start[0].endswith((".yaml", ".yml"))
    found = search(
        parsed.start[0] if recipe else parsed.start,
        data_of("--data", parsed.data),
        test_data=data_of("--test-data", parsed.test_data) if parsed.test_data else None,
        base_model=parsed.base_model,
        vary=_vary(parsed.vary),
        layers=parsed.layers,
        objective=parsed.objective,
        optimiser=parsed.optimiser,
        trials=parsed.trials,
        budget=parsed.budget,
        leave_one_out=parsed.leave_one_out,
        clusters=parsed.clusters,
        log=parsed.log,
        seed=parsed.seed,
        workers=parsed.workers,
        threshold=parsed.threshold,
        progress=progress_of(parsed),
        **measuring_of(parsed),
        **running_of(parsed),
    )
    files: list[Path] = []
    if current().is_main:
        files = found.save(parsed.output, parsed.plot, overwrite=parsed.overwrite)
    merging = [f"  merge  pcb-peft merge {typed(file)} -o {typed(file.stem)}" for file in files]
    following = "\n".join([f"the winning recipe is in {parsed.output}", "next:", *merging])
    data = {**found.as_dict(), "output": str(parsed.output), "log": str(parsed.log)}
    return Answer(f"{found}\n{following}", data, essential=True)


def _vary(words: Sequence[str]) -> dict[str, Any] | str | None:
    """The things that may change: ``a=1,2`` is a list of values, ``a=0.1..0.5`` all numbers between.

    Raises:
        UsageError: A word is not of that form.
    """
    if not words:
        return None
    if words in (["all"], ["scale"]):
        return "all" if words == ["all"] else {}
    vary: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise UsageError(
                f"--vary: {word!r} is not NAME=VALUES",
                "for example density=0.05..0.5 method=pcb,ties",
            )
        low, dots, high = text.partition("..")
        if name in ("before", "after"):
            vary[name] = [_steps(part) for part in text.split(",")]
        else:
            values = [parse_value(part) for part in ((low, high) if dots else text.split(","))]
            vary[name] = tuple(values) if dots else values
    return vary


def _steps(text: str) -> list[Any]:
    """Calibrations between plus signs; none stands for none."""
    return [] if text == "none" else [parse_step(part) for part in text.split("+")]


COMMAND = Command(
    "search",
    "Search for a recipe that keeps more of all tasks",
    "pcb-peft search math-lora code-lora --data math.jsonl code.jsonl -o best.yaml\n"
    "pcb-peft search recipe.yaml --data math.jsonl code.jsonl --vary method=pcb,iso_c after=none,svc --budget 30m\n"
    "pcb-peft search recipe.yaml --data math.jsonl code.jsonl --optimiser cma --objective worst --plot search.png\n"
    "pcb-peft search a b c d --data a.jsonl b.jsonl c.jsonl d.jsonl --leave-one-out --clusters",
    _add_arguments,
    _run,
)
