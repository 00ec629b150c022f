"""``pcb-peft merge``: several adapters into one, or into their base model."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from pcb_peft.commands.arguments import (
    add_compare_base,
    add_resume,
    add_saving_arguments,
    dtype_of,
    is_verbose,
    progress_of,
)
from pcb_peft.commands.command import Answer, Command
from pcb_peft.commands.export import FOLDED, PROFILES
from pcb_peft.commands.next_steps import (
    after_fold,
    after_merge,
    missing_heads,
    where_written,
)
from pcb_peft.commands.parser import UsageError
from pcb_peft.commands.recipe_arguments import add_recipe_arguments, recipe_of
from pcb_peft.commands.sources import constant
from pcb_peft.runtime.paths import size_on_disk
from pcb_peft.runtime.progress import phase
from pcb_peft.runtime.units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pcb_peft.adapters.adapter import Adapter
    from pcb_peft.exporting.export import Exported
    from pcb_peft.merging.report import Report
    from pcb_peft.merging.result import MergedAdapter
    from pcb_peft.recipes.recipe import Recipe


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "pcb-peft merge ADAPTER [ADAPTER ...] -o DIRECTORY [options]\n"
        "       pcb-peft merge RECIPE.yaml -o DIRECTORY [options]"
    )
    parser.add_argument(
        "adapters", nargs="+", help="directories or hub ids of adapters; or one recipe (.yaml)"
    )
    add_saving_arguments(parser, required=False)
    parser.add_argument(
        "--for",
        dest="profile",
        choices=PROFILES,
        metavar="PROFILE",
        help=f"write it as export does: {', '.join(PROFILES)}",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="with --for: load the result, and compare its log-probabilities with the merge's and the base model's",
    )
    parser.add_argument(
        "--fold", action="store_true", help="write the base model with the merge folded in"
    )
    add_compare_base(parser)
    add_resume(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="estimate time, memory and size from the headers of the files; write nothing",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="also write a page for a browser: where each adapter is kept, what they share, the recipe",
    )
    parser.add_argument("--device", help="where to compute, such as cuda (default: cpu)")
    most = format_size(constant("runtime/resources.py", "DEFAULT_MEMORY"))
    parser.add_argument(
        "--max-memory", metavar="SIZE", help=f"size of the cache, such as 1G (default: {most})"
    )
    add_recipe_arguments(parser)


def _run(parsed: argparse.Namespace) -> Answer:
    if parsed.output is None and not parsed.dry_run:
        raise UsageError(
            "give -o/--output, the directory to write, or --dry-run",
            "pcb-peft merge math-lora code-lora -o merged",
        )
    if parsed.compare_base and not parsed.fold:
        raise UsageError("--compare-base compares base models in a fold: give --fold, too")
    if parsed.resume and not parsed.fold:
        raise UsageError("--resume continues a fold: give --fold, too")
    if parsed.profile and parsed.fold:
        raise UsageError("--for transformers folds: leave out --fold")
    if parsed.verify and not parsed.profile:
        raise UsageError("--verify needs a profile: --for peft, or another one")
    recipe, notes = recipe_of(parsed)
    return _estimate(parsed, recipe, notes) if parsed.dry_run else _merge(parsed, recipe, notes)


def _estimate(parsed: argparse.Namespace, recipe: "Recipe", notes: list[str]) -> Answer:
    from pcb_peft.dry_run.estimate import estimate_merge
    from pcb_peft.runtime.resources import DEFAULT_MEMORY

    with phase("estimating", progress_of(parsed)):
        estimate = estimate_merge(
            recipe,
            max_memory=DEFAULT_MEMORY if parsed.max_memory is None else parsed.max_memory,
            dtype=dtype_of(parsed),
            rank_pattern=parsed.rank_pattern,
            fold=parsed.fold,
        )
    data = {"estimate": dataclasses.asdict(estimate), "notes": notes}
    return Answer("\n".join([str(estimate), *notes]), data, essential=True)


def _merge(parsed: argparse.Namespace, recipe: "Recipe", notes: list[str]) -> Answer:
    from pcb_peft.adapters.loading import load_adapters
    from pcb_peft.base.model import lazy_base
    from pcb_peft.merging.engine import merge
    from pcb_peft.merging.finish import check_writable
    from pcb_peft.runtime.resources import DEFAULT_MEMORY, number_of_bytes, working_device

    memory = DEFAULT_MEMORY if parsed.max_memory is None else number_of_bytes(parsed.max_memory)
    device, progress = working_device(parsed.device), progress_of(parsed)
    _check_outputs(parsed, recipe)
    check_writable(recipe, fold=parsed.fold)
    with phase("reading", progress):
        base = lazy_base(recipe.base_model, dequantize=recipe.dequantize)
        adapters = load_adapters(recipe.adapters, base_model=base)
    with phase("merging", progress):
        merged = merge(recipe, adapters, device=device, max_memory=memory, progress=progress)
    exported = None
    with phase("writing", progress):
        if parsed.profile:
            exported = _exported(merged, parsed)
        else:
            merged = _written(merged, parsed)
    if parsed.report:
        _write_page(merged, adapters, parsed)
    return _answer(merged, parsed, notes, exported)


def _check_outputs(parsed: argparse.Namespace, recipe: "Recipe") -> None:
    """Refuse outputs that could not be written after the merge."""
    from pcb_peft.adapters.saving import is_one_file, is_our_file
    from pcb_peft.writing.fold import check_fold_target
    from pcb_peft.writing.targets import check_file_target, check_target

    overwrite, inputs = parsed.overwrite, _inputs(parsed, recipe)
    if parsed.profile:
        from pcb_peft.exporting.profiles import profile_named

        profile = profile_named(parsed.profile)
        profile.check_output(parsed.output, overwrite=overwrite, inputs=inputs)
    elif parsed.fold:
        check_fold_target(parsed.output, overwrite=overwrite, inputs=inputs)
    elif is_one_file(parsed.output):
        check_file_target(parsed.output, overwrite=overwrite, inputs=inputs, is_ours=is_our_file)
    else:
        check_target(parsed.output, overwrite=overwrite, inputs=inputs)
    if parsed.report:
        from pcb_peft.reporting.page import is_report

        check_file_target(parsed.report, overwrite=overwrite, inputs=inputs, is_ours=is_report)


def _write_page(
    merged: "MergedAdapter", adapters: "Sequence[Adapter]", parsed: argparse.Namespace
) -> None:
    from pcb_peft.reporting.page import write_report

    progress = progress_of(parsed)
    with phase("report", progress):
        write_report(merged, parsed.report, adapters, overwrite=parsed.overwrite, progress=progress)


def _inputs(parsed: argparse.Namespace, recipe: "Recipe") -> list[str | None]:
    """The files and models that the merge is made from: the recipe, if it is a file, and all that it names."""
    metric = [] if recipe.metric is None else [recipe.metric]
    sources = [one.directory for one in (*recipe.adapters, *recipe.statistics, *metric)]
    return [*parsed.adapters, *sources, recipe.base_model]


def _exported(merged: "MergedAdapter", parsed: argparse.Namespace) -> "Exported":
    """Write the output as a profile has it."""
    from pcb_peft.exporting.export import export

    recipe = merged.recipe
    return export(
        merged,
        parsed.profile,
        parsed.output,
        base_model=recipe.base_model,
        dtype=dtype_of(parsed) if parsed.profile != FOLDED else None,
        dequantize=recipe.dequantize,
        overwrite=parsed.overwrite,
        verified=parsed.verify,
        progress=progress_of(parsed),
    )


def _written(merged: "MergedAdapter", parsed: argparse.Namespace) -> "MergedAdapter":
    """Write the output, and return the merged adapter with what is known then."""
    if parsed.fold:
        return merged.fold(
            str(merged.recipe.base_model),
            parsed.output,
            overwrite=parsed.overwrite,
            progress=progress_of(parsed),
            compare_base=parsed.compare_base,
            resume=parsed.resume,
        )
    return merged.save_pretrained(
        parsed.output,
        dtype=dtype_of(parsed),
        rank_pattern=parsed.rank_pattern,
        overwrite=parsed.overwrite,
    )


def _answer(
    merged: "MergedAdapter",
    parsed: argparse.Namespace,
    notes: list[str],
    exported: "Exported | None",
) -> Answer:
    from pcb_peft.consumers.check import check
    from pcb_peft.consumers.features import heads_apart
    from pcb_peft.consumers.files import open_output
    from pcb_peft.merging.heads import notes_without_warning

    report, output = merged.report, parsed.output
    rank, size = report.rank, size_on_disk(output)
    folded = parsed.fold or parsed.profile == FOLDED
    warning = missing_heads(merged, output, folded=folded)
    details = _module_lines(report) if is_verbose(parsed) else []
    page = [f"report for a browser: {parsed.report}"] if parsed.report else []
    checked, written = check(output), where_written(output, rank, size)
    following = after_fold(output) if folded else after_merge(merged, output, checked)
    verified = [] if exported is None or not exported.verification else [str(exported.verification)]
    shown, who_reads_it = report, checked.line
    if warning:  # it says all about the heads
        shown = dataclasses.replace(report, notes=notes_without_warning(report.notes))
        who_reads_it = checked.line_without(heads_apart(open_output(output)))
    lines = [str(shown), *notes, *details, written, *page, who_reads_it, *verified]
    lines.append(following if exported is None else exported.next_steps)
    data = {
        "output": str(output),
        "bytes": size,
        "rank": rank,
        "folded": folded,
        "base_model": merged.base_model,
        "head": merged.recipe.head,
        "heads_kept_apart": list(merged.heads),
        "notes": [*report.notes, *notes],
        "report": report.as_dict(),
        "page": str(parsed.report) if parsed.report else None,
        "check": checked.as_dict(),
        "verification": verified[0] if verified else None,
    }
    return Answer("\n".join(filter(None, lines)), data, warnings=[warning] if warning else ())


def _module_lines(report: "Report") -> list[str]:
    """One line per module, for ``--verbose``."""
    return [
        f"{name}: {' x '.join(map(str, module.shape))}, rank {module.rank or 'full'}, "
        f"energy {module.energy:.4f}, sign conflicts {module.conflicts:.1%}"
        for name, module in report.modules.items()
    ]


COMMAND = Command(
    "merge",
    "Merge adapters of one base model into one adapter",
    "pcb-peft merge math-lora code-lora -o merged\n"
    "pcb-peft merge math-lora code-lora -o merged --method ties --density 0.3 --weights 1 0.5\n"
    "pcb-peft merge recipe.yaml -o merged --set density=0.3\n"
    "pcb-peft merge recipe.yaml --dry-run",
    _add_arguments,
    _run,
)
