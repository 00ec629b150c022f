"""Arguments that several commands share, and the values that their words stand for."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pcb_peft.commands.parser import UsageError

DTYPES = ("float32", "bfloat16", "float16")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
DEQUANTIZE = "accept a quantised base model (NF4, INT8, GPTQ, AWQ, FP8 ...), and compute its weights from their codes"
FOLD_IN_16_BITS = "; a fold of it is written in bfloat16"
WORDS = {"true": True, "false": False, "none": None, "null": None}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command has: ``-q``, ``-v`` and ``--json``."""
    group = parser.add_argument_group("output of every command")
    for flags, words in (
        (("-q", "--quiet"), "print errors only, and the answers of commands that write nothing"),
        (("-v", "--verbose"), "print more: details, times, tracebacks of unexpected errors"),
        (("--json",), "print the result as one JSON object"),
    ):
        group.add_argument(*flags, action="store_true", default=argparse.SUPPRESS, help=words)


def add_output_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``-o`` and ``--overwrite``."""
    parser.add_argument("-o", "--output", type=Path, required=required, help="directory to write")
    add_overwrite_arguments(parser, "directory")
    parser.set_defaults(writes_directory=True)


def add_overwrite_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--overwrite`` and ``--overwrite-all``, for a file or a directory."""
    written = "everything in it" if what == "directory" else "it"
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace the {what} if pcb_peft wrote {written}",
    )
    parser.add_argument(
        "--overwrite-all",
        action="store_const",
        const="all",
        dest="overwrite",
        help=f"replace the {what} whatever it holds",
    )


def add_saving_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add what a command that writes an adapter has."""
    add_output_arguments(parser, required=required)
    parser.add_argument(
        "--dtype",
        type=str.lower,
        default=DTYPES[0],
        choices=DTYPES,
        help=f"data type of the tensors written (default: {DTYPES[0]})",
    )
    parser.add_argument(
        "--rank-pattern",
        action="store_true",
        help="save each module at its own rank, without padding (PEFT's rank_pattern)",
    )


def add_dequantize(parser: Any, *, folds: bool = False) -> None:
    """Add ``--dequantize``."""
    words = DEQUANTIZE + FOLD_IN_16_BITS if folds else DEQUANTIZE
    parser.add_argument("--dequantize", action="store_true", help=words)


def add_compare_base(parser: argparse.ArgumentParser) -> None:
    """Add ``--compare-base``."""
    parser.add_argument(
        "--compare-base",
        metavar="MODEL",
        help="the same model quantised, or not quantised, to measure how far from it the base model is",
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add ``--resume``."""
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the whole shards that a killed run of the same fold left, each verified by its checksum; if "
        "this run ends early, leave its own for the next one",
    )


def dtype_of(parsed: argparse.Namespace) -> Any:
    """Return the torch dtype that ``--dtype`` names."""
    import torch

    return getattr(torch, parsed.dtype)


def progress_of(parsed: argparse.Namespace) -> bool | None:
    """Return False with ``--quiet``, else None: progress is shown where a person looks at it."""
    return False if is_quiet(parsed) else None


def is_quiet(parsed: argparse.Namespace) -> bool:
    """Return whether only errors are printed."""
    return getattr(parsed, "quiet", False)


def is_json(parsed: argparse.Namespace) -> bool:
    """Return whether the result is printed as JSON."""
    return getattr(parsed, "json", False)


def is_verbose(parsed: argparse.Namespace) -> bool:
    """Return whether details are printed, too."""
    return getattr(parsed, "verbose", False)


def parse_value(text: str) -> Any:
    """Parse a number, true, false, none, or several values between commas; anything else is text.

    >>> parse_value("1e-3"), parse_value("1,0.5"), parse_value("true"), parse_value("es")
    (0.001, [1, 0.5], True, 'es')
    """
    if text.startswith("[") and text.endswith("]"):
        return [parse_value(part.strip()) for part in text[1:-1].split(",")]
    if "," in text:
        return [parse_value(part.strip()) for part in text.split(",") if part.strip()]
    if NUMBER.fullmatch(text):
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    return WORDS.get(text.lower(), text)


BLOCKS = "blocks:"
"""Beginning of a weight with a number per block of an image model."""


def parse_weights(words: Sequence[str]) -> list[Any]:
    """Parse one weight per adapter: ``1 0.5`` or ``1,0.5``; ``[0,1]`` is a gradient from the first layer to the last.

    ``blocks:1,0,0.5`` has a number per block of an image model.

    Raises:
        UsageError: A weight is not a number.
    """
    weights: list[Any] = []
    for word in words:
        if word.startswith(BLOCKS):
            weights.append({"blocks": parse_value(f"[{word.removeprefix(BLOCKS)}]")})
            continue
        values = parse_value(word)
        weights += values if isinstance(values, list) and not word.startswith("[") else [values]
    for word, weight in zip(words, weights, strict=False):
        numbers = weight["blocks"] if isinstance(weight, dict) else weight
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if not all(type(number) in (int, float) for number in numbers):
            raise UsageError(
                f"--weights: {word!r} is not a number",
                "adapters come before options: pcb-peft merge math-lora code-lora --weights 1 0.5",
            )
    return weights


def parse_step(text: str) -> dict[str, dict[str, Any]]:
    """Parse a calibration with its options.

    >>> parse_step("exponent:power=0.5")
    {'exponent': {'power': 0.5}}

    Raises:
        UsageError: An option has no value.
    """
    name, _, options = text.partition(":")
    pairs = [option.partition("=") for option in options.split(",") if option]
    if not all(equals and value for _, equals, value in pairs):
        raise UsageError(f"{text!r} is not NAME:OPTION=VALUE", "for example exponent:power=0.5")
    return {name.lower(): {option: parse_value(value) for option, _, value in pairs}}


def is_named(word: str) -> bool:
    """Return whether a word is NAME=FILE, and not the path of a file with an equals sign.

    >>> is_named("math=math.jsonl"), is_named("runs/lr=0.1/math.jsonl")
    (True, False)
    """
    name, equals, _ = word.partition("=")
    return bool(equals) and "/" not in name


def file_of(word: str) -> str:
    """Return FILE of a word that is NAME=FILE, or FILE alone.

    >>> file_of("math=math.jsonl"), file_of("math.jsonl")
    ('math.jsonl', 'math.jsonl')
    """
    return word.partition("=")[2] if is_named(word) else word


def in_known_case(word: str, names: Iterable[str]) -> str:
    """Return a name in the case in which it is known; an unknown one as it is.

    >>> in_known_case("TIES", ["pcb", "ties"])
    'ties'
    """
    return next((name for name in names if name.lower() == word.lower()), word)
