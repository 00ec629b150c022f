"""The command line: one function per command."""

import argparse
import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pcb_peft.adapters.loading import fold_adapter
from pcb_peft.adapters.source import Source
from pcb_peft.calibrations import list_calibrations
from pcb_peft.commands.arguments import (
    flag_of,
    parse_bool,
    parse_bytes,
    parse_device,
    parse_rank,
    parse_step,
)
from pcb_peft.commands.catalog import WHEN, print_catalog
from pcb_peft.commands.demo import POOLS, run_demo
from pcb_peft.data.collect import DEFAULT_MEMORY as COLLECT_MEMORY
from pcb_peft.data.collect import collect_statistics
from pcb_peft.data.statistics_file import KINDS
from pcb_peft.deltas.replacements import POLICIES, TIES
from pcb_peft.dry_run.estimate import estimate_merge
from pcb_peft.errors import OptionError, PcbPeftError
from pcb_peft.extraction.extract import extract_adapter
from pcb_peft.merging.engine import DEFAULT_MEMORY, merge
from pcb_peft.merging.finish import check_writable
from pcb_peft.merging.report import Report
from pcb_peft.merging.result import MergedAdapter
from pcb_peft.methods import get_method, list_methods
from pcb_peft.plugins.options import Option
from pcb_peft.recipes.peft_aliases import PEFT_ALIASES, method_of
from pcb_peft.recipes.recipe import Recipe, read_recipe
from pcb_peft.runtime.processes import Processes, joined, stoppable
from pcb_peft.spaces import get_space, list_spaces
from pcb_peft.version import __version__
from pcb_peft.writing.atomic import check_target

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECIPE = (
    *("method", "weights", "space", "scope", "rank", "before", "after"),
    *("base_model", "heads", "tied", "chain", "seed", "statistics"),
)
TIED = f"tied weights that do not change alike when they are folded: {', '.join(TIES)};"

