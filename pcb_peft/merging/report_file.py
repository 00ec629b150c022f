"""The report of a merge as a file beside its output: the same bytes for the same merge, and no local path in it."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pcb_peft.adapters.saving import REPORT, REPORT_FILE
from pcb_peft.errors import AdapterError
from pcb_peft.files.gguf import GgufFile
from pcb_peft.files.json_text import parse_json, read_text
from pcb_peft.files.schema import checked
from pcb_peft.files.tensors import SafetensorsFile
from pcb_peft.merging.report import Report
from pcb_peft.recipes.recipe import Recipe
from pcb_peft.recipes.weights import plain
from pcb_peft.runtime.shown import shown
from pcb_peft.version import __version__
from pcb_peft.writing.model_card import public_name

DIGITS = 6
"""Significant digits of a number in the file; further ones could depend on the number of threads."""
_WAY_OUT = "take it away, or merge again"
_LOCAL = re.compile(
    r"(?<![\w./~\\])(?:~|\.{1,2}|[A-Za-z]:)?[/\\](?:[^/\\\s,;:][^/\\,;:\n]*[/\\])*[^/\\\s,;:]+"
)


def report_json(report: Report, recipe: Recipe, paths: Iterable[str]) -> str:
    """Return the report as JSON. How long the merge took is left out: it would be another file each time.

    Args:
        report: The report.
        recipe: The recipe, for the weights of the adapters.
        paths: Local paths that the notes may name; they go by their last part.
    """
    named = [one.path for one in (*recipe.adapters, *recipe.statistics)]
    local = {path for path in (*named, recipe.base_model, *paths) if path and not public_name(path)}
    names = report.names or [source.name for source in recipe.adapters]
    weights = zip(names, plain(recipe.weights), strict=True)
    data = report.as_dict()
    modules = data.pop("modules")
    del data["seconds"]
    content = {
        "written_by": f"pcb_peft {__version__}",
        "weights": [{"adapter": name, "weight": weight} for name, weight in weights],
        **data,
        "notes": [without_paths(note, local) for note in report.notes],
        "modules": modules,  # the longest part comes last
    }
    return json.dumps(_rounded(content), indent=1, ensure_ascii=False) + "\n"


def read_report(place: Path, recipe: Recipe | None = None) -> Report | None:
    """Read the report of a merge that was saved.

    Args:
        place: Its directory, or its file.
        recipe: The recipe beside it, which must be of as many adapters.

    Returns:
        The report; None where there is none.

    Raises:
        AdapterError: It is damaged, or belongs to another merge than the recipe.
    """
    text: Any = None
    if place.is_file() and place.suffix in (".safetensors", ".gguf"):
        gguf = place.suffix == ".gguf"
        stated = GgufFile(place).fields if gguf else SafetensorsFile(place).metadata()
        text, where = stated.get(REPORT), f"{place} ({REPORT})"
    else:
        file = place / REPORT_FILE
        text = read_text(file, AdapterError, _WAY_OUT) if file.is_file() else None
        where = str(file)
    if text is None:
        return None
    content = parse_json(text, where, AdapterError, _WAY_OUT)
    report = checked(content, Report, where, AdapterError, _WAY_OUT)
    count = len(report.names or report.adapters)
    if recipe is not None and count not in (0, len(recipe.adapters)):
        raise AdapterError(
            f"{where} is of {count} adapters, and the recipe beside it of {len(recipe.adapters)}: they belong to "
            "different merges; merge again"
        )
    for module, line in report.modules.items():
        if line.products and line.products.keys() != line.adapter_norms.keys():
            raise AdapterError(
                f"{where}: {shown(module)} names other adapters in products than in adapter_norms; {_WAY_OUT}"
            )
        if report.names and not line.adapter_norms.keys() <= set(report.names):
            raise AdapterError(
                f"{where}: {shown(module)} names other adapters than the list of names; {_WAY_OUT}"
            )
    return report


def without_paths(text: str, paths: Iterable[str] = ()) -> str:
    """Return a text in which local paths go by their last part.

    Args:
        text: The text.
        paths: Paths that may stand in it, and could not be told from words.

    >>> without_paths("org/llama, /home/jane/llama are one model, not out/opt", ["out/opt"])
    'org/llama, llama are one model, not opt'
    """
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return _LOCAL.sub(lambda found: re.split(r"[/\\]", found[0])[-1], text)


def _rounded(value: Any) -> Any:
    """Return plain data with rounded numbers."""
    if isinstance(value, dict):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
