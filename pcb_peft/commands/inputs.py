"""Inputs that are missing, refused before anything slow is imported."""

import argparse
from collections.abc import Iterator
from typing import Any

from pcb_peft.base.hub import not_found
from pcb_peft.commands.arguments import file_of
from pcb_peft.errors import AdapterNotFoundError, OptionError
from pcb_peft.runtime.paths import expanded, similar_path

SOURCES = ("adapter", "adapters", "merged", "against", "start", "base_model", "finetuned")
"""Arguments that are directories or hub ids."""
TEXTS = {"data": "--data", "test_data": "--test-data", "texts": "--data"}
"""Arguments that are files of texts, with their flags."""
OTHERS = ("statistics", "metric", "checkpoint")
"""Arguments that are other files that an output must not replace."""
RECIPES = (".yaml", ".yml")
HARNESS = "lm-eval:"


def check_inputs(parsed: argparse.Namespace) -> None:
    """Refuse paths at which there is nothing. Words that may be ids of the Hub are left to those who ask it.

    Raises:
        AdapterNotFoundError: A directory is missing.
        OptionError: A file of texts is missing.
    """
    for word in (word for name in SOURCES for word in _words(parsed, name)):
        is_path = word.startswith((".", "/", "~")) and not word.endswith(RECIPES)
        if is_path and not expanded(word).exists():
            raise AdapterNotFoundError(not_found(word))
    for name, flag in TEXTS.items():
        for word in _words(parsed, name):
            _check_texts(flag, file_of(word))


def paths_of(parsed: argparse.Namespace) -> list[str]:
    """Return what an output is made from, which it must not replace: paths, and ids of the Hub."""
    return [
        file_of(word) if name in TEXTS else word
        for name in (*SOURCES, *TEXTS, *OTHERS)
        for word in _words(parsed, name)
    ]


def check_directory(parsed: argparse.Namespace) -> None:
    """Refuse a directory that must not be replaced, before anything slow is imported.

    Raises:
        OutputError: It holds something, and ``--overwrite`` is missing; or the output is made from it.
    """
    writes = getattr(parsed, "writes_directory", False) and not getattr(parsed, "dry_run", False)
    if writes and parsed.output is not None and parsed.output.is_dir():
        from pcb_peft.writing.targets import check_target

        check_target(parsed.output, overwrite=parsed.overwrite, inputs=paths_of(parsed))


def _words(parsed: argparse.Namespace, name: str) -> Iterator[str]:
    given: Any = getattr(parsed, name, None)
    many = given if isinstance(given, list | tuple) else [given]
    yield from (str(word) for word in many if word)


def _check_texts(flag: str, file: str) -> None:
    path = expanded(file)
    if file.startswith(HARNESS) or (path.exists() and not path.is_dir()):
        return
    hint = similar_path(file)
    found = f"{file} is a directory" if path.is_dir() else f"there is no file {file}"
    raise OptionError(
        f"{flag}: {found}{hint and f'; {hint}'}; give a file with one JSON object per line"
    )