EXAMPLES = {
    "merge": "pcb-peft merge math-lora code-lora -o merged --method pcb --density 0.1\n"
    "  pcb-peft merge recipe.yaml -o merged\n"
    "  pcb-peft merge recipe.yaml --dry-run",
    "collect": "pcb-peft collect math-lora --base-model meta-llama/Llama-3.2-1B --data math.jsonl -o math.safetensors",
    "fold": "pcb-peft fold merged meta-llama/Llama-3.2-1B -o merged-model",
    "extract": "pcb-peft extract my-finetune --base-model meta-llama/Llama-3.2-1B -o my-lora --rank 0.95",
    "methods": "pcb-peft methods pcb",
    "demo": "pcb-peft demo",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if it did what it should, 2 after an error message, more after a signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings(), stoppable() as came, joined() as processes:
        warnings.showwarning = _show_warning if processes.is_main else _show_nothing
        try:
            parsed = _parser(words).parse_args(words)
            with _quiet(processes), processes.together():
                parsed.run(parsed)
        except PcbPeftError as error:
            if processes.is_main:
                print(f"error: {error}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, SystemExit):
            if not came:
                raise
            which = f"process {processes.rank} of {processes.size}: " if processes.size > 1 else ""
            print(f"error: {which}interrupted ({came[0].name})", file=sys.stderr)
            return 128 + came[0]
    return 0


def _quiet(processes: Processes) -> contextlib.AbstractContextManager[object]:
    """One process prints, the others do not."""
    return (
        contextlib.nullcontext() if processes.is_main else contextlib.redirect_stdout(io.StringIO())
    )


def merge_command(parsed: argparse.Namespace) -> None:
    """Merge adapters of one base model into one adapter."""
    recipe = _recipe(parsed)
    if parsed.dry_run:
        found = estimate_merge(
            recipe,
            max_memory=parsed.max_memory,
            dtype=DTYPES[parsed.dtype],
            rank_pattern=parsed.rank_pattern,
            fold=parsed.fold,
        )
        print(found)
        return
    check_target(parsed.output, overwrite=parsed.overwrite)
    check_writable(recipe, fold=parsed.fold)
    merged = merge(recipe, device=parsed.device, max_memory=parsed.max_memory)
    if parsed.fold:
        merged.fold(str(recipe.base_model), parsed.output, overwrite=parsed.overwrite)
    else:
        merged.save_pretrained(
            parsed.output,
            dtype=DTYPES[parsed.dtype],
            rank_pattern=parsed.rank_pattern,
            overwrite=parsed.overwrite,
            format=parsed.format,
        )
    print(merged.report)
    print(_whereabouts(merged, parsed.output))


def collect_command(parsed: argparse.Namespace) -> None:
    """Measure on texts what a method that needs data wants to know of an adapter."""
    found = collect_statistics(
        parsed.adapter,
        parsed.base_model,
        parsed.data,
        parsed.output,
        parsed.kind,
        labels=parsed.labels,
        batch_size=parsed.batch_size,
        max_length=parsed.max_length,
        limit=parsed.limit,
        max_memory=parsed.max_memory,
        overwrite=parsed.overwrite,
    )
    unit = "tokens" if found.kind == "gram" else "labels"
    print(f"{found.kind} of {len(found.shapes)} modules over {found.count} {unit}: {parsed.output}")


def fold_command(parsed: argparse.Namespace) -> None:
    """Write a base model with an adapter folded into its weights."""
    fold_adapter(
        parsed.adapter,
        parsed.base_model,
        parsed.output,
        tied=parsed.tied,
        overwrite=parsed.overwrite,
    )
    print(f"folded into {parsed.output}")


def extract_command(parsed: argparse.Namespace) -> None:
    """Write the LoRA that turns a base model into a fine-tuned one."""
    check_target(parsed.output, overwrite=parsed.overwrite)
    extracted = extract_adapter(
        parsed.finetuned, parsed.base_model, parsed.rank, leave_out=parsed.leave_out
    )
    extracted.save_pretrained(
        parsed.output,
        dtype=DTYPES[parsed.dtype],
        rank_pattern=parsed.rank_pattern,
        overwrite=parsed.overwrite,
    )
    report = extracted.report
    print(f"{len(report.modules)} modules, retained energy {report.energy:.4f}")
    if extracted.head.modules:
        print(f"stored whole: {', '.join(extracted.head.modules)}")
    print("\n".join([*report.notes, f"written to {parsed.output}{_highest_rank(report)}"]))


def methods_command(parsed: argparse.Namespace) -> None:
    """List the merge methods, the spaces and the calibrations, or explain one of them."""
    print_catalog(parsed.name)


def demo_command(parsed: argparse.Namespace) -> None:
    """Merge real adapters and show on real text what the merge can do."""
    run_demo(parsed.output, pool=parsed.pool)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pcb-peft", description="Merge PEFT adapters.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_merge_arguments(_command(commands, "merge", merge_command), words)

    _add_collect_arguments(_command(commands, "collect", collect_command))

    fold = _command(commands, "fold", fold_command)
    fold.add_argument("adapter", help="directory or hub id")
    fold.add_argument(
        "base_model", help="directory or hub id of a transformers checkpoint in safetensors"
    )
    fold.add_argument("--tied", help=f"{TIED} default refuse")
    _add_output_arguments(fold)

    extract = _command(commands, "extract", extract_command)
    extract.add_argument("finetuned", help="directory or hub id of a transformers checkpoint")
    extract.add_argument("--base-model", required=True, help="what it was trained from, likewise")
    extract.add_argument(
        "--rank", type=parse_rank, required=True, help="integer, or fraction of the energy to keep"
    )
    extract.add_argument(
        "--leave-out", nargs="+", default=(), metavar="GLOB", help="parameters not to extract"
    )
    _add_saving_arguments(extract)

    methods = _command(commands, "methods", methods_command)
    methods.add_argument("name", nargs="?", help="a method, a space or a calibration")

    demo = _command(commands, "demo", demo_command)
    demo.add_argument("-o", "--output", type=Path, help="keep the merged adapter there")
    demo.add_argument("--pool", default="lora", choices=POOLS, help="which of the example adapters")
    return parser


def _command(commands: Any, name: str, run: Callable[[Any], None]) -> argparse.ArgumentParser:
    summary = (run.__doc__ or "").removesuffix(".")
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}.",
        epilog=f"example:\n  {EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_output_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "-o", "--output", type=Path, required=required, help="the directory to write"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a directory that is not empty"
    )


def _add_collect_arguments(parser: argparse.ArgumentParser) -> None:
    users = {
        kind: ", ".join(m.name for m in list_methods().values() if m.needs_statistic == kind)
        for kind in KINDS
    }
    parser.add_argument("adapter", help="directory or hub id")
    parser.add_argument("--base-model", required=True, help="directory or hub id")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="JSON lines with text and, if wanted, text_pair; for gradients of a classifier with label, of a causal "
        "language model, if wanted, with answer: then only that is learnt",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    words = "; ".join(f"{kind} for {names}" for kind, names in users.items())
    parser.add_argument("--kind", default="gram", choices=KINDS, help=f"{words}; default gram")
    parser.add_argument("--labels", nargs="+", help="names of the classes, as the head has them")
    parser.add_argument("--batch-size", type=int, default=8, help="texts at a time; default 8")
    parser.add_argument("--max-length", type=int, default=512, help="tokens; default 512")
    parser.add_argument("--limit", type=int, help="texts, evenly spread over the file")
    parser.add_argument(
        "--max-memory",
        type=parse_bytes,
        default=COLLECT_MEMORY,
        help="of sums held at once, such as 1G",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file")


def _add_saving_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    _add_output_arguments(parser, required=required)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the tensors written")
    parser.add_argument(
        "--rank-pattern", action="store_true", help="give each module its own rank, without padding"
    )


def _add_merge_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    parser.add_argument("adapters", nargs="+", help="directories, hub ids, or one recipe (.yaml)")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what it will take, and write nothing"
    )
    _add_saving_arguments(parser, required="--dry-run" not in words)
    parser.add_argument("--format", default="peft", help="peft, diffusers, kohya; default peft")
    parser.add_argument(
        "--fold", action="store_true", help="write the base model with the merge folded in"
    )
    parser.add_argument(
        "--device", type=parse_device, help="where tiles are computed, such as cuda"
    )
    parser.add_argument(
        "--max-memory",
        type=parse_bytes,
        default=DEFAULT_MEMORY,
        help="held between passes, such as 1G",
    )

    _add_recipe_arguments(parser.add_argument_group("the recipe"))
    for title, option in _chosen_options(words):
        parser.add_argument(
            flag_of(option),
            dest=f"option.{option.name}",
            type=_kind(option),
            metavar=option.kind.__name__.upper(),
            help=f"{title}: {option.explanation} ({option.allowed}; default {option.default})".replace(
                "%", "%%"
            ),
        )


def _add_recipe_arguments(recipe: Any) -> None:
    recipe.add_argument(
        "--method", help=f"{', '.join([*list_methods(), *PEFT_ALIASES])}; default pcb"
    )
    recipe.add_argument("--weights", nargs="+", type=float, help="one per adapter; default 1")
    recipe.add_argument("--space", help=f"auto, {', '.join(list_spaces())}; default auto")
    recipe.add_argument("--scope", help="auto, global, module; default auto")
    recipe.add_argument(
        "--rank",
        type=parse_rank,
        help="integer, energy fraction, budget:N, utility:N, or full; default: lossless",
    )
    for when, what in zip(WHEN, ("adapters", "merge"), strict=True):
        names = ", ".join(list_calibrations(when))
        recipe.add_argument(
            f"--{when}",
            nargs="+",
            type=parse_step,
            metavar="STEP",
            help=f"calibrations of the {what}: {names}; with an option: NAME:OPTION=VALUE",
        )
    recipe.add_argument("--base-model", help="directory or hub id")
    recipe.add_argument(
        "--statistics",
        nargs="+",
        help="one file per adapter, of pcb-peft collect, if the method needs data",
    )
    recipe.add_argument(
        "--heads",
        help=f"what becomes of heads, embeddings and token rows that adapters replace: {', '.join(POLICIES)}; default "
        "keep-each (one file per adapter where they differ)",
    )
    recipe.add_argument("--tied", help=f"{TIED} default refuse")
    recipe.add_argument(
        "--chain",
        action="store_true",
        default=None,
        help="each adapter was trained on top of those before it",
    )
    recipe.add_argument("--seed", type=int, help="of random methods; default 0")


def _chosen_options(words: Sequence[str]) -> list[tuple[str, Option]]:
    """The options of the method and the space that the command line names."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scout.add_argument("--method", default="pcb")
    scout.add_argument("--space", default="auto")
    named = scout.parse_known_args(list(words))[0]
    method = get_method(method_of(named.method))
    space = get_space(method.space if named.space == "auto" else named.space)
    return [(owner.name, option) for owner in (method, space) for option in owner.options.values()]


def _recipe(parsed: argparse.Namespace) -> Recipe:
    """The recipe that the command line gives, or names."""
    given = {name: value for name in RECIPE if (value := getattr(parsed, name)) is not None}
    options = {
        name.removeprefix("option."): value
        for name, value in vars(parsed).items()
        if name.startswith("option.") and value is not None
    }
    if parsed.adapters[0].endswith((".yaml", ".yml")):
        if given or options or len(parsed.adapters) > 1:
            extra = ", ".join([*given, *options, *parsed.adapters[1:]])
            raise OptionError(
                f"a recipe says everything itself: leave out {extra}, or write it into {parsed.adapters[0]}"
            )
        return read_recipe(Path(parsed.adapters[0]))
    given |= {
        name: tuple(given[name]) for name in ("weights", "statistics", *WHEN) if name in given
    }
    return Recipe(adapters=tuple(map(Source, parsed.adapters)), options=options, **given)


def _whereabouts(merged: MergedAdapter, output: Path) -> str:
    heads = (
        f"; the heads of {', '.join(merged.heads)} are in {output / 'heads'}"
        if merged.heads
        else ""
    )
    return f"written to {output}{_highest_rank(merged.report)}{heads}"


def _highest_rank(report: Report) -> str:
    ranks = [module.rank for module in report.modules.values() if module.rank is not None]
    return f" of rank {max(ranks)}" if ranks else ""


def _kind(option: Option) -> Callable[[str], Any]:
    if option.kind is bool:
        return parse_bool
    return option.kind


def _show_nothing(*_: object, **__: object) -> None:
    """Another process shows it."""


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
